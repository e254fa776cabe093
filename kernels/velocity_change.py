"""Relative change of the velocity under ablation: ||v_k - v|| / (||v|| + eps) over a clip's valid frames.

AG-REPA (arXiv 2603.01006), the FoG-A score of one clip.

Dims:     V variants, C clips, T frames, M mel bins.
Shapes:   variants (V, C, T, M); base (C, T, M), any strides over variants and clips; lengths (C,) or None;
          change (V, C) fp32.
Numerics: fp32 inside, no atomics, deterministic; padded frames never influence the result, even if not finite.
Traffic:  1 pass over the variants (and the base, once in the CPU library, V + 1 times through the GPU's L2 cache).
"""

import math

import torch

from . import _native
from ._backend import backend_of, tl, triton
from ._launch import UNSPECIALIZED, launch
from ._library import Operation
from ._rows import ceil_div, check_tensor, valid_frames

_PIECE = 4096  # elements per partial sum of a clip; fixed, so that results repeat bit for bit


def velocity_change_ref(
    variants: torch.Tensor, base: torch.Tensor, lengths: torch.Tensor | None = None, eps: float = 1e-8
) -> torch.Tensor:
    difference = variants - base
    if lengths is not None:
        mask = valid_frames(lengths, base.shape[1])[..., None]
        difference, base = torch.where(mask, difference, 0), torch.where(mask, base, 0)
    return difference.flatten(2).norm(dim=2) / (base.flatten(1).norm(dim=1) + eps)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _velocity_change_kernel(
    variants_ptr,  # (V, C, T, M), clips contiguous
    base_ptr,  # (C, T, M), clips contiguous
    lengths_ptr,  # (C,) int64, or None: all frames are valid
    squares_ptr,  # (V + 1, C, pieces) fp32: of the base at v = 0, of variant v - 1 minus the base beyond
    clips,
    frames,
    bins,
    variants_v,
    variants_c,
    base_c,
    PIECE: tl.constexpr,
    ALIGN: tl.constexpr,  # divides all strides and the elements of a clip
):
    """The sum of squares of one piece of one clip."""
    pieces = tl.cdiv(frames * bins, PIECE)
    piece = tl.program_id(0) % pieces
    c = (tl.program_id(0) // pieces % clips).to(tl.int64)
    v = (tl.program_id(0) // (pieces * clips)).to(tl.int64)
    valid = frames * bins
    if lengths_ptr is not None:
        valid = tl.minimum(tl.load(lengths_ptr + c), frames).to(tl.int32) * bins
    i = piece * PIECE + tl.arange(0, PIECE)
    # Rounding by ALIGN changes no number; it shows the compiler that whole vectors can be loaded.
    mask = i < (valid + ALIGN - 1) // ALIGN * ALIGN
    base_clip = c * (base_c // ALIGN * ALIGN)  # int64: V*C*T*M overflows int32
    x = tl.load(base_ptr + base_clip + i, mask=mask, other=0.0).to(tl.float32)
    if v > 0:
        clip = (v - 1) * (variants_v // ALIGN * ALIGN) + c * (variants_c // ALIGN * ALIGN)
        x = tl.load(variants_ptr + clip + i, mask=mask, other=0.0).to(tl.float32) - x
    x = tl.where(i < valid, x, 0.0)
    tl.store(squares_ptr + tl.program_id(0), tl.sum(x * x, axis=0))


def _output(variants: torch.Tensor, base: torch.Tensor, lengths: torch.Tensor | None, eps: float) -> torch.Tensor:
    return variants.new_empty(variants.shape[:2], dtype=torch.float32)


def _forward(variants: torch.Tensor, base: torch.Tensor, lengths: torch.Tensor | None, eps: float) -> torch.Tensor:
    count, clips, frames, bins = variants.shape
    variants, base = _packed_clips(variants), _packed_clips(base)
    squares = variants.new_empty((count + 1, clips, ceil_div(frames * bins, _PIECE)), dtype=torch.float32)
    strides = (*variants.stride()[:2], base.stride(0))
    if backend_of(variants) == "native":
        sizes = (count, clips, frames, bins, _PIECE)
        _native.call("velocity_change", variants.dtype, variants, base, lengths, squares, *sizes, *strides)
    else:
        settings = {"PIECE": _PIECE, "ALIGN": math.gcd(*strides, frames * bins, 16), "num_warps": 8}
        grid, tensors = (squares.numel(), 1, 1), (variants, base, lengths, squares)
        launch(_velocity_change_kernel, grid, tensors, (clips, frames, bins), strides, **settings)
    norms = squares.sum(2).sqrt()
    return norms[1:] / (norms[0] + eps)


def _packed_clips(x: torch.Tensor) -> torch.Tensor:
    """Return x, copied if the frames of a clip do not follow one another in memory."""
    return x if x.stride()[-2:] == (x.shape[-1], 1) else x.contiguous()


_velocity_change = Operation(
    "velocity_change(Tensor variants, Tensor base, Tensor? lengths, float eps) -> Tensor", _forward, _output
)


def velocity_change(
    variants: torch.Tensor, base: torch.Tensor, lengths: torch.Tensor | None = None, eps: float = 1e-8
) -> torch.Tensor:
    """Return the change of every variant and clip (V, C), fp32 (float64 for float64).

    The fused backends have no backward: if a gradient is wanted, the reference runs. Raises ValueError with the wanted
    shape, dtype or device if a tensor does not fit.
    """
    if variants.ndim != 4 or variants.shape[1:] != base.shape:
        raise ValueError(f"variants {tuple(variants.shape)} must be (V, *{tuple(base.shape)})")
    if not base.is_floating_point() or variants.dtype != base.dtype or variants.device != base.device:
        raise ValueError(
            f"variants are {variants.dtype} on {variants.device}, base is {base.dtype} on {base.device}: wanted one "
            "floating-point dtype and one device"
        )
    if lengths is not None:
        check_tensor("lengths", lengths, base.shape[:1], base)
    wants_gradient = torch.is_grad_enabled() and (variants.requires_grad or base.requires_grad)
    if backend_of(base) == "reference" or wants_gradient:
        dtype = torch.promote_types(base.dtype, torch.float32)
        return velocity_change_ref(variants.to(dtype), base.to(dtype), lengths, eps)
    return _velocity_change(variants, base, None if lengths is None else lengths.long(), float(eps))
