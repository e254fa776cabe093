"""Training from a URL in length buckets with clips that cannot be read: the same on 1 and 2 ranks; too many end it."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from agrepa_fast.alignment.aligner import Aligner
from agrepa_fast.config_file import load_config
from agrepa_fast.data.index import load_index, read_index, write_index
from agrepa_fast.data.layout import BatchLayout
from agrepa_fast.data.loading import TrainBatches
from agrepa_fast.data.plan import BatchPlan
from agrepa_fast.data.reading import read_shard
from agrepa_fast.data.writing import write_shard
from agrepa_fast.errors import UserError
from agrepa_fast.models.audio_dit.dit import AudioDiT
from agrepa_fast.training import dry_run
from agrepa_fast.training.builder import teacher_dims
from agrepa_fast.zero.ds_config import resolve_ds_config
from agrepa_fast.zero.engine import build_engine
from agrepa_fast.zero.masters import full_weights

from ..data.server import serving
from ..ranks import call_on_ranks, run_training
from ..testing import metrics, write_small_shards
from ..training.in_process import ds_values

ARGS = ("train.batch_frames=100", "train.steps=8", "align.strategy=fixed:2", "data.read_attempts=3")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Buckets of 13, 19 and 25 frames. A speech shard ends in its second clip and an audio shard has a NaN; probes
    read neither."""
    folder = tmp_path_factory.mktemp("runs") / "shards"
    write_small_shards(folder, (13, 19, 25), shard_clips=4)
    index = load_index(folder)
    cut, spoilt = index.shards("train", "speech")[4].path, index.shards("train", "audio")[5]
    cut.write_bytes(cut.read_bytes()[:6000])
    clips = read_shard(spoilt, index)
    clips[0].mel[-1, -1] = np.nan
    entry = next(entry for entry in index.content["shards"] if entry["file"] == spoilt.path.name)
    entry |= write_shard(spoilt.path, clips, "teacher_audio")
    write_index(folder, index.content)
    return folder


def test_the_curve_is_the_same_on_2_ranks_whatever_the_server_and_the_shards_do(shards, tmp_path):
    """Stage 0 on one rank against stage 3 on two, whose batches are 7, 4 or 3 clips; a server that fails now and then;
    clips that are lost for good."""
    args, found = ("--preset", str(shards / "preset.yaml"), *ARGS, "data.max_faults=0.3"), {}
    for ranks, ds_config, workers in ((1, "zero0.json", 0), (2, "zero3.json", 1)):
        with serving(shards) as server:
            server.moods["train-speech-0000.tar"] = ["500", "die"]
            server.moods["train-audio-0000.tar"] = ["short"]
            run = tmp_path / f"on{ranks}"
            more = (f"data.path={server.url}", f"data.workers={workers}", f"run.dir={run}", "--ds_config", ds_config)
            output = run_training(ranks, *args, *more, cwd=tmp_path)
        assert "global batches: 7 clips of up to 13 frames" in output
        assert "dry run: " in output
        faults = [json.loads(line) for line in (run / "faults.jsonl").read_text().splitlines()]
        assert {fault["kind"] for fault in faults} == {"truncated", "not_finite"}
        assert len({(fault["file"], fault["clip"]) for fault in faults}) == len(faults)
        found[ranks] = metrics(run), {(fault["file"], fault["clip"], fault["kind"]) for fault in faults}
        counted = [line for line in found[ranks][0].values() if "data/faults_truncated" in line]
        assert counted[-1]["data/faults_truncated"] == sum(fault["kind"] == "truncated" for fault in faults)
    (one, lost), (two, lost_too) = found[1], found[2]
    assert lost == lost_too
    assert one.keys() == two.keys() == set(range(9))
    for step in one:
        for name in (name for name in one[step] if "loss" in name):
            assert one[step][name] == pytest.approx(two[step][name], abs=1e-5), (step, name)


