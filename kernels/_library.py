"""Register an operation as a torch operator agrepa::<name> for CPU and CUDA, with its fake and its gradient.

torch.compile and CUDA graphs see one opaque node per operator.
Raw `define` and `impl` cost 3 us per call; torch.library.custom_op costs 20 to 25 us.
"""

from collections.abc import Callable

import torch

_library = torch.library.Library("agrepa", "DEF")
_implementations: dict[str, Callable] = {}


def define(schema: str, run: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Register agrepa::<schema> and return it. `run` allocates and fills the outputs; `fake` only allocates them."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"agrepa::{name}", fake, lib=_library)
    _implementations[f"agrepa::{name}"] = run
    return getattr(torch.ops.agrepa, name).default


def implementation(operator: torch._ops.OpOverload) -> Callable | None:
    """Return the Python function that an operator of ours runs, and None for another library's operator.

    A TorchDispatchMode is off while an operator runs. A mode that must see the calls inside runs this function itself.
    """
    return _implementations.get(operator._schema.name)


def differentiate(name: str, backward: Callable, save: Callable) -> None:
    """Register the gradient of agrepa::<name>: save(ctx, inputs, output) and backward(ctx, *gradients).

    If `save` calls ctx.set_materialize_grads(False), the gradients of unused outputs are None.
    """
    torch.library.register_autograd(f"agrepa::{name}", backward, setup_context=save, lib=_library)
