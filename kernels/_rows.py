"""Rows and conditions: a batch has N rows over C conditions, C divides N, and row n has condition n mod C. What the
operations share to check, address and reduce such tensors."""

import torch

CHUNK = 32  # frames whose contributions to a modulation's gradient are summed in registers; fixed: same bits every time
FORWARD_TILE = 4096  # elements a Triton program holds of each tensor: 16 a thread, two 128-bit loads of bf16
BACKWARD_TILE = 2048  # three fp32 accumulators beside four tensors: more would leave one program to an SM


def row_tile(width: int, elements: int = FORWARD_TILE) -> dict[str, int]:
    """Launch settings of Triton kernels that work on whole rows of this width."""
    block = max(16, 1 << (width - 1).bit_length())
    return {"D": width, "BLOCK": block, "ROWS": min(CHUNK, max(1, elements // block)), "num_warps": 8}


def split_rows(x: torch.Tensor, conditions: int) -> torch.Tensor:
    """View (N, ...) as (N / C, C, ...), so that per-condition tensors broadcast instead of being copied."""
    if x.shape[0] % conditions:
        raise ValueError(f"{x.shape[0]} rows over {conditions} conditions: the conditions must divide the rows")
    return x.unflatten(0, (-1, conditions))


def over_time(m: torch.Tensor) -> torch.Tensor:
    """(C, D) as (C, 1, D), so that it broadcasts over frames; (C, T, D) as it is."""
    return m.unsqueeze(1) if m.ndim == 2 else m


def valid_frames(lengths: torch.Tensor, frames: int) -> torch.Tensor:
    """(C, T) bool: frame t of condition c is real, t < lengths[c]."""
    return torch.arange(frames, device=lengths.device) < lengths.unsqueeze(1)


def check_tensor(name: str, tensor: torch.Tensor, shape: tuple[int | str, ...], like: torch.Tensor) -> None:
    """Raise ValueError unless the tensor has this shape (a string stands for any size), x's device, and a contiguous
    last dimension."""
    fits = tensor.ndim == len(shape) and all(
        isinstance(wanted, str) or size == wanted for size, wanted in zip(tensor.shape, shape, strict=False)
    )
    if not fits:
        wanted = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{name} is {tuple(tensor.shape)}, wanted ({wanted})")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, wanted {like.device}")
    if tensor.ndim and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension, wanted 1: call .contiguous()")


def check_rows(name: str, x: torch.Tensor) -> None:
    """Raise ValueError unless x is a floating-point (N, T, D) tensor with a contiguous last dimension."""
    check_tensor(name, x, ("N", "T", "D"), x)
    if not x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype}, wanted float32, bfloat16, float16 or float64")


def fit_modulation(name: str, m: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The modulation m (C, D) or (C, T, D) of x (N, T, D), in x's dtype. Raises ValueError for another shape or device,
    or when C does not divide N."""
    n, frames, width = x.shape
    check_tensor(name, m, ("C", width) if m.ndim == 2 else ("C", frames, width), x)
    if m.shape[0] == 0 or n % m.shape[0]:
        raise ValueError(f"{name}: {n} rows over {m.shape[0]} conditions: the conditions must divide the rows")
    return m.to(x.dtype)


def modulation_strides(m: torch.Tensor) -> tuple[int, int]:
    """Elements from one condition to the next and from one frame to the next, 0 for (C, D)."""
    return (m.stride(0), 0) if m.ndim == 2 else (m.stride(0), m.stride(1))


def per_condition(sums: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Gradient of a modulation like (C, D) or (C, T, D), from fp32 partial sums (N, chunks, D) or (N, T, D)."""
    rows = split_rows(sums, like.shape[0])
    return (rows.sum((0, 2)) if like.ndim == 2 else rows.sum(0)).to(like.dtype)


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """x itself when its last dimension is contiguous, else a copy (gradients may come expanded or transposed)."""
    return x if x.stride(-1) == 1 else x.contiguous()
