"""The projection heads of aligned layers: one two-layer MLP for each (domain, layer), fp32, kept beside the sharded
model; and BiT-C's projections of the token condition."""

from collections.abc import Sequence

import torch
import torch.nn as nn

from ..attribution.selection import LayerSelection
from ..seeds import derive_seed


class AlignmentHeads(nn.Module):
    """Linear(width -> width), GELU, Linear(width -> teacher) for every selected layer of every domain.

    Weights depend on the seed and the head's name alone, so every rank creates the same ones whenever its layer is
    selected. Xavier-uniform weights and zero biases, as in the released AG-REPA code. widths: of all layers, L1 first.
    teacher_dims: domain -> width of its teacher's vectors. earlier: heads of an earlier selection; those of layers that
    stay are taken over.
    """

    def __init__(
        self,
        selection: LayerSelection,
        widths: Sequence[int],
        teacher_dims: dict[str, int],
        seed: int,
        earlier: "AlignmentHeads | None" = None,
    ):
        super().__init__()
        self.selection, self.widths = selection, widths
        self.heads = nn.ModuleDict()
        for domain, layers in selection.layers.items():
            for layer in layers:
                name = head_name(domain, layer)
                kept = earlier is not None and name in earlier.heads
                size = widths[layer - 1], teacher_dims[domain]
                self.heads[name] = earlier.heads[name] if kept else _head(*size, seed, name)
            table = selection.weights_at.get(domain, (selection.weights[domain],))
            self.register_buffer(f"weights_{domain}", torch.tensor(table), persistent=False)
        self.register_buffer("times", torch.tensor(selection.times or (0.0,)), persistent=False)

    def equally_wide(self, domain: str) -> list[list[int]]:
        """Return the places of a domain's layers in its selection, in one list per width."""
        groups: dict[int, list[int]] = {}
        for place, layer in enumerate(self.selection.layers[domain]):
            groups.setdefault(self.widths[layer - 1], []).append(place)
        return list(groups.values())

    def stacked(
        self, domain: str, layers: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return w1 (K, D, D), b1 (K, D), w2 (K, E, D), b2 (K, E) of a domain's heads of equally wide layers."""
        heads = [self.heads[head_name(domain, layer)] for layer in layers]
        parts = zip(*((head[0].weight, head[0].bias, head[2].weight, head[2].bias) for head in heads), strict=True)
        return tuple(torch.stack(part) for part in parts)

    def layer_weights(self, domain: str, t: torch.Tensor) -> torch.Tensor:
        """Return lambda (K,), or (K, N) for clips at times t (N,) if the selection's weights differ by time: linear
        between the probe's times, constant beyond them."""
        table = getattr(self, f"weights_{domain}")  # (times, K)
        if len(table) == 1:
            return table[0]
        right = torch.searchsorted(self.times, t).clamp(1, len(table) - 1)
        left, before = right - 1, self.times[right - 1]
        share = ((t - before) / (self.times[right] - before)).clamp(0, 1)
        return torch.lerp(table[left], table[right], share.unsqueeze(1)).T.contiguous()


def head_name(domain: str, layer: int) -> str:
    return f"{domain}_L{layer}"


def _head(width: int, teacher_dim: int, seed: int, name: str) -> nn.Sequential:
    head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, teacher_dim))
    generator = torch.Generator().manual_seed(derive_seed(seed, name))
    for linear in (head[0], head[2]):
        nn.init.xavier_uniform_(linear.weight, generator=generator)
        nn.init.zeros_(linear.bias)
    return head


class BitcProjections(nn.ModuleDict):
    """One bias-free linear map per domain, from the pooled token condition (layer 0) to its teacher.

    The weights are orthogonal, as in the released AG-REPA code, and depend on the seed and the domain alone.
    """

    def __init__(self, dim: int, teacher_dims: dict[str, int], seed: int):
        super().__init__()
        for domain, teacher_dim in teacher_dims.items():
            self[domain] = nn.Linear(dim, teacher_dim, bias=False)
            generator = torch.Generator().manual_seed(derive_seed(seed, f"bitc {domain}"))
            nn.init.orthogonal_(self[domain].weight, generator=generator)
