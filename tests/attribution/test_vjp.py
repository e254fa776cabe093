"""FoG-A to first order, by one backward."""

import pytest
import torch
import torch.nn as nn

from agrepa_fast import Backbone, Layer, foga
from agrepa_fast.attribution.points import ProbePoints
from agrepa_fast.attribution.vjp import FogaVjp
from agrepa_fast.kernels import philox_normal
from agrepa_fast.models.voicebox import Voicebox
from agrepa_fast.seeds import clip_keys

from ..testing import MEL_BINS, VOCAB, small_model


class UNet(Backbone):
    """Two branches in each stage, the middle one at half of the frames, and a skip beside it."""

    kind, row_arguments = "branch", ()

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(MEL_BINS, 16), nn.Linear(32, MEL_BINS)
        self.stages = nn.ModuleList(
            nn.ModuleList(nn.Sequential(nn.Tanh(), nn.Linear(16, 16)) for _ in "ab") for _ in "123"
        )

    @property
    def layers(self):
        return [Layer(tuple(stage), 16) for stage in self.stages]

    def velocity(self, x_t, t, condition):
        first, middle, last = self.stages
        x = skip = run_stage(first, self.enter(x_t) + t[:, None, None])
        x = run_stage(middle, x[:, ::2]).repeat_interleave(2, dim=1)[:, : x_t.shape[1]]
        return self.leave(torch.cat((run_stage(last, x), skip), dim=-1)).tanh()


def run_stage(stage: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    for branch in stage:
        x = x + branch(x)
    return x


class StateInTheMiddle(Backbone):
    """Blocks that take their state second, by keyword, and return it second."""

    row_arguments, state = ("time",), "hidden"

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(16, 16)

        def forward(self, time, hidden):
            return time.sum(), hidden + self.mix(hidden * time).tanh()

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(MEL_BINS, 16), nn.Linear(16, MEL_BINS)
        self.blocks = nn.ModuleList(self.Block() for _ in "123")

    @property
    def layers(self):
        return [Layer((block,), 16) for block in self.blocks]

    def velocity(self, x_t, t, condition):
        hidden = self.enter(x_t)
        time = t[:, None, None].expand_as(hidden).cos()
        for block in self.blocks:
            _, hidden = block(time=time, hidden=hidden)
        return self.leave(hidden)


def audio_dit():
    return small_model()


def voicebox(**options):
    model = Voicebox(MEL_BINS, VOCAB, 16, depth=4, heads=2, dim_head=8, token_dim=8, registers=2, skips=True, **options)
    for name, parameter in model.named_parameters():
        if "to_gamma" in name or "to_beta" in name:  # norms that depend on the time
            nn.init.normal_(parameter, std=0.1)
    return model


def papers_voicebox():
    return voicebox(position="alibi", time="token", ffn="gelu", qk_norm=False)


def gated(kind: str, gate: float):
    """A forward hook that gates a part: what it adds to the residual, times the gate."""

    def hook(part, args, kwargs, out):
        if kind == "branch":
            return gate * out
        if isinstance(out, tuple):
            return out[0], torch.lerp(kwargs["hidden"], out[1], gate)
        return torch.lerp(args[0], out, gate)

    return hook


class TestVjp:
    @pytest.mark.parametrize("t", [0.2, 0.7])
    @pytest.mark.parametrize("make", [audio_dit, voicebox, papers_voicebox, UNet, StateInTheMiddle])
    def test_one_backward_gives_every_layers_derivative_along_one_direction(self, make, t, probe_batch):
        """|<u, dv/dm_l>| sqrt(pi/2) / ||v||, the derivative to each layer's gate by central differences in fp64."""
        torch.manual_seed(0)
        model = make().double().eval()
        batch = probe_batch._replace(
            mel=probe_batch.mel.double(),
            condition=probe_batch.condition.map(lambda x: x.double() if x.is_floating_point() else x),
        )
        measured = FogaVjp(model, ProbePoints((t,))).launch(batch).values[:, :, 0, 0].double()
        assert measured.shape == (len(model.layers), 3)
        x_t, times = ProbePoints().x_t(batch, t, 0), torch.full((3,), t, dtype=torch.float64)
        u = philox_normal(clip_keys(0, 0, batch.places, f"foga-vjp {t:g}"), 37 * 12).view(3, 37, 12)
        with torch.no_grad():
            v = model(x_t, times, batch.condition).v
            for number, layer in enumerate(model.layers):
                either = []
                for gate in (1 + 1e-4, 1 - 1e-4):
                    hook = gated(model.kind, gate)
                    handles = [part.register_forward_hook(hook, with_kwargs=True) for part in layer.parts]
                    either.append(model(x_t, times, batch.condition).v)
                    for handle in handles:
                        handle.remove()
                along = (u * (either[0] - either[1]) / 2e-4).sum((1, 2)).abs()
                wanted = along * (torch.pi / 2) ** 0.5 / v.flatten(1).norm(dim=1)
                assert wanted.max() > 1e-3
                torch.testing.assert_close(measured[number], wanted, rtol=1e-4, atol=1e-5)

    def test_the_mean_over_draws_is_foga_where_blocks_are_weak(self, probe_batch):
        """To first order, and blocks that do little: within the noise of 200 draws."""
        model = small_model(awake=False)
        for block in model.blocks:
            torch.nn.init.normal_(block.modulation.weight, std=0.01)
        exact = foga(model, probe_batch, times=(0.5,)).values[:, :, 0, 0]
        draws = FogaVjp(model, ProbePoints((0.5,), draws=200)).launch(probe_batch).values[:, :, 0]
        # every draw has another x_t as well; the exact score differs little between them
        torch.testing.assert_close(draws.mean(-1), exact, rtol=0.25, atol=0)

    def test_no_gradient_no_hook_and_no_mode_is_left(self, probe_batch):
        model = small_model(dropout=0.5).train()
        a, b = (FogaVjp(model, ProbePoints((0.5,))).launch(probe_batch) for _ in range(2))
        assert torch.equal(a.values, b.values)
        assert model.training
        assert all(p.grad is None for p in model.parameters())
        assert all(not block._forward_hooks for block in model.blocks)
