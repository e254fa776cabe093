"""How much a model's velocity changes in every gate variant: the core of FoG-A, for our models and others."""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn

from ..device import DeviceCopies
from ..kernels import velocity_change
from .gate_plan import GatePlan, prefix_order, single_ablations
from .gates import multi_gate
from .rows import rounding_limit


class Variants:
    """Gate variants (V, L) of a model, planned once. The first is the whole model; None: single ablations.

    parts: the number of modules that each of the L gates leaves out together. Raises ValueError if the first row of
    gates ablates something.
    """

    def __init__(self, gates: torch.Tensor | None, parts: Sequence[int]):
        gates = single_ablations(len(parts)) if gates is None else gates
        if not (gates[0] == 1).all():
            raise ValueError("the first row of gates is the whole model: all ones")
        order = prefix_order(gates)
        if gates.shape[1] != len(parts):
            raise ValueError(f"gates {tuple(gates.shape)} must be (variants, {len(parts)}): one column a layer")
        self.gates = gates = gates.repeat_interleave(torch.tensor(parts, device=gates.device), 1)
        self.plan = GatePlan(gates[order])
        self.count = len(gates)
        self._places = DeviceCopies(order.argsort()[1:] - 1)  # of the ablated variants, as given, among the sorted ones

    def changes(
        self,
        run: Callable[[int], torch.Tensor],
        blocks: Sequence[nn.Module],
        lengths: torch.Tensor | None = None,
        **gating,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return every ablated variant's relative change, (V - 1, C) fp32, and the whole model's velocity (C, T, M).

        run: called with V, runs the model on V * C rows, variant-major, and returns their velocities (V * C, T, M).
        lengths: (C,) valid frames; None: all are. gating: options of multi_gate.
        """
        with multi_gate(blocks, self.plan, **gating):
            v = run(self.count).unflatten(0, (self.count, -1))
        return velocity_change(v[1:], v[0], lengths)[self._places.on(v.device)], v[0]


def check_floor(floor: torch.Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError if the whole model computes another velocity among its variants than alone.

    floor: (C,) relative change between the two. dtype: of the model. Call it after a look at the blocks themselves.
    """
    if floor.max() > rounding_limit(dtype):
        raise ValueError("the model's rows depend on each other outside of its blocks: it cannot be gated exactly")
