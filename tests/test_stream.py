import pytest
import torch

from agrepa_fast.config import DOMAINS, DataConfig, UserError
from agrepa_fast.data.shards import load_index
from agrepa_fast.data.stream import BatchLayout, collate, fixed_clips, train_batches

from .runs import write_small_shards


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream") / "shards"
    write_small_shards(folder)
    return load_index(folder)


@pytest.mark.parametrize(("world", "accumulation", "workers"), [(1, 1, 0), (2, 1, 0), (2, 2, 0), (1, 4, 0), (1, 2, 2)])
def test_the_global_batch_does_not_depend_on_how_it_is_spread(index, world, accumulation, workers):
    data = DataConfig(speech_share=0.5, workers=workers)
    for step in (0, 5):
        single = next(train_batches(index, DataConfig(), BatchLayout(8, 1, 0, 1), seed=0, center=True, step=step))
        keys = {}
        for rank in range(world):
            layout = BatchLayout(8, accumulation, rank, world)
            batches = train_batches(index, data, layout, seed=0, center=True, step=step)
            for _ in range(accumulation):
                batch = next(batches)
                keys |= dict(zip(batch.places, batch.keys, strict=True))
        assert [keys[place] for place in range(8)] == list(single.keys)


def test_resuming_at_a_step_gives_the_batches_from_there(index):
    layout = BatchLayout(6, 2, 0, 1)
    running = train_batches(index, DataConfig(), layout, seed=0, center=True)
    all_keys = [next(running).keys for _ in range(20)]
    resumed = train_batches(index, DataConfig(), layout, seed=0, center=True, step=7)
    assert [next(resumed).keys for _ in range(6)] == all_keys[14:]


def test_collate_normalises_and_centres_and_pads_with_zeros(index):
    samples = fixed_clips(index, "val", "speech", 2) + fixed_clips(index, "val", "audio", 1)
    batch = collate(samples, (0, 1, 2), index)
    for row, sample in enumerate(samples):
        wanted = (torch.from_numpy(sample.mel).float() - index.mel_mean) / index.mel_std
        assert torch.equal(batch.mel[row, : sample.frames], wanted)
        assert not batch.mel[row, sample.frames :].any()
        assert batch.condition.tokens[row, : len(sample.tokens)].tolist() == sample.tokens.tolist()
        assert batch.condition.lengths[row] == sample.frames
        mean = torch.from_numpy(index.teacher(sample.domain).mean)
        torch.testing.assert_close(batch.teacher[sample.domain][row], torch.from_numpy(sample.teacher).float() - mean)
    assert not batch.teacher["audio"][:2].any()
    assert batch.domain.tolist() == [0, 0, 1]
    raw = collate(samples, (0, 1, 2), index, center=False)
    assert torch.equal(raw.teacher["audio"][2], torch.from_numpy(samples[2].teacher).float())


def test_the_whole_training_split_is_normalised(index):
    every = [s for domain in DOMAINS for s in fixed_clips(index, "train", domain, 22)]
    batch = collate(every, tuple(range(44)), index)
    frames = torch.cat([mel[:length] for mel, length in zip(batch.mel, batch.condition.lengths, strict=True)])
    assert frames.mean().item() == pytest.approx(0, abs=1e-4)
    assert frames.std().item() == pytest.approx(1, abs=1e-3)


def test_too_few_clips(index):
    with pytest.raises(UserError, match="6 audio clips of the val split are wanted, 5 are there"):
        fixed_clips(index, "val", "audio", 6)
