"""Alignment beside the sharded engine: BiT-C's projections, the heads of the current selection, and their own AdamW."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from math import ceil
from types import MappingProxyType

import torch
import torch.distributed as dist

from ..attribution.selection import LayerSelection
from ..config import Config
from ..data.batch import Batch
from ..errors import UserError
from ..lr_schedule import lr_factor
from ..models.backbone import Backbone, pool_frames
from ..ranks import all_sum
from ..their_code import their_error
from .bitc import BitcProjections, bitc_loss
from .heads import AlignmentHeads
from .losses import alignment_loss
from .objective import OF_LAYERS
from .registry import OBJECTIVES, make_objective, target_widths
from .schedule import align_factor


class Aligner:
    """The losses beside the flow loss. There are no heads and no alignment loss until `select` gets layers.
    A model without a token condition has no BiT-C.

    Heads and projections are fp32 and replicated. They stay out of the DeepSpeed engine: a module made after its
    initialisation would never train under ZeRO-2, and unused parameters that differ by rank hang stages 1 to 3.
    report: prints a line on rank 0.
    """

    def __init__(
        self,
        config: Config,
        model: Backbone,
        teacher_dims: dict[str, int],
        device: torch.device,
        report: Callable[[str], None] = lambda line: None,
    ):
        self.config, self.device, self.report = config, device, report
        self.widths = [layer.width for layer in model.layers]
        self.selection: LayerSelection | None = None
        self._choices = 0  # how often layers were selected
        self.since: int | None = None  # first step that aligns
        self.heads: AlignmentHeads | None = None
        self.optimizer: torch.optim.AdamW | None = None
        align = config.align
        self._varies = bool(align.warmup_steps or align.decay)
        self._factor = torch.ones((), device=device)  # of the step; a captured step reads it
        dtype = next(model.parameters()).dtype
        self.objective = make_objective(align.objective, self.widths, teacher_dims, dtype)
        self.target_widths = target_widths(self.objective, self.widths, teacher_dims)
        weights = {"speech": align.bitc_speech, "audio": align.bitc_audio}
        given = teacher_dims if model.condition_width is not None else ()
        self.bitc_weights = {domain: weights[domain] for domain in given if weights[domain] > 0}
        dims = {domain: teacher_dims[domain] for domain in self.bitc_weights}
        self.bitc = BitcProjections(model.condition_width, dims, config.run.seed).to(device)
        self._make_optimizer()

    def start_from(self, projections: dict[str, torch.Tensor]) -> None:
        """Copy the BiT-C projections of another run, by domain, where their shapes fit. They belong to its token
        condition."""
        with torch.no_grad():
            for domain, projection in self.bitc.items():
                if domain in projections and projections[domain].shape == projection.weight.shape:
                    projection.weight.copy_(projections[domain])

    def select(self, selection: LayerSelection) -> None:
        """Make the heads of a selection; those of layers that stay keep their weights and optimizer state. Every rank
        must get the same selection."""
        earlier, self.selection, self.heads = self.heads, selection, None
        self._choices += 1
        if selection.all_layers:
            sizes = self.widths, self.target_widths
            self.heads = AlignmentHeads(self.objective, selection, *sizes, self.config.run.seed, earlier)
            self.heads.to(self.device)
            last = len(self.widths)
            if self.objective.target in OF_LAYERS and last in selection.all_layers:
                self.report(f"align.objective={self.config.align.objective}: L{last} is compared with itself, the last")
        self._make_optimizer()

    def _make_optimizer(self) -> None:
        train, before = self.config.train, self.optimizer
        self.optimizer = None
        if parameters := self.parameters():
            options = {"betas": tuple(train.betas), "weight_decay": train.weight_decay}
            options["fused"] = self.device.type == "cuda" or None
            decayed, plain = ([p for p in parameters if (p.ndim > 1) == decays] for decays in (True, False))
            groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]  # of biases and norms
            self.optimizer = torch.optim.AdamW(groups, lr=self.config.align.lr, **options)
        if before is not None and self.optimizer is not None:
            self.optimizer.state.update({p: before.state[p] for p in parameters if p in before.state})

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return the parameters that training changes."""
        return [*self.bitc.parameters(), *(self.heads.trained_parameters() if self.heads is not None else ())]

    def begin(self, step: int) -> None:
        """Set the weight of a step. Call it before the losses, outside of a captured step."""
        if not self._aligns(step):
            return
        self.since = step if self.since is None else self.since
        if self._varies:
            self._factor.fill_(align_factor(self.config, step, self.since))

    def layers(self, step: int) -> tuple[int, ...]:
        """Return the layers whose hidden states the losses of a step need; 0 is the token condition."""
        condition = (0,) if len(self.bitc) else ()
        if not self._aligns(step):
            return condition
        deeper = self._partners() if self.objective.target == "deeper" else ()
        return condition + tuple(sorted({*self.selection.all_layers, *deeper}))

    def variant(self, step: int) -> tuple[int, ...]:
        """Return numbers that change with everything that a captured step reads besides its batch and its weights: the
        layers of a step, and the weights lambda of their choice."""
        return (self._choices, *self.layers(step))

    def attention_layers(self, step: int) -> tuple[int, ...]:
        """Return the layers whose queries and keys the losses of a step need."""
        return self.selection.all_layers if self.objective.attention and self._aligns(step) else ()

    def averaged_layers(self, step: int) -> tuple[int, ...]:
        """Return the layers whose states by the averaged weights, at a cleaner time, a step needs in its batch."""
        return self._partners() if self.objective.target == "averaged" and self._aligns(step) else ()

    def _partner(self, layer: int) -> int:
        """Return the deeper layer that a layer is compared with; the last has none deeper."""
        depth = len(self.widths)
        return min(depth, layer + (self.config.align.deeper or max(1, depth // 3)))

    def _partners(self) -> tuple[int, ...]:
        return tuple(sorted({self._partner(layer) for layer in self.selection.all_layers}))

    def _aligns(self, step: int) -> bool:
        stop = self.config.align.stop
        return self.heads is not None and (stop is None or step < stop)

    def pools(self, step: int) -> bool:
        """Return whether the losses of a step take time-means of hidden states, instead of their frames."""
        return self.objective.tap == "pooled" or not self._aligns(step)

    def losses(
        self,
        hidden: dict[int, torch.Tensor],
        batch: Batch,
        t: torch.Tensor,
        kept: torch.Tensor | None,
        step: int,
        attention: Mapping[int, Sequence[torch.Tensor]] = MappingProxyType({}),
    ) -> dict[str, torch.Tensor]:
        """Return align_loss (alignment times its weight) and bitc_loss, fp32 means over the batch's clips.

        The weight is that of the last `begin`. align_loss is zero without a selection, and from align.stop on.
        hidden: states by layer, (N, T, D), or time-means (N, D) if the step `pools`. t, kept: (N,) time of each clip,
        and whether its tokens are kept; None: all are. attention: queries and keys of the step's `attention_layers`.
        """
        zero = torch.zeros((), device=self.device)
        losses = {"align_loss": zero, "bitc_loss": zero}
        if self._aligns(step):
            loss = self.config.align.weight * self._alignment(self.heads, hidden, batch, t, attention)
            losses["align_loss"] = loss * self._factor if self._varies else loss
        if len(self.bitc):
            weights, condition = self.bitc_weights, hidden[0]
            if condition.ndim == 3:
                condition = pool_frames(condition, batch.condition.lengths, batch.mel.shape[1])
            losses["bitc_loss"] = bitc_loss(self.bitc, weights, condition, batch.teacher, batch.domain, kept)
        return losses

    @property
    def trial_layers(self) -> tuple[int, ...]:
        """The layers of `trial`: the first ones, as many as a domain may align; those of fixed:…, or none."""
        align, depth = self.config.align, len(self.widths)
        if align.strategy == "none":
            return ()
        if align.share is not None:  # the k highest of L layers carry k / L at least, and one more makes that sure
            count = ceil(align.share * depth) + 1
        else:  # a soft choice of the demo has 1.4 K
            count = align.k * (2 if align.choice == "soft" else 1)
        if align.per_time:
            count *= len(self.config.probe.times)
        return align.fixed_layers or tuple(range(1, min(count, depth) + 1))

    def trial(self, hidden, batch: Batch, t: torch.Tensor, attention) -> tuple[torch.Tensor, list[torch.nn.Parameter]]:
        """Return the alignment term as if `trial_layers` were aligned in every domain, and the parameters of its heads,
        which nothing else knows. A dry run takes it for the layers that are not chosen yet. Arguments: of `losses`."""
        layers = self.trial_layers
        domains = self.target_widths if layers else ()
        weights = dict.fromkeys(domains, (1.0,) * len(layers))
        selection = LayerSelection("trial", dict.fromkeys(domains, layers), weights)
        heads = AlignmentHeads(self.objective, selection, self.widths, self.target_widths, 0).to(self.device)
        return self._alignment(heads, hidden, batch, t, attention), heads.trained_parameters()

    def _alignment(self, heads: AlignmentHeads, hidden, batch: Batch, t: torch.Tensor, attention) -> torch.Tensor:
        """Return the alignment term. Raises UserError if a user's objective raises anything."""
        name = self.config.align.objective
        try:
            return alignment_loss(self.objective, heads, hidden, batch, t, self._partner, attention)[0]
        except Exception as error:
            if name in OBJECTIVES or isinstance(error, torch.OutOfMemoryError):
                raise
            raise UserError(f"align.objective={name}: {their_error(error)}") from error

    def reduce(self, step: int) -> torch.Tensor:
        """Average the gradients of a step over ranks in one all-reduce, and return their norm, 0-dim on the device.
        Call it after the last backward, at the same point on every rank."""
        if self._aligns(step):  # a user's objective may not reach the heads of a domain that this rank has no clip of
            for parameter in self.heads.trained_parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        parameters = self._trained()
        if not parameters:
            return torch.zeros((), device=self.device)
        flat = all_sum(torch.cat([p.grad.flatten() for p in parameters])) / dist.get_world_size()
        for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad.copy_(gradient.view_as(parameter))
        return flat.norm()

    def step(self, step: int) -> None:
        """Clip the reduced gradients, and update."""
        if parameters := self._trained():
            torch.nn.utils.clip_grad_norm_(parameters, self.config.train.clip_norm)
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.align.lr * lr_factor(self.config.train, step)
            self.optimizer.step()
        self.discard()

    def discard(self) -> None:
        """Forget the gradients of a step."""
        if self.optimizer is not None:
            self.optimizer.zero_grad()

    def _trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.parameters() if p.grad is not None]  # none of the heads after align.stop

    def export(self) -> dict[str, torch.Tensor]:
        """Return the weights of projections ("bitc.speech.weight") and heads ("heads.speech_L1.0.weight", ...)."""
        parts = {"bitc": self.bitc.state_dict(), "heads": self.heads.heads.state_dict() if self.heads else {}}
        # Copies: a user's head may tie two weights or keep a transposed view, and safetensors takes neither.
        return {
            f"{part}.{name}": value.detach().cpu().clone().contiguous()
            for part, state in parts.items()
            for name, value in state.items()
        }

    def state_dict(self) -> dict:
        """Return selection, heads, projections and optimizer; the same on every rank."""
        return {
            "selection": None if self.selection is None else asdict(self.selection),
            "since": self.since,
            "weights": self.export(),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        if state["selection"] is not None:
            self.select(LayerSelection.from_dict(state["selection"]))
            self.since = state.get("since", self.since)  # version 0.1 kept none, and its weight was constant
        modules = {"bitc": self.bitc, **({"heads": self.heads.heads} if self.heads is not None else {})}
        for part, module in modules.items():
            weights = {name: value for name, value in state["weights"].items() if name.startswith(f"{part}.")}
            module.load_state_dict({name.removeprefix(f"{part}."): value for name, value in weights.items()})
        if self.optimizer is not None:
            self.optimizer.load_state_dict(self._in_groups(state["optimizer"]))

    def _in_groups(self, saved: dict) -> dict:
        """Return the optimizer's state of a checkpoint; those of version 0.1 have one group of all parameters."""
        groups = self.optimizer.state_dict()["param_groups"]
        if len(saved["param_groups"]) == len(groups):
            return saved
        places = {parameter: place for place, parameter in enumerate(self.parameters())}
        ours = [places[parameter] for group in self.optimizer.param_groups for parameter in group["params"]]
        state = {number: saved["state"][place] for number, place in enumerate(ours) if place in saved["state"]}
        return {"state": state, "param_groups": groups}