def test_more_faults_than_allowed_stop_all_ranks_with_one_line(shards, tmp_path):
    with serving(shards) as server:
        args = ("--preset", str(shards / "preset.yaml"), *ARGS, f"data.path={server.url}", "run.dir=run")
        output = run_training(2, *args, cwd=tmp_path, wanted=2)
    (line,) = [line for line in output.splitlines() if "agrepa train: " in line]
    assert "of 44 training clips could not be read, more than data.max_faults=0.001 allows" in line
    assert "Traceback" not in output
    assert (tmp_path / "run" / "faults.jsonl").is_file()


def train_three_steps(preset: str, stage: int, dry: bool) -> tuple[list[float], str, Callable[[], str]]:
    """The losses, a hash of the weights, and a function that makes one more dry run. dry: make dry runs before the
    first two steps, the second of which finds moments and traces."""
    objective = ("pooled", "layersync", "sra", "pooled")[stage]
    config = load_config(preset, ["model.dropout=0.2", "train.batch_frames=100", f"align.objective={objective}"])
    index = read_index(Path(preset).parent)
    config = replace(config, model=replace(config.model, n_mels=index.n_mels, vocab=index.vocab))
    layout, device = BatchLayout(None, 1, dist.get_rank(), dist.get_world_size()), torch.device("cpu")
    torch.manual_seed(0)
    model = AudioDiT(config.model)
    plan = BatchPlan.of(index, config, layout, model.attention_cost, config.run.seed)
    engine = build_engine(model, config, resolve_ds_config(ds_values(stage), config.train, layout, device))
    aligner = Aligner(config, model, teacher_dims(index), device)
    total, aligned = aligner.objective.total, []
    aligner.objective.total = lambda layers, *given: aligned.append(len(layers)) or total(layers, *given)
    batches, losses = TrainBatches(index, config.data, layout, seed=0, center=True, plan=plan), []
    for step in range(3):
        if dry and step < 2:
            before = torch.get_rng_state()
            line = dry_run.dry_run(engine, index, plan, layout, device, aligner)
            assert line == "dry run: 4 clips of 13 frames a rank and micro-batch, the largest bucket", line
            assert aligned == 4 * (step + 1) * [config.align.k], "two domains, with padding and without"
            assert torch.equal(before, torch.get_rng_state())
            assert all(p.grad is None or not p.grad.any() for p in engine.module.parameters())
        batch = next(batches)
        v = engine(batch.mel, torch.full((len(batch.keys),), 0.5), batch.condition).v
        loss = batch.weight * (v - batch.mel).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    weights = full_weights(engine)
    digest = hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()
    return losses, digest, lambda: dry_run.dry_run(engine, index, plan, layout, device, aligner)


def train_with_and_without_dry_runs(preset: str) -> None:
    for stage in (0, 1, 2, 3):
        (*plain, _), (*dry, _) = train_three_steps(preset, stage, False), train_three_steps(preset, stage, True)
        assert plain == dry, (stage, plain, dry)


def test_the_dry_run_leaves_no_trace_at_any_stage(shards):
    call_on_ranks(2, train_with_and_without_dry_runs, str(shards / "preset.yaml"))


def refusal_of_a_dry_run(preset: str, stage: int, rank: int) -> str:
    """What a dry run says when the memory of one rank is not enough."""
    *_, again = train_three_steps(preset, stage, False)

    def run_out_of_memory(*_):
        if dist.get_rank() == rank or stage == 3:  # under ZeRO-3 a rank alone would leave the others waiting
            raise torch.OutOfMemoryError("CUDA out of memory")

    dry_run._forward_backward = run_out_of_memory
    with pytest.raises(UserError) as refused:
        again()
    return str(refused.value)


@pytest.mark.parametrize("stage", [2, 3])
def test_every_rank_names_what_does_not_fit(stage, shards):
    for line in call_on_ranks(2, refusal_of_a_dry_run, str(shards / "preset.yaml"), stage, 1):
        assert line.startswith("4 clips of 13 frames a rank and micro-batch, the largest bucket, do not fit")
        assert "lower train.batch_frames" in line
