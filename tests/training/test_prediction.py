"""flow.prediction=x: the network returns the clean mel, and everything else sees the velocity of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from agrepa_fast import Backbone, Layer, foga, load_model
from agrepa_fast.attribution.points import ProbeBatch
from agrepa_fast.checkpoints.upstream import export_upstream, start_from_upstream
from agrepa_fast.config import FlowConfig
from agrepa_fast.config_file import load_config, save_config, settings_that_differ
from agrepa_fast.errors import UserError
from agrepa_fast.flow import sample, training_loss
from agrepa_fast.kernels import flow_mix
from agrepa_fast.models.registry import make_model
from agrepa_fast.models.voicebox import Voicebox
from agrepa_fast.reporting.opened import open_checkpoint
from agrepa_fast.seeds import clip_keys
from agrepa_fast.training.start import check_start

from ..ranks import call_on_ranks
from ..testing import MEL_BINS, VOCAB, small_batch, small_model
from .in_process import ds_values, make_run

T = torch.tensor([0.3, 0.93, 0.99])
FLOW = FlowConfig(prediction="x", steps=7)


class Oracle(Backbone):
    """Knows the clean mels."""

    predicts = "x"

    def __init__(self, mel: torch.Tensor):
        super().__init__()
        self.mel = mel

    @property
    def layers(self):
        return [Layer((self,), MEL_BINS)]

    def velocity(self, x_t, t, condition):
        return self.mel.repeat(len(x_t) // len(self.mel), 1, 1)


def voicebox() -> Voicebox:
    torch.manual_seed(0)
    return Voicebox(MEL_BINS, VOCAB, dim=16, depth=2, heads=2, dim_head=8, token_dim=12, registers=2)


def points(sigma: float = 0.5):
    """(mel, condition, x_t, target) at T."""
    mel, condition = small_batch()
    return mel, condition, *flow_mix(mel, T, clip_keys(0, 0, range(3), "noise"), sigma)


def test_the_clean_mel_gives_the_target_for_every_row():
    mel, condition, x_t, target = points(sigma=0.7)
    v = Oracle(mel)(x_t.repeat(2, 1, 1), T, condition).v
    valid = (torch.arange(mel.shape[1]) < condition.lengths[:, None])[..., None]
    torch.testing.assert_close(v, (target * valid).repeat(2, 1, 1), atol=5e-5, rtol=0)
    end = Oracle(mel)(mel, torch.ones(3), condition).v
    assert end.isfinite().all()


@pytest.mark.parametrize("make", [small_model, voicebox])
def test_velocity_of_a_prediction_by_hand(make):
    """Two rows a condition; AudioDiT also with a time per frame."""
    _, condition, x_t, _ = points()
    rows, model = torch.cat((x_t, 2 * x_t)), make().eval()
    per_frame = torch.linspace(0, 0.9, x_t.shape[1]).expand(3, -1)
    with torch.no_grad():
        for t in (T, per_frame) if make is small_model else (T,):
            model.predicts = "velocity"
            raw = model(rows, t, condition, capture=(1,))
            model.predicts = "x"
            found = model(rows, t, condition, capture=(1,))
            left = 1 - t.repeat(2, *[1] * (t.ndim - 1)).view(6, -1, 1)
            valid = (torch.arange(x_t.shape[1]) < condition.lengths.repeat(2)[:, None])[..., None]
            torch.testing.assert_close(found.v, (raw.v - rows) / left * valid)
            assert torch.equal(found.hidden[1], raw.hidden[1])


def test_loss_and_gradients_are_those_of_jit():
    """Denoiser.forward of LTH14/JiT, with our noise, means over each clip's frames, and 1 - t on both sides of 0.05."""
    mel, condition, x_t, target = points()
    model = small_model()

    def gradients(loss: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    x, left = model(x_t, T, condition).v, (1 - T)[:, None, None].clamp_min(0.05)
    error = ((mel - x_t) / left - (x - x_t) / left).square().mean(2)
    naive = torch.stack([error[clip, :length].mean() for clip, length in enumerate(condition.lengths.tolist())])
    wanted = gradients(naive.mean())
    model.predicts = "x"
    loss = training_loss(FLOW, model(x_t, T, condition).v, target, condition.lengths, T)
    torch.testing.assert_close(loss, naive, rtol=1e-4, atol=0)
    torch.testing.assert_close(gradients(loss.mean()), wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))


def test_in_bf16_the_velocity_is_computed_in_fp32():
    mel, condition, x_t, target = points()
    v = Oracle(mel.bfloat16())(x_t, T, condition).v
    assert v.dtype == torch.float32
    rounding = (mel.bfloat16().float() - mel).abs() / (1 - T)[:, None, None]
    valid = (torch.arange(mel.shape[1]) < condition.lengths[:, None])[..., None]
    assert ((v - target).abs() * valid <= rounding + 5e-5).all()


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
@pytest.mark.parametrize("steps", [7, 100])
def test_sampling_ends_at_the_predicted_mel(steps, solver):
    """100 steps: several of them are beyond t = 0.95."""
    mel, condition = small_batch()
    flow = replace(FLOW, steps=steps, solver=solver, guidance=3.0)
    found = sample(Oracle(mel), condition, clip_keys(0, 0, range(3), "sample"), flow)
    valid = (torch.arange(mel.shape[1]) < condition.lengths[:, None])[..., None]
    torch.testing.assert_close(found * valid, mel, atol=1e-4, rtol=0)


