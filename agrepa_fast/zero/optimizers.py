"""The optimizer that DeepSpeed wraps: AdamW, or Muon for the layers' matrices and AdamW for the rest."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn as nn
from torch.optim.adamw import adamw

from ..config import TrainConfig
from ..models.backbone import Backbone
from ..ranks import all_gather
from .construction import whole_shape
from .ds_config import zero_stage
from .masters import Piece, master_parameters, master_pieces, trained_parameters
from .muon import Matrices, MuonShare, Orthogonalizer
from .rules import Rule, adamw_rules, muon_rules

KINDS = ("muon", "decayed", "plain")  # what updates a part of a master: Muon, or AdamW with or without decay


def build_optimizer(model: Backbone, train: TrainConfig, ds_config: dict) -> "RuledOptimizer":
    """Return the optimizer of all weights that are not frozen. ds_config: resolved. Call `attach` when DeepSpeed has
    made its masters."""
    rules = muon_rules(model) if train.optimizer == "muon" else adamw_rules(model)
    return RuledOptimizer(rules, train, train.clip_norm if clips_in_optimizer(ds_config) else None)


def clips_in_optimizer(ds_config: dict) -> bool:
    """Whether DeepSpeed puts no optimizer of its own around ours, and so neither clips nor skips: stage 0 in fp32."""
    return zero_stage(ds_config) == 0 and not ds_config["bf16"]["enabled"]


class Layout:
    """The kinds of a master's parts, in the order of its elements. Neighbouring parts of one kind are merged, except
    Muon's: one per piece."""

    def __init__(self, master: torch.Tensor, pieces: Sequence[Piece], rules: Sequence[Rule]):
        self.sizes: list[int] = []
        self.kinds: list[str] = []
        end = 0
        for piece in pieces:
            rule = rules[piece.number]
            self._add(piece.at - end, "plain")  # DeepSpeed's padding
            self._add(piece.numel, "muon" if rule.matrices else "decayed" if rule.decays else "plain")
            end = piece.at + piece.numel
        self._add(master.numel() - end, "plain")

    def _add(self, size: int, kind: str) -> None:
        if kind != "muon" and self.kinds[-1:] == [kind]:
            self.sizes[-1] += size
        elif size:
            self.sizes.append(size)
            self.kinds.append(kind)

    def cut(self, tensor: torch.Tensor, kind: str) -> list[torch.Tensor]:
        """Return the parts of a kind, flat, of a tensor that is laid out as the master."""
        if kind not in self.kinds:
            return []
        parts = tensor.flatten().split(self.sizes)
        return [part for part, own in zip(parts, self.kinds, strict=True) if own == kind]


