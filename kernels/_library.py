"""Define operations: torch operators agrepa::<name> for torch.compile, and plain Python calls for eager mode.

torch.compile, fake tensors, dispatch modes and function transforms see one opaque operator. An eager call runs the same
function without the dispatcher, inside one autograd.Function if a gradient is wanted: torch.library's autograd costs
more CPU time than most operations.
"""

from collections.abc import Callable

import torch
import torch._C as _C

_library = torch.library.Library("agrepa", "DEF")
_implementations: dict[str, Callable] = {}
_PLAIN = (torch.Tensor, torch.nn.Parameter)


class Operation:
    """An operation. A call takes the arguments of its schema in order, and returns its first `results` outputs.

    schema: of the torch operator. run(*inputs): allocates and fills the outputs; None stands for one that is not asked
    for. fake(*inputs): only allocates them. results: number of outputs for callers, None for all; the others are kept
    for the backward. The operator returns an empty tensor instead of None.
    """

    def __init__(self, schema: str, run: Callable, fake: Callable, results: int | None = None):
        self.name = schema.partition("(")[0]
        self._run, self._results, self._differentiable = on_its_device(run), results, None
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in ("CPU", "CUDA"):
            _library.impl(self.name, _without_none(self._run), key)
        torch.library.register_fake(f"agrepa::{self.name}", _without_none(fake), lib=_library)
        self.operator = getattr(torch.ops.agrepa, self.name).default
        _implementations[f"agrepa::{self.name}"] = _without_none(run)

    def differentiate(self, backward: Callable, save: Callable) -> None:
        """Give the operation a gradient: save(ctx, inputs, output) and backward(ctx, *gradients of the outputs).

        backward gets the gradients of `results` outputs or of all, and returns a tuple, one gradient per input. If
        `save` calls ctx.set_materialize_grads(False), the gradients of unused outputs are None.
        """
        run, results = self._run, self._results

        def forward(ctx, *inputs):
            outputs = run(*inputs)
            save(ctx, inputs, outputs)
            return _first(outputs, results)

        torch.library.register_autograd(f"agrepa::{self.name}", backward, setup_context=save, lib=_library)
        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        function = type(self.name, (torch.autograd.Function,), methods)
        # Function.apply of PyTorch minds function transforms first, which do not come here.
        self._differentiable = super(torch.autograd.Function, function).apply

    def __call__(self, *inputs):
        if is_traced(inputs):
            return _first(self.operator(*inputs), self._results)
        if self._differentiable is not None and wants_gradient(inputs):
            return self._differentiable(*inputs)
        return _first(self._run(*inputs), self._results)


def is_traced(inputs: tuple) -> bool:
    """Return whether something other than plain eager PyTorch must see a call with these inputs."""
    if (
        torch.compiler.is_compiling()
        or _C._len_torch_dispatch_stack()
        or _C._are_functorch_transforms_active()
        or _C._get_tracing_state() is not None
    ):
        return True
    for value in inputs:  # noqa: SIM110 - loops, here and below: any() would take twice as long
        if type(value) not in _PLAIN and isinstance(value, torch.Tensor):
            return True
    return False


def wants_gradient(inputs: tuple) -> bool:
    """Return whether autograd would record a call with these inputs."""
    if torch.is_grad_enabled():
        for value in inputs:
            if isinstance(value, torch.Tensor) and value.requires_grad:
                return True
    return False


def on_its_device(run: Callable) -> Callable:
    """Return `run` such that the GPU of its first tensor is the current one: Triton launches on the current one."""

    def guarded(*inputs):
        for first in inputs:
            if isinstance(first, torch.Tensor):
                break
        if not first.is_cuda or first.get_device() == torch.cuda.current_device():
            return run(*inputs)
        with torch.cuda.device(first.device):
            return run(*inputs)

    return guarded


def implementation(operator: torch._ops.OpOverload) -> Callable | None:
    """Return the Python function that an operator of ours runs, and None for another library's operator.

    A TorchDispatchMode is off while an operator runs. A mode that must see the calls inside runs this function itself.
    """
    return _implementations.get(operator._schema.name)


def _first(outputs, results: int | None):
    if results is None:
        return outputs
    return outputs[0] if results == 1 else outputs[:results]


def _without_none(function: Callable) -> Callable:
    def filled(*inputs):
        outputs = function(*inputs)
        if not isinstance(outputs, tuple) or all(output is not None for output in outputs):
            return outputs
        first = next(value for value in inputs if isinstance(value, torch.Tensor))
        return tuple(first.new_empty(0) if output is None else output for output in outputs)

    return filled


def once_differentiable(name: str) -> Callable[[Callable], Callable]:
    """Decorate a backward such that differentiating its results raises RuntimeError instead of giving wrong numbers.

    torch.autograd.function.once_differentiable would overlook saved tensors that need a gradient.
    """
    return lambda backward: _refuse_second(name, backward)


def _refuse_second(name: str, backward: Callable) -> Callable:
    def first_time(ctx, *gradients):
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        with torch.no_grad():
            results = backward(ctx, *gradients)
        message = f"{name} has no second derivative on this backend: run it with AGREPA_BACKEND=reference"
        refuse = _C._functions.DelayedError(message, len(results))
        return refuse(*(None if x is None else x.detach().requires_grad_() for x in results))

    return first_time
