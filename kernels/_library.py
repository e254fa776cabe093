"""How an operation becomes a torch operator: agrepa::<name>, for CPU and CUDA, with a fake and, where it has one, an
autograd formula. torch.compile and CUDA graphs see one opaque node each.

Raw define and impl cost 3 us a call, torch.library.custom_op 20 to 25.
"""

from collections.abc import Callable

import torch

_library = torch.library.Library("agrepa", "DEF")
OPERATORS: dict[str, Callable] = {}  # name -> what runs, for the tests that count bytes


def define(schema: str, run: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Register agrepa::<schema>. `run` allocates and fills the outputs; `fake` only allocates them."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"agrepa::{name}", fake, lib=_library)
    OPERATORS[name] = run
    return getattr(torch.ops.agrepa, name).default


def differentiate(name: str, backward: Callable, save: Callable) -> None:
    """Register the gradient of agrepa::<name>: save(ctx, inputs, output) and backward(ctx, *gradients), which gets None
    for outputs that nothing used if `save` calls ctx.set_materialize_grads(False)."""
    torch.library.register_autograd(f"agrepa::{name}", backward, setup_context=save, lib=_library)
