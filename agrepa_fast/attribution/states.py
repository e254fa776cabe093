"""Find the argument of a block that is its state, from how its model calls it.

The state is the argument that a block hands on updated: leaving the block out hands on the argument as it is.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .trees import Path, describe

Tensors = dict[Path, torch.Tensor]
NAME_IT = "name it: --state NAME, state=NAME in Python"


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

    Raises ValueError unless exactly one argument fits.
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


def find_states(calls: Sequence[TracedCall]) -> None:
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


def find_branches(calls: Sequence[TracedCall]) -> None:
    """Set `update` of every call: the one output, or the one of the shape of an input."""
    for call in calls:
        outs = _distinct(call.returned)
        call.update = choose_branch(call.name, outs, updates(call.given, call.returned)[1])


def choose_branch(name: str, outs: Tensors, fitting: Tensors) -> Path:
    """Return the path of a branch among its outputs. Raises ValueError unless exactly one fits."""
    candidates = outs if len(outs) == 1 else fitting
    if len(candidates) != 1:
        raise ValueError(f"{name} returns {len(outs)} tensors, and it cannot be told which is the branch's output")
    return next(iter(candidates))
