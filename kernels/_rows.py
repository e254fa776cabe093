"""Checks, strides and sums for rows and conditions, on the host.

A batch has N rows over C conditions, C divides N, and row n has condition n mod C.
"""

import torch

CHUNK = 32  # frames per partial sum of a modulation's gradient on CPUs; fixed, so that results repeat bit for bit


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return (a + b - 1) // b


def split_rows(x: torch.Tensor, conditions: int) -> torch.Tensor:
    """Return x (N, ...) viewed as (N / C, C, ...), against which per-condition tensors broadcast without a copy."""
    if x.shape[0] % conditions:
        raise ValueError(f"{x.shape[0]} rows over {conditions} conditions: the conditions must divide the rows")
    return x.unflatten(0, (-1, conditions))


def over_time(m: torch.Tensor) -> torch.Tensor:
    """Return (C, D) as (C, 1, D), which broadcasts over frames, and (C, T, D) unchanged."""
    return m.unsqueeze(1) if m.ndim == 2 else m


def valid_frames(lengths: torch.Tensor, frames: int) -> torch.Tensor:
    """Return a (C, T) mask, True where frame t < lengths[c]."""
    return torch.arange(frames, device=lengths.device) < lengths.unsqueeze(1)


def check_tensor(name: str, tensor: torch.Tensor, shape: tuple[int | str, ...], like: torch.Tensor) -> None:
    """Raise ValueError unless the tensor has this shape (a string stands for any size), the device of `like`, and a
    contiguous last dimension."""
    fits = tensor.ndim == len(shape)
    for size, wanted in zip(tensor.shape, shape, strict=False):  # a loop: all() would cost more than the rest
        fits = fits and (size == wanted or isinstance(wanted, str))
    if not fits:
        wanted = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{name} is {tuple(tensor.shape)}, wanted ({wanted})")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, wanted {like.device}")
    if tensor.ndim and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension, wanted 1: call .contiguous()")


def check_rows(name: str, x: torch.Tensor) -> None:
    """Raise ValueError unless x is a floating-point (N, T, D) tensor with a contiguous last dimension."""
    if x.ndim != 3 or x.stride(2) != 1:  # asked first, here and below, because check_tensor costs more than this
        check_tensor(name, x, ("N", "T", "D"), x)
    if not x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype}, wanted float32, bfloat16, float16 or float64")


def fit_modulation(name: str, m: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the modulation m (C, D) or (C, T, D) of x (N, T, D) in x's dtype. Raises ValueError for another shape or
    device, or if C does not divide N."""
    n, frames, width = x.shape
    if m.ndim != 2 or m.shape[1] != width or m.stride(1) != 1 or m.device != x.device:
        check_tensor(name, m, ("C", width) if m.ndim == 2 else ("C", frames, width), x)
    if m.shape[0] == 0 or n % m.shape[0]:
        raise ValueError(f"{name}: {n} rows over {m.shape[0]} conditions: the conditions must divide the rows")
    return m if m.dtype == x.dtype else m.to(x.dtype)


def row_strides(*tensors: torch.Tensor | None) -> tuple[int, ...]:
    """Return per tensor the strides over rows (or conditions) and frames, in elements; 0 over frames for (C, D)."""
    strides: list[int] = []
    for x in tensors:
        strides += (0, 0) if x is None else (x.stride(0), x.stride(1) if x.ndim == 3 else 0)
    return tuple(strides)


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """Return an empty contiguous tensor like x, in half the time that x.new_empty(x.shape) takes."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """Return x, copied if its last dimension is not contiguous. Gradients may arrive expanded or transposed."""
    return x if x.stride(-1) == 1 else x.contiguous()
