"""The projection heads of aligned layers: one two-layer MLP for each (domain, layer), fp32, kept beside the sharded
model."""

import torch
import torch.nn as nn

from ..attribution.selection import LayerSelection
from ..flow import derive_seed


class AlignmentHeads(nn.Module):
    """Linear(dim -> dim), GELU, Linear(dim -> teacher) for every selected layer of every domain.

    Weights depend on the seed and the head's name alone, so every rank creates the same ones whenever its layer is
    selected. Xavier-uniform weights and zero biases, as in the released AG-REPA code. teacher_dims: domain -> width of
    its teacher's vectors.
    """

    def __init__(self, selection: LayerSelection, dim: int, teacher_dims: dict[str, int], seed: int):
        super().__init__()
        self.selection = selection
        self.heads = nn.ModuleDict()
        for domain, layers in selection.layers.items():
            for layer in layers:
                self.heads[head_name(domain, layer)] = _head(dim, teacher_dims[domain], seed, domain, layer)
            self.register_buffer(f"weights_{domain}", torch.tensor(selection.weights[domain]), persistent=False)

    def stacked(self, domain: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """w1 (K, D, D), b1 (K, D), w2 (K, E, D), b2 (K, E) and lambda (K,) of a domain's heads, in the order of its
        layers."""
        heads = [self.heads[head_name(domain, layer)] for layer in self.selection.layers[domain]]
        parts = zip(*((head[0].weight, head[0].bias, head[2].weight, head[2].bias) for head in heads), strict=True)
        return (*(torch.stack(part) for part in parts), getattr(self, f"weights_{domain}"))


def head_name(domain: str, layer: int) -> str:
    return f"{domain}_L{layer}"


def _head(dim: int, teacher_dim: int, seed: int, domain: str, layer: int) -> nn.Sequential:
    head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, teacher_dim))
    generator = torch.Generator().manual_seed(derive_seed(seed, head_name(domain, layer)))
    for linear in (head[0], head[2]):
        nn.init.xavier_uniform_(linear.weight, generator=generator)
        nn.init.zeros_(linear.bias)
    return head
