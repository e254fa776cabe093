"""F5-TTS and E2 against the package's own networks: velocities, gradients and drops; padding, which changes no clip."""

import copy
import sys
from dataclasses import replace
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from types import ModuleType

import pytest
import torch

from agrepa_fast.attribution.foga import foga
from agrepa_fast.attribution.points import ProbeBatch, ProbePoints
from agrepa_fast.config import ModelConfig
from agrepa_fast.errors import UserError
from agrepa_fast.models import f5_package
from agrepa_fast.models.condition import Condition
from agrepa_fast.models.f5 import F5
from agrepa_fast.models.f5_package import import_network
from agrepa_fast.models.registry import make_model

from ..attribution.test_peers import INSTALL, awake
from ..testing import Operations

if find_spec("f5_tts") is None:
    pytest.skip(INSTALL, allow_module_level=True)

MELS, VOCAB, FRAMES = 20, 30, 29
SIZES = {"dim": 32, "depth": 4, "heads": 2, "dim_head": 16, "dropout": 0.0}
FORMS = {
    "v1": {"conv_layers": 2, "text_dim": 24},
    "v0": {"conv_layers": 2, "text_dim": 24, "text_mask_padding": False, "pe_attn_head": 1},
    "norms, long skip": {"conv_layers": 1, "qk_norm": "rms_norm", "long_skip_connection": True},
    "text spread over the clip": {"conv_layers": 1, "text_embedding_average_upsampling": True},
    "E2": {"network": "UNetT", "text_mask_padding": False, "pe_attn_head": 1},
    "E2, added skips": {"network": "UNetT", "conv_layers": 1, "skip_connect_type": "add"},
}

CASES = [(form, fused) for form in FORMS for fused in (False, True) if not (fused and "network" in FORMS[form])]


def small(form: str = "v1", **options) -> F5:
    torch.manual_seed(0)
    return awake(F5(MELS, 7, VOCAB, **SIZES, **(FORMS[form] | options)))


def theirs_of(ours: F5, form: str) -> torch.nn.Module:
    """The package's own network, with the same weights."""
    options = dict(FORMS[form])
    theirs = import_network(options.pop("network", "DiT"))(mel_dim=MELS, text_num_embeds=VOCAB, **SIZES, **options)
    theirs.load_state_dict(ours.transformer.state_dict())
    return theirs.eval()


def clips(lengths: tuple[int, ...] = (FRAMES,) * 3, frames: int = FRAMES) -> tuple[torch.Tensor, Condition]:
    """x_t and conditions with texts of several lengths, the last one longer than its clip."""
    draw, lengths = torch.Generator().manual_seed(1), torch.tensor(lengths)
    x = torch.randn(len(lengths), frames, MELS, generator=draw)
    text = torch.randint(0, VOCAB, (len(lengths), 12), generator=draw)
    text = torch.where(torch.arange(12) < torch.tensor([7, 4, 12])[: len(lengths), None], text, -1)
    given = torch.arange(frames) < lengths[:, None] // 3
    tokens = torch.zeros(len(lengths), 2, dtype=torch.int64)
    return x, Condition(tokens, tokens[:, 0] + 2, torch.where(given[..., None], x, 0), lengths, text=text)


TIMES = torch.tensor([0.1, 0.5, 0.8])
SOME, OTHERS = torch.tensor([True, False, True]), torch.tensor([True, True, False])


@pytest.mark.parametrize(("form", "fused"), CASES)
def test_velocity_and_gradients_are_the_packages(form, fused):
    ours = small(form, fused=fused)
    theirs = theirs_of(ours, form)
    x, condition = clips()
    want = theirs(x=x, cond=condition.reference, text=condition.text, time=TIMES)
    found = ours(x, TIMES, condition).v
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    for out in (found, want):
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    gradients = {f"transformer.{name}": p.grad for name, p in theirs.named_parameters()}
    assert list(gradients) == [name for name, _ in ours.named_parameters()]
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("padding", ["strict", "upstream"])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_each_clip_drops_what_their_flags_drop_for_a_batch(form, padding):
    ours = small(form, padding=padding, fused=False)
    theirs = theirs_of(ours, form)
    lengths = (FRAMES,) * 3 if padding == "strict" else (FRAMES, 20, 9)
    x, condition = clips(lengths)
    mask = torch.arange(FRAMES) < condition.lengths[:, None]
    found = ours(x, TIMES, replace(condition, keep_tokens=SOME, keep_reference=OTHERS)).v
    for clip in range(3):
        flags = {"drop_text": not SOME[clip], "drop_audio_cond": not OTHERS[clip]}
        want = theirs(
            x=x, cond=condition.reference, text=condition.text, time=TIMES,
            mask=mask if padding == "upstream" else None, **flags,
        )  # fmt: skip
        assert torch.equal(found[clip], torch.where(mask[clip, :, None], want[clip], 0)), flags


