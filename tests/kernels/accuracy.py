"""Compare an operation with its reference: error against float64, guarded buffers, repeatability.

The RMS error of a fused result against float64 may be 1.5 times that of plain PyTorch in the same dtype. (bf16
statistics would pass a rule on the maximum error.) Inputs and outputs lie between NaN canaries, and the operation's
allocations start as NaN, so reads and writes out of bounds and unwritten elements fail the test.
"""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from agrepa_fast.kernels import force_backend
from agrepa_fast.kernels._library import implementation

FUSED = ("triton", "native")  # without a GPU, Triton runs in its interpreter (conftest.py)
CANARY = 256  # elements on each side
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def fused_backends() -> tuple[str, ...]:
    return ("triton",) if DEVICE == "cuda" else FUSED


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of the same shape between NaN canaries, or between zeros for integers."""
    fill = float("nan") if tensor.is_floating_point() else 0
    buffer = torch.full((tensor.numel() + 2 * CANARY,), fill, dtype=tensor.dtype, device=tensor.device)
    inner = buffer[CANARY:-CANARY].view(tensor.shape)
    return inner.copy_(tensor)


class Guard(TorchDispatchMode):
    """Inside it, allocations of our operators lie between canaries and start as NaN. Leaving it raises AssertionError
    if a canary was overwritten."""

    ALLOCATE = (torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default)

    def __init__(self):
        super().__init__()
        self.buffers, self.inside = [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if ours := implementation(func):
            was, self.inside = self.inside, True
            try:
                with self:
                    return ours(*args, **kwargs)
            finally:
                self.inside = was
        result = func(*args, **kwargs)
        if self.inside and func in self.ALLOCATE and result.is_floating_point():
            buffer = torch.full((result.numel() + 2 * CANARY,), float("nan"), dtype=result.dtype, device=result.device)
            self.buffers.append(buffer)
            return buffer[CANARY : buffer.numel() - CANARY].view(result.shape)
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        if error[0] is None and not self.inside:
            for buffer in self.buffers:
                edges = torch.cat((buffer[:CANARY], buffer[buffer.numel() - CANARY :]))
                assert edges.isnan().all(), "an operation wrote outside its output"


def run(call: Callable, inputs: dict[str, torch.Tensor], gradients: list[torch.Tensor], backend: str, dtype=None):
    """Return outputs and gradients of call(**inputs), by name. Floating-point inputs become leaves in `dtype` (default:
    their own); `gradients` are those of the outputs, cast to each output's dtype."""
    leaves = {}
    for name, value in inputs.items():
        leaf = value.detach().to(dtype if dtype is not None and value.is_floating_point() else value.dtype)
        leaves[name] = guarded(leaf).requires_grad_(leaf.is_floating_point())
    with force_backend(backend), Guard():
        outputs = call(**leaves)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else [o for o in outputs if o is not None]
        assert len(outputs) == len(gradients), f"{len(outputs)} outputs, {len(gradients)} gradients"
        torch.autograd.backward(outputs, [g.to(o.dtype) for o, g in zip(outputs, gradients, strict=True)])
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return results | {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def assert_as_accurate(
    call: Callable, inputs: dict[str, torch.Tensor], gradients: list[torch.Tensor], backend: str, factor: float = 1.5
) -> None:
    """Check that call(**inputs), built on public operations, is as close to float64 as its reference."""
    fused = run(call, inputs, gradients, backend)
    plain = run(call, inputs, gradients, "reference")
    exact = run(call, inputs, gradients, "reference", torch.float64)
    assert fused.keys() == plain.keys() == exact.keys(), (list(fused), list(plain), list(exact))
    for name in exact:
        assert fused[name].dtype == plain[name].dtype, f"{name}: {fused[name].dtype}, wanted {plain[name].dtype}"
        assert fused[name].shape == plain[name].shape, name
        error, allowed = rms(fused[name] - exact[name]), factor * rms(plain[name] - exact[name])
        floor = 1e-7 * rms(exact[name])  # where plain PyTorch happens to be exact
        assert error <= allowed + floor, f"{name}: RMS error {error:.3e}, allowed {allowed + floor:.3e}"


def assert_repeatable(call: Callable, inputs: dict[str, torch.Tensor], gradients: list[torch.Tensor], backend: str):
    """Check that two runs give outputs and gradients with the same bits."""
    first, second = (run(call, inputs, gradients, backend) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name} differs between two runs"
