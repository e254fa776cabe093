"""Voicebox against voicebox-pytorch's, in float64, and what that package lacks."""

from dataclasses import replace

import pytest
import torch
import torch.nn as nn

from agrepa_fast.attribution.foga import FogaProbe, foga
from agrepa_fast.attribution.points import ProbeBatch, ProbePoints
from agrepa_fast.config import FlowConfig
from agrepa_fast.config_file import load_config
from agrepa_fast.errors import UserError
from agrepa_fast.flow import counted_frames, flow_loss, reference_around, training_draws
from agrepa_fast.models.audio_dit.conditioning import Condition
from agrepa_fast.models.voicebox import Voicebox, _alibi, _Fourier, _Transformer

from ..attribution.test_peers import voicebox_package

MELS, VOCAB, FRAMES = 6, 11, 23
SIZES = {"dim": 32, "depth": 4, "heads": 2, "dim_head": 16, "token_dim": 12, "registers": 3}
PAPER = {
    "skips": True, "position": "alibi", "time": "token", "ffn": "gelu", "qk_norm": False, "registers": 0, "ff_mult": 4,
}  # fmt: skip
FORMS = pytest.mark.parametrize("options", [{}, {"skips": True}, PAPER], ids=["package", "skips", "paper"])


def small(**options) -> Voicebox:
    torch.manual_seed(0)
    return awake(Voicebox(MELS, VOCAB, **(SIZES | options))).eval()


