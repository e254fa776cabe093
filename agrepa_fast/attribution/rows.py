"""Where the rows of V variants stand in a tensor, and whether rows that must be equal are."""

from dataclasses import dataclass

import torch

_SAME_ROWS = {torch.float64: 1e-6, torch.float32: 1e-3}
_ONE_PREFIX = {torch.float64: 1e-10, torch.float32: 1e-5}


def rounding_limit(dtype: torch.dtype) -> float:
    """Return the relative RMS difference that rounding explains, between rows computed alone and among others."""
    return _SAME_ROWS.get(dtype, 0.1)


@dataclass(frozen=True)
class RowAxis:
    """The dimension of a tensor that holds the rows of all variants: (outer, variants, rows of one variant).

    outer is 1 for rows that are variant-major, 2 where a model has stacked two such batches on each other.
    """

    dim: int = 0
    outer: int = 1

    def split(self, x: torch.Tensor, variants: int) -> torch.Tensor:
        """Return x as (variants, ...), a view."""
        rows = x.shape[self.dim] // (self.outer * variants)
        return x.unflatten(self.dim, (self.outer, variants, rows)).movedim(self.dim + 1, 0)

    def join(self, parts: torch.Tensor) -> torch.Tensor:
        """Return the tensor that `split` gives as `parts`; a view where the rows are variant-major."""
        return parts.movedim(0, self.dim + 1).flatten(self.dim, self.dim + 2)


def row_axis(one: torch.Tensor, many: torch.Tensor, variants: int, clips: int) -> RowAxis | None:
    """Return where `many` holds the rows of `variants` > 1 variants of a tensor that is `one` for one variant.

    None: it has no rows, since both have one shape. The first variant's rows decide between places of equal shape: they
    are those of `one`. Raises ValueError if the shapes or the rows do not fit.
    """
    if one.shape == many.shape:
        if not same(many, one, rounding_limit(one.dtype)):
            raise ValueError("changes with the number of rows")
        return None
    dims = [dim for dim, size in enumerate(one.shape[: many.ndim]) if many.shape[dim] != size]
    if one.ndim != many.ndim or len(dims) != 1 or many.shape[dims[0]] != variants * one.shape[dims[0]]:
        raise ValueError(f"is {tuple(one.shape)} for one variant and {tuple(many.shape)} for {variants}")
    per_clip = max(1, one.shape[dims[0]] // clips)
    for outer in (outer for outer in range(1, per_clip + 1) if per_clip % outer == 0):
        axis = RowAxis(dims[0], outer)
        first = axis.split(many, variants)[0].flatten(axis.dim, axis.dim + 1)
        if same(first, one, rounding_limit(one.dtype)):
            return axis
    raise ValueError("has other rows among the variants than alone")


def same(a: torch.Tensor, b: torch.Tensor, limit: float) -> bool:
    """Return whether the relative RMS difference of a to b is within `limit`, or b has a nan. Waits for the device."""
    if not b.is_floating_point():
        return torch.equal(a, b)
    a, b = a.detach().double(), b.detach().double()
    finite = b.isfinite()
    if not finite.all():  # -inf in additive masks
        if b.isnan().any():
            return True
        if not torch.equal(a[~finite], b[~finite]):
            return False
        a, b = a[finite], b[finite]
    return bool((a - b).norm() <= limit * b.norm())


def prefixes_differ(parts: torch.Tensor, first: list[int], prefix: list[int]) -> bool:
    """Return whether variants with one prefix differ in their rows. parts: (V, ...). Waits for the device once."""
    limit = _ONE_PREFIX.get(parts.dtype, 0.02 if parts.is_floating_point() else 0)
    unlike = []
    for variant, number in enumerate(prefix):
        if first[number] != variant:
            a, b = parts[variant], parts[first[number]]
            if parts.is_floating_point():
                a, b = a.detach().nan_to_num(), b.detach().nan_to_num()
                unlike.append((a - b).double().norm() > limit * b.double().norm())
            else:
                unlike.append((a != b).any())
    return bool(torch.stack(unlike).any()) if unlike else False
