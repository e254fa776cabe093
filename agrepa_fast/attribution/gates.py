"""Many gate variants of one model in one forward: rows that share a gate prefix are computed once.

Write a residual block as h_l = h_{l-1} + g_l f_l(h_{l-1}). Variants of the model differ in their gates g. Two variants
whose gates agree on blocks 1 ... l-1 have the same input to block l, so block l runs once per distinct prefix (see
gate_plan.py). Ablating each of L blocks alone then costs L(L+1)/2 block forwards instead of the L^2 of one forward per
layer, and gives the same numbers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn as nn

from .gate_plan import BlockPlan, GatePlan

KINDS = ("block", "branch")
_SAME_ROWS = {torch.float64: 1e-6, torch.float32: 1e-3}


def rounding_limit(dtype: torch.dtype) -> float:
    """Return the relative RMS difference that rounding explains, between rows computed alone and among others."""
    return _SAME_ROWS.get(dtype, 0.1)


@dataclass
class _GatedCall:
    """The settings that the patched blocks of one multi_gate share, and a record of what ran."""

    variants: int
    depth: int
    kind: str
    row_arguments: Sequence[str | int] | None
    max_rows: int | None
    check_rows: bool
    ran: list[int] = field(default_factory=list)  # prefixes of each block, as they ran
    seen: set[str | int] = field(default_factory=set)  # arguments that some block was called with

    def begin_block(self, number: int, prefixes: int) -> None:
        """Record that block `number` (0-based) starts. Raises ValueError unless it is the next one."""
        due = len(self.ran) % self.depth
        if number != due:
            raise ValueError(
                f"block {number + 1} ran where block {due + 1} of {self.depth} was due: every block must run once, in "
                "the order in which they were given"
            )
        self.ran.append(prefixes)

    def check_complete(self) -> None:
        """Raises ValueError if a block did not run, or if no block has one of row_arguments."""
        if not self.ran or len(self.ran) % self.depth:
            raise ValueError(f"block {len(self.ran) % self.depth + 1} of {self.depth} never ran inside multi_gate")
        if unknown := [name for name in self.row_arguments or () if name not in self.seen]:
            known = ", ".join(sorted(map(str, self.seen)))
            raise ValueError(f"row_arguments: no block has an argument {unknown[0]!r}, but {known}")


@contextmanager
def multi_gate(
    blocks: Sequence[nn.Module],
    gates: torch.Tensor | GatePlan,
    *,
    kind: str = "block",
    row_arguments: Sequence[str | int] | None = None,
    max_rows: int | None = None,
    check_rows: bool = True,
) -> Iterator[list[int]]:
    """Inside it, a model with these residual blocks computes all variants of gates (V, L) at once.

    Call the model with V * C rows, variant-major (row v * C + c). At block l one row of each distinct gate prefix runs.
    Gate 1 hands on the block's output, gate 0 its input untouched, a value between blends them. Every variant gets a
    full row back, so skip connections and heads outside the blocks see right values. Yields a list with the prefixes
    run at each block, filled as blocks run.

    blocks: in the order in which they run. gates: (V, L) in [0, 1], or a GatePlan of them, to plan once. kind: "block"
    for modules that contain their residual sum; "branch" for modules whose output is added to the residual outside of
    them (attention and FFN apart, voicebox-pytorch), whose outputs are multiplied by the gate and exactly zero at 0.

    A block's state is its first tensor argument, positional or by keyword. Its other tensor arguments with V * C rows
    are sliced like it. If the state has another dimension of that size, a table could be mistaken for rows, and
    `row_arguments` (keyword names, positions from 1 on) must name the arguments that are rows. A tuple output has the
    state first; its other tensors are handed on per variant. max_rows bounds the rows that a block runs at once.
    check_rows: every block that runs several prefixes also runs the first one alone (C rows), to see that rows do not
    depend on each other; and no block may return another sequence that updates one of its row arguments. False saves
    the first and allows the second.

    Raises ValueError for gates that do not fit the blocks, rows that V does not divide, ambiguous arguments, blocks
    that never run, run twice, or run in another order, and blocks that cannot be gated exactly: rows that depend on
    each other (batch statistics, attention across clips, dropout left on), a second stream beside the state, a state
    that changes its shape or is changed in place. The message names the module.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: {' or '.join(KINDS)}")
    if len(gates.shape) != 2 or gates.shape[1] != len(blocks):
        raise ValueError(f"gates {tuple(gates.shape)} must be (variants, {len(blocks)}): one column a block")
    plan = gates if isinstance(gates, GatePlan) else GatePlan(gates)
    call = _GatedCall(plan.shape[0], len(blocks), kind, row_arguments, max_rows, check_rows)
    patched = []
    try:
        for number, (block, block_plan) in enumerate(zip(blocks, plan.blocks, strict=True)):
            if batch_norm := _batch_norm(block):
                raise ValueError(f"block {number + 1}: {batch_norm}: its rows are not independent of each other")
            patched.append((block, block.__dict__.get("forward")))
            name = f"block {number + 1} ({type(block).__name__})"
            block.forward = partial(_gated_forward, block.forward, name, block_plan, number, call)
        yield call.ran
        call.check_complete()
    finally:
        for block, own_forward in reversed(patched):
            del block.forward
            if own_forward is not None:
                block.forward = own_forward


