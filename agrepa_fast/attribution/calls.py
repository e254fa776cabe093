"""How a model calls its blocks: their order, their arguments and their results, recorded in one plain forward."""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

from .rows import same
from .states import Tensors, TracedCall, find_branches, find_states
from .trees import Path, describe, tensors

FOLLOW = "name blocks that follow each other"


def positional_names(forward: Callable) -> list[str]:
    """Return the names of the arguments that a forward takes by position; [] if it does not tell."""
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def name_arguments(names: Sequence[str], args: tuple, kwargs: dict) -> dict[str | int, object]:
    """Return the arguments of a call by name, those without a name by position."""
    return {(names[place] if place < len(names) else place): value for place, value in enumerate(args)} | kwargs


def block_name(number: int, block: nn.Module) -> str:
    """Return how messages name a block. number: 0-based."""
    return f"block {number + 1} ({type(block).__name__})"


@contextmanager
def patched(blocks: Sequence[nn.Module], wrap: Callable[[int, Callable], Callable]) -> Iterator[None]:
    """Inside, wrap(number, forward) is the forward of each block; a block that is listed twice is wrapped once."""
    own_forwards = []
    try:
        for number, block in enumerate(blocks):
            if any(block is other for other in blocks[:number]):
                continue
            own_forwards.append((block, block.__dict__.get("forward")))
            block.forward = wrap(number, block.forward)
        yield
    finally:
        for block, own_forward in reversed(own_forwards):
            block.__dict__.pop("forward", None)
            if own_forward is not None:
                block.forward = own_forward


class Turns:
    """The place of every call of a block in a list of blocks. One that is listed n times runs at these n in turn."""

    def __init__(self, blocks: Sequence[nn.Module]):
        self.places, self.calls = defaultdict(list), defaultdict(int)
        for number, block in enumerate(blocks):
            self.places[id(block)].append(number)

    def next_place(self, block: nn.Module) -> int:
        """Return the place, 0-based, of a call that begins."""
        places = self.places[id(block)]
        self.calls[id(block)] += 1
        return places[(self.calls[id(block)] - 1) % len(places)]


@dataclass
class Trace:
    """All calls of a forward of C clips, in order."""

    clips: int
    calls: list[TracedCall] = field(default_factory=list)
    reads_values: bool = False  # Python has read values of tensors since the first block began: for a decision, maybe


class _ValueReads(TorchDispatchMode):
    """Notes in `seen` whether Python reads values of tensors while `listening`: bool(), item(), equal()."""

    def __init__(self):
        super().__init__()
        self.listening = self.seen = False

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.seen |= self.listening and operation in _READS
        return operation(*args, **(kwargs or {}))


_READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default}


def trace_calls(
    run: Callable[[], object],
    blocks: Sequence[nn.Module],
    clips: int,
    *,
    kind: str = "block",
    state: str | int | None = None,
) -> tuple[Trace, object]:
    """Return how run(), a forward of C clips, calls the blocks, and its output.

    kind: as multi_gate. state: the name or position of the argument that is the state; None: found by its shape.

    Raises ValueError, naming a block and the reason, for blocks that do not run, run inside each other, change an
    argument (a cache, say), or whose state cannot be told.
    """
    trace, running, copied, turns, reads = Trace(clips), [], {}, Turns(blocks), _ValueReads()

    def record(block: nn.Module, forward: Callable, names: Sequence[str], /, *args, **kwargs):
        reads.listening = False
        number = turns.next_place(block)
        name = block_name(number, block)
        if running:
            raise ValueError(f"{name} runs inside {running[-1]}: {FOLLOW}")
        arguments = name_arguments(names, args, kwargs)
        given = dict(tensors(arguments))
        if nested := next((path for path, value in given.items() if value.is_nested), None):
            raise ValueError(
                f"{name} gets nested tensors as {describe(nested)!r}, which have no rows: build the model without them "
                "(nn.TransformerEncoder(enable_nested_tensor=False))"
            )
        inputs, before = _copies(given, copied), _versions(given)
        running.append(name)
        reads.listening = True
        out = forward(*args, **kwargs)
        reads.listening = False
        running.pop()
        _check_unchanged(name, before, inputs, dict(tensors(arguments)))
        returned = dict(tensors(out))
        named = names[state] if isinstance(state, int) and state < len(names) else state
        trace.calls.append(TracedCall(number, name, inputs, _copies(returned, copied), given, returned, named))
        reads.listening = True
        return out

    def wrap(number: int, forward: Callable) -> Callable:
        return partial(record, blocks[number], forward, positional_names(forward))

    with patched(blocks, wrap), reads:
        out = run()
    trace.reads_values = reads.seen
    check_all_ran([call.block for call in trace.calls], blocks)
    if kind == "block":
        find_states(trace.calls)
    else:
        find_branches(trace.calls)
    for call in trace.calls:
        call.given = call.returned = {}
    return trace, out


def check_all_ran(ran: Sequence[int], blocks: Sequence[nn.Module]) -> None:
    """Raises ValueError if a block is not among the 0-based numbers `ran`."""
    seen = {id(blocks[number]) for number in ran}
    for number, block in enumerate(blocks):
        if id(block) not in seen:
            raise ValueError(f"{block_name(number, block)} of {len(blocks)} never ran")


def _copies(values: Tensors, copied: dict) -> Tensors:
    """Return copies. copied: those made before, of tensors that still are what they were."""
    copies = {}
    for path, value in values.items():
        if value.is_inference():
            copies[path] = value.detach().clone()
            continue
        key = id(value), value._version
        if key not in copied:
            copied[key] = value.detach().clone()
        copies[path] = copied[key]
    return copies


def _versions(values: Tensors) -> dict[Path, tuple]:
    """Return what tells whether a value was replaced or changed in place. Tensors of inference mode have no count."""
    return {path: (id(value), None if value.is_inference() else value._version) for path, value in values.items()}


def _check_unchanged(name: str, before: dict[Path, tuple], copies: Tensors, after: Tensors) -> None:
    """Raises ValueError if a block has changed an argument: variants would share what is not the same for them."""
    now = _versions(after)
    changed = [path for path in (*before, *now) if before.get(path) != now.get(path)]
    changed += [path for path, value in after.items() if path in copies and not same(value, copies[path], 0)]
    if not changed:
        return
    argument = describe(changed[0])
    if changed[0] in before and changed[0] in now and len(changed[0]) == 1:
        raise ValueError(
            f"{name} changes its input in place ({argument!r}): the variants without it would get the changed one"
        )
    raise ValueError(
        f"{name} keeps state in its argument {argument!r} (a cache?): switch that off (use_cache=False, say), or wrap "
        "the model so that its blocks do without"
    )
