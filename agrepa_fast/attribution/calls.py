"""How a model calls its blocks: their order, their arguments and their state, recorded in one plain forward.

The state of a block is the argument that it hands on updated: leaving the block out hands on the argument as it is.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn as nn

from .rows import same
from .trees import Path, describe, tensors

Tensors = dict[Path, torch.Tensor]
FOLLOW = "name blocks that follow each other"
NAME_IT = "name it: --state NAME, state=NAME in Python"


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
class TracedCall:
    """One call of a block in a forward of C rows."""

    block: int  # 0-based number
    name: str  # of the block, for messages
    inputs: Tensors  # copies, as they were at the call
    outputs: Tensors
    given: Tensors  # the very tensors, to follow them from call to call
    returned: Tensors
    named: str | None = None  # the argument that the user calls the state
    state: Path = ()  # among the inputs; of no meaning for branches
    update: Path = ()  # the state, or the branch, among the outputs


@dataclass
class Trace:
    """All calls of a forward of C clips, in order."""

    clips: int
    calls: list[TracedCall] = field(default_factory=list)


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
    trace, running, copied, turns = Trace(clips), [], {}, Turns(blocks)

    def record(block: nn.Module, forward: Callable, names: Sequence[str], /, *args, **kwargs):
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
        out = forward(*args, **kwargs)
        running.pop()
        _check_unchanged(name, before, inputs, dict(tensors(arguments)))
        returned = dict(tensors(out))
        named = names[state] if isinstance(state, int) and state < len(names) else state
        trace.calls.append(TracedCall(number, name, inputs, _copies(returned, copied), given, returned, named))
        return out

    def wrap(number: int, forward: Callable) -> Callable:
        return partial(record, blocks[number], forward, positional_names(forward))

    with patched(blocks, wrap):
        out = run()
    check_all_ran([call.block for call in trace.calls], blocks)
    if kind == "block":
        _find_states(trace.calls)
    else:
        _find_branches(trace.calls)
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


def updates(inputs: Tensors, outputs: Tensors) -> tuple[Tensors, Tensors]:
    """Return the inputs and outputs between which a block may write its residual sum.

    Both floating point, not handed on as they are, and every output of the shape of an input. A tensor at several
    places counts once. Where a block hands on all of its inputs, these count. Beside a sequence (N, T, D), vectors do
    not count.
    """
    ins, outs = _distinct(inputs), _distinct(outputs)
    same = {id(value) for value in ins.values()} & {id(value) for value in outs.values()}
    if set(map(id, outs.values())) - same:
        ins = {path: value for path, value in ins.items() if id(value) not in same}
        outs = {path: value for path, value in outs.items() if id(value) not in same}
    shapes = {value.shape for value in outs.values()}
    ins = {path: value for path, value in ins.items() if value.shape in shapes}
    shapes = {value.shape for value in ins.values()}
    if sequences := {shape for shape in shapes if len(shape) > 2}:
        shapes = sequences
        ins = {path: value for path, value in ins.items() if value.shape in shapes}
    return ins, {path: value for path, value in outs.items() if value.shape in shapes}


def _distinct(values: Tensors) -> Tensors:
    found: dict[int, tuple[Path, torch.Tensor]] = {}
    for path, value in values.items():
        if value.is_floating_point() and value.ndim:
            found.setdefault(id(value), (path, value))
    return dict(found.values())


def choose_state(
    name: str,
    inputs: Tensors,
    outputs: Tensors,
    state: str | int | None,
    ins: Tensors,
    outs: Tensors,
    check_streams: bool = True,
) -> tuple[Path, Path]:
    """Return the paths of a block's state among inputs and outputs. ins, outs: the candidates of `updates`.

    state: its name, if the user gives it. check_streams: refuse blocks that update another sequence beside it.

    Raises ValueError if there is none, or more than one.
    """
    streams = {value.shape for value in outs.values() if value.ndim > 2}
    others = [path for path, value in ins.items() if value.shape in streams]
    if check_streams and len(others) > 1 and len(outs) > 1:
        raise ValueError(
            f"{name} returns an updated argument {describe(others[1])!r} beside its state: "
            "blocks with two streams cannot be gated"
        )
    if state is not None:
        named = [path for path in inputs if path[0] == state or describe(path) == state]
        if not named:
            raise ValueError(f"{name} has no tensor {state!r}, but {', '.join(map(describe, inputs)) or 'no tensors'}")
        ins = {path: inputs[path] for path in named if path in ins} or {named[0]: inputs[named[0]]}
    if not ins or not outs:
        raise ValueError(f"{name} {_shapes(inputs, outputs)}: a block that changes the shape has no gate")
    if len(ins) > 1:
        listed = " or ".join(repr(describe(path)) for path in ins)
        raise ValueError(f"{name}: its state could be {listed}; {NAME_IT}")
    (state_path, value) = next(iter(ins.items()))
    fitting = [path for path, out in outs.items() if out.shape == value.shape]
    if len(fitting) != 1 and (check_streams or not fitting):
        found = f"{len(fitting)} outputs" if fitting else "no output"
        raise ValueError(f"{name} returns {found} of the shape of its state {describe(state_path)!r}: it has no gate")
    return state_path, fitting[0]


def _shapes(inputs: Tensors, outputs: Tensors) -> str:
    if not outputs:
        return "returns no tensor"
    shapes = [tuple(value.shape) for value in _distinct(inputs).values()] or ["no numbers"]
    return f"makes {tuple(next(iter(outputs.values())).shape)} of {', '.join(map(str, shapes))}"


def _find_states(calls: Sequence[TracedCall]) -> None:
    """Set state and update of every call.

    Of several candidates, arguments that one tensor fills for several blocks are conditions, unless a block returned
    it. A candidate that is left must be what a block returned. Where this does not decide, the argument's name does,
    if it is the state's in the other calls of blocks of the same class.
    """
    users, made = defaultdict(set), set()
    for call in calls:
        for value in call.given.values():
            users[id(value)].add(call.block)
        made |= {id(value) for value in call.returned.values()}
    undecided, known = [], defaultdict(set)
    for call in calls:
        ins, outs = updates(call.given, call.returned)
        if call.named is None and len(ins) > 1:
            left = {path: value for path, value in ins.items() if len(users[id(value)]) == 1 or id(value) in made}
            if len(left) != 1 or id(next(iter(left.values()))) not in made:
                undecided.append(call)
                continue
            ins = left
        call.state, call.update = choose_state(call.name, call.given, call.returned, call.named, ins, outs)
        known[_class_of(call)].add(call.state)
    for call in undecided:
        ins, outs = updates(call.given, call.returned)
        elsewhere = known[_class_of(call)]
        if len(elsewhere) == 1 and (path := next(iter(elsewhere))) in ins:
            ins = {path: ins[path]}
        call.state, call.update = choose_state(call.name, call.given, call.returned, None, ins, outs)


def _class_of(call: TracedCall) -> str:
    return call.name.partition("(")[2]


def _find_branches(calls: Sequence[TracedCall]) -> None:
    """Set `update` of every call: the one output, or the one of the shape of an input."""
    for call in calls:
        outs = _distinct(call.returned)
        call.update = choose_branch(call.name, outs, updates(call.given, call.returned)[1])


def choose_branch(name: str, outs: Tensors, fitting: Tensors) -> Path:
    """Return the path of a branch among its outputs. Raises ValueError if there is none, or more than one."""
    candidates = outs if len(outs) == 1 else fitting
    if len(candidates) != 1:
        raise ValueError(f"{name} returns {len(outs)} tensors, and it cannot be told which is the branch's output")
    return next(iter(candidates))