class RuledOptimizer(torch.optim.AdamW):
    """AdamW and Muon in one optimizer of one parameter group. The state of a master is that of AdamW: exp_avg,
    exp_avg_sq and step. Muon's momentum is in exp_avg.

    clip_norm: clip by the global norm, and leave everything as it is if that is not finite, as DeepSpeed's own
    optimizers do; None: DeepSpeed does. The engine reads `overflow` and `_global_grad_norm` after a step.
    """

    def __init__(self, rules: dict[nn.Parameter, Rule], train: TrainConfig, clip_norm: float | None = None):
        trained = [parameter for parameter in rules if parameter.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.contiguous()  # updates go to flat views
        options = {"betas": tuple(train.betas), "weight_decay": train.weight_decay, "fused": True}
        super().__init__(trained, lr=train.lr, **options)
        self.rules, self.momentum, self.clip_norm = rules, train.momentum, clip_norm
        self.overflow, self._global_grad_norm = False, None
        self.partitioned = False  # DeepSpeed converts checkpoints by ranks, and wants the same moments of all masters
        self.layouts: dict[torch.Tensor, Layout] = {}  # by master
        self.shares: list[MuonShare] = []

    def attach(self, engine) -> None:
        """Find the parameters in the masters of the engine that wraps this optimizer. Every rank must call it."""
        self.partitioned = engine.zero_optimization_stage() > 0
        trained = [parameter for _, parameter in trained_parameters(engine.module)]
        rules = [self.rules[parameter] for parameter in trained]
        shapes = {
            number: Matrices(rule.matrices, shape[0] // rule.matrices, shape[1])
            for number, (rule, shape) in enumerate(zip(rules, map(whole_shape, trained), strict=True))
            if rule.matrices
        }
        masters, pieces = master_parameters(engine), master_pieces(engine)
        self.layouts = {m: Layout(m, ours, rules) for m, ours in zip(masters, pieces, strict=True)}
        if not shapes:
            return
        together = [[master] for master in range(len(masters))] if self.partitioned else [list(range(len(masters)))]
        for group in together:  # stepped at once
            ours = [piece for master in group for piece in pieces[master] if piece.number in shapes]
            held = all_gather(ours)
            numbers = {piece.number for theirs in held for piece in theirs}
            if numbers:
                found = {number: shapes[number] for number in numbers}
                dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
                where = {"device": engine.device, "dtype": dtype}
                orthogonalizer = Orthogonalizer(found, held, shared=self.partitioned, **where)
                self.shares.append(MuonShare([masters[n] for n in group], orthogonalizer, ours))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        if not self.layouts or (self.clip_norm is not None and not self._clip()):
            return  # at stage 0 in bf16, DeepSpeed takes a step without gradients while it is made
        (group,) = self.param_groups
        lr, decay, masters = group["lr"], group["weight_decay"], group["params"]
        for master in masters:
            self._make_state(master)
        updated = [master for master in masters if master.grad is not None]
        for kind, own_decay in (("decayed", decay), ("plain", 0.0)):
            parts = [self.cut(kind, updated, tensors) for tensors in ("weights", "grad", "exp_avg", "exp_avg_sq")]
            if parts[0]:
                # A count per part: AdamW adds one to each.
                counts = [self.state[m]["step"] for m in updated for own in self.layouts[m].kinds if own == kind]
                beta1, beta2 = group["betas"]
                adamw(
                    *parts,
                    [],
                    list(torch._foreach_add(counts, 0)),
                    fused=group["fused"],
                    amsgrad=False,
                    beta1=beta1,
                    beta2=beta2,
                    lr=lr,
                    weight_decay=own_decay,
                    eps=group["eps"],
                    maximize=False,
                )
        stepped = set(map(id, masters))
        for share in self.shares:
            if id(share.masters[0]) in stepped:
                parts = [self.cut("muon", share.masters, tensors) for tensors in ("weights", "grad", "exp_avg")]
                share.update(*parts, lr=lr, momentum=self.momentum, decay=decay)
        torch._foreach_add_([self.state[master]["step"] for master in masters], 1)

    def cut(self, kind: str, masters: Iterable[torch.Tensor], tensors: str) -> list[torch.Tensor]:
        """Return the flat parts of a kind of all masters' "weights", "grad" (zeros for a master without one), or of a
        tensor of their states."""
        found = []
        for master in masters:
            if kind in self.layouts[master].kinds:
                if tensors == "weights":
                    tensor = master.detach()
                elif tensors == "grad":
                    tensor = torch.zeros_like(master) if master.grad is None else master.grad
                else:
                    tensor = self.state[master][tensors]
                found += self.layouts[master].cut(tensor, kind)
        return found

    def _make_state(self, master: torch.Tensor) -> None:
        state, kinds = self.state[master], self.layouts[master].kinds
        if not state:
            state["step"] = torch.zeros((), device=master.device)
            state["exp_avg"] = torch.zeros_like(master)
            if kinds != ["muon"] or self.partitioned:
                state["exp_avg_sq"] = torch.zeros_like(master)

    def set_state(self, master: torch.Tensor, moments: dict[str, torch.Tensor], updates: int) -> None:
        """Continue a master from exp_avg and exp_avg_sq, laid out as it is, after so many updates."""
        self._make_state(master)
        state = self.state[master]
        state.update({name: moment for name, moment in moments.items() if name in state})
        state["step"].fill_(updates)

    def _clip(self) -> bool:
        """Clip the gradients by their global norm. Return whether it is finite; if not, they are as they were."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._global_grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        self.overflow = not bool(self._global_grad_norm.isfinite())
        if not self.overflow:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, self._global_grad_norm)
        return not self.overflow


def optimizer_inside(engine) -> RuledOptimizer:
    """Return the optimizer that DeepSpeed's own wraps. Its state is keyed by the masters."""
    return engine.basic_optimizer
