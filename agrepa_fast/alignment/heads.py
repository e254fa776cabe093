"""The heads of aligned layers: one for each (domain, layer), as the objective makes them, fp32, kept beside the sharded
model."""

from collections.abc import Sequence

import torch
import torch.nn as nn

from ..attribution.selection import LayerSelection
from ..seeds import derive_seed
from .objective import Objective


class AlignmentHeads(nn.Module):
    """The objective's head for every selected layer of every domain, and the layers' weights.

    A head's weights depend on the seed and its name alone, so every rank creates the same ones whenever its layer is
    selected. widths: of all layers, L1 first. target_widths: domain -> width of what its layers are compared with.
    earlier: heads of an earlier selection; those of layers that stay are taken over.
    """

    def __init__(
        self,
        objective: Objective,
        selection: LayerSelection,
        widths: Sequence[int],
        target_widths: dict[str, int],
        seed: int,
        earlier: "AlignmentHeads | None" = None,
    ):
        super().__init__()
        self.selection = selection
        self.heads = nn.ModuleDict()
        for domain, layers in selection.layers.items():
            for layer in layers:
                name = _name(domain, layer)
                head = None if earlier is None else earlier.of(domain, layer)
                if head is None:
                    sizes = widths[layer - 1], target_widths[domain]
                    head = make_head(objective, *sizes, derive_seed(seed, name))
                if head is not None:
                    self.heads[name] = head
            table = selection.weights_at.get(domain, (selection.weights[domain],))
            self.register_buffer(f"weights_{domain}", torch.tensor(table), persistent=False)
        self.register_buffer("times", torch.tensor(selection.times or (0.0,)), persistent=False)

    def of(self, domain: str, layer: int) -> nn.Module | None:
        """Return the head of a domain's layer, None if it has none."""
        name = _name(domain, layer)
        return dict(self.heads.items()).get(name)

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of all heads without those that a user's objective has frozen."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def layer_weights(self, domain: str, t: torch.Tensor) -> torch.Tensor:
        """Return lambda (K,), or (K, N) for clips at times t (N,) if the selection's weights differ by time: linear
        between the probe's times, constant beyond them."""
        table = getattr(self, f"weights_{domain}")  # (times, K)
        if len(table) == 1:
            return table[0]
        right = torch.searchsorted(self.times, t.contiguous()).clamp(1, len(table) - 1)
        left, before = right - 1, self.times[right - 1]
        share = ((t - before) / (self.times[right] - before)).clamp(0, 1)
        return torch.lerp(table[left], table[right], share.unsqueeze(1)).T.contiguous()


def make_head(objective: Objective, width: int, target_width: int, seed: int) -> nn.Module | None:
    """Return a new head on the CPU, its weights drawn from the seed. The random states stay as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return objective.head(width, target_width)


def _name(domain: str, layer: int) -> str:
    return f"{domain}_L{layer}"
