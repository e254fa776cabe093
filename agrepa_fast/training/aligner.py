"""Alignment beside the sharded engine: the current selection, its heads, and their own AdamW."""

from dataclasses import asdict

import torch
import torch.distributed as dist

from ..alignment.heads import AlignmentHeads
from ..alignment.objectives import alignment_loss
from ..attribution.scores import LayerScores
from ..attribution.selection import LayerSelection
from ..config import Config
from ..data.stream import Batch
from .engine import all_sum, lr_factor


class Aligner:
    """No selection, no heads, no loss, until `select` is called with one that has layers.

    Heads are fp32 and replicated. They stay out of the DeepSpeed engine: a module made after its initialisation would
    never train under ZeRO-2, and unused parameters that differ by rank hang stages 1 to 3.
    """

    def __init__(self, config: Config, teacher_dims: dict[str, int], device: torch.device):
        self.config, self.teacher_dims, self.device = config, teacher_dims, device
        self.selection: LayerSelection | None = None
        self.heads: AlignmentHeads | None = None
        self.optimizer: torch.optim.AdamW | None = None
        self.probes: list[LayerScores] = []  # the recent ones, which the next ranking pools

    def add_probe(self, scores: LayerScores) -> LayerScores:
        """Remember a probe; returns it pooled with the recent ones (probe.pool together)."""
        recent = self.probes[-(self.config.probe.pool - 1) :] if self.config.probe.pool > 1 else []
        self.probes = [*recent, scores]
        return scores.pooled_with(recent)

    def select(self, selection: LayerSelection) -> None:
        """Create the heads of a selection; every rank must get the same one."""
        self.selection, self.heads, self.optimizer = selection, None, None
        if not selection.all_layers:
            return
        self.heads = AlignmentHeads(selection, self.config.model.dim, self.teacher_dims, self.config.run.seed)
        self.heads.to(self.device)
        train = self.config.train
        self.optimizer = torch.optim.AdamW(
            self.heads.parameters(),
            lr=self.config.align.lr,
            betas=tuple(train.betas),
            weight_decay=train.weight_decay,
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """1-based layers whose hidden states the loss needs."""
        return self.selection.all_layers if self.heads is not None else ()

    def loss(self, hidden: dict[int, torch.Tensor], batch: Batch) -> torch.Tensor:
        """align.weight x alignment loss, the mean over the batch's clips, fp32; zero while nothing is selected."""
        if self.heads is None:
            return torch.zeros((), device=self.device)
        return self.config.align.weight * alignment_loss(self.heads, hidden, batch.teacher, batch.domain)[0]

    def step(self, step: int) -> None:
        """Average the heads' gradients over ranks in one all-reduce, clip, and update. At the same point on every
        rank."""
        if self.heads is None:
            return
        parameters = list(self.heads.parameters())
        flat = all_sum(torch.cat([p.grad.flatten() for p in parameters])) / dist.get_world_size()
        for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad.copy_(gradient.view_as(parameter))
        torch.nn.utils.clip_grad_norm_(parameters, self.config.train.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.align.lr * lr_factor(self.config.train, step)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict:
        """Recent probes, selection, heads and optimizer; the same on every rank, so it loads on any number of them."""
        state = {"probes": [asdict(scores) for scores in self.probes]}
        if self.selection is None:
            return state
        state |= {"selection": asdict(self.selection)}
        if self.heads is not None:
            state |= {"heads": self.heads.state_dict(), "optimizer": self.optimizer.state_dict()}
        return state

    def load_state_dict(self, state: dict) -> None:
        self.probes = [LayerScores(**scores) for scores in state["probes"]]
        if "selection" not in state:
            return
        self.select(LayerSelection.from_dict(state["selection"]))
        if self.heads is not None:
            self.heads.load_state_dict(state["heads"])
            self.optimizer.load_state_dict(state["optimizer"])