def awake(model: nn.Module) -> nn.Module:
    """Adaptive norms that depend on the time."""
    for name, parameter in model.named_parameters():
        if "to_gamma" in name or "to_beta" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def clips(lengths=(FRAMES, 17, 9), frames: int = FRAMES, per_frame: bool = False) -> tuple[torch.Tensor, Condition]:
    draw, lengths = torch.Generator().manual_seed(1), torch.tensor(lengths)
    valid = (torch.arange(frames) < lengths[:, None])[..., None]
    mel = torch.randn(len(lengths), frames, MELS, generator=draw) * valid
    count = frames if per_frame else frames // 2
    tokens = torch.randint(0, VOCAB, (len(lengths), count), generator=draw)
    token_lengths = lengths if per_frame else (lengths // 2).clamp(min=1)
    reference = torch.where(torch.arange(frames)[:, None] < 5, mel, 0)
    return mel, Condition(tokens, token_lengths, reference, lengths)


def both_in_float64() -> tuple[Voicebox, nn.Module]:
    ours = small().double()
    theirs = voicebox_package().VoiceBox(
        num_cond_tokens=VOCAB,
        dim_in=MELS,
        dim_cond_emb=12,
        dim=32,
        depth=4,
        dim_head=16,
        heads=2,
        num_register_tokens=3,
    )
    theirs = theirs.double().eval()
    assert list(theirs.state_dict()) == list(ours.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("lengths", [(FRAMES,) * 3, (FRAMES, 17, 9)])
def test_equals_voicebox_pytorch(lengths, dropped):
    ours, theirs = both_in_float64()
    x, condition = clips(lengths, per_frame=True)
    x, t = x.double(), torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    condition = replace(condition, reference=condition.reference.double())
    if dropped:
        none = torch.zeros(3, dtype=torch.bool)
        condition = replace(condition, keep_tokens=none, keep_reference=none)
    mask = torch.arange(FRAMES) < condition.lengths[:, None]
    want = theirs(
        x,
        times=t,
        cond_token_ids=condition.tokens,
        cond=condition.reference,
        cond_mask=torch.zeros_like(mask),
        self_attn_mask=mask if condition.padded else None,
        cond_drop_prob=float(dropped),
    )
    found = ours(x, t, condition).v
    torch.testing.assert_close(found, want * mask[..., None], rtol=1e-10, atol=1e-10)
    for out in (found, want * mask[..., None]):
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for name, parameter in ours.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("lengths", [(FRAMES,) * 3, (FRAMES, 17, 9)])
def test_the_loss_is_the_package_s_from_the_same_draws(lengths):
    """Of the span that is hidden: the mean over clips of each clip's mean."""
    ours, theirs = both_in_float64()
    mel, condition = clips(lengths, per_frame=True)
    mel, flow = mel.double(), FlowConfig(sigma=1.0, reference="infill", loss_region="hidden", average="clip")
    draws = training_draws(flow, condition.lengths, torch.tensor([4, 5, 6]))
    noise, t = torch.randn(mel.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64), draws.t.double()
    x_t, target = (1 - t.view(-1, 1, 1)) * noise + t.view(-1, 1, 1) * mel, mel - noise
    mask = torch.arange(FRAMES) < condition.lengths[:, None]
    want = theirs(
        x_t,
        times=t,
        cond_token_ids=condition.tokens,
        cond=mel,
        cond_mask=draws.hidden.frames(FRAMES),
        self_attn_mask=mask if condition.padded else None,
        cond_drop_prob=0.0,
        target=target,
    )
    v = ours(x_t, t, replace(condition, reference=reference_around(mel, draws.hidden))).v
    counted = counted_frames(flow, draws.hidden, condition.lengths)
    torch.testing.assert_close(flow_loss(v, target, counted).mean().double(), want, rtol=1e-6, atol=0)


def test_weights_of_the_package_come_without_what_makes_tokens_and_mels():
    model = small()
    own = model.state_dict()
    around = {"voicebox.audio_enc_dec.weight": own["null_cond"], "duration_predictor.weight": own["null_cond"]}
    found = model.from_upstream({f"voicebox.{name}": tensor for name, tensor in own.items()} | around)
    assert found == own == model.from_upstream(dict(own))


@pytest.mark.parametrize("options", [{"skips": True}, PAPER, {"qk_norm": False}])
def test_a_form_that_the_package_lacks_is_not_written_as_its_file(options):
    with pytest.raises(UserError, match="VoiceBox has no skips, ALiBi"):
        small(**options).to_upstream({})


def test_skips_equal_those_of_its_transformer():
    torch.manual_seed(0)
    theirs = voicebox_package().Transformer(
        dim=32, depth=4, dim_head=16, heads=2, num_register_tokens=3, adaptive_rmsnorm=True,
        adaptive_rmsnorm_cond_dim_in=128, use_unet_skip_connection=True, attn_qk_norm=True,
    )  # fmt: skip
    theirs = awake(theirs).double().eval()
    ours = _Transformer(32, 4, heads=2, dim_head=16, ff_mult=4, registers=3, dropout=0.0, skips=True).double()
    ours.load_state_dict(theirs.state_dict())
    x, time = torch.randn(3, FRAMES, 32, dtype=torch.float64), torch.randn(3, 128, dtype=torch.float64)
    lengths = torch.tensor([FRAMES, 17, 9])
    mask = torch.arange(FRAMES) < lengths[:, None]
    want = theirs(x, mask=mask, adaptive_rmsnorm_cond=time)
    torch.testing.assert_close(ours(x, time, lengths)[mask], want[mask], rtol=1e-10, atol=1e-10)


@FORMS
def test_padding_changes_no_clip(options):
    model = small(**options)
    x, condition = clips()
    keep = torch.tensor([True, False, True])
    condition = replace(condition, keep_tokens=keep, keep_reference=~keep)
    t = torch.tensor([0.2, 0.5, 0.9])
    together = model(x, t, condition, capture=(0, 2), pooled=True)
    for clip, length in enumerate(condition.lengths.tolist()):
        one, tokens = condition[clip : clip + 1], int(condition.token_lengths[clip])
        alone = Condition(
            one.tokens[:, :tokens], one.token_lengths, one.reference[:, :length], one.lengths,
            keep_tokens=one.keep_tokens, keep_reference=one.keep_reference,
        )  # fmt: skip
        out = model(x[clip : clip + 1, :length], t[clip : clip + 1], alone, capture=(0, 2), pooled=True)
        torch.testing.assert_close(out.v[0], together.v[clip, :length], rtol=1e-5, atol=1e-5)
        for layer in (0, 2):
            torch.testing.assert_close(out.hidden[layer][0], together.hidden[layer][clip], rtol=1e-5, atol=1e-5)


@FORMS
def test_foga_equals_leaving_out_one_layer_at_a_time(options):
    model = small(**options)
    mel, condition = clips()
    batch = ProbeBatch(mel, condition, torch.tensor([0, 1, 0]), (0, 1, 2))
    scores = foga(model, batch, times=(0.5,), sigma=1.0).values[..., 0, 0]
    points = ProbePoints((0.5,), sigma=1.0)
    x_t, t = points.x_t(batch, 0.5, 0), torch.full((3,), 0.5)
    with torch.no_grad():
        base = model(x_t, t, condition).v
        for number, layer in enumerate(model.layers):
            handles = [part.register_forward_hook(lambda _m, _a, out: 0 * out) for part in layer.parts]
            v = model(x_t, t, condition).v
            for handle in handles:
                handle.remove()
            change = (v - base).flatten(1).norm(dim=1) / base.flatten(1).norm(dim=1)
            torch.testing.assert_close(scores[number], change, rtol=1e-5, atol=1e-5)


def test_attention_and_ffn_apart():
    mel, condition = clips()
    batch = ProbeBatch(mel, condition, torch.tensor([0, 1, 0]), (0, 1, 2))
    scores = foga(small(), batch, times=(0.5,), kind="branch")
    assert scores.names == tuple(f"{n}.{part}" for n in (1, 2, 3, 4) for part in ("attn", "ffn"))
    FogaProbe(small(), ProbePoints((0.5,)), kind="branch").check_blocks(batch)


def test_skips_need_pairs():
    with pytest.raises(ValueError, match="depth=3"):
        small(depth=3, skips=True)


@pytest.mark.parametrize(("name", "value"), [("position", "alibis"), ("time", "tokens"), ("ffn", "relu")])
def test_choices_that_do_not_exist_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}='{value}': "):
        small(**{name: value})


def test_the_preset_has_the_papers_size():
    """330 M parameters (sec. 5.1), with some hundred phones."""
    with torch.device("meta"):
        model = Voicebox(80, 400, **load_config("voicebox").model.options)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(330e6, rel=0.01)
    assert {name: load_config("voicebox").model.options[name] for name in PAPER} == PAPER


def test_bias_falls_with_the_distance_and_is_zero_for_the_time_token():
    bias = _alibi(4, 1, 5, torch.device("cpu"))
    assert not bias[:, 0].any()
    assert not bias[:, :, 0].any()
    for head, slope in enumerate((2**-2, 2**-4, 2**-6, 2**-8)):
        for i in range(5):
            for j in range(5):
                assert bias[head, 1 + i, 1 + j] == -slope * abs(i - j)


def test_the_papers_layer_is_attention_with_the_bias_and_an_ffn():
    torch.manual_seed(0)
    model = _Transformer(
        8, 1, heads=2, dim_head=4, ff_mult=4, registers=0, dropout=0.0, skips=False, position="alibi", time="token",
        ffn="gelu", qk_norm=False,
    ).double()  # fmt: skip
    frames, time = torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    x = torch.cat((time[:, None], frames), dim=1)
    _, _, _, attention, _, ffn, _ = model.layers[0]
    rms = (x / x.square().mean(-1, keepdim=True).sqrt()) @ attention.to_qkv.weight.T
    q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in rms.chunk(3, -1))
    weights = (q @ k.transpose(-1, -2) / 2 + _alibi(2, 1, 5, torch.device("cpu")).double()).softmax(-1)
    x = x + (weights @ v).transpose(1, 2).flatten(2) @ attention.to_out.weight.T
    x = x + ffn(x / x.square().mean(-1, keepdim=True).sqrt())
    wanted = x / x.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(model(frames, time, None), wanted[:, 1:], rtol=1e-12, atol=1e-12)


def test_times_stay_exact_beside_weights_in_bf16():
    layer, t = _Fourier(64).to(torch.bfloat16), torch.tensor([0.3, 0.777])
    angles = 2 * torch.pi * t[:, None].double() * layer.weights.double()
    assert layer(t).dtype == torch.bfloat16
    torch.testing.assert_close(layer(t).double(), torch.cat((angles.sin(), angles.cos()), -1), rtol=0, atol=2**-8)
