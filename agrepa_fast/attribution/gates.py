"""Many ablations of one model in one forward: rows that share a gate prefix are computed once.

Write a residual block as h_l = h_{l-1} + g_l f_l(h_{l-1}). Variants of the model differ in their gates g. Two variants
whose gates agree on blocks 1 ... l-1 have the same input to block l, so block l runs once for every distinct prefix: a
trie over the gate matrix. Ablating each of L blocks alone costs L(L+1)/2 block forwards instead of the L^2 of one
forward a layer, and gives the same numbers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial

import torch
import torch.nn as nn

KINDS = ("block", "branch")
SAME_ROWS = {torch.float64: 1e-6, torch.float32: 1e-3}  # relative RMS difference that rounding explains; others: 0.1


def single_ablations(depth: int) -> torch.Tensor:
    """(depth + 1, depth) gates: the whole model, then the model without block 1, ..., without block L (FoG-A)."""
    return torch.cat((torch.ones(1, depth), 1 - torch.eye(depth)))


@dataclass(frozen=True)
class _BlockPlan:
    """Which variants' rows one block runs, and who uses which result."""

    first: torch.Tensor  # (P,) the first variant of each distinct prefix
    prefix: torch.Tensor  # (V,) which of the P results each variant uses
    gate: tuple[float, ...]  # V, this block's gates
    contiguous: bool  # whether `first` is 0 ... P - 1: a slice
    copies: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(first, prefix) there; copied once, since a copy waits for the GPU and no CUDA graph can hold it."""
        if device not in self.copies:
            self.copies[device] = self.first.to(device), self.prefix.to(device)
        return self.copies[device]

    def partial_gates(self) -> list[tuple[int, float]]:
        """(variant, gate) of every gate below 1."""
        return [(variant, gate) for variant, gate in enumerate(self.gate) if gate < 1]


def _plan(gates: torch.Tensor) -> tuple[_BlockPlan, ...]:
    columns = tuple(map(tuple, gates.T.tolist())) if gates.ndim == 2 else None
    if columns is None or not all(0 <= gate <= 1 for column in columns for gate in column):
        raise ValueError(f"gates must be a (variants, blocks) matrix in [0, 1], not {tuple(gates.shape)}")
    return _plan_columns(columns, len(gates))


@lru_cache(maxsize=32)  # a probe is planned once, and its index tensors are copied to the device once
def _plan_columns(columns: tuple[tuple[float, ...], ...], variants: int) -> tuple[_BlockPlan, ...]:
    plans = []
    prefix = [0] * variants  # the number of each variant's prefix, extended block by block
    for column in columns:
        first = list({number: variant for variant, number in reversed(list(enumerate(prefix)))}.items())
        first = [variant for _, variant in sorted(first)]
        slices = first == list(range(len(first)))
        plans.append(_BlockPlan(torch.tensor(first), torch.tensor(prefix), column, slices))
        number: dict[tuple[int, float], int] = {}
        prefix = [number.setdefault(key, len(number)) for key in zip(prefix, column, strict=True)]
    return tuple(plans)


def count_block_forwards(gates: torch.Tensor) -> int:
    """Block forwards (of C rows each) that multi_gate runs for gates (V, L): the number of distinct prefixes at every
    block, summed. For kind="branch" it counts branches: half a block each where a block has two."""
    return sum(len(plan.first) for plan in _plan(gates.cpu()))


def prefix_order(gates: torch.Tensor) -> torch.Tensor:
    """(V,) an order of the variants in which the rows that every block runs are the first ones, a slice instead of a
    gather: by the block at which a variant leaves the ones before it."""
    births = torch.full((len(gates),), gates.shape[1])
    for block, plan in reversed(list(enumerate(_plan(gates.cpu())))):
        births[plan.first] = block
    return births.argsort(stable=True)


@dataclass
class _Gating:
    """What the patched blocks of one multi_gate share."""

    variants: int
    depth: int
    kind: str
    row_arguments: Sequence[str | int] | None
    max_rows: int | None
    check_rows: bool
    ran: list[int] = field(default_factory=list)
    seen: set[str | int] = field(default_factory=set)  # arguments that some block was called with

    def begin(self, number: int, prefixes: int) -> None:
        """Block `number` (0-based) starts. Raises ValueError when it is not the next one: prefixes would be wrong."""
        due = len(self.ran) % self.depth
        if number != due:
            raise ValueError(
                f"block {number + 1} ran where block {due + 1} of {self.depth} was due: every block must run once, in "
                "the order in which they were given"
            )
        self.ran.append(prefixes)

    def end(self) -> None:
        if not self.ran or len(self.ran) % self.depth:
            raise ValueError(f"block {len(self.ran) % self.depth + 1} of {self.depth} never ran inside multi_gate")
        if unknown := [name for name in self.row_arguments or () if name not in self.seen]:
            known = ", ".join(sorted(map(str, self.seen)))
            raise ValueError(f"row_arguments: no block has an argument {unknown[0]!r}, but {known}")


@contextmanager
def multi_gate(
    blocks: Sequence[nn.Module],
    gates: torch.Tensor,
    *,
    kind: str = "block",
    row_arguments: Sequence[str | int] | None = None,
    max_rows: int | None = None,
    check_rows: bool = True,
) -> Iterator[list[int]]:
    """Inside it, a model with these residual blocks computes all variants of gates (V, L) at once.

    The model is called with V * C rows, variant-major (row v * C + c). At block l one row of each distinct gate prefix
    runs; gate 1 hands on the block's output, gate 0 its input untouched, a value between blends them. Every variant
    gets a full row back, so skip connections and heads outside the blocks see right values. Yields a list with the
    prefixes run at each block, filled as blocks run.

    kind: "block" for modules that contain their residual sum; "branch" for modules whose output is added to the
    residual outside of them (attention and FFN apart, voicebox-pytorch): their outputs are multiplied by the gate, and
    exactly zero at gate 0. Blocks or branches are given in the order in which they run.

    A block's state is its first tensor argument, positional or by keyword. Its other tensor arguments with V * C rows
    are sliced like it; when the state has another dimension of that size, a table could be mistaken for rows, and
    `row_arguments` (keyword names, positions from 1 on) must say which arguments are rows. A tuple output has the
    state first; its other tensors are handed on per variant. max_rows bounds the rows that a block runs at once.
    check_rows: every block that runs several prefixes also runs the first alone (C rows), to see that rows do not
    depend on each other; and no block may return another sequence that updates one of its row arguments. False saves
    the first and allows the second.

    Raises ValueError for gates that do not fit the blocks, rows that V does not divide, ambiguous arguments, blocks
    that never run, run twice, or run in another order, and blocks that cannot be gated exactly: rows that depend on
    each other (batch statistics, attention across clips, dropout left on), a second stream beside the state, a state
    that changes its shape or is changed in place. The message names the module.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: {' or '.join(KINDS)}")
    if gates.ndim != 2 or gates.shape[1] != len(blocks):
        raise ValueError(f"gates {tuple(gates.shape)} must be (variants, {len(blocks)}): one column a block")
    gating = _Gating(len(gates), len(blocks), kind, row_arguments, max_rows, check_rows)
    patched = []
    try:
        for number, (block, plan) in enumerate(zip(blocks, _plan(gates.cpu()), strict=True)):
            if batch_norm := _batch_norm(block):
                raise ValueError(f"block {number + 1}: {batch_norm}: its rows are not independent of each other")
            patched.append((block, block.__dict__.get("forward")))
            what = f"block {number + 1} ({type(block).__name__})"
            block.forward = partial(_gated_forward, block.forward, what, plan, number, gating)
        yield gating.ran
        gating.end()
    finally:
        for block, own_forward in reversed(patched):
            del block.forward
            if own_forward is not None:
                block.forward = own_forward


