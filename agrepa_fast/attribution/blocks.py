"""Find the gated modules of a model by path, and name them."""

import torch.nn as nn

from ..models.backbone import Backbone


def gated_parts(model: Backbone, kind: str = "block") -> list[tuple[str, tuple[nn.Module, ...]]]:
    """Return what FoG-A leaves out in turn, by name: layers ("1", "2", …), or with kind "branch" each layer's branches
    apart ("1.attn", "1.ffn", …). Raises ValueError if the model has no branches."""
    if kind == "block":
        return [(str(number), layer.parts) for number, layer in enumerate(model.layers, 1)]
    found = [
        (f"{n}.{name}", (part,)) for n, layer in enumerate(model.layers, 1) for name, part in layer.branches.items()
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} names no branches of its layers")
    return found


def part_names(model: Backbone, kind: str = "block") -> tuple[str, ...]:
    """Return LayerScores.names: () for layers, "1.attn", "1.ffn", … for their branches."""
    return () if kind == "block" else tuple(name for name, _ in gated_parts(model, kind))


def gating(model: Backbone, kind: str = "block") -> dict[str, object]:
    """Return multi_gate's options for the layers of a backbone, or for their branches."""
    kind = model.kind if kind == "block" else kind
    return {"kind": kind, "row_arguments": model.row_arguments, "state": model.state if kind == "block" else None}


def find_blocks(model: nn.Module, paths: str) -> dict[str, nn.Module]:
    """Return name -> module of `paths`, in the order of running.

    paths: the path of a list ("transformer.blocks"), or paths with a star for every element of a list, taken in turn
    ("layers.*.attn,layers.*.ff"). A module that stands at several places is named once, by the first. Raises ValueError
    for a path that does not exist.
    """
    columns = [_expand(model, path if "*" in path else f"{path}.*") for path in paths.split(",")]
    if len({len(column) for column in columns}) > 1:
        raise ValueError(f"{paths}: the lists have {', '.join(str(len(column)) for column in columns)} elements")
    found: dict[nn.Module, str] = {}
    for turn in zip(*columns, strict=True):
        for name in turn:
            if isinstance(model.get_submodule(name), nn.ModuleList | nn.ModuleDict):
                raise ValueError(f"{name} is a list of modules, no block: name it, as in --blocks {name}")
            found.setdefault(model.get_submodule(name), name)
    return {name: module for module, name in found.items()}


def _expand(model: nn.Module, path: str) -> list[str]:
    before, _, after = path.partition(".*")
    try:
        names = [f"{before}.{name}{after}" for name, _ in model.get_submodule(before).named_children()]
        for name in names:
            model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"{path}: {error}") from error
    if not names:
        raise ValueError(f"{before} ({type(model.get_submodule(before)).__name__}) is no list of modules")
    return names
