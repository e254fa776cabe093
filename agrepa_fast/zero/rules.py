"""The update rule of each parameter: Muon for the hidden matrices, AdamW for all others."""

from typing import NamedTuple

import torch.nn as nn

from ..models.backbone import Backbone
from .construction import whole_shape

_FUSED = {"qkv": 3, "kv": 2}  # in the name of a layer: the matrices in its weight, one below the other
_MODULATIONS = ("modulation", "adaln", "norm")  # in the name of a layer, or in the name or class of its holder
_TIMES = ("time", "sinu_pos_emb")  # in the name of a module that embeds the flow time


class Rule(NamedTuple):
    """decays: whether train.weight_decay applies. matrices: the number of matrices of equal shape, one below the other,
    that Muon updates; 0: AdamW updates the parameter."""

    decays: bool
    matrices: int = 0


def adamw_rules(model: nn.Module) -> dict[nn.Parameter, Rule]:
    """Return the rule of every parameter under AdamW. Weights with two dimensions or more decay, except embeddings;
    biases, norms and other vectors do not."""
    embeddings = {p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    return {p: Rule(len(whole_shape(p)) > 1 and p not in embeddings) for p in model.parameters()}


def muon_rules(model: Backbone) -> dict[nn.Parameter, Rule]:
    """Return the rule of every parameter under Muon, which takes the weights of all nn.Linear in the model's layers and
    of those that embed the flow time, except modulations, and the fused weight of nn.MultiheadAttention. Queries, keys
    and values that share one weight are matrices of their own.

    A modulation maps one vector per clip to scales, shifts and gates. Its gradient has at most as many directions as
    the batch has clips, and orthogonalisation would give the weakest of them the length of the strongest. The embedding
    of the time is read through a SiLU: AdamW's first updates, of one length and one sign for all weights of a row, have
    driven it to where that is 0, for every t (docs/training.md).
    """
    rules, names = adamw_rules(model), {module: name for name, module in model.named_modules()}
    for module, name in names.items():
        embeds_time = any(part in name.lower() for part in _TIMES)
        if embeds_time and _is_linear(module) and not _modulates(name, model):
            rules[module.weight] = Rule(True, 1)
    for module in (module for layer in model.layers for part in layer.parts for module in part.modules()):
        if isinstance(module, nn.MultiheadAttention) and isinstance(module.in_proj_weight, nn.Parameter):
            rules[module.in_proj_weight] = Rule(True, 3)
        elif _is_linear(module) and not _modulates(names[module], model):
            rules[module.weight] = Rule(True, _matrices(names[module], model))
    return rules


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module is linear and its matrix is a parameter, which a computed matrix of a parametrization is
    not."""
    return isinstance(module, nn.Linear) and isinstance(module.weight, nn.Parameter)


def _modulates(name: str, model: nn.Module) -> bool:
    holder, _, own = name.rpartition(".")
    words = (own, holder.rpartition(".")[2], type(model.get_submodule(holder)).__name__)
    return any(part in word.lower() for word in words for part in _MODULATIONS)


def _matrices(name: str, model: nn.Module) -> int:
    """Return how many matrices the weight of a layer holds. Queries, keys and values of one size have that of the
    layer's input, or of a layer beside it that takes the attention's output; keys of fewer heads than the queries have
    neither, and such a weight is one matrix."""
    holder, _, own = name.rpartition(".")
    count = next((count for part, count in _FUSED.items() if part in own.lower()), 1)
    beside = [module for module in model.get_submodule(holder).children() if isinstance(module, nn.Linear)]
    return count if model.get_submodule(name).out_features in {count * module.in_features for module in beside} else 1
