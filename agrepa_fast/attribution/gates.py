"""Many ablations of one model in one forward: rows that share a gate prefix are computed once.

Write a residual block as h_l = h_{l-1} + g_l f_l(h_{l-1}). Variants of the model differ in their gates g. Two variants
whose gates agree on blocks 1 ... l-1 have the same input to block l, so block l runs once for every distinct prefix: a
trie over the gate matrix. Ablating each of L blocks alone costs L(L+1)/2 block forwards instead of the L^2 of one
forward a layer, and gives the same numbers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn


def single_ablations(depth: int) -> torch.Tensor:
    """(depth + 1, depth) gates: the whole model, then the model without block 1, ..., without block L (FoG-A)."""
    return torch.cat((torch.ones(1, depth), 1 - torch.eye(depth)))


@dataclass(frozen=True)
class _BlockPlan:
    """Which variants' rows one block runs, and who uses which result."""

    first: torch.Tensor  # (P,) the first variant of each distinct prefix
    prefix: torch.Tensor  # (V,) which of the P results each variant uses
    gate: torch.Tensor  # (V,) this block's gates

    @property
    def contiguous(self) -> bool:
        return torch.equal(self.first, torch.arange(len(self.first)))


def _plan(gates: torch.Tensor) -> list[_BlockPlan]:
    if gates.ndim != 2 or not ((gates >= 0) & (gates <= 1)).all():
        raise ValueError(f"gates must be a (variants, blocks) matrix in [0, 1], not {tuple(gates.shape)}")
    plans = []
    rows = gates.tolist()
    for block in range(gates.shape[1]):
        first: dict[tuple[float, ...], int] = {}  # prefix -> its first variant
        number = {}  # prefix -> its place among the distinct ones
        prefix = []
        for variant, row in enumerate(rows):
            key = tuple(row[:block])
            first.setdefault(key, variant)
            prefix.append(number.setdefault(key, len(number)))
        plans.append(_BlockPlan(torch.tensor(list(first.values())), torch.tensor(prefix), gates[:, block].clone()))
    return plans


def count_block_forwards(gates: torch.Tensor) -> int:
    """Block forwards (of C rows each) that multi_gate runs for gates (V, L): the number of distinct prefixes at every
    block, summed."""
    return sum(len(plan.first) for plan in _plan(gates.cpu()))


@contextmanager
def multi_gate(
    blocks: Sequence[nn.Module], gates: torch.Tensor, *, row_arguments: Sequence[str | int] | None = None
) -> Iterator[list[int]]:
    """Inside it, a model with these residual blocks computes all variants of gates (V, L) at once.

    The model is called with V * C rows, variant-major (row v * C + c). At block l one row of each distinct gate prefix
    runs; gate 1 hands on the block's output, gate 0 its input untouched, a value between blends them. Every variant
    gets a full row back, so skip connections and heads outside the blocks see right values. Yields a list with the
    prefixes run at each block, filled as blocks run.

    A block's first positional argument is its hidden state. Its other tensor arguments with V * C rows are sliced like
    it; when the hidden state has another dimension of that size, a table could be mistaken for rows, and
    `row_arguments` (keyword names, positions from 1 on) must say which arguments are rows. A tuple output has the
    hidden state first; its other tensors are handed on per variant.

    Raises ValueError for gates that do not fit the blocks, rows that V does not divide, and ambiguous arguments.
    """
    if gates.ndim != 2 or gates.shape[1] != len(blocks):
        raise ValueError(f"gates {tuple(gates.shape)} must be (variants, {len(blocks)}): one column a block")
    ran: list[int] = []
    patched = []
    try:
        for block, plan in zip(blocks, _plan(gates.cpu()), strict=True):
            patched.append((block, block.__dict__.get("forward")))
            block.forward = partial(_gated_forward, block.forward, plan, len(gates), row_arguments, ran)
        yield ran
    finally:
        for block, own_forward in patched:
            del block.forward
            if own_forward is not None:
                block.forward = own_forward


def _gated_forward(forward, plan: _BlockPlan, variants: int, row_arguments, ran: list[int], *args, **kwargs):
    x = args[0]
    rows = x.shape[0]
    if rows % variants:
        raise ValueError(f"{rows} rows for {variants} variants: call the model with variants x clips rows")
    ran.append(len(plan.first))
    take = partial(_take_variants, plan=plan, variants=variants)
    spread = partial(_spread_variants, plan=plan, clips=rows // variants)
    is_row = _row_test(x, rows, row_arguments, {**dict(enumerate(args)), **kwargs})
    out = forward(
        take(x),
        *[take(value) if is_row(place, value) else value for place, value in enumerate(args[1:], start=1)],
        **{name: take(value) if is_row(name, value) else value for name, value in kwargs.items()},
    )
    if isinstance(out, torch.Tensor):
        return _blend(x, spread(out), plan, variants)
    others = [spread(value) if _has_rows(value, len(plan.first) * (rows // variants)) else value for value in out[1:]]
    return (_blend(x, spread(out[0]), plan, variants), *others)


def _has_rows(value, rows: int) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == rows


def _row_test(x: torch.Tensor, rows: int, row_arguments, arguments: dict):
    """A function (name, value) -> whether that argument has a row for every row of x."""
    if row_arguments is not None:
        return lambda name, value: name in row_arguments
    suspects = [name for name, value in arguments.items() if name != 0 and _has_rows(value, rows)]
    if suspects and rows in x.shape[1:]:
        raise ValueError(
            f"argument {suspects[0]!r} has {rows} rows, as has a later dimension of the state {tuple(x.shape)}: "
            "name the arguments that are rows in multi_gate(row_arguments=...)"
        )
    return lambda name, value: name in suspects


def _take_variants(x: torch.Tensor, *, plan: _BlockPlan, variants: int) -> torch.Tensor:
    """The rows (P * C, ...) of the variants that run, a view when they come first."""
    by_variant = x.unflatten(0, (variants, -1))
    if plan.contiguous:
        return by_variant[: len(plan.first)].flatten(0, 1)
    return by_variant[plan.first.to(x.device)].flatten(0, 1)


def _spread_variants(out: torch.Tensor, *, plan: _BlockPlan, clips: int) -> torch.Tensor:
    """(P * C, ...) to every variant's rows (V * C, ...)."""
    return out.unflatten(0, (-1, clips))[plan.prefix.to(out.device)].flatten(0, 1)


def _blend(x: torch.Tensor, out: torch.Tensor, plan: _BlockPlan, variants: int) -> torch.Tensor:
    """Write the input over the rows of `out` (a fresh tensor) with gate 0, the blend over those between 0 and 1."""
    if (plan.gate == 1).all():
        return out
    before, after = x.unflatten(0, (variants, -1)), out.unflatten(0, (variants, -1))
    for variant in (plan.gate < 1).nonzero().flatten().tolist():
        gate = float(plan.gate[variant])
        row = before[variant]
        after[variant] = row if gate == 0 else row + gate * (after[variant] - row)
    return after.flatten(0, 1)
