"""CosyVoice 3 against numbers that its authors' code gave, and what that code lacks.

cosyvoice3.safetensors holds random weights of a small CausalMaskedDiffWithDiT of FunAudioLLM/CosyVoice at ace7c47 (dim
32, depth 2, chunks of 10 frames, no dropout), inputs, mu, velocities with and without streaming, the mean square of the
latter, and its gradients.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agrepa_fast import fuse
from agrepa_fast.attribution.foga import foga
from agrepa_fast.attribution.points import ProbeBatch, ProbePoints
from agrepa_fast.errors import UserError
from agrepa_fast.models.condition import Condition
from agrepa_fast.models.cosyvoice3 import CosyVoice3, _Block

from ..attribution.test_peers import f5_dit
from ..training.waits import waits

GOLDEN = Path(__file__).with_name("cosyvoice3.safetensors")
MELS, CODES, VOICE = 20, 30, 12


def golden(streaming: float = 0.0) -> tuple[CosyVoice3, torch.Tensor, torch.Tensor, Condition, dict]:
    """The model, x_t, t and conditions of the file, and all of its tensors."""
    values = load_file(GOLDEN)
    sizes = {"dim": 32, "depth": 2, "heads": 2, "dim_head": 16, "look_ahead_dim": 24, "chunk": 10, "dropout": 0.0}
    model = CosyVoice3(MELS, 2 * CODES, VOICE, **sizes, streaming=streaming)
    weights = {name.removeprefix("weight."): v for name, v in values.items() if name.startswith("weight.")}
    model.load_state_dict(model.from_upstream(weights))
    tokens, reference = values["input.token_lengths"], values["input.cond"].transpose(1, 2)
    condition = Condition(values["input.tokens"], tokens, reference, 2 * tokens, speaker=values["input.speaker"])
    return model, values["input.x"].transpose(1, 2), values["input.t"], condition, values


def relative(found: torch.Tensor, want: torch.Tensor) -> float:
    return float(((found - want).norm() / want.norm()).detach())


@pytest.mark.parametrize("streaming", [False, True])
def test_velocities_are_theirs(streaming):
    model, x, t, condition, values = golden(streaming=float(streaming))
    want = values[f"velocity.streaming_{streaming}"].transpose(1, 2)
    assert relative(model.train(streaming)(x, t, condition).v, want) < 2e-6


def test_mu_and_gradients_are_theirs():
    model, x, t, condition, values = golden()
    out = model.eval()(x, t, condition, capture=(0,))
    valid = torch.arange(x.shape[1]) < condition.lengths[:, None]
    assert relative(out.hidden[0][valid], values["mu"][valid]) < 2e-6
    loss = out.v.square().mean()
    assert float(loss.detach()) == pytest.approx(float(values["loss"]), rel=1e-6)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    gradients["input_embedding.weight"] = gradients["input_embedding.weight"][:CODES]
    compared = [name.removeprefix("gradient.") for name in values if name.startswith("gradient.")]
    assert len(compared) == 9
    for name in compared:
        assert relative(gradients[name], values[f"gradient.{name}"]) < 1e-5, name


def test_streaming_is_drawn_for_each_clip_in_training_alone():
    model, x, t, condition, values = golden(streaming=0.5)
    whole, chunked = (values[f"velocity.streaming_{s}"].transpose(1, 2) for s in (False, True))
    assert relative(model.eval()(x, t, condition).v, whole) < 2e-6
    torch.manual_seed(0)
    seen = set()
    for _ in range(30):
        v = model.train()(x, t, condition).v
        near = [[relative(v[clip], kind[clip]) < 1e-5 for kind in (whole, chunked)] for clip in range(2)]
        assert all(sum(kinds) == 1 for kinds in near)
        seen.add(tuple(kinds[1] for kinds in near))
    assert len(seen) == 4


def longer(frames: int = 37, lengths: tuple[int, ...] = (33, 22, 15)) -> tuple[CosyVoice3, torch.Tensor, Condition]:
    """The model and clips whose frames are not twice their tokens, padded beyond the longest."""
    model = golden()[0].eval()
    draw, lengths = torch.Generator().manual_seed(1), torch.tensor(lengths)
    valid = (torch.arange(frames) < lengths[:, None])[..., None]
    mel = torch.randn(len(lengths), frames, MELS, generator=draw) * valid
    tokens = torch.randint(0, 2 * CODES, (len(lengths), 19), generator=draw)
    reference = torch.where(torch.arange(frames)[:, None] < 5, mel, 0)
    speaker = torch.randn(len(lengths), VOICE, generator=draw)
    return model, mel, Condition(tokens, lengths // 2, reference, lengths, speaker=speaker)


def alone(condition: Condition, clip: int) -> Condition:
    """The condition of one clip, without padding."""
    one, length = condition[clip : clip + 1], int(condition.lengths[clip])
    tokens = one.tokens[:, : int(one.token_lengths)]
    return replace(one, tokens=tokens, reference=one.reference[:, :length], padded=False)


def test_padding_changes_no_clip():
    model, x, condition = longer()
    keep = torch.tensor([True, False, True])
    condition = replace(condition, keep_tokens=keep, keep_reference=~keep)
    t = torch.tensor([0.2, 0.5, 0.9])
    together = model(x, t, condition, capture=(0, 1), pooled=True)
    for clip, length in enumerate(condition.lengths.tolist()):
        row = slice(clip, clip + 1)
        out = model(x[row, :length], t[row], alone(condition, clip), capture=(0, 1), pooled=True)
        torch.testing.assert_close(out.v[0], together.v[clip, :length], rtol=1e-5, atol=1e-5)
        for layer in (0, 1):
            torch.testing.assert_close(out.hidden[layer][0], together.hidden[layer][clip], rtol=1e-5, atol=1e-5)


def test_a_drop_puts_zeros_in_place_of_mu_and_speaker_or_of_the_reference():
    model, x, condition = longer()
    given = []
    model.decoder.estimator.register_forward_pre_hook(lambda _module, args: given.append(args[2:5]))
    keep_tokens, keep_reference = torch.tensor([False, True, True]), torch.tensor([True, False, True])
    t = torch.full((3,), 0.4)
    model(x, t, condition)
    model(x, t, replace(condition, keep_tokens=keep_tokens, keep_reference=keep_reference))
    whole, dropped = given
    for part, kept in enumerate((keep_tokens, keep_tokens, keep_reference)):
        assert torch.equal(dropped[part][kept], whole[part][kept])
        assert whole[part][~kept].any()
        assert not dropped[part][~kept].any()


@pytest.mark.parametrize("masked", [False, True])
def test_a_block_is_f5s_with_one_rotated_head(masked):
    theirs = f5_dit(dropout=0.0, pe_attn_head=1, attn_mask_enabled=True)[0].transformer_blocks[0]
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours = _Block(32, 2, 16, 4, 0.0)
    ours.load_state_dict(theirs.state_dict())
    x, time, lengths = torch.randn(3, 13, 32), torch.randn(3, 32), torch.tensor([13, 7, 4])
    mask = torch.arange(13) < lengths[:, None] if masked else torch.ones(3, 13, dtype=torch.bool)
    angles = torch.arange(13)[:, None] * torch.rand(8)
    want = theirs(x, time, mask=mask, rope=(angles.repeat_interleave(2, -1)[None], 1.0))
    found = ours(x, time, lengths if masked else None, (angles.cos(), angles.sin()))
    assert relative(found[mask], want[mask]) < 1e-5
    whole = mask[:, None, None].expand(-1, 1, 13, -1)
    assert relative(ours(x, time, whole, (angles.cos(), angles.sin()))[mask], want[mask]) < 1e-5
    assert fuse(theirs) == 1
    assert relative(theirs(x, time, mask=whole, rope=(angles.repeat_interleave(2, -1)[None], 1.0)), want) < 1e-5


def test_foga_equals_leaving_out_one_block_at_a_time():
    model, mel, condition = longer()
    batch = ProbeBatch(mel, condition, torch.tensor([0, 0, 0]), (0, 1, 2))
    scores = foga(model, batch, times=(0.5,), sigma=1.0).values[..., 0, 0]
    x_t, t = ProbePoints((0.5,), sigma=1.0).x_t(batch, 0.5, 0), torch.full((3,), 0.5)
    with torch.no_grad():
        base = model(x_t, t, condition).v
        for number, block in enumerate(model.decoder.estimator.transformer_blocks):
            handle = block.register_forward_hook(lambda _m, args, _out: args[0])
            change = (model(x_t, t, condition).v - base).flatten(1).norm(dim=1) / base.flatten(1).norm(dim=1)
            handle.remove()
            torch.testing.assert_close(scores[number], change, rtol=1e-5, atol=1e-5)


def test_weights_go_out_as_they_came_in():
    model, *_, values = golden()
    theirs = {name.removeprefix("weight."): v for name, v in values.items() if name.startswith("weight.")}
    state = model.to_upstream(dict(model.state_dict()))
    assert state.keys() == theirs.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("decoder.estimator.mid_blocks.0.0.block1.block.1.weight", (8,), "a weight of CosyVoice 1, and the model is"),
        ("decoder.estimator.mid_blocks.0.0.block1.block.2.weight", (8,), "a weight of CosyVoice 2, and the model is"),
        ("input_embedding.weight", (31, MELS), "31 token ids, and the shards data.codebook=30"),
        ("input_embedding.weight", None, "input_embedding.weight is missing"),
    ],
)
def test_weights_of_another_model_are_refused_by_name(key, shape, message):
    model, *_, values = golden()
    state = {name.removeprefix("weight."): v for name, v in values.items() if name.startswith("weight.")}
    if shape is None:
        del state[key]
    else:
        state[key] = torch.zeros(shape)
    with pytest.raises(UserError, match=message):
        model.from_upstream(state)


def test_nothing_waits_for_a_gpu():
    model, x, t, condition, _ = golden(streaming=0.5)
    with waits() as found:
        model.train()(x, t, condition, capture=(0, 1), pooled=True).v.square().mean().backward()
    assert model.replayable
    assert not found
