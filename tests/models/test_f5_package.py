"""F5 in the package's own training and inference: its loss, its sampler, its weight files."""

import inspect
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from agrepa_fast.checkpoints.upstream import start_from_upstream
from agrepa_fast.config import FlowConfig
from agrepa_fast.config_file import load_config
from agrepa_fast.errors import UserError
from agrepa_fast.flow import sample, training_draws
from agrepa_fast.kernels import flow_mix, philox_normal
from agrepa_fast.models.f5 import F5
from agrepa_fast.training.run import Run

from ..attribution.test_peers import import_alone
from .test_f5 import FRAMES, MELS, clips, small, theirs_of

FLOW = replace(load_config("f5-v1").flow, drop_reference=0.0, drop_all=0.0, steps=8)
KEYS = torch.tensor([[11, 12, 13], [21, 22, 23]])


def cfm_module() -> ModuleType:
    return import_alone("f5_tts.model.cfm", "librosa", "librosa.filters")


def cfm_of(ours: F5, form: str, **options) -> torch.nn.Module:
    return cfm_module().CFM(theirs_of(ours, form), mel_spec_kwargs={"n_mel_channels": MELS}, **options)


def our_loss(model: F5, batch: SimpleNamespace, flow: FlowConfig, counted: float) -> torch.Tensor:
    """The flow loss of a training step. counted: frames whose loss counts in a clip, the mean over the batch."""
    aligner = SimpleNamespace(layers=lambda step: (), pools=lambda step: True, losses=lambda *_: {})
    aligner.attention_layers = aligner.layers
    run = SimpleNamespace(config=SimpleNamespace(flow=flow), choice=SimpleNamespace(aligner=aligner))
    batch.mean_frames = counted / (sum(flow.infill) / 2)  # then the expected count is that of the batch
    return Run.losses(run, model, batch, KEYS, 0)[0]["flow_loss"]


@pytest.mark.parametrize("drop", ["nothing", "reference", "all"])
@pytest.mark.parametrize("form", ["v1", "v0", "E2"])
def test_loss_is_theirs_from_the_same_draws(form, drop, monkeypatch):
    """Their coins are of the batch, ours of each clip; here all clips agree."""
    padded = drop == "nothing"
    ours = small(form, padding="upstream" if padded else "strict")
    mel, condition = clips((FRAMES, 20, 9) if padded else (FRAMES,) * 3)
    mel = torch.where((torch.arange(FRAMES) < condition.lengths[:, None])[..., None], mel, 0)
    almost_one = 1 - 1e-12
    dropped = {"nothing": {}, "reference": {"drop_reference": almost_one}, "all": {"drop_all": almost_one}}
    flow: FlowConfig = replace(FLOW, **dropped[drop])
    draws = training_draws(flow, condition.lengths, KEYS[0])
    span = draws.hidden.frames(FRAMES)
    found = our_loss(ours, SimpleNamespace(mel=mel, condition=condition), flow, float(span.sum() / 3))

    noise = mel - flow_mix(mel, draws.t, KEYS[1], 1.0)[1]
    cfm = cfm_of(ours, form, audio_drop_prob=float(drop == "reference"), cond_drop_prob=float(drop == "all"))
    monkeypatch.setattr(torch, "randn_like", lambda _x: noise)
    monkeypatch.setattr(torch, "rand", lambda *_args, **_options: draws.t)
    monkeypatch.setitem(type(cfm).forward.__globals__, "mask_from_frac_lengths", lambda *_: span)
    want, given, _ = cfm(mel, condition.text, lens=condition.lengths)
    assert torch.equal(given == 0, (mel == 0) | span.unsqueeze(-1))
    torch.testing.assert_close(found, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", ["v1", "E2"])
def test_samples_are_theirs_from_the_same_noise(form, monkeypatch):
    ours = small(form)
    mel, condition = clips((FRAMES, FRAMES))
    given = torch.tensor([9, 6])
    mask = (torch.arange(FRAMES) < given[:, None])[..., None]
    condition = replace(condition, reference=torch.where(mask, mel, 0))
    found = sample(ours, condition, KEYS[1, :2], FLOW)

    noise = iter(philox_normal(KEYS[1, :2], FRAMES * MELS).view(2, FRAMES, MELS))
    monkeypatch.setattr(torch, "randn", lambda *_args, **_options: next(noise))
    want, _ = cfm_of(ours, form).sample(
        mel[:, :9], condition.text, FRAMES, lens=given, steps=8, cfg_strength=2.0, sway_sampling_coef=-1.0,
        use_epss=False,
    )  # fmt: skip
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def load_checkpoint(cfm: torch.nn.Module, path) -> torch.nn.Module:
    """What f5_tts.infer.utils_infer.load_checkpoint does with averaged weights on a CPU."""
    checkpoint = load_file(path)
    names = {name.replace("ema_model.", ""): v for name, v in checkpoint.items() if name not in ("initted", "step")}
    cfm.load_state_dict(names)
    return cfm


@pytest.mark.parametrize("form", ["v1", "norms, long skip", "E2"])
def test_weights_go_to_their_loader_and_back(form, tmp_path):
    ours, other = small(form), small(form)
    content = ours.to_upstream(dict(ours.state_dict()))
    assert {"initted", "step", "ema_model.transformer.rotary_embed.inv_freq"} < content.keys()
    save_file(content, tmp_path / "model_7.safetensors")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    cfm = load_checkpoint(cfm_of(other, form), tmp_path / "model_7.safetensors")
    x, condition = clips()
    times = torch.tensor([0.1, 0.5, 0.8])
    want = ours(x, times, condition).v
    theirs = cfm.transformer(x=x, cond=condition.reference, text=condition.text, time=times)
    torch.testing.assert_close(theirs, want, rtol=1e-5, atol=1e-5)
    assert cfm.sample(x[:1, :9], condition.text[:1], FRAMES, steps=4)[0].isfinite().all()

    line = start_from_upstream(other, tmp_path / "model_7.safetensors")
    assert torch.equal(other(x, times, condition).v, want)
    assert "CC-BY-NC-4.0" in line
    assert ("E2;" if form == "E2" else "v1 by model.options.pe_attn_head=None") in line
    assert "v0 by model.options.pe_attn_head=1" in small("v0").upstream


@pytest.mark.parametrize("kind", ["averaged", "live", "compiled", "old"])
def test_files_of_their_trainer_are_read(kind, tmp_path):
    ours, other = small(), small()
    weights = {name: tensor + 1 for name, tensor in ours.state_dict().items()}
    live = {name: tensor + 2 for name, tensor in weights.items()}
    averaged = {f"ema_model.{name}": tensor for name, tensor in weights.items()}
    if kind == "compiled":
        averaged = {name.replace("ema_model.", "ema_model._orig_mod."): tensor for name, tensor in averaged.items()}
    if kind == "old":
        averaged |= {"ema_model.mel_spec.mel_stft.mel_scale.fb": torch.ones(3)}
    averaged |= {"initted": torch.tensor(True), "step": torch.tensor(9)}
    content = {"ema_model_state_dict": averaged, "model_state_dict": live, "update": 9}
    if kind == "live":
        del content["ema_model_state_dict"]
    torch.save(content, tmp_path / "model_last.pt")
    start_from_upstream(other, tmp_path / "model_last.pt")
    want = live if kind == "live" else weights
    assert all(torch.equal(tensor, want[name]) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (("E2", {"text_dim": 24, "conv_layers": 2}), "transformer.layers.0.1.g is (32,)"),
        (("v1", {"qk_norm": "rms_norm"}), "transformer.transformer_blocks.0.attn.k_norm.weight is (16,)"),
        (("v1", {"text_dim": 20}), "transformer.input_embed.proj.weight is (32, 60), not (32, 64)"),
    ],
)
def test_weights_of_another_network_are_refused_by_name(other, name, tmp_path):
    form, options = other
    other = small(form, **options)
    save_file(other.to_upstream(dict(other.state_dict())), tmp_path / "model_7.safetensors")
    with pytest.raises(UserError, match="not the weights of this F5") as refusal:
        start_from_upstream(small(), tmp_path / "model_7.safetensors")
    assert name in str(refusal.value)


