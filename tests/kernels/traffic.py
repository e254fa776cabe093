"""Count the passes over a tensor that an operation makes, by watching everything that it runs.

A pass moves as many bytes as one (N, T, D) tensor of the operation. Tensors less than half as large are left out.
- An aten operator counts the tensors that it reads and writes. Views and allocations move nothing.
- An interpreted Triton launch counts the elements of every load and store.
- A call into the CPU library counts each tensor argument once, or twice if it changes one that held values before.
- Products (mm, bmm ...) are counted apart: they read their operands several times.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from agrepa_fast.kernels import _native, force_backend
from agrepa_fast.kernels._library import implementation

ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
PRODUCTS = ("linear", "mm", "addmm", "bmm", "baddbmm")
OVERWRITING = ("copy_", "zero_", "fill_", "normal_", "uniform_")  # their first argument is written, not read
VIEWS = ("_unsafe_view", "lift_fresh", "alias")  # those that their schema does not show


def large_tensors(values, least: int) -> Iterator[torch.Tensor]:
    """Yield the tensors among nested arguments with at least `least` elements in memory (a broadcast has few)."""
    if isinstance(values, torch.Tensor):
        if _own(values) >= least:
            yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from large_tensors(value, least)


def _own(tensor: torch.Tensor) -> int:
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return int(np.prod([1, *sizes]))


def _bytes(tensor: torch.Tensor) -> int:
    return _own(tensor) * tensor.element_size()


class Traffic(TorchDispatchMode):
    """Counts bytes inside it: `moved` by name ("ada_norm_fwd: argument 0", "aten.clone: read"), and `products` for
    matrix products."""

    def __init__(self, least: int):
        super().__init__()
        self.least = least  # elements
        self.moved, self.products = Counter(), Counter()
        self.fresh: dict[int, torch.Tensor] = {}  # address -> allocation that nothing has written yet

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if ours := implementation(func):
            with self:
                return ours(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        result = func(*args, **kwargs)
        if name in ALLOCATIONS:
            self.fresh[result.untyped_storage().data_ptr()] = result
        elif not func.is_view and name not in VIEWS:
            self._count_operator(func, name, args, kwargs, result)
        return result

    def _count_operator(self, func, name, args, kwargs, result) -> None:
        counter = self.products if name in PRODUCTS else self.moved
        given = zip((a.name for a in func._schema.arguments), args, strict=False)
        values = dict(given) | kwargs
        shaped = name.startswith("new_") or name.endswith("_like")  # self gives the shape or the dtype only
        for argument in func._schema.arguments:
            for tensor in large_tensors(values.get(argument.name), self.least):
                written = argument.alias_info is not None and argument.alias_info.is_write
                if written:
                    self.fresh.pop(tensor.untyped_storage().data_ptr(), None)
                    counter[f"aten.{name}: {argument.name} written"] += _bytes(tensor)
                if not ((shaped and argument.name == "self") or (written and name in OVERWRITING)):
                    counter[f"aten.{name}: {argument.name} read"] += _bytes(tensor)
        if not any(returned.alias_info for returned in func._schema.returns):
            for tensor in large_tensors(result, self.least):
                counter[f"aten.{name}: result written"] += _bytes(tensor)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Inside it, Triton launches and calls into the CPU library count too."""
        with mock.patch.object(_native, "call", self._native_call(_native.call)), self._interpreter():
            yield

    def _native_call(self, run: Callable) -> Callable:
        def call(operation, dtype, *arguments):
            large = {i: t for i, t in enumerate(arguments) if isinstance(t, torch.Tensor) and _own(t) >= self.least}
            with _disable_current_modes():
                before = {i: tensor.clone() for i, tensor in large.items()}
                run(operation, dtype, *arguments)
                for i, tensor in large.items():
                    changed = not torch.equal(tensor.view(torch.uint8), before[i].view(torch.uint8))
                    kept = self.fresh.pop(tensor.untyped_storage().data_ptr(), None) is None
                    self.moved[f"{operation}: argument {i}"] += _bytes(tensor) * (2 if changed and kept else 1)

        return call

    @contextmanager
    def _interpreter(self) -> Iterator[None]:
        from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

        spans: list[tuple[int, int, str]] = []  # first and last address of the launch's large tensors
        launch, load, store = (
            GridExecutor.__call__,
            InterpreterBuilder.create_masked_load,
            InterpreterBuilder.create_masked_store,
        )

        def launched(executor, *args, **options):
            for name, value in zip(executor.arg_names, args, strict=False):
                if isinstance(value, torch.Tensor) and _own(value) >= self.least:
                    first, last = value.data_ptr(), value.data_ptr() + _extent(value)
                    spans.append((first, last, f"{executor.fn.__name__}: {name}"))
                    self.fresh.pop(value.untyped_storage().data_ptr(), None)
            with _disable_current_modes():
                launch(executor, *args, **options)
            spans.clear()

        def touched(pointers, mask, how: str) -> None:
            addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
            for first, last, name in spans:
                inside = (addresses >= first) & (addresses < last)
                if inside.any():
                    self.moved[f"{name} {how}"] += int(inside.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
                    break

        def loaded(builder, pointers, mask, *rest):
            touched(pointers, mask, "read")
            return load(builder, pointers, mask, *rest)

        def stored(builder, pointers, value, mask, *rest):
            touched(pointers, mask, "written")
            return store(builder, pointers, value, mask, *rest)

        with (
            mock.patch.object(GridExecutor, "__call__", launched),
            mock.patch.object(InterpreterBuilder, "create_masked_load", loaded),
            mock.patch.object(InterpreterBuilder, "create_masked_store", stored),
        ):
            yield


def _extent(tensor: torch.Tensor) -> int:
    """Return the bytes from its first element to the end of its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def passes(
    call: Callable, inputs: dict[str, torch.Tensor], unit: torch.Tensor, backend: str
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the passes of call(**inputs) by name, forward and backward, in tensors like `unit`, without products.

    Floating-point inputs are leaves; every differentiable output gets a random gradient."""
    leaves = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in inputs.items()}
    size, counts = unit.numel() * unit.element_size(), []
    with force_backend(backend):
        with Traffic(unit.numel() // 2) as forward, forward.hooked():
            outputs = call(**leaves)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else [o for o in outputs if o is not None]
        outputs = [output for output in outputs if output.requires_grad]
        gradients = [torch.randn_like(output) for output in outputs]
        with Traffic(unit.numel() // 2) as backward, backward.hooked():
            if outputs:
                torch.autograd.grad(outputs, [t for t in leaves.values() if t.requires_grad], gradients)
    for traffic in (forward, backward):
        counts.append({name: moved / size for name, moved in traffic.moved.items()})
    return counts[0], counts[1]
