"""Find the gated modules of a model by path, and name them."""

import torch.nn as nn


def model_blocks(model: nn.Module, kind: str = "block") -> list[nn.Module]:
    """Return the modules that FoG-A gates in a model like AudioDiT: its blocks, or each block's attention and FFN."""
    if kind == "block":
        return list(model.blocks)
    return [part for block in model.blocks for part in (block.attn, block.ffn)]


def part_names(depth: int, kind: str = "block") -> tuple[str, ...]:
    """Return LayerScores.names for model_blocks: () for blocks, "1.attn", "1.ffn", ... for their parts."""
    layers = range(1, depth + 1)
    return () if kind == "block" else tuple(f"{layer}.{part}" for layer in layers for part in ("attn", "ffn"))


def find_blocks(model: nn.Module, paths: str) -> dict[str, nn.Module]:
    """Return name -> module of `paths`, in the order of running.

    paths: the path of a list ("transformer.blocks"), or paths with a star for every element of a list, taken in turn
    ("layers.*.attn,layers.*.ff"). Raises ValueError for a path that does not exist.
    """
    columns = [_expand(model, path if "*" in path else f"{path}.*") for path in paths.split(",")]
    if len({len(column) for column in columns}) > 1:
        raise ValueError(f"{paths}: the lists have {', '.join(str(len(column)) for column in columns)} elements")
    return {name: model.get_submodule(name) for turn in zip(*columns, strict=True) for name in turn}


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
