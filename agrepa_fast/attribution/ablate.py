"""FoG-A of any model, at given inputs."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn as nn

from ..config import DOMAINS
from ..kernels import velocity_change
from .calls import Trace, block_name, trace_calls
from .gate_plan import GatePlan
from .gates import multi_gate
from .points import evaluation_mode
from .rows import RowAxis, rounding_limit, row_axis
from .scores import BatchScores, LayerScores
from .trees import describe, replaced, tensors
from .variants import Variants, check_floor

VERIFY = 4  # layers that are also computed in a forward of their own
OUTPUTS = ("sample", "v", "velocity", "last_hidden_state")  # names of a velocity among other outputs


@torch.no_grad()
def ablate(
    model: nn.Module,
    inputs: dict,
    blocks: Sequence[nn.Module],
    *,
    gates: torch.Tensor | None = None,
    kind: str = "block",
    row_arguments: Sequence[str | int] | None = None,
    state: str | None = None,
    velocity: str | None = None,
    per_call: bool = False,
    verify: int | None = VERIFY,
    max_rows: int | None = None,
    domain: str = "audio",
) -> LayerScores:
    """Return how much model(**inputs) changes when each block is left out, in all of its calls.

    inputs: keyword arguments. The first floating tensor of two dimensions has C rows, and every tensor with C rows, in
    tuples, mappings and dataclasses too, is repeated for the variants. velocity: the field of the model's output
    that it is; None: the output, the first of a tuple, one of OUTPUTS, or the only tensor.

    per_call: a layer is one call of a block, not a block: a stack of 4 blocks that runs twice has 8 layers, named
    1.call1, ..., 4.call1, 1.call2, ... in the order of running. Name every block once.

    A plain forward shows how blocks are called. What they are given and return for the whole model is compared with it
    at every call. verify: so many variants, spread over the layers, are also computed in a forward of their own and
    compared; None: all, and so where the model reads values of tensors in Python, since it may decide by them.

    blocks, gates, kind, row_arguments, state, max_rows: as in multi_gate, but the first row of gates is all ones.
    domain: of all clips.

    Raises ValueError as foga and multi_gate do, if the inputs have no rows, if a block is named twice, or if a variant
    has another score in a forward of its own.
    """
    _check_model(model, blocks)
    clips = _count_clips(inputs)
    with evaluation_mode(model):
        trace, out = trace_calls(lambda: model(**_repeated(inputs, clips, 1)), blocks, clips, kind=kind, state=state)
        field = find_velocity(out, velocity)
        velocities = _Velocity(field, dict(tensors(out))[field], clips)
        names: tuple[str, ...] = ()
        if per_call:
            trace, blocks, names = _layer_per_call(trace, blocks)
        variants = Variants(gates, [1] * len(blocks))

        def run(count: int) -> torch.Tensor:
            return velocities.of(model(**_repeated(inputs, clips, count)), count)

        options = {"kind": kind, "row_arguments": row_arguments, "state": state, "max_rows": max_rows, "trace": trace}
        changes, base = variants.changes(run, blocks, **options)
        floor = velocity_change(velocities.of(out, 1)[None], base)[0]
        scores = BatchScores(changes[..., None, None], floor, ~base.flatten(1).any(1))
        domains = torch.full((clips,), DOMAINS.index(domain))
        names = names if gates is None else ()
        checked = scores.of_clips(range(clips), domains, (float("nan"),), recipe="given", names=names)
        check_floor(checked.floor, base.dtype)
        for layer in _spread(variants.count - 1, None if trace.reads_values else verify):
            with multi_gate(blocks, GatePlan(variants.gates[layer + 1 : layer + 2]), **options):
                change = velocity_change(run(1)[None], base)[0]
            _check_score(layer, changes[layer], change, rounding_limit(base.dtype))
    return checked


def _check_model(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    if meta := next((name for name, parameter in model.named_parameters() if parameter.is_meta), None):
        raise ValueError(f"the model's weights have no values ({meta} is on the meta device): load them first")
    for number, block in enumerate(blocks):
        if (first := next(place for place, other in enumerate(blocks) if other is block)) < number:
            raise ValueError(
                f"{block_name(number, block)} is block {first + 1} again: name it once, to leave it out of all its "
                "calls, or to measure every call apart with --per-call (per_call=True in Python)"
            )


def _count_clips(inputs: dict) -> int:
    """Return C. Raises ValueError if the inputs have no rows."""
    found = [value for _, value in tensors(inputs) if value.ndim]
    sequences = [value for value in found if value.ndim > 1]
    floats = [value for value in sequences if value.is_floating_point()]
    first = next(iter(floats or sequences or found), None)
    if first is None or not len(first):
        raise ValueError("the inputs hold no tensor with a row for every clip")
    return len(first)


def _repeated(inputs: dict, clips: int, variants: int) -> dict:
    """Return the inputs with copies of their rows for every variant, so that a model may write into them."""
    rows = {path: value for path, value in tensors(inputs) if value.ndim and len(value) == clips}
    return replaced(inputs, {path: value.repeat(variants, *[1] * (value.ndim - 1)) for path, value in rows.items()})


def _layer_per_call(trace: Trace, blocks: Sequence[nn.Module]) -> tuple[Trace, list[nn.Module], tuple[str, ...]]:
    """Return the trace with a block for every call, these blocks, and the names of the layers."""
    ran, names = [call.block for call in trace.calls], []
    for place, number in enumerate(ran):
        names.append(f"{number + 1}.call{ran[: place + 1].count(number)}")
    calls = [replace(call, block=place) for place, call in enumerate(trace.calls)]
    return replace(trace, calls=calls), [blocks[number] for number in ran], tuple(names)


def find_velocity(out, name: str | None) -> tuple:
    """Return the path of the velocity in a model's output.

    name: of its field; None: found. Raises ValueError, listing the fields, if it must be named.
    """
    found = {path: value for path, value in tensors(out) if value.is_floating_point() and value.ndim}
    listed = ", ".join(describe(path) for path in found if path) or "nothing"
    if name is not None:
        if chosen := next((path for path in found if path and name in (str(path[0]), describe(path))), None):
            return chosen
        raise ValueError(f"the model returns no tensor {name!r}, but {listed}")
    paths = {str(path[0]) if path else "": path for path in reversed(found)}
    if chosen := next((paths[name] for name in OUTPUTS if name in paths), None):
        return chosen
    if len(found) == 1 or (found and isinstance(out, tuple | list)):
        return next(iter(found))
    raise ValueError(
        f"the model returns {type(out).__name__} of {listed}: name its velocity (--velocity NAME, velocity=NAME in "
        "Python)"
    )


class _Velocity:
    """The velocity in a model's outputs. field: where it stands. alone: of C clips."""

    def __init__(self, field: tuple, alone: torch.Tensor, clips: int):
        self.field, self.alone, self.clips = field, alone, clips
        self.axis = RowAxis()

    def of(self, out, variants: int) -> torch.Tensor:
        """Return (variants * C, 1, elements). Raises ValueError if rows of the whole model are not what they were."""
        value = dict(tensors(out)).get(self.field)
        if value is None:
            raise ValueError(f"the model returns no {describe(self.field)!r} with the rows of several variants")
        if variants > 1:
            self.axis = self._find_axis(value, variants)
        dim = self.axis.dim + 2  # of the rows among (variants, ..., outer, rows, ...)
        by_clip = self.axis.split(value, variants).unflatten(dim, (self.clips, -1)).movedim(dim, 1)
        return by_clip.reshape(variants * self.clips, 1, -1)

    def _find_axis(self, value: torch.Tensor, variants: int) -> RowAxis:
        try:
            axis = row_axis(self.alone, value, variants, self.clips)
        except ValueError as error:
            raise ValueError(
                "the model's rows depend on each other outside of its blocks: it cannot be gated exactly "
                f"(its output {error})"
            ) from error
        if axis is None or self.alone.shape[axis.dim] % self.clips:
            raise ValueError(f"the model's output {tuple(value.shape)} has no row per clip")
        return axis


def _spread(layers: int, count: int | None) -> list[int]:
    """Return `count` of the layers, spread from the first to the last."""
    count = layers if count is None else min(count, layers)
    return torch.linspace(0, layers - 1, count).round().int().unique().tolist() if count else []


def _check_score(layer: int, shared: torch.Tensor, own: torch.Tensor, limit: float) -> None:
    if not torch.allclose(shared, own, rtol=limit, atol=limit):
        raise ValueError(
            f"layer {layer + 1} scores {float(shared.mean()):.4g} with shared rows and {float(own.mean()):.4g} in a "
            "forward of its own: the model's rows depend on each other, on chance, or on state outside of its blocks"
        )