def find_blocks(model: nn.Module, paths: str) -> dict[str, nn.Module]:
    """Name -> module of what `paths` names, in the order of running: a list's path ("transformer.blocks"), or paths
    with a star for every element of a list, taken in turn ("layers.*.attn,layers.*.ff"). Raises ValueError for a path
    that does not exist."""
    columns = [_expand(model, path if "*" in path else f"{path}.*") for path in paths.split(",")]
    if len({len(column) for column in columns}) > 1:
        raise ValueError(f"{paths}: the lists have {', '.join(str(len(column)) for column in columns)} elements")
    return {name: model.get_submodule(name) for turn in zip(*columns, strict=True) for name in turn}


def _expand(model: nn.Module, path: str) -> list[str]:
    before, _, after = path.partition(".*")
    try:
        names = [f"{before}.{name}{after}" for name, _ in model.get_submodule(before).named_children()]
        for name in names:
            model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"{path}: {error}") from error
    if not names:
        raise ValueError(f"{before} ({type(model.get_submodule(before)).__name__}) is no list of modules")
    return names


def _batch_norm(block: nn.Module) -> str | None:
    """What mixes the rows of a batch by its statistics, if anything does."""
    for name, module in block.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            return f"{name or 'it'} ({type(module).__name__}) normalises over the batch"
    return None