@pytest.mark.parametrize(
    ("preset", "theirs"), [("f5-v1", "F5TTS_v1_Base"), ("f5-v0", "F5TTS_Base"), ("e2", "E2TTS_Base")]
)
def test_presets_are_the_packages_configurations(preset, theirs):
    ours = load_config(preset)
    folder = Path(cfm_module().__file__).parents[1]
    theirs = yaml.safe_load((folder / "configs" / f"{theirs}.yaml").read_text())
    arch, mel, optim = theirs["model"]["arch"], theirs["model"]["mel_spec"], theirs["optim"]
    options = {"network": "DiT"} | ours.model.options
    assert options.pop("network") == theirs["model"]["backbone"]
    unused = ("attn_backend", "attn_mask_enabled", "checkpoint_activations", "qk_norm", "pe_attn_head")
    assert options == {name: value for name, value in arch.items() if name not in unused or name in options}
    assert arch.get("pe_attn_head") == options.get("pe_attn_head")
    data, train = ours.data, ours.train
    assert (data.sample_rate, data.n_mels) == (mel["target_sample_rate"], mel["n_mel_channels"])
    assert (data.hop_length, data.n_fft, data.f_max) == (mel["hop_length"], mel["n_fft"], mel["target_sample_rate"] / 2)
    assert (train.lr, train.warmup_steps) == (float(optim["learning_rate"]), optim["num_warmup_updates"])
    assert train.clip_norm == optim["max_grad_norm"]
    assert train.batch_frames == 8 * theirs["datasets"]["batch_size_per_gpu"]
    defaults = inspect.signature(cfm_module().CFM).parameters
    assert ours.flow.drop_reference == defaults["audio_drop_prob"].default
    assert ours.flow.drop_all == defaults["cond_drop_prob"].default
    assert tuple(ours.flow.infill) == defaults["frac_lengths_mask"].default
    assert not data.normalize
