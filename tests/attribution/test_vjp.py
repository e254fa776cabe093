"""FoG-A to first order, by one backward."""

import pytest
import torch

from agrepa_fast import foga
from agrepa_fast.attribution.points import ProbePoints
from agrepa_fast.attribution.vjp import FogaVjp
from agrepa_fast.kernels import philox_normal
from agrepa_fast.seeds import clip_keys

from ..testing import small_model


class TestVjp:
    @pytest.mark.parametrize("t", [0.2, 0.7])
    def test_one_backward_gives_every_layers_derivative_along_one_direction(self, t, probe_batch):
        """|<u, dv/dm_l>| sqrt(pi/2) / ||v||, the derivative to each block's gate by central differences in fp64."""
        model = small_model().double()
        batch = probe_batch._replace(
            mel=probe_batch.mel.double(),
            condition=probe_batch.condition.map(lambda x: x.double() if x.is_floating_point() else x),
        )
        measured = FogaVjp(model, ProbePoints((t,))).launch(batch)
        x_t, times = ProbePoints().x_t(batch, t, 0), torch.full((3,), t, dtype=torch.float64)
        u = philox_normal(clip_keys(0, 0, batch.places, f"foga-vjp {t:g}"), 37 * 12).view(3, 37, 12)
        with torch.no_grad():
            v = model(x_t, times, batch.condition).v
            for layer, block in enumerate(model.blocks):
                either = []
                for gate in (1 + 1e-4, 1 - 1e-4):
                    handle = block.register_forward_hook(lambda _, args, out, g=gate: args[0] + g * (out - args[0]))
                    either.append(model(x_t, times, batch.condition).v)
                    handle.remove()
                along = (u * (either[0] - either[1]) / 2e-4).sum((1, 2)).abs()
                wanted = along * (torch.pi / 2) ** 0.5 / v.flatten(1).norm(dim=1)
                torch.testing.assert_close(measured.values[layer, :, 0, 0].double(), wanted, rtol=1e-4, atol=1e-5)

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