def _batch_norm(block: nn.Module) -> str | None:
    """Return which module of the block mixes rows by the batch's statistics, or None."""
    for name, module in block.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            return f"{name or 'it'} ({type(module).__name__}) normalises over the batch"
    return None


def _gated_forward(forward: Callable, block: str, plan: BlockPlan, number: int, call: _GatedCall, *args, **kwargs):
    """A patched block's forward: run one row per prefix, hand a row to every variant, apply the gates."""
    arguments = {**dict(enumerate(args)), **kwargs}
    state = next((name for name, value in arguments.items() if isinstance(value, torch.Tensor) and value.ndim), None)
    if state is None:
        raise ValueError(f"{block} was called without a tensor")
    x, variants = arguments[state], call.variants
    rows = x.shape[0]
    if rows % variants:
        raise ValueError(f"{rows} rows for {variants} variants: call the model with variants x clips rows")
    call.begin_block(number, plan.prefixes)
    call.seen.update(arguments)
    clips = rows // variants
    is_row = _row_test(x, state, call.row_arguments, arguments)
    running = {name: _rows_that_run(value, plan, variants) for name, value in arguments.items() if is_row(name, value)}
    is_block = call.kind == "block"
    version = running[state]._version if is_block and not x.is_inference() else None
    check = partial(_check_streams, block, state) if is_block and call.check_rows else None
    out = _in_chunks(forward, args, kwargs, running, plan.prefixes * clips, _chunk_rows(call.max_rows, clips), check)
    if version is not None and running[state]._version != version:
        raise ValueError(f"{block} changes its input in place: the variants without it would get the changed one")
    if call.check_rows and plan.prefixes > 1:
        first = {name: value[:clips] for name, value in running.items()}
        with torch.no_grad():
            alone = _state_of(_in_chunks(forward, args, kwargs, first, clips, None, None))
        _check_rows(_state_of(out)[:clips], alone, block)
    spread = partial(_to_every_variant, plan=plan, clips=clips)
    gated = (_blend if is_block else _scale)(x, spread(_state_of(out)), plan, variants)
    if isinstance(out, torch.Tensor):
        return gated
    others = [spread(value) if _has_rows(value, plan.prefixes * clips) else value for value in out[1:]]
    return (gated, *others)


