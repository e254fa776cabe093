"""FoG-A to first order, for all layers from one backward: `foga-vjp`.

With the gate m_l of block l, h_l = h_{l-1} + m_l f_l, leaving the block out changes the velocity by about -dv/dm_l =
-J_l f_l, J_l the Jacobian of v to h_l. For gaussian u, <u, J_l f_l> = <J_l^T u, h_l - h_{l-1}> is gaussian with
standard deviation ||J_l f_l||, and one backward of <u, v> gives J_l^T u for every l. So sqrt(pi / 2) |<J_l^T u, f_l>| /
||v|| is FoG-A's first-order term in expectation over u. It misses the later blocks' response beyond first order, and is
noisy in a single draw. A layer of several parts has the sum of their inner products.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn

from ..kernels import philox_normal
from ..models.backbone import Backbone
from .calls import block_name, name_arguments, positional_names
from .points import ProbeBatch, ProbePoints, clip_times, evaluation_mode
from .scores import BatchScores
from .states import choose_branch, choose_state, updates
from .trees import tensors


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
        running: list[tuple[int, torch.Tensor, torch.Tensor]] = []  # layer, what it adds, what it hands on
        handles = [
            part.register_forward_hook(partial(self._keep, running.append, number), with_kwargs=True)
            for number, layer in enumerate(self.model.layers)
            for part in layer.parts
        ]
        try:
            with torch.enable_grad():
                x_t = self.points.x_t(batch, time, draw).detach().requires_grad_()
                v = self.model(x_t, clip_times(batch, time), batch.condition).v.float()
                u = philox_normal(self.points.keys(batch, draw, f"foga-vjp {time:g}"), v[0].numel()).view_as(v)
                outputs = [output for _, _, output in running]
                gradients = torch.autograd.grad((u * v).sum(), outputs, materialize_grads=True)
        finally:
            for handle in handles:
                handle.remove()
        norm = v.detach().flatten(1).norm(dim=1)
        inner = norm.new_zeros(len(self.model.layers), len(norm))
        for (number, added, _), gradient in zip(running, gradients, strict=True):
            inner[number] += (gradient.float() * added.float()).flatten(1).sum(1)
        return math.sqrt(math.pi / 2) * inner.abs() / (norm + 1e-8), norm

    def _keep(self, append: Callable, number: int, part: nn.Module, args: tuple, kwargs: dict, out) -> None:
        """A forward hook: note what a part adds to the residual, and the tensor that it hands on, as gates do."""
        names = dict(enumerate(positional_names(part.forward)))
        inputs = dict(tensors(name_arguments(list(names.values()), args, kwargs)))
        outputs, name = dict(tensors(out)), block_name(number, part)
        ins, outs = updates(inputs, outputs)
        if self.model.kind == "branch":
            handed_on = added = outputs[choose_branch(name, outputs, outs)]
        else:
            state = names.get(self.model.state, self.model.state)
            before, after = choose_state(name, inputs, outputs, state, ins, outs, check_streams=False)
            handed_on = outputs[after]
            added = handed_on - inputs[before]
        append((number, added.detach(), handed_on))
