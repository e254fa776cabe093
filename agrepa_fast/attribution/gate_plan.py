"""Which rows each block runs when many gate variants of one model are computed together.

Two variants whose gates agree on blocks 1 ... l-1 have the same input to block l. So block l runs once per distinct
gate prefix: the blocks walk a trie over the gate matrix.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ..device import DeviceCopies


def single_ablations(depth: int) -> torch.Tensor:
    """Return FoG-A's gates (L + 1, L): the whole model, then the model without block 1, ..., without block L."""
    return torch.cat((torch.ones(1, depth), 1 - torch.eye(depth)))


def count_block_forwards(gates: torch.Tensor) -> int:
    """Return how many block forwards, of C rows each, multi_gate runs for gates (V, L): all blocks' distinct prefixes.

    For kind="branch" it counts branches: half a block each where a block has two.
    """
    return sum(block.prefixes for block in GatePlan(gates).blocks)


def prefix_order(gates: torch.Tensor) -> torch.Tensor:
    """Return an order (V,) of the variants in which every block runs the first rows: a slice instead of a gather.

    Variants are sorted by the block at which their prefix becomes their own. The whole model stays first.
    """
    births = torch.full((len(gates),), gates.shape[1])
    for number, block in reversed(list(enumerate(GatePlan(gates).blocks))):
        births[block.first.host] = number
    return births.argsort(stable=True)


@dataclass
class BlockPlan:
    """The variants whose rows one block runs, and the result that each variant uses."""

    first: DeviceCopies  # (P,) the first variant of each distinct prefix, whose rows run
    prefix: DeviceCopies  # (V,) the number of each variant's prefix among the P results
    gates: tuple[float, ...]  # (V,) of this block

    def __post_init__(self) -> None:
        self.prefixes = len(self.first.host)
        self.is_slice = self.first.host.tolist() == list(range(self.prefixes))

    def partial_gates(self) -> list[tuple[int, float]]:
        """Return (variant, gate) of every gate below 1."""
        return [(variant, gate) for variant, gate in enumerate(self.gates) if gate < 1]


class GatePlan:
    """The plan of gates (V, L) in [0, 1]: one BlockPlan per block that runs and set of blocks that ran before it.

    A variant's state depends on the gates of all blocks that ran before, in any order and any number of times: these
    gates are its prefix. `blocks` are the plans of a model whose blocks run once, in order.

    A probe makes it once: the copies of its indices on the device stay where they are, as CUDA graphs need. Raises
    ValueError for gates of another shape or outside [0, 1].
    """

    def __init__(self, gates: torch.Tensor):
        if gates.ndim != 2 or not ((gates >= 0) & (gates <= 1)).all():
            raise ValueError(f"gates must be a (variants, blocks) matrix in [0, 1], not {tuple(gates.shape)}")
        self.shape = tuple(gates.shape)
        self._columns = gates.T.tolist()
        self._prefixes = {frozenset[int](): [0] * len(gates)}  # blocks that ran -> number of each variant's prefix
        self._plans: dict[tuple[frozenset[int], int], BlockPlan] = {}
        self.blocks = tuple(self.after(frozenset(range(block)), block) for block in range(gates.shape[1]))

    def after(self, ran: frozenset[int], block: int) -> BlockPlan:
        """Return the plan of a block that runs after the blocks `ran`, which were planned one by one."""
        if (ran, block) not in self._plans:
            prefix, column = self._prefixes[ran], self._columns[block]
            _, first = np.unique(prefix, return_index=True)
            plan = BlockPlan(DeviceCopies(torch.from_numpy(first)), DeviceCopies(torch.tensor(prefix)), tuple(column))
            self._plans[ran, block] = plan
            numbers: dict[tuple[int, float], int] = {}  # in the order of appearance
            longer = [numbers.setdefault(pair, len(numbers)) for pair in zip(prefix, column, strict=True)]
            self._prefixes.setdefault(ran | {block}, prefix if block in ran else longer)
        return self._plans[ran, block]
