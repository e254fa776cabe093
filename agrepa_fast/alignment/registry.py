"""The objective that align.objective names: a published one, or a class of the user's."""

from collections.abc import Sequence
from itertools import chain

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parameter import is_lazy

from ..config import AlignConfig
from ..data.index import Index
from ..errors import UserError
from ..kernels import valid_frames
from ..models.backbone import Backbone
from ..settings import check
from ..their_code import named_object, their_error
from .frames import Frames, IRepa
from .haste import Haste
from .heads import make_head
from .layersync import LayerSync
from .objective import OF_LAYERS, TAPS, TARGETS, AlignedLayer, Objective
from .pooled import Pooled
from .sra import Sra

OBJECTIVES: dict[str, type[Objective]] = {
    "pooled": Pooled,
    "frames": Frames,
    "irepa": IRepa,
    "haste": Haste,
    "layersync": LayerSync,
    "sra": Sra,
}
_LENGTHS = (7, 3, 0)  # frames of the trial's clips; the last is of another domain


def make_objective(
    name: str, widths: Sequence[int], teacher_dims: dict[str, int], dtype: torch.dtype = torch.float32
) -> Objective:
    """Return the objective of align.objective=name. widths: channels of the model's layers, L1 first; teacher_dims:
    domain -> width of its teacher's vectors; dtype: the model's.

    A MODULE:CLASS is tried on random clips of these widths, its frames in fp32 and in dtype. Raises UserError, with the
    place in the user's code, if the class cannot be imported or fails the trial.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]()
    try:
        objective = named_object(name)()
        check(isinstance(objective, Objective), "derive it from agrepa_fast.Objective")
        check(objective.tap in TAPS, f"tap={objective.tap!r}: {', '.join(TAPS)} are known")
        check(objective.target in TARGETS, f"target={objective.target!r}: {', '.join(map(str, TARGETS))} are known")
        check(not objective.attention, "attention=True: objectives of ours alone take attention")
        one_vector = objective.target in ("pooled", None)
        check(objective.tap == "frames" or one_vector, f"target={objective.target!r} needs tap='frames'")
        for width in {*widths}:
            for target_width in {*target_widths(objective, widths, teacher_dims).values()}:
                _try(objective, width, target_width, dtype)
    except Exception as error:  # anything, in code that is not ours
        raise UserError(f"align.objective={name}: {their_error(error)}") from error
    return objective


def target_widths(objective: Objective, widths: Sequence[int], teacher_dims: dict[str, int]) -> dict[str, int]:
    """Return domain -> width of what its layers are compared with."""
    return dict.fromkeys(teacher_dims, widths[0]) if objective.target in OF_LAYERS else teacher_dims


def check_backbone(align: AlignConfig, objective: Objective, backbone: str, model: type[Backbone]) -> None:
    """Raise UserError if the run's objective takes the attention of layers, and the model cannot tell it."""
    check(
        model.tells_attention or not objective.attention,
        f"align.objective={align.objective} compares attention, and model.backbone={backbone} cannot tell its queries "
        f"and keys: use audio_dit, or align.objective=frames",
    )


def check_layers(align: AlignConfig, objective: Objective, widths: Sequence[int]) -> None:
    """Raise UserError if the run's objective does not go with the model's layers, or with their choice."""
    if objective.target not in OF_LAYERS:
        unused = f"align.deeper={align.deeper}: align.objective={align.objective} compares with no deeper layer"
        check(align.deeper is None, f"{unused}: leave it out")
        return
    name, different = f"align.objective={align.objective}", " and ".join(map(str, sorted({*widths})))
    check(len({*widths}) == 1, f"{name} compares layers with deeper ones, and these have {different} channels")
    last = align.strategy == "deep" or len(widths) in align.fixed_layers
    check(not last, f"{name} compares layers with deeper ones, and align.strategy={align.strategy} takes the last")
    every = align.strategy != "none" and not align.fixed_layers and align.share is None and align.k >= len(widths)
    check(not every, f"{name} compares layers with deeper ones, and align.k={align.k} takes the last: lower it")


def check_shards(align: AlignConfig, objective: Objective, index: Index) -> None:
    """Raise UserError if the shards lack the targets of the run's objective."""
    for domain in index.domains if objective.target == "frames" else ():
        check(
            index.teacher(domain).rate is not None,
            f"align.objective={align.objective} needs the teacher's frames, and {index.folder} has one vector per clip "
            f"of {domain}: prepare with data.teacher_rate=12.5, or add the teacher at that rate (--add-teacher)",
        )
        check(
            index.teacher(domain).attention is not None or not objective.attention,
            f"align.objective={align.objective} needs the teacher's queries and keys, and {index.folder} has frames of "
            f"{domain} without: prepare with data.teacher_attention=1, or add the teacher with it (--add-teacher), and "
            f"train with it",
        )


def _try(objective: Objective, width: int, target_width: int, dtype: torch.dtype) -> None:
    """Raise ValueError if the losses of random clips or their gradients are not finite, or change with the padding; any
    error that it raises for frames in dtype."""
    head = make_head(objective, width, target_width, seed=0)
    if head is not None:
        head.eval()
        if any(map(is_lazy, (*head.parameters(), *head.buffers()))):
            raise ValueError("a head's layers need their sizes from the start: nn.Linear, not nn.LazyLinear")
    draw = torch.Generator().manual_seed(0)
    tap, target = (torch.randn(len(_LENGTHS), max(_LENGTHS), size, generator=draw) for size in (width, target_width))
    losses, gradients = zip(*(_losses(objective, head, tap, target, padding) for padding in (0, 5)), strict=True)
    if not all(tensor.isfinite().all() for tensor in (*losses, *chain(*gradients))):
        raise ValueError(
            "its losses or gradients are not finite for random clips, one of them without frames that count"
        )
    if not torch.allclose(*losses, rtol=1e-3, atol=1e-5):
        raise ValueError("padding changes the loss of a clip: average over the frames of mask alone")
    if objective.tap == "frames" and dtype != torch.float32:
        _losses(objective, head, tap.to(dtype), target, 0)


def _losses(
    objective: Objective, head: nn.Module | None, tap: torch.Tensor, target: torch.Tensor, padding: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return each clip's loss (N,), and the gradients of their sum to tap and to the head's trained parameters."""
    lengths = torch.tensor(_LENGTHS)
    tap, target = F.pad(tap, (0, 0, 0, padding)), F.pad(target, (0, 0, 0, padding))
    mask = valid_frames(lengths, tap.shape[1])
    if objective.tap == "pooled":
        tap, mask = tap[:, 0], lengths > 0
    target = {"pooled": target[:, 0], None: None}.get(objective.target, target)
    layer = AlignedLayer(head, tap.clone().requires_grad_(), target, mask)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # an objective may draw
        total, losses = objective.total([layer], torch.ones(1), torch.full((len(mask),), 0.5), torch.ones(len(mask)))
    leaves = [layer.tap, *(p for p in (head.parameters() if head is not None else ()) if p.requires_grad)]
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return losses, [gradient for gradient in gradients if gradient is not None]