def _check_streams(block: str, state: str | int, given: dict, out: torch.Tensor | tuple) -> None:
    """Raises ValueError if a block's output is no update of its state, or if it updates another row argument as well:
    only the state is gated."""
    before, after = given[state].shape, _state_of(out).shape
    if after != before:
        raise ValueError(f"{block} makes {tuple(after)} of {tuple(before)}: a block that changes the shape has no gate")
    others = () if isinstance(out, torch.Tensor) else out[1:]
    new = [value for value in others if _is_sequence(value) and not any(value is old for old in given.values())]
    for name, value in given.items():
        if name != state and _is_sequence(value) and any(value.shape == other.shape for other in new):
            raise ValueError(
                f"{block} returns an updated argument {name!r} beside its state: "
                "blocks with two streams cannot be gated"
            )


def _is_sequence(value) -> bool:
    """Return whether it could be a stream: floating point (N, T, D) or more, neither a mask nor a vector per clip."""
    return isinstance(value, torch.Tensor) and value.ndim > 2 and value.is_floating_point()


def _state_of(out: torch.Tensor | tuple) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out[0]


def _check_rows(together: torch.Tensor, alone: torch.Tensor, block: str) -> None:
    """Raises ValueError unless rows computed among others equal the same rows computed alone, but for rounding."""
    limit = rounding_limit(alone.dtype)
    together, alone = together.detach().double(), alone.double()
    if not (together - alone).norm() <= limit * alone.norm() and alone.isfinite().all():
        raise ValueError(
            f"{block} cannot be gated exactly: its rows depend on each other (attention across clips, statistics of "
            "the batch) or on chance (dropout left on)"
        )


def _chunk_rows(max_rows: int | None, clips: int) -> int | None:
    """Return the rows of a chunk: whole variants, since row n has condition n mod C."""
    return None if max_rows is None else max(1, max_rows // clips) * clips


def _in_chunks(
    forward: Callable, args: tuple, kwargs: dict, running: dict, rows: int, chunk: int | None, check: Callable | None
):
    """Return forward(*args, **kwargs) with `running` in place of the arguments of these names, `chunk` rows at a time;
    check(part of `running`, output) sees every chunk."""
    outputs = []
    for start in range(0, rows, chunk or rows):
        part = {name: value[start : start + (chunk or rows)] for name, value in running.items()}
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
    """Return a function (name, value) -> whether that argument has a row for every row of x."""
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


def _rows_that_run(x: torch.Tensor, plan: BlockPlan, variants: int) -> torch.Tensor:
    """Return the rows (P * C, ...) of the variants that run, a view if they come first."""
    by_variant = x.unflatten(0, (variants, -1))
    chosen = by_variant[: plan.prefixes] if plan.is_slice else by_variant[plan.first.on(x.device)]
    return chosen.flatten(0, 1)


def _to_every_variant(out: torch.Tensor, *, plan: BlockPlan, clips: int) -> torch.Tensor:
    """Return each variant's rows (V * C, ...) of the prefixes' results (P * C, ...)."""
    return out.unflatten(0, (-1, clips))[plan.prefix.on(out.device)].flatten(0, 1)


def _blend(x: torch.Tensor, out: torch.Tensor, plan: BlockPlan, variants: int) -> torch.Tensor:
    """Write the input over the rows of `out` (a fresh tensor) with gate 0, the blend over those between 0 and 1."""
    before, after = x.unflatten(0, (variants, -1)), out.unflatten(0, (variants, -1))
    for variant, gate in plan.partial_gates():
        row = before[variant]
        after[variant] = row if gate == 0 else row + gate * (after[variant] - row)
    return after.flatten(0, 1)


def _scale(x: torch.Tensor, out: torch.Tensor, plan: BlockPlan, variants: int) -> torch.Tensor:
    """Return the branch's output (a fresh tensor) times the gate, exact zeros at gate 0."""
    after = out.unflatten(0, (variants, -1))
    for variant, gate in plan.partial_gates():
        after[variant] = gate * after[variant] if gate else 0
    return after.flatten(0, 1)
