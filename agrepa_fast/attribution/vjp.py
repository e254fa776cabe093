"""FoG-A to first order, for all layers from one backward: `foga-vjp`.

With the gate m_l of block l, h_l = h_{l-1} + m_l f_l, leaving the block out changes the velocity by about -dv/dm_l =
-J_l f_l, J_l the Jacobian of v to h_l. For gaussian u, <u, J_l f_l> = <J_l^T u, h_l - h_{l-1}> is gaussian with
standard deviation ||J_l f_l||, and one backward of <u, v> gives J_l^T u for every l. So sqrt(pi / 2) |<J_l^T u, f_l>| /
||v|| is FoG-A's first-order term in expectation over u. It misses what later blocks do beyond first order, and is noisy
in a single draw.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn as nn

from ..config import TIMES
from ..kernels import philox_normal
from .foga import Measured, ProbeBatch, noised, probe_keys, undisturbed


class FogaVjp:
    """The estimate for one model like AudioDiT, again and again; parameters as foga. It runs L block forwards and one
    backward for each time and draw, and leaves no gradient behind."""

    def __init__(
        self, model: nn.Module, *, times: Sequence[float] = TIMES, draws: int = 1, sigma: float = 0.5, seed: int = 0
    ):
        self.model, self.times, self.draws, self.sigma, self.seed = model, tuple(times), draws, sigma, seed

    def launch(self, batch: ProbeBatch) -> Measured:
        """values (L, C, times, draws), floor 0, and which velocities are zero, on the batch's device."""
        values, silent = [], None
        with undisturbed(self.model):
            for t in self.times:
                for draw in range(self.draws):
                    value, norm = self._one(batch, t, draw)
                    values.append(value)
                    silent = norm == 0 if silent is None else silent | (norm == 0)
        values = torch.stack(values, -1).unflatten(-1, (len(self.times), self.draws))
        return Measured(values, torch.zeros_like(values[0, :, 0, 0]), silent)

    def _one(self, batch: ProbeBatch, t: float, draw: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(L, C) scores and (C,) norms of the velocity at one time and draw."""
        branches, outputs, handles = [], [], []

        def keep(_module, args, out) -> None:
            outputs.append(out)
            branches.append((out - args[0]).detach())

        for block in self.model.blocks:
            handles.append(block.register_forward_hook(keep))
        try:
            with torch.enable_grad():
                x_t = noised(batch, t, self.sigma, self.seed, draw).requires_grad_()
                v = self.model(x_t, torch.full_like(x_t[:, 0, 0], t).detach(), batch.condition).v.float()
                keys = probe_keys(self.seed, draw, batch.places, f"foga-vjp {t:g}", v.device)
                u = philox_normal(keys, v[0].numel()).view_as(v)
                gradients = torch.autograd.grad((u * v).sum(), outputs)
        finally:
            for handle in handles:
                handle.remove()
        norm = v.detach().flatten(1).norm(dim=1)
        inner = [(g.float() * f.float()).sum((1, 2)) for g, f in zip(gradients, branches, strict=True)]
        return math.sqrt(math.pi / 2) * torch.stack(inner).abs() / (norm + 1e-8), norm
