"""Forward and backward of a micro-batch as one CUDA graph per batch shape, for ZeRO 0 to 2.

The graph holds the losses and torch.autograd.grad; a replay stands in the autograd graph as one operation whose inputs
are the parameters. So engine.backward gets every gradient through the parameters' own hooks, and DeepSpeed reduces and
partitions as it always does (torch.cuda.make_graphed_callables works likewise). Under ZeRO-3 weights are there only
inside a module's forward, and nothing can be captured.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn

from ..attribution.foga import captured
from ..config import UserError
from ..data.stream import Batch

Losses = dict[str, torch.Tensor]


class GraphedLosses:
    """`compute(batch, keys)`, replayed. keys (2, C) int64: of the clips' draws and noise.

    limit: batch shapes that are captured; later ones run as they come. say: told of every capture. parameters: what
    the losses train. All graphs share one memory pool and one set of gradients, as large as the weights.
    """

    def __init__(
        self,
        compute: Callable[[Batch, torch.Tensor], Losses],
        parameters: Callable[[], Sequence[nn.Parameter]],
        limit: int,
        say: Callable[[str], None],
    ):
        self.compute, self.parameters, self.limit, self.say = compute, parameters, limit, say
        self._programs: dict[tuple, _Program] = {}
        self._captured_at: tuple = ()

    def __call__(self, batch: Batch, keys: torch.Tensor, variant: tuple = ()) -> tuple[torch.Tensor, Losses]:
        """The sum to differentiate, and the losses. variant: what else the work depends on: the layers aligned."""
        parameters = list(self.parameters())
        here = (variant, tuple(parameter.data_ptr() for parameter in parameters))
        if here != self._captured_at:  # other layers are aligned, or weights have moved: a checkpoint was loaded
            self._programs, self._captured_at = {}, here
            self._pool, self._gradients = torch.cuda.graph_pool_handle(), [torch.zeros_like(p) for p in parameters]
        shape = tuple(tensor.shape for tensor in (*_tensors(batch), keys))
        if shape not in self._programs:
            if len(self._programs) >= self.limit:
                losses = self.compute(batch, keys)
                return sum(losses.values()), losses
            program = _Program(self.compute, batch, keys, parameters, self._gradients)
            program.capture(self._pool)
            self._programs[shape] = program
            self.say(
                f"forward and backward of {tuple(batch.mel.shape)} captured, {len(self._programs)} of at most "
                f"{self.limit} CUDA graphs"
            )
        return self._programs[shape](batch, keys)


class _Program:
    """One batch shape's work, on buffers that stay where they are."""

    def __init__(self, compute, batch: Batch, keys: torch.Tensor, parameters: list, gradients: list):
        self.compute, self.parameters = compute, parameters
        self.batch, self.keys = batch.map(torch.clone), keys.clone()
        self.gradients: list[torch.Tensor | None] = gradients
        self.losses: Losses = {}
        self.replay: Callable[[], None] = self._run

    def capture(self, pool) -> None:
        try:
            self.replay = captured(self._run, pool)
        except ValueError as error:
            raise UserError(f"train.graphs: {error}; train.graphs=0 runs without CUDA graphs") from error

    def _run(self) -> None:
        with torch.enable_grad():
            losses = self.compute(self.batch, self.keys)
            found = torch.autograd.grad(sum(losses.values()), self.parameters, allow_unused=True)
        # What a loss does not reach has no gradient, as without graphs: the heads after align.stop.
        self.gradients = [None if g is None else kept for g, kept in zip(found, self.gradients, strict=True)]
        for gradient, kept in zip(found, self.gradients, strict=True):
            if gradient is not None:
                kept.copy_(gradient)
        for name, loss in losses.items():
            self.losses.setdefault(name, torch.zeros_like(loss)).copy_(loss.detach())

    def __call__(self, batch: Batch, keys: torch.Tensor) -> tuple[torch.Tensor, Losses]:
        for kept, given in zip((*_tensors(self.batch), self.keys), (*_tensors(batch), keys), strict=True):
            kept.copy_(given)
        self.replay()
        reached = [(p, g) for p, g in zip(self.parameters, self.gradients, strict=True) if g is not None]
        parameters, gradients = zip(*reached, strict=True)
        losses = {name: loss.clone() for name, loss in self.losses.items()}
        return _Replayed.apply(sum(losses.values()), gradients, *parameters), losses


class _Replayed(torch.autograd.Function):
    """The value of losses whose gradients are known already."""

    @staticmethod
    def forward(
        ctx, total: torch.Tensor, gradients: tuple[torch.Tensor, ...], *parameters: nn.Parameter
    ) -> torch.Tensor:
        ctx.gradients = gradients
        return total.clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple:
        # New tensors: the buffers are written again by the next replay, while DeepSpeed may still be reducing these.
        return None, None, *torch._foreach_mul(ctx.gradients, grad.to(torch.float32))


def _tensors(batch: Batch) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    batch.map(lambda tensor: found.append(tensor) or tensor)
    return found
