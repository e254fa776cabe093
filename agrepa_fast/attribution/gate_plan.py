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
    """The plan of gates (V, L) in [0, 1], one BlockPlan per block.

    A probe makes it once: the copies of its indices on the device stay where they are, as CUDA graphs need. Raises
    ValueError for gates of another shape or outside [0, 1].
    """

    def __init__(self, gates: torch.Tensor):
        if gates.ndim != 2 or not ((gates >= 0) & (gates <= 1)).all():
            raise ValueError(f"gates must be a (variants, blocks) matrix in [0, 1], not {tuple(gates.shape)}")
        self.shape = tuple(gates.shape)
        self.blocks = tuple(_plan_blocks(gates.T.tolist(), len(gates)))


def _plan_blocks(columns: list[list[float]], variants: int) -> list[BlockPlan]:
    plans = []
    prefix = [0] * variants  # the number of each variant's prefix, in the order of appearance
    for column in columns:
        _, first = np.unique(prefix, return_index=True)
        plans.append(
            BlockPlan(DeviceCopies(torch.from_numpy(first)), DeviceCopies(torch.tensor(prefix)), tuple(column))
        )
        numbers: dict[tuple[int, float], int] = {}
        prefix = [numbers.setdefault(longer, len(numbers)) for longer in zip(prefix, column, strict=True)]
    return plans
