"""Forward and backward of a micro-batch as one CUDA graph per batch shape, or two: with and without padding. For ZeRO 0
to 2.

The graph holds the losses and torch.autograd.grad. A replay is one operation of the autograd graph, whose inputs are
the parameters. So engine.backward gets every gradient through the parameters' own hooks, and DeepSpeed reduces and
partitions it as it always does (torch.cuda.make_graphed_callables works likewise). Under ZeRO-3 weights exist only
inside a module's forward, and nothing can be captured.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn

from ..config import TrainConfig
from ..data.batch import Batch
from ..data.layout import BatchLayout, ceil_div
from ..data.plan import BatchPlan
from ..device import CapturedPrograms, CaptureError, tensors_of
from ..errors import UserError

_ALIGNMENT = 128  # elements: each gradient starts where vectorised kernels want it
_FEW_SHAPES = 8  # a graph of each is captured in the first steps, and again when layers are chosen

Losses = dict[str, torch.Tensor]
Compute = Callable[[Batch, torch.Tensor], tuple[Losses, torch.Tensor]]


def check_graphs(train: TrainConfig, device: torch.device, stage: int) -> None:
    """Raise UserError if train.graphs is set and the device or the ZeRO stage allows no CUDA graphs."""
    if train.graphs and (device.type != "cuda" or stage == 3):
        where = "under ZeRO-3, where weights exist only inside a forward" if stage == 3 else f"on a {device.type}"
        raise UserError(f"train.graphs={train.graphs}: there are no CUDA graphs {where}: set it to 0")


def count_shapes(
    replayable: bool, train: TrainConfig, device: torch.device, stage: int, plan: BatchPlan, layout: BatchLayout
) -> int:
    """Return the number of shapes of all ranks' micro-batches, where each of them is worth a CUDA graph, or 0: without
    graphs, or if shapes are many. It is the limit of GraphedLosses where train.graphs is null. replayable: of the model
    and the objective."""
    graphs = device.type == "cuda" and stage < 3 and not train.compile and not train.activation_checkpointing
    if not (replayable and graphs and plan.fixed_shapes):
        return 0
    parts = layout.parts
    shapes = {(b.frames, size) for b in plan.buckets for size in (b.clips // parts, ceil_div(b.clips, parts))}
    return len(shapes) if len(shapes) <= _FEW_SHAPES else 0


class GraphedLosses:
    """Losses of micro-batches whose forward and backward are replayed.

    parameters: returns the tensors that the losses train. limit: number of batch shapes that are captured; batches of
    further shapes run as they come. print_line: called with a line per capture. survive: called with a line if a step
    cannot be captured; all run as they come from there on. None: it is an error. All graphs share one memory pool and
    one set of gradients, as large as the weights.

    Captured or not, all gradients reach the engine by the same operation of the autograd graph, hence in the same
    order: DeepSpeed reduces them in that order, and ranks may have captured different shapes.
    """

    def __init__(
        self,
        parameters: Callable[[], Sequence[nn.Parameter]],
        limit: int,
        print_line: Callable[[str], None],
        survive: Callable[[str], None] | None = None,
    ):
        self.parameters, self.limit, self.print_line, self.survive = parameters, limit, print_line, survive
        self._programs = CapturedPrograms()
        self._shapes: set[tuple] = set()  # of the programs; one with padding and one without may have the same
        self._gradients: _FlatGradients | None = None  # where every step leaves those of the parameters
        # Of the last computation in Python: the names of its losses, and False for each parameter that had no gradient,
        # such as the heads after align.stop. A program's are those of its capture.
        self._outcome: tuple[tuple[str, ...], list[bool]] = ((), [])
        self._captured: dict[tuple, tuple[tuple[str, ...], list[bool]]] = {}

    def __call__(
        self, compute: Compute, batch: Batch, keys: torch.Tensor, variant: tuple = ()
    ) -> tuple[torch.Tensor, Losses, torch.Tensor]:
        """Return the sum of compute(batch, keys)'s losses, to differentiate; the losses; each clip's loss.

        keys (2, B) int64. variant: Aligner.variant; all graphs are captured again for another. Raises UserError if
        the step cannot be captured, without `survive`.
        """
        parameters = list(self.parameters())
        if self._programs.drop_stale(parameters, variant):
            self._gradients, self._shapes, self._captured = _FlatGradients(parameters), set(), {}

        def forward_backward(batch: Batch, keys: torch.Tensor) -> tuple[torch.Tensor, ...]:
            with torch.enable_grad():
                losses, clips = compute(batch, keys)
                gradients = torch.autograd.grad(sum(losses.values()), parameters, allow_unused=True)
            self._outcome = tuple(losses), [gradient is not None for gradient in gradients]
            self._gradients.copy(gradients)
            return clips.detach(), *(loss.detach() for loss in losses.values())

        shape = tuple(tensor.shape for tensor in tensors_of(batch, keys))
        key = shape, batch.condition.padded  # a program of clips without padding has no masks
        if key not in self._programs and len(self._shapes | {shape}) <= self.limit:
            self._capture(key, forward_backward, batch, keys)
        if key in self._programs:
            clips, *values = self._programs(key, batch, keys)
            names, has_gradient = self._captured[key]
        else:
            clips, *values = forward_backward(batch, keys)
            names, has_gradient = self._outcome
        losses = dict(zip(names, values, strict=True))
        reached = [parameter for parameter, has in zip(parameters, has_gradient, strict=True) if has]
        return _Replayed.apply(sum(losses.values()), self._gradients, has_gradient, *reached), losses, clips

    def _capture(self, key: tuple, forward_backward: Callable, batch: Batch, keys: torch.Tensor) -> None:
        try:
            self._programs.capture(key, forward_backward, batch, keys)
        except CaptureError as error:
            if self.survive is None:
                raise UserError(
                    f"train.graphs: the step cannot be captured ({error}); train.graphs=0 runs without CUDA graphs"
                ) from error
            self.limit = 0
            self._programs.drop()  # they may hold the memory that was missing
            self.survive(f"the step cannot be captured ({error}): training goes on without CUDA graphs")
            return
        self._shapes.add(key[0])
        self._captured[key] = self._outcome
        masks = "" if batch.condition.padded else " without padding"
        self.print_line(
            f"forward and backward of {tuple(batch.mel.shape)}{masks} captured, {len(self._shapes)} of at most "
            f"{self.limit} batch shapes"
        )


class _FlatGradients:
    """Gradients of parameters as views into one tensor per dtype, which one kernel scales.

    torch._foreach_mul would take a kernel per parameter: its fast path wants a factor in the gradients' own dtype, and
    bf16 would round the share of a micro-batch.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self._places, ends = [], {}
        for parameter in parameters:
            start = ends.get(parameter.dtype, 0)
            self._places.append((parameter.dtype, start, parameter.shape))
            ends[parameter.dtype] = start + -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
        device = parameters[0].device
        self._flat = {dtype: torch.zeros(end, dtype=dtype, device=device) for dtype, end in ends.items()}

    def copy(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Write the gradients of all parameters into their places; None leaves a place as it is."""
        for dtype in self._flat:
            given = zip(self._views(self._flat), gradients, strict=True)
            pairs = [(view, new) for view, new in given if new is not None and new.dtype == dtype]
            if pairs:
                torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))

    def times(self, factor: torch.Tensor) -> list[torch.Tensor]:
        """Return the gradients times `factor` (0-dim), in new memory."""
        return self._views({dtype: flat * factor for dtype, flat in self._flat.items()})

    def _views(self, flat: dict[torch.dtype, torch.Tensor]) -> list[torch.Tensor]:
        return [flat[dtype][start : start + shape.numel()].view(shape) for dtype, start, shape in self._places]


class _Replayed(torch.autograd.Function):
    """The value of losses whose gradients are known already. reached: whether each parameter has one."""

    @staticmethod
    def forward(
        ctx, total: torch.Tensor, gradients: _FlatGradients, reached: list[bool], *parameters: nn.Parameter
    ) -> torch.Tensor:
        ctx.gradients, ctx.reached = gradients, reached
        return total.clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple:
        # New memory: the next replay writes into these, while DeepSpeed may still be reducing.
        scaled = zip(ctx.gradients.times(grad), ctx.reached, strict=True)
        return None, None, None, *(gradient for gradient, reached in scaled if reached)
