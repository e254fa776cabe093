"""Many gate variants of one model in one forward: rows that share a gate prefix are computed once.

Write a residual block as h_l = h_{l-1} + g_l f_l(h_{l-1}). Variants of the model differ in their gates g. Two variants
whose gates agree on all blocks that ran before have the same state, so a block runs once per distinct prefix (see
gate_plan.py). Ablating each of L blocks alone then costs L(L+1)/2 block forwards instead of the L^2 of one forward per
layer, and gives the same numbers.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn as nn

from .calls import FOLLOW, Trace, Turns, block_name, check_all_ran, name_arguments, patched, positional_names
from .forms import CallForm, GuessedForm, TracedForm
from .gate_plan import BlockPlan, GatePlan
from .rows import RowAxis, prefixes_differ, rounding_limit, same
from .trees import Path, describe, replaced, tensors

KINDS = ("block", "branch")


class _GatedRun:
    """The settings that the patched blocks of one multi_gate share, and a record of what ran."""

    def __init__(self, blocks: Sequence[nn.Module], plan: GatePlan, *, kind, max_rows, check_rows, trace, **naming):
        self.blocks, self.plan, self.variants = blocks, plan, plan.shape[0]
        self.kind, self.max_rows, self.check_rows, self.trace = kind, max_rows, check_rows, trace
        self.naming = naming  # row_arguments and state
        self.prefixes: list[int] = []  # of every call, as it ran
        self.columns: list[int] = []  # of every call
        self.seen: set[str | int] = set()  # arguments that some block was called with
        self.running: str | None = None  # the block that runs
        self._before: frozenset[int] = frozenset()
        self._turns = Turns(blocks)

    def begin_call(self, block: nn.Module) -> tuple[int, BlockPlan]:
        """Return the place of this call of a block, and its plan."""
        number = self._turns.next_place(block)
        if self.running:
            raise ValueError(f"{block_name(number, block)} runs inside {self.running}: {FOLLOW}")
        plan = self.plan.after(self._before, number)
        self._before |= {number}
        self.columns.append(number)
        self.prefixes.append(plan.prefixes)
        return number, plan

    def form(self, number: int, names: Sequence[str], arguments: dict) -> CallForm:
        """Return which tensors of this call are rows. Raises ValueError if that cannot be told."""
        name = block_name(number, self.blocks[number])
        positions = dict(enumerate(names))
        self.seen |= {*arguments, *(place for place, known in positions.items() if known in arguments)}
        naming = dict(self.naming) | {"state": positions.get(self.naming["state"], self.naming["state"])}
        if naming["row_arguments"] is not None:
            naming["row_arguments"] = {positions.get(argument, argument) for argument in naming["row_arguments"]}
        if self.trace is None:
            return GuessedForm(name, self.kind, arguments, self.variants, **naming)
        turn = (len(self.columns) - 1) % len(self.trace.calls)
        call = self.trace.calls[turn]
        if call.block != number:
            raise ValueError(f"{name} ran where {call.name} ran alone: the order of the blocks depends on the rows")
        return TracedForm(call, self.kind, arguments, self.variants, self.trace.clips, naming["row_arguments"])

    def check_complete(self) -> None:
        """Raises ValueError if a block did not run, or not as often as before, or no block has a row argument."""
        check_all_ran(self.columns, self.blocks)
        for number, block in enumerate(self.blocks):
            calls, places = self._turns.calls[id(block)], len(self._turns.places[id(block)])
            if calls % places:
                raise ValueError(f"{block_name(number, block)} ran {calls} times, but is listed {places} times")
        if self.trace is not None and len(self.columns) % len(self.trace.calls):
            raise ValueError("the blocks run less often with the rows of several variants than alone")
        if unknown := [name for name in self.naming["row_arguments"] or () if name not in self.seen]:
            known = ", ".join(sorted(map(str, self.seen)))
            raise ValueError(f"row_arguments: no block has an argument {unknown[0]!r}, but {known}")


@contextmanager
def multi_gate(
    blocks: Sequence[nn.Module],
    gates: torch.Tensor | GatePlan,
    *,
    kind: str = "block",
    row_arguments: Sequence[str | int] | None = None,
    state: str | int | None = None,
    max_rows: int | None = None,
    check_rows: bool = True,
    trace: Trace | None = None,
) -> Iterator[list[int]]:
    """Inside it, a model with these residual blocks computes all variants of gates (V, L) at once.

    Call the model with V * C rows, variant-major (row v * C + c). One row of each distinct gate prefix runs per call of
    a block. Gate 1 hands on the block's output, gate 0 its input untouched, a value between blends them. Every variant
    gets a full row back, so skip connections and heads outside the blocks see right values. Yields a list with the
    prefixes run at each call, filled as blocks run.

    blocks: in any order; fewest rows run if it is theirs. A block that runs n times per forward has its gate in all of
    its calls, or one gate per call if it is listed n times. gates: (V, L) in [0, 1], or a GatePlan of them, to plan
    once. kind: "block" for modules that contain their residual sum; "branch" for modules whose output is added to the
    residual outside of them (attention and FFN apart, voicebox-pytorch), whose outputs are multiplied by the gate and
    exactly zero at 0.

    state: the name or position of the argument that a block updates; None: the one of its output's shape. Other tensors
    with V * C rows, within tuples, mappings and dataclasses too, are sliced like it. If the state has another dimension
    of that size, a table could be mistaken for rows, and `row_arguments` (names, or positions) must name the arguments
    that are rows. Other tensors of an output are handed on per variant. max_rows bounds the rows that a block runs at
    once.

    check_rows: at every call, variants of one prefix must have equal rows, and the first prefix also runs alone (C
    rows), to see that rows do not depend on each other. False saves this, and allows blocks to return another sequence
    that updates one of their row arguments, if `state` is named. trace: how the model calls its blocks (trace_calls):
    instead, rows and outputs of the first variant, the whole model, are compared with that forward at every call.

    Raises ValueError for gates that do not fit the blocks, rows that V does not divide, ambiguous arguments, blocks
    that never run, and blocks that cannot be gated exactly: rows that depend on each other (batch statistics, attention
    across clips, dropout left on), a second stream beside the state, a state that changes its shape or is changed in
    place. The message names the module.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: {' or '.join(KINDS)}")
    if len(gates.shape) != 2 or gates.shape[1] != len(blocks):
        raise ValueError(f"gates {tuple(gates.shape)} must be (variants, {len(blocks)}): one column a block")
    for number, block in enumerate(blocks):
        if batch_norm := _batch_norm(block):
            raise ValueError(f"block {number + 1}: {batch_norm}: its rows are not independent of each other")
    plan = gates if isinstance(gates, GatePlan) else GatePlan(gates)
    options = {"kind": kind, "max_rows": max_rows, "check_rows": check_rows, "trace": trace}
    run = _GatedRun(blocks, plan, row_arguments=row_arguments, state=state, **options)

    def wrap(number: int, forward: Callable) -> Callable:
        return partial(_gated_forward, forward, blocks[number], positional_names(forward), run)

    with patched(blocks, wrap):
        yield run.prefixes
        run.check_complete()


