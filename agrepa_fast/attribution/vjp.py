"""FoG-A to first order, for all layers from one backward: `foga-vjp`.

With the gate m_l of block l, h_l = h_{l-1} + m_l f_l, leaving the block out changes the velocity by about -dv/dm_l =
-J_l f_l, J_l the Jacobian of v to h_l. For gaussian u, <u, J_l f_l> = <J_l^T u, h_l - h_{l-1}> is gaussian with
standard deviation ||J_l f_l||, and one backward of <u, v> gives J_l^T u for every l. So sqrt(pi / 2) |<J_l^T u, f_l>| /
||v|| is FoG-A's first-order term in expectation over u. It misses the later blocks' response beyond first order, and is
noisy in a single draw. A layer of several parts has the sum of their inner products.
"""

import math
from itertools import islice

import torch

from ..kernels import philox_normal
from ..models.backbone import Backbone
from .points import ProbeBatch, ProbePoints, clip_times, evaluation_mode
from .scores import BatchScores


class FogaVjp:
    """The estimate for a backbone, again and again with its live weights.

    A launch runs L block forwards and one backward per time and draw, and leaves no gradient behind.
    """

    def __init__(self, model: Backbone, points: ProbePoints):
        self.model, self.points = model, points

    def launch(self, batch: ProbeBatch) -> BatchScores:
        """Queue the measurement of a batch in evaluation mode. Its floor is 0: nothing is ablated."""
        values, silent = [], []
        with evaluation_mode(self.model):
            for time, draw in self.points:
                value, norm = self._estimate(batch, time, draw)
                values.append(value)
                silent.append(norm == 0)
        stacked = self.points.stack(values)
        return BatchScores(stacked, torch.zeros_like(stacked[0, :, 0, 0]), torch.stack(silent).any(0))

    def _estimate(self, batch: ProbeBatch, time: float, draw: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scores (L, C) and the norms of the velocity (C,) at one time and draw."""
        branches, outputs, handles = [], [], []

        def keep(_module, args, kwargs, out) -> None:
            out = out if isinstance(out, torch.Tensor) else out[0]
            state = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)
            outputs.append(out)
            branches.append((out if self.model.kind == "branch" else out - state).detach())

        parts = [len(layer.parts) for layer in self.model.layers]
        for layer in self.model.layers:
            handles += [part.register_forward_hook(keep, with_kwargs=True) for part in layer.parts]
        try:
            with torch.enable_grad():
                x_t = self.points.x_t(batch, time, draw).detach().requires_grad_()
                v = self.model(x_t, clip_times(batch, time), batch.condition).v.float()
                u = philox_normal(self.points.keys(batch, draw, f"foga-vjp {time:g}"), v[0].numel()).view_as(v)
                gradients = torch.autograd.grad((u * v).sum(), outputs)
        finally:
            for handle in handles:
                handle.remove()
        norm = v.detach().flatten(1).norm(dim=1)
        inner = [(g.float() * f.float()).flatten(1).sum(1) for g, f in zip(gradients, branches, strict=True)]
        of_layers = torch.stack([torch.stack(of_layer).sum(0) for of_layer in _split(inner, parts)])
        return math.sqrt(math.pi / 2) * of_layers.abs() / (norm + 1e-8), norm


def _split(values: list[torch.Tensor], sizes: list[int]) -> list[list[torch.Tensor]]:
    remaining = iter(values)
    return [list(islice(remaining, size)) for size in sizes]
