"""Muon: momentum whose matrices are made orthogonal, each on one rank, whatever the ZeRO stage.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; update lengths as AdamW's by Liu et al.
2025, "Muon is scalable for LLM training". The numbers are those of torch.optim.Muon with
adjust_lr_fn="match_rms_adamw", for which the iterations are in bf16.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..errors import UserError
from .masters import Piece

A, B, C = 3.4445, -4.7750, 2.0315  # of the quintic iteration, as in torch.optim.Muon
STEPS = 5
_BATCH = 1 << 26  # elements that are iterated together: bounds the memory


class Matrices(NamedTuple):
    """A parameter that Muon updates: `count` matrices of rows x cols, one below the other."""

    count: int
    rows: int
    cols: int

    @property
    def scale(self) -> float:
        """The factor that gives an orthogonal update about the RMS of AdamW's, 0.2."""
        return 0.2 * max(self.rows, self.cols) ** 0.5

    @property
    def numel(self) -> int:
        return self.count * self.rows * self.cols

    @property
    def flops(self) -> int:
        """FLOPs of the iterations: three products each, two of them of small x small by small x large."""
        small, large = sorted((self.rows, self.cols))
        return self.count * STEPS * (4 * small * small * large + 2 * small**3)


def orthogonalize(x: torch.Tensor) -> torch.Tensor:
    """Return about U V^T of each matrix U S V^T: x (M, rows, cols) with rows <= cols, in any floating type.

    Five Newton-Schulz iterations, in x's type, leave singular values of about 0.7 to 1.2. A zero matrix stays zero.
    """
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x