def _batch_norm(block: nn.Module) -> str | None:
    """Return which module of the block mixes rows by the batch's statistics, or None."""
    for name, module in block.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            return f"{name or 'it'} ({type(module).__name__}) normalises over the batch"
    return None


def _gated_forward(forward: Callable, block: nn.Module, names: Sequence[str], run: _GatedRun, /, *args, **kwargs):
    """A patched block's forward: run one row per prefix, hand a row to every variant, apply the gates."""
    arguments = name_arguments(names, args, kwargs)
    number, plan = run.begin_call(block)
    form = run.form(number, names, arguments)
    by_variant = {path: axis.split(form.given[path], run.variants) for path, axis in form.rows.items()}
    if run.check_rows or run.trace is not None:
        _check_prefixes(form, by_variant, plan)
    running = {path: _rows_that_run(value, plan, form.rows_to_run(plan)) for path, value in by_variant.items()}

    def call(start: int, stop: int):
        tensor_of: dict[int, torch.Tensor] = {}  # an argument that stands at several places stays one
        part = {}
        for path, value in running.items():
            whole = id(form.given[path])
            if whole not in tensor_of:
                tensor_of[whole] = form.rows[path].join(value[start:stop])
            part[path] = tensor_of[whole]
        changed = replaced(arguments, part)
        named = list(changed.values())
        run.running = form.name
        out = form.called(forward, named[: len(args)], dict(list(changed.items())[len(args) :]), part)
        run.running = None
        return out

    out, parts, axes = _in_chunks(call, form, plan, run.max_rows, run.check_rows)
    if run.check_rows and run.trace is None and plan.prefixes > 1:
        with torch.no_grad():
            alone = dict(tensors(call(0, 1)))[form.update]
        _check_rows(parts[form.update][0], axes[form.update].split(alone, 1)[0], form.name)
    everyone = {path: value[plan.prefix.on(value.device)] for path, value in parts.items()}
    update = everyone[form.update]
    gated = _blend(by_variant[form.state], update, plan) if run.kind == "block" else _scale(update, plan)
    everyone |= dict.fromkeys(form.updates, gated)
    return replaced(out, {path: axes[path].join(value) for path, value in everyone.items()})


