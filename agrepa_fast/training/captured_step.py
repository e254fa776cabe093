"""Forward and backward of a micro-batch as one CUDA graph per batch shape, for ZeRO 0 to 2.

The graph holds the losses and torch.autograd.grad; a replay stands in the autograd graph as one operation whose inputs
are the parameters. So engine.backward gets every gradient through the parameters' own hooks, and DeepSpeed reduces and
partitions as it always does (torch.cuda.make_graphed_callables works likewise). Under ZeRO-3 weights are there only
inside a module's forward, and nothing can be captured.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn

from ..config import TrainConfig
from ..data.batches import Batch
from ..device import captured
from ..errors import UserError

Losses = dict[str, torch.Tensor]
Compute = Callable[[Batch, torch.Tensor], tuple[Losses, torch.Tensor]]


def check_graphs(train: TrainConfig, device: torch.device, stage: int) -> None:
    """Raise UserError where train.graphs cannot be."""
    if train.graphs and (device.type != "cuda" or stage == 3):
        where = "under ZeRO-3, where weights are there only inside a forward" if stage == 3 else f"on a {device.type}"
        raise UserError(f"train.graphs={train.graphs}: there are no CUDA graphs {where}: set it to 0")


class GraphedLosses:
    """The losses of micro-batches, replayed.

    limit: batch shapes that are captured; later ones run as they come. say: told of every capture. parameters: what
    the losses train. All graphs share one memory pool and one set of gradients, as large as the weights.
    """

    def __init__(
        self,
        parameters: Callable[[], Sequence[nn.Parameter]],
        limit: int,
        say: Callable[[str], None],
    ):
        self.parameters, self.limit, self.say = parameters, limit, say
        self._programs: dict[tuple, _Program] = {}
        self._captured_at: tuple = ()

    def __call__(
        self, compute: Compute, batch: Batch, keys: torch.Tensor, variant: tuple = ()
    ) -> tuple[torch.Tensor, Losses, torch.Tensor]:
        """The sum of compute(batch, keys)'s losses, to differentiate; the losses; each clip's. keys (2, B) int64.
        variant: what else the work depends on: the layers that are aligned."""
        parameters = list(self.parameters())
        here = (variant, tuple(parameter.data_ptr() for parameter in parameters))
        if here != self._captured_at:  # other layers are aligned, or weights have moved: a checkpoint was loaded
            self._programs, self._captured_at = {}, here
            self._pool, self._gradients = torch.cuda.graph_pool_handle(), [torch.zeros_like(p) for p in parameters]
        shape = tuple(tensor.shape for tensor in (*_tensors(batch), keys))
        if shape not in self._programs:
            if len(self._programs) >= self.limit:
                losses, clips = compute(batch, keys)
                return sum(losses.values()), losses, clips
            program = _Program(compute, batch, keys, parameters, self._gradients)
            program.capture(self._pool)
            self._programs[shape] = program
            self.say(
                f"forward and backward of {tuple(batch.mel.shape)} captured, {len(self._programs)} of at most "
                f"{self.limit} CUDA graphs"
            )
        return self._programs[shape](batch, keys)


class _Program:
    """One batch shape's work, on buffers that stay where they are."""

    def __init__(self, compute: Compute, batch: Batch, keys: torch.Tensor, parameters: list, gradients: list):
        self.compute, self.parameters = compute, parameters
        self.batch, self.keys = batch.map(torch.clone), keys.clone()
        self.gradients: list[torch.Tensor | None] = gradients
        self.losses: Losses = {}
        self.clips = batch.mel.new_zeros(len(batch.mel), dtype=torch.float32)
        self.replay: Callable[[], None] = self._run

    def capture(self, pool) -> None:
        try:
            self.replay = captured(self._run, pool)
        except ValueError as error:
            raise UserError(f"train.graphs: {error}; train.graphs=0 runs without CUDA graphs") from error

    def _run(self) -> None:
        with torch.enable_grad():
            losses, clips = self.compute(self.batch, self.keys)
            found = torch.autograd.grad(sum(losses.values()), self.parameters, allow_unused=True)
        # What a loss does not reach has no gradient, as without graphs: the heads after align.stop.
        self.gradients = [None if g is None else kept for g, kept in zip(found, self.gradients, strict=True)]
        for gradient, kept in zip(found, self.gradients, strict=True):
            if gradient is not None:
                kept.copy_(gradient)
        self.clips.copy_(clips.detach())
        for name, loss in losses.items():
            self.losses.setdefault(name, torch.zeros_like(loss)).copy_(loss.detach())

    def __call__(self, batch: Batch, keys: torch.Tensor) -> tuple[torch.Tensor, Losses, torch.Tensor]:
        for kept, given in zip((*_tensors(self.batch), self.keys), (*_tensors(batch), keys), strict=True):
            kept.copy_(given)
        self.replay()
        reached = [(p, g) for p, g in zip(self.parameters, self.gradients, strict=True) if g is not None]
        parameters, gradients = zip(*reached, strict=True)
        losses = {name: loss.clone() for name, loss in self.losses.items()}
        return _Replayed.apply(sum(losses.values()), gradients, *parameters), losses, self.clips.clone()


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