@pytest.mark.parametrize(("form", "fused"), CASES)
@torch.no_grad()
def test_padding_changes_no_clip(form, fused):
    ours = small(form, fused=fused).eval()
    lengths, frames = (FRAMES, 20, 9), FRAMES + 4  # more than the longest clip
    x, condition = clips(lengths, frames)
    condition = replace(condition, keep_tokens=SOME, keep_reference=OTHERS)
    together = ours(x, TIMES, condition, capture=(0, 2, 4), pooled=True)
    for clip, length in enumerate(lengths):
        alone = condition[clip : clip + 1]
        text = alone.text[alone.text >= 0][None, :length]
        alone = replace(alone, reference=alone.reference[:, :length], text=text, padded=False)
        out = ours(x[clip : clip + 1, :length], TIMES[clip : clip + 1], alone, capture=(0, 2, 4), pooled=True)
        torch.testing.assert_close(out.v[0], together.v[clip, :length], rtol=1e-5, atol=1e-5)
        for layer in out.hidden:
            torch.testing.assert_close(out.hidden[layer][0], together.hidden[layer][clip], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["v1", "E2"])
@torch.no_grad()
def test_strict_padding_reads_no_value(form):
    """A CUDA graph cannot: it would wait for the GPU."""
    ours, (x, condition) = small(form), clips((FRAMES, 20, 9), FRAMES + 1)
    with Operations() as ran:
        ours(x, TIMES, replace(condition, keep_tokens=SOME))
    assert len(ran.names) > 50
    assert "aten._local_scalar_dense.default" not in ran.names
    assert small(form).replayable
    assert not small(form, padding="upstream").replayable