def _in_chunks(
    call: Callable, form: CallForm, plan: BlockPlan, max_rows: int | None, check_streams: bool
) -> tuple[object, dict[Path, torch.Tensor], dict[Path, RowAxis]]:
    """Return the first chunk's output, the rows (P, ...) of all chunks per path of it, and where they stand.

    Chunks are whole variants, since row n has condition n mod C.
    """
    prefixes = form.rows_to_run(plan)
    size = prefixes if max_rows is None else max(form.least_chunk, max_rows // form.rows_per_variant)
    first, pieces = None, defaultdict(list)
    for start in range(0, prefixes, size):
        count = min(size, prefixes - start)
        out = call(start, start + count)
        leaves = dict(tensors(out))
        if first is None:
            first, axes = out, form.place_outputs(leaves, count, check_streams)
        for path, axis in axes.items():
            pieces[path].append(axis.split(leaves[path], count))
    return first, {path: parts[0] if len(parts) == 1 else torch.cat(parts) for path, parts in pieces.items()}, axes


def _check_prefixes(form: CallForm, by_variant: dict[Path, torch.Tensor], plan: BlockPlan) -> None:
    """Raises ValueError if variants that have had the same gates so far differ in a block's arguments."""
    first, prefix = plan.first.host.tolist(), plan.prefix.host.tolist()
    for path, value in by_variant.items():
        if prefixes_differ(value, first, prefix):
            raise ValueError(
                f"{form.name} cannot be gated exactly: its argument {describe(path)!r} differs between variants with "
                "the same gates so far (rows depend on each other outside of the blocks, or on chance)"
            )


def _check_rows(together: torch.Tensor, alone: torch.Tensor, block: str) -> None:
    """Raises ValueError unless rows computed among others equal the same rows computed alone, but for rounding."""
    if not same(together, alone, rounding_limit(alone.dtype)):
        raise ValueError(
            f"{block} cannot be gated exactly: its rows depend on each other (attention across clips, statistics of "
            "the batch) or on chance (dropout left on)"
        )


def _rows_that_run(by_variant: torch.Tensor, plan: BlockPlan, count: int) -> torch.Tensor:
    """Return the rows (count, ...) of the variants that run, a view if they come first."""
    if plan.is_slice or count > plan.prefixes:
        return by_variant[:count]
    return by_variant[plan.first.on(by_variant.device)]


def _blend(before: torch.Tensor, after: torch.Tensor, plan: BlockPlan) -> torch.Tensor:
    """Write the input over the variants (V, ...) of `after` with gate 0, the blend over those between 0 and 1."""
    for variant, gate in plan.partial_gates():
        row = before[variant]
        after[variant] = row if gate == 0 else row + gate * (after[variant] - row)
    return after


def _scale(after: torch.Tensor, plan: BlockPlan) -> torch.Tensor:
    """Multiply the variants (V, ...) of a branch's output by their gates, exact zeros at gate 0."""
    for variant, gate in plan.partial_gates():
        after[variant] = gate * after[variant] if gate else 0
    return after