class Orthogonalizer:
    """Makes directions orthogonal that are cut over the ranks. Every rank must make it, and call it, in the same order.

    shapes: number -> Matrices. held: the pieces of each rank. shared: whether each element is on one rank (ZeRO 1 to
    3); otherwise every rank holds all. Each parameter has one rank that iterates: one that holds at least half as much
    of it as any, and has the least to do. The others send it their pieces and get them back.
    """

    def __init__(
        self,
        shapes: dict[int, Matrices],
        held: Sequence[Sequence[Piece]],
        *,
        shared: bool,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.shapes, self.device, self.dtype = shapes, device, dtype
        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        self._pieces = held[self.rank]
        self.owners = _owners(shapes, held)
        self._taken = [self._by_owner(pieces) for pieces in held]  # [rank][owner] -> pieces
        kept = [[p for p in pieces if shared or self.owners[p.number] == rank] for rank, pieces in enumerate(held)]
        self._given = [self._by_owner(pieces) for pieces in kept]
        provided = Counter()
        for piece in (piece for pieces in kept for piece in pieces):
            provided[piece.number] += piece.numel
        if any(provided[number] != matrices.numel for number, matrices in shapes.items()):
            raise UserError(
                "train.optimizer=muon: this ds_config keeps a weight on several ranks: remove mics_shard_size"
            )

    def __call__(self, directions: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the orthogonal update of each direction, flat and in the iterations' type. directions: this rank's, in
        the order of its pieces."""
        ours = dict(zip(self._pieces, directions, strict=True))
        out = [[ours[piece].flatten() for piece in pieces] for pieces in self._given[self.rank]]
        received = self._exchange(out, [pieces[self.rank] for pieces in self._given])
        whole = self._iterate(self._assemble(received))
        wanted = [pieces[self.rank] for pieces in self._taken]
        out = [[whole[p.number].flatten()[p.start : p.start + p.numel] for p in pieces] for pieces in wanted]
        updates = {}
        for pieces, parts in zip(self._taken[self.rank], self._exchange(out, self._taken[self.rank]), strict=True):
            updates |= dict(zip(pieces, parts, strict=True))
        return [updates[piece] for piece in self._pieces]

    def _by_owner(self, pieces: Sequence[Piece]) -> list[list[Piece]]:
        return [[p for p in pieces if self.owners[p.number] == owner] for owner in range(self.world)]

    def _exchange(self, out: list[list[torch.Tensor]], due: list[list[Piece]]) -> list[list[torch.Tensor]]:
        """Send out[r] to rank r, and return what each rank has sent: tensors of the sizes that are due from it."""
        if self.world == 1:
            return out
        flat = [tensor for tensors in out for tensor in tensors]
        empty = torch.empty(0, dtype=self.dtype, device=self.device)
        sent = torch.cat(flat).to(self.device, self.dtype) if flat else empty
        sizes = [[piece.numel for piece in pieces] for pieces in due]
        received = empty.new_empty(sum(map(sum, sizes)))
        dist.all_to_all_single(received, sent, [*map(sum, sizes)], [sum(t.numel() for t in tensors) for tensors in out])
        parts = iter(received.split([size for part in sizes for size in part]))
        return [[next(parts) for _ in part] for part in sizes]

    def _assemble(self, received: list[list[torch.Tensor]]) -> dict[int, torch.Tensor]:
        """Return number -> (count, rows, cols) of the parameters that this rank iterates."""
        found = defaultdict(dict)
        for pieces, parts in zip(self._given, received, strict=True):
            for piece, part in zip(pieces[self.rank], parts, strict=True):
                found[piece.number][piece.start] = part
        whole = {}
        for number, parts in found.items():
            tensors = [part for _, part in sorted(parts.items())]
            whole[number] = (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).view(self.shapes[number])
        return whole

    def _iterate(self, whole: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Return the orthogonal matrices of each parameter. Those of one shape are iterated together."""
        updates, alike = {}, defaultdict(list)
        for number in whole:
            alike[tuple(sorted(self.shapes[number][1:]))].append(number)
        for numbers in alike.values():
            for chunk in _chunks(numbers, [self.shapes[number].numel for number in numbers]):
                wide = torch.cat([_wide(whole[number]) for number in chunk]).to(self.device, self.dtype)
                parts = orthogonalize(wide).split([self.shapes[number].count for number in chunk])
                for number, part in zip(chunk, parts, strict=True):
                    updates[number] = part if self.shapes[number].rows <= self.shapes[number].cols else part.mT
        return updates


class MuonShare:
    """The matrices in some masters of this rank that Muon updates together with those of the other ranks.

    After an update, `squares` has the sums of squares of the update and of the weights before it, 0-dim.
    """

    def __init__(self, masters: Sequence[torch.Tensor], orthogonalizer: Orthogonalizer, pieces: Sequence[Piece]):
        self.masters, self._orthogonalizer = masters, orthogonalizer
        self._sizes = [piece.numel for piece in pieces]
        self._scales = [orthogonalizer.shapes[piece.number].scale for piece in pieces]
        self.squares: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self,
        weights: list[torch.Tensor],
        gradients: list[torch.Tensor],
        means: list[torch.Tensor],
        *,
        lr: float,
        momentum: float,
        decay: float,
    ) -> None:
        """Update flat weights and the means of their gradients, in the order of the pieces. Overwrites the gradients.
        Every rank must call it, also without pieces."""
        if weights:
            torch._foreach_lerp_(means, gradients, 1 - momentum)
            torch._foreach_lerp_(gradients, means, momentum)  # Nesterov's
        directions = self._orthogonalizer(gradients)
        if not weights:
            return
        steps = list(weights[0].new_empty(sum(self._sizes)).split(self._sizes))
        torch._foreach_copy_(steps, directions)
        torch._foreach_mul_(steps, self._scales)
        torch._foreach_add_(steps, weights, alpha=decay)
        self.squares = (_square(steps) * lr**2, _square(weights))
        torch._foreach_add_(weights, steps, alpha=-lr)


def _square(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(torch._foreach_norm(tensors)).square().sum()


def _wide(matrices: torch.Tensor) -> torch.Tensor:
    return matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT


def _chunks(numbers: list[int], sizes: list[int]) -> list[list[int]]:
    """Return the numbers in groups whose sizes sum to at most _BATCH, or of one."""
    groups, total = [[]], 0
    for number, size in zip(numbers, sizes, strict=True):
        if groups[-1] and total + size > _BATCH:
            groups.append([])
            total = 0
        groups[-1].append(number)
        total += size
    return groups


def _owners(shapes: dict[int, Matrices], held: Sequence[Sequence[Piece]]) -> dict[int, int]:
    """Return number -> the rank that iterates it, the same on every rank. held: pieces by rank."""
    amounts: dict[int, dict[int, int]] = {number: defaultdict(int) for number in shapes}
    for rank, pieces in enumerate(held):
        for piece in pieces:
            amounts[piece.number][rank] += piece.numel
    owners, load = {}, [0] * len(held)
    for number in sorted(shapes, key=lambda number: (-shapes[number].flops, number)):
        most = max(amounts[number].values())
        candidates = [rank for rank, amount in amounts[number].items() if 2 * amount >= most]
        owners[number] = min(candidates, key=lambda rank: (load[rank], rank))
        load[owners[number]] += shapes[number].flops
    return owners