@pytest.mark.parametrize("form", ["v1", "norms, long skip", "E2", "E2, added skips"])
@torch.no_grad()
def test_foga_equals_leaving_out_one_layer_at_a_time(form):
    ours = small(form).eval()
    mel, condition = clips((FRAMES, 20, 9))
    batch = ProbeBatch(mel, condition, torch.tensor([0, 1, 0]), (0, 1, 2))
    scores = foga(ours, batch, times=(0.5,), sigma=1.0).values[..., 0, 0]
    x_t, t = ProbePoints((0.5,), sigma=1.0).x_t(batch, 0.5, 0), torch.full((3,), 0.5)
    base = ours(x_t, t, condition).v
    for number, layer in enumerate(ours.layers):
        for part in layer.parts:
            first = next(iter(signature(part.forward).parameters))
            part.own = part.forward

            def left_out(*args, first=first, **kwargs):
                state = args[0] if args else kwargs[first]
                return state if ours.kind == "block" else torch.zeros_like(state)

            part.forward = left_out
        change = (ours(x_t, t, condition).v - base).flatten(1).norm(dim=1) / base.flatten(1).norm(dim=1)
        for part in layer.parts:
            part.forward = part.own
        assert change.min() > 1e-3, "a layer that does nothing shows nothing"
        torch.testing.assert_close(scores[number], change, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_branches_of_e2_are_probed_apart():
    mel, condition = clips()
    batch = ProbeBatch(mel, condition, torch.zeros(3, dtype=torch.int64), (0, 1, 2))
    assert len(foga(small("E2"), batch, times=(0.5,), kind="branch").values) == 8


def test_taps_are_the_states_between_layers():
    ours = small("E2").eval()
    x, condition = clips()
    states = []
    for _, attn_norm, *_ in ours.transformer.layers[1:2]:
        attn_norm.register_forward_pre_hook(lambda _m, args: states.append(args[0][:, 1:]))
    hidden = ours(x, TIMES, condition, capture=(1,)).hidden[1]
    assert torch.equal(hidden, states[0])


def test_layers_are_recomputed_to_the_same_gradients():
    x, condition = clips((FRAMES, 20, 9))
    for form in ("v1", "E2"):
        gradients = []
        for recompute in (False, True):
            ours = small(form)
            if recompute:
                ours.recompute_layers()
            ours(x, TIMES, condition).v.square().sum().backward()
            gradients.append([p.grad for p in ours.parameters() if p.grad is not None])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("form", ["v1", "E2"])
def test_bf16_weights_are_as_near_to_fp32_as_the_packages_mixed_precision(form):
    """Times and angles stay fp32: in bf16 they would be far off."""
    ours = small(form).eval()
    theirs, (x, condition) = theirs_of(ours, form), clips()
    call = {"x": x, "cond": condition.reference, "text": condition.text, "time": TIMES}
    exact = theirs(**call)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = theirs(**call).float()
    for parameter in ours.parameters():  # as the engine casts: no buffers
        parameter.data = parameter.data.bfloat16()
    found = ours(x, TIMES, condition).v.float()
    assert (found - exact).norm() < 1.3 * (mixed - exact).norm()


@torch.no_grad()
def test_a_copy_is_the_same_model_with_taps_of_its_own():
    ours = small().eval()
    copied, (x, condition) = copy.deepcopy(ours), clips((FRAMES, 20, 9))
    for parameter in ours.parameters():
        parameter.zero_()
    out = copied(x, TIMES, condition, capture=(0, 1))
    assert torch.equal(out.v, small().eval()(x, TIMES, condition).v)
    assert all(states.any() for states in out.hidden.values())
    assert list(copied.state_dict()) == list(ours.state_dict())


def test_what_the_package_does_not_take_is_refused_in_one_line():
    config = ModelConfig(backbone="f5", n_mels=MELS, vocab=7, text_vocab=VOCAB, options={"network": "MMDiT"})
    for options, message in (
        ({"network": "MMDiT"}, "model.options.network=MMDiT: DiT or UNetT"),
        ({"network": "UNetT", "fused": True}, "UNetT has no fused blocks"),
        ({"widht": 3}, "unexpected keyword argument 'widht'"),
    ):
        with pytest.raises(UserError, match=r"model\.backbone=f5: ") as refusal:
            make_model(replace(config, options=options))
        assert message in str(refusal.value)
    with pytest.raises(UserError, match=r"takes text: set data\.text"):
        make_model(replace(config, text_vocab=None))
    x, condition = clips()
    with pytest.raises(ValueError, match=r"which is missing: set data\.text"):
        small()(x, TIMES, replace(condition, text=None))
    x, condition = clips((8193,), 8193)
    with pytest.raises(ValueError, match=r"8193 frames: F5's text encoder has positions for 8192, lower data\."):
        small()(x, TIMES[:1], condition)


@pytest.fixture
def not_imported(monkeypatch):
    """As in a new process; other tests get their modules back."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("f5_tts", "librosa", "x_transformers")]:
        monkeypatch.delitem(sys.modules, name)
    return monkeypatch


def test_a_package_that_is_absent_is_named_with_the_remedy(not_imported):
    not_imported.setitem(sys.modules, "x_transformers", None)
    with pytest.raises(UserError, match=r"x_transformers.*: pip install 'agrepa_fast\[f5\]'"):
        import_network("DiT")
    assert "f5_tts.model" not in sys.modules


def test_the_package_can_be_imported_whole_before_and_after(not_imported):
    network = import_network("DiT")
    assert "f5_tts.model" not in sys.modules  # whoever imports it runs its __init__, and finds these classes
    assert sys.modules[network.__module__].DiT is network
    whole = ModuleType("f5_tts.model")
    whole.__path__ = [str(Path(sys.modules[network.__module__].__file__).parents[1])]
    not_imported.setitem(sys.modules, "f5_tts.model", whole)
    import_network("UNetT")
    assert sys.modules["f5_tts.model"] is whole


def test_packages_for_waves_are_missed_where_they_are_called(not_imported):
    installed = f5_package._is_installed
    not_imported.setattr(f5_package, "_is_installed", lambda name: "librosa" not in name and installed(name))
    mel = sys.modules[import_network("DiT").__module__.replace("backbones.dit", "modules")].librosa_mel_fn
    assert "librosa" not in sys.modules
    with pytest.raises(ImportError, match=r"librosa\.filters.*: pip install 'agrepa_fast\[f5\]'"):
        mel(sr=24000)