def _gated_forward(forward: Callable, what: str, plan: _BlockPlan, number: int, gating: _Gating, *args, **kwargs):
    arguments = {**dict(enumerate(args)), **kwargs}
    state = next((name for name, value in arguments.items() if isinstance(value, torch.Tensor) and value.ndim), None)
    if state is None:
        raise ValueError(f"{what} was called without a tensor")
    x, variants = arguments[state], gating.variants
    rows = x.shape[0]
    if rows % variants:
        raise ValueError(f"{rows} rows for {variants} variants: call the model with variants x clips rows")
    gating.begin(number, len(plan.first))
    gating.seen.update(arguments)
    clips = rows // variants
    is_row = _row_test(x, state, gating.row_arguments, arguments)
    taken = {name: _take_variants(value, plan, variants) for name, value in arguments.items() if is_row(name, value)}
    is_block = gating.kind == "block"
    version = taken[state]._version if is_block and not x.is_inference() else None
    checks = partial(_check_streams, what, state) if is_block and gating.check_rows else None
    chunk = _chunk_rows(gating.max_rows, clips)
    out = _in_chunks(forward, args, kwargs, taken, len(plan.first) * clips, chunk, checks)
    if version is not None and taken[state]._version != version:
        raise ValueError(f"{what} changes its input in place: the variants without it would get the changed one")
    if gating.check_rows and len(plan.first) > 1:
        alone = {name: value[:clips] for name, value in taken.items()}
        with torch.no_grad():
            alone = _state(_in_chunks(forward, args, kwargs, alone, clips, None, None))
        _check_rows(_state(out)[:clips], alone, what)
    spread = partial(_spread_variants, plan=plan, clips=clips)
    gated = (_blend if is_block else _scale)(x, spread(_state(out)), plan, variants)
    if isinstance(out, torch.Tensor):
        return gated
    others = [spread(value) if _has_rows(value, len(plan.first) * clips) else value for value in out[1:]]
    return (gated, *others)


def _check_streams(what: str, state: str | int, taken: dict, out: torch.Tensor | tuple) -> None:
    """Raises ValueError when a block's output is no update of its state, or another of its row arguments is updated
    beside it: only the state is handed on ungated."""
    before, after = taken[state].shape, _state(out).shape
    if after != before:
        raise ValueError(f"{what} makes {tuple(after)} of {tuple(before)}: a block that changes the shape has no gate")
    rest = () if isinstance(out, torch.Tensor) else out[1:]
    made = [value for value in rest if _is_sequence(value) and not any(value is given for given in taken.values())]
    for name, value in taken.items():
        if name != state and _is_sequence(value) and any(value.shape == other.shape for other in made):
            raise ValueError(
                f"{what} returns an updated argument {name!r} beside its state: blocks with two streams cannot be gated"
            )


def _is_sequence(value) -> bool:
    """Whether it could be a stream: floating point (N, T, D) or more, no mask and no vector a clip."""
    return isinstance(value, torch.Tensor) and value.ndim > 2 and value.is_floating_point()


def _state(out: torch.Tensor | tuple) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out[0]