@torch.no_grad()
def test_foga_is_the_change_of_the_velocity_with_a_block_left_out():
    """||v' - v|| / ||v|| = ||x' - x|| / ||x - x_t||: the factor 1 / (1 - t) is in both."""
    mel, condition = small_batch()
    batch = ProbeBatch(mel, condition, torch.tensor([0, 1, 0]), (0, 1, 2))
    model, t = small_model().eval(), torch.full((3,), 0.6)
    x_t, _ = flow_mix(mel, t, clip_keys(0, 0, batch.places, "foga 0.6"), 0.5)
    valid = (torch.arange(mel.shape[1]) < condition.lengths[:, None])[..., None]
    blocks, x = list(model.blocks), model(x_t, t, condition).v
    wanted = []
    for left_out in blocks:
        model.blocks = torch.nn.ModuleList(block for block in blocks if block is not left_out)
        change = (model(x_t, t, condition).v - x).flatten(1).norm(dim=1)
        wanted.append(change / ((x - x_t) * valid).flatten(1).norm(dim=1))
    model.blocks = torch.nn.ModuleList(blocks)
    model.predicts = "x"
    scores = foga(model, batch, times=(0.6,))
    torch.testing.assert_close(scores.values[:, :, 0, 0], torch.stack(wanted), atol=1e-5, rtol=1e-5)


def curves(preset: str, folder: Path, ways: tuple[tuple[int, str], ...]) -> dict[tuple[int, str], list[float]]:
    """The losses of three steps, per stage and precision."""
    found = {}
    for stage, precision in ways:
        settings = ("flow.prediction=x", "flow.times=logit_normal:0.8,1.5", f"train.precision={precision}")
        run, batches = make_run(preset, ds_values(stage), folder / f"{stage}{precision}", *settings)
        assert run.engine.module.predicts == "x"
        losses = []
        for step in range(3):
            run.step(batches, step)
            losses.append(run.metrics.flush(step + 1)["train/flow_loss"])
        found[stage, precision] = losses
    return found


def test_the_curve_depends_on_neither_ranks_nor_stage_and_bf16_follows_it(preset, tmp_path):
    ((alone, *_),) = [list(found.values()) for found in call_on_ranks(1, curves, str(preset), tmp_path, ((0, "fp32"),))]
    ways = ((0, "fp32"), (3, "fp32"), (2, "bf16"))
    for found in call_on_ranks(2, curves, str(preset), tmp_path, ways):
        assert found[0, "fp32"] == pytest.approx(alone, rel=1e-5)
        assert found[3, "fp32"] == pytest.approx(alone, rel=1e-5)
        assert found[2, "bf16"] == pytest.approx(alone, rel=0.03)


@pytest.fixture
def exported(tmp_path) -> Path:
    """An export of a model that predicts x."""
    config = load_config("demo", ["model.dim=32", "model.depth=2", "model.heads=2", "flow.prediction=x", "align.k=1"])
    config = replace(config, model=replace(config.model, n_mels=MEL_BINS, vocab=VOCAB))
    folder = tmp_path / "exported"
    folder.mkdir()
    save_file(dict(make_model(config.model).state_dict()), folder / "model.safetensors")
    save_config(config, folder / "config.yaml")
    (folder / "export.json").write_text(json.dumps({"step": 0, "weights": "averaged"}))
    return folder


def test_a_checkpoint_knows_its_prediction(exported):
    model, config = load_model(exported)
    assert (model.predicts, config.flow.prediction) == ("x", "x")
    assert check_start(config, make_model(config.model, "x"), None, exported) is None
    with pytest.raises(
        UserError, match=r"its flow\.prediction is x, and this run's is velocity: set flow\.prediction=x"
    ):
        check_start(config, make_model(config.model), None, exported)
    with pytest.raises(UserError, match=r"flow\.prediction is the checkpoint's"):
        open_checkpoint(exported, ["flow.prediction=velocity"], live=False, uses=("flow",))
    velocity = replace(config, flow=replace(config.flow, prediction="velocity"))
    assert settings_that_differ(config, velocity) == [("flow.prediction", "x", "velocity")]


def test_files_of_other_packages_are_refused(exported, tmp_path):
    with pytest.raises(UserError, match=r"--upstream: models of other packages predict the velocity"):
        export_upstream(exported, tmp_path / "theirs.pt")
    assert not (tmp_path / "theirs.pt").exists()
    model = voicebox()
    torch.save({"model": model.to_upstream(dict(model.state_dict()))["model"]}, tmp_path / "theirs.pt")
    start_from_upstream(model, tmp_path / "theirs.pt")
    model.predicts = "x"
    with pytest.raises(UserError, match=r"theirs\.pt: its model predicts the velocity: leave flow\.prediction=x out"):
        start_from_upstream(model, tmp_path / "theirs.pt")