def _check_rows(together: torch.Tensor, alone: torch.Tensor, what: str) -> None:
    """Raises ValueError unless rows computed among others equal the same rows computed alone, but for rounding."""
    together, alone, limit = together.detach().double(), alone.double(), SAME_ROWS.get(alone.dtype, 0.1)
    if not (together - alone).norm() <= limit * alone.norm() and alone.isfinite().all():
        raise ValueError(
            f"{what} cannot be gated exactly: its rows depend on each other (attention across clips, statistics of the "
            "batch) or on chance (dropout left on)"
        )


def _chunk_rows(max_rows: int | None, clips: int) -> int | None:
    """Rows of a chunk: whole variants, since row n has condition n mod C."""
    return None if max_rows is None else max(1, max_rows // clips) * clips


def _in_chunks(
    forward: Callable, args: tuple, kwargs: dict, taken: dict, rows: int, chunk: int | None, check: Callable | None
):
    """forward with `taken` in place of the arguments of these names, `chunk` rows at a time; check(part of taken,
    output) sees every one."""
    outputs = []
    for start in range(0, rows, chunk or rows):
        part = {name: value[start : start + (chunk or rows)] for name, value in taken.items()}
        outputs.append(
            forward(
                *[part.get(place, value) for place, value in enumerate(args)],
                **{name: part.get(name, value) for name, value in kwargs.items()},
            )
        )
        if check is not None:
            check(part, outputs[-1])
    if len(outputs) == 1:
        return outputs[0]
    if isinstance(outputs[0], torch.Tensor):
        return torch.cat(outputs)
    return tuple(
        torch.cat(parts) if isinstance(parts[0], torch.Tensor) else parts[0] for parts in zip(*outputs, strict=True)
    )


def _has_rows(value, rows: int) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == rows


def _row_test(x: torch.Tensor, state: str | int, row_arguments, arguments: dict) -> Callable:
    """A function (name, value) -> whether that argument has a row for every row of x."""
    if row_arguments is not None:
        return lambda name, value: name == state or name in row_arguments
    rows = x.shape[0]
    suspects = [name for name, value in arguments.items() if name != state and _has_rows(value, rows)]
    if suspects and rows in x.shape[1:]:
        raise ValueError(
            f"argument {suspects[0]!r} has {rows} rows, as has a later dimension of the state {tuple(x.shape)}: "
            "name the arguments that are rows in multi_gate(row_arguments=...)"
        )
    return lambda name, value: name == state or name in suspects


def _take_variants(x: torch.Tensor, plan: _BlockPlan, variants: int) -> torch.Tensor:
    """The rows (P * C, ...) of the variants that run, a view when they come first."""
    by_variant = x.unflatten(0, (variants, -1))
    if plan.contiguous:
        return by_variant[: len(plan.first)].flatten(0, 1)
    return by_variant[plan.on(x.device)[0]].flatten(0, 1)


def _spread_variants(out: torch.Tensor, *, plan: _BlockPlan, clips: int) -> torch.Tensor:
    """(P * C, ...) to every variant's rows (V * C, ...)."""
    return out.unflatten(0, (-1, clips))[plan.on(out.device)[1]].flatten(0, 1)


def _blend(x: torch.Tensor, out: torch.Tensor, plan: _BlockPlan, variants: int) -> torch.Tensor:
    """Write the input over the rows of `out` (a fresh tensor) with gate 0, the blend over those between 0 and 1."""
    before, after = x.unflatten(0, (variants, -1)), out.unflatten(0, (variants, -1))
    for variant, gate in plan.partial_gates():
        row = before[variant]
        after[variant] = row if gate == 0 else row + gate * (after[variant] - row)
    return after.flatten(0, 1)


def _scale(x: torch.Tensor, out: torch.Tensor, plan: _BlockPlan, variants: int) -> torch.Tensor:
    """The branch's output (a fresh tensor) times the gate, exact zeros at gate 0."""
    after = out.unflatten(0, (variants, -1))
    for variant, gate in plan.partial_gates():
        after[variant] = gate * after[variant] if gate else 0
    return after.flatten(0, 1)
