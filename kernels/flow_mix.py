"""A point on the flow-matching path and its velocity, with noise from a counter-based stream keyed by clip.

x_t = (1 - t) sigma eps + t x, target = x - sigma eps (Lipman et al. 2023; sigma as in the released AG-REPA code).
Philox4x32-10 (Salmon et al. 2011) with Triton's conventions for counters and normals, so that a kernel can draw the
same noise in place. Element i of clip c is the (i mod 4)-th normal of counter i / 4 under the clip's key, so it depends
neither on the batch nor on the padding.

Dims:     C clips, T frames, M mel bins.
Shapes:   x, x_t, target (C, T, M); t (C,) or (C, T); keys (C,) int64.
Numerics: fp32 inside, x_t and target in x's dtype; backends draw the same bits, and their normals differ by the
          rounding of log, sin and cos.
Traffic:  3 passes over (C, T, M): x, x_t, target. No noise is stored.
"""

import math

import torch

from . import _native
from ._backend import backend_of, tl, triton
from ._launch import UNSPECIALIZED, launch
from ._library import Operation
from ._rows import ceil_div, check_rows, check_tensor, empty_like

# The multipliers and the increments of the keys, of Salmon et al. 2011, table 2
_A, _B = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def _philox(keys: torch.Tensor, counters: int) -> list[torch.Tensor]:
    """Return four (C, counters) tensors of 32-bit words, in int64."""
    c0 = torch.arange(counters, device=keys.device).expand(len(keys), -1)
    c1 = c2 = c3 = torch.zeros_like(c0)
    k0, k1 = (keys & _LOW).unsqueeze(1), ((keys >> 32) & _LOW).unsqueeze(1)
    for _ in range(10):
        high, low = c2 * _B, c0 * _A  # int64 products wrap; their 64 bits are right all the same
        c0, c1, c2, c3 = (
            ((high >> 32) & _LOW) ^ c1 ^ k0,
            high & _LOW,
            ((low >> 32) & _LOW) ^ c3 ^ k1,
            low & _LOW,
        )
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return [c0, c1, c2, c3]


def _uniform(words: torch.Tensor) -> torch.Tensor:
    folded = torch.where(words >= 1 << 31, (1 << 32) - 1 - words, words)  # as Triton, which does not shift
    return folded.float() * 4.6566127342e-10


def philox_uniform(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Return (C, count) fp32 uniforms in [0, 1), given keys (C,) int64."""
    words = torch.stack(_philox(keys, ceil_div(count, 4)), dim=-1)
    return _uniform(words).flatten(1)[:, :count]


def philox_normal(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Return (C, count) fp32 standard normals, given keys (C,) int64."""
    u = [_uniform(words) for words in _philox(keys, ceil_div(count, 4))]
    pairs = []
    for first, second in (u[:2], u[2:]):
        radius = torch.sqrt(-2 * torch.log(first.clamp(min=1e-7)))
        angle = 2 * math.pi * second
        pairs += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(pairs, dim=-1).flatten(1)[:, :count]


def flow_mix_ref(
    x: torch.Tensor, t: torch.Tensor, keys: torch.Tensor, sigma: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    noise = sigma * philox_normal(keys, x[0].numel()).view_as(x).to(x.dtype)
    t = t.to(x.dtype).view(*t.shape, *[1] * (x.ndim - t.ndim))
    return (1 - t) * noise + t * x, x - noise


@triton.jit
def _normals(word1, word2):
    """Box-Muller transform of two tiles of words.

    The nearest quarter turn is subtracted from the angle, exactly, in u; cos and sin of the rest are polynomials
    (Cephes, S. Moshier). The GPU library's cos and sin keep an array in local memory for large angles.
    """
    radius = tl.sqrt(-2.0 * tl.log(tl.maximum(tl.uint_to_uniform_float(word1), 1e-7)))
    u = tl.uint_to_uniform_float(word2)
    quarter = (4.0 * u + 0.5).to(tl.int32)
    angle = 6.283185307179586 * (u - 0.25 * quarter.to(tl.float32))
    z = angle * angle
    sin = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * angle + angle
    cos = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    odd = (quarter & 1) == 1
    first = tl.where(odd, sin, cos)
    second = tl.where(odd, cos, sin)
    first = tl.where(((quarter + 1) & 2) == 2, -first, first)
    second = tl.where((quarter & 2) == 2, -second, second)
    return radius * first, radius * second


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _flow_mix_kernel(
    x_ptr,  # (C, T, M) contiguous
    t_ptr,  # (C,), or (C, T) if PER_FRAME, fp32
    keys_ptr,  # (C,) int64
    x_t_ptr,  # (C, T, M) contiguous
    target_ptr,  # (C, T, M) contiguous
    elements,  # T * M
    bins,
    t_c,
    t_t,
    sigma,
    COUNTERS: tl.constexpr,
    PER_FRAME: tl.constexpr,
    ALIGN: tl.constexpr,  # divides `bins`
):
    elements = elements // ALIGN * ALIGN  # changes no number; shows the compiler that whole vectors can be loaded
    tiles = tl.cdiv(elements, 4 * COUNTERS)
    c = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    counter = tile * COUNTERS + tl.arange(0, COUNTERS)
    word0, word1, word2, word3 = tl.randint4x(tl.load(keys_ptr + c), counter)
    n0, n1 = _normals(word0, word1)
    n2, n3 = _normals(word2, word3)
    noise = tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (4 * COUNTERS,)) * sigma
    i = tile * (4 * COUNTERS) + tl.arange(0, 4 * COUNTERS)
    inside = i < elements
    clip = c * elements  # int64: C*T*M overflows int32
    x = tl.load(x_ptr + clip + i, mask=inside, other=0.0).to(tl.float32)
    if PER_FRAME:
        t = tl.load(t_ptr + c * t_c + (i // bins).to(tl.int64) * t_t, mask=inside, other=0.0).to(tl.float32)
    else:
        t = tl.load(t_ptr + c * t_c).to(tl.float32)
    tl.store(x_t_ptr + clip + i, ((1.0 - t) * noise + t * x).to(x_t_ptr.dtype.element_ty), mask=inside)
    tl.store(target_ptr + clip + i, (x - noise).to(target_ptr.dtype.element_ty), mask=inside)


def _outputs(x: torch.Tensor, t: torch.Tensor, keys: torch.Tensor, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_like(x), empty_like(x)


def _forward(x: torch.Tensor, t: torch.Tensor, keys: torch.Tensor, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
    clips, frames, bins = x.shape
    x_t, target = _outputs(x, t, keys, sigma)
    x = x.contiguous()
    t_strides = (t.stride(0), t.stride(1) if t.ndim == 2 else 0)
    tensors = (x, t, keys, x_t, target)
    if backend_of(x) == "native":
        _native.call("flow_mix", x.dtype, *tensors, clips, frames, bins, *t_strides, sigma)
    else:
        elements, counters = frames * bins, 512
        settings = {"COUNTERS": counters, "PER_FRAME": t.ndim == 2, "ALIGN": math.gcd(bins, 16), "num_warps": 4}
        grid, sizes = (clips * ceil_div(elements, 4 * counters), 1, 1), (elements, bins, *t_strides)
        launch(_flow_mix_kernel, grid, tensors, sizes, (), sigma, **settings)
    return x_t, target


_flow_mix = Operation("flow_mix(Tensor x, Tensor t, Tensor keys, float sigma) -> (Tensor, Tensor)", _forward, _outputs)


def _save(ctx, inputs, output) -> None:
    x, t, _, _ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(t.view(*t.shape, *[1] * (x.ndim - t.ndim)))


def _differentiate(ctx, dx_t, dtarget) -> tuple[torch.Tensor | None, ...]:
    (t,) = ctx.saved_tensors
    return (t * dx_t + dtarget).to(ctx.dtype), None, None, None


_flow_mix.differentiate(_differentiate, _save)


def flow_mix(
    x: torch.Tensor, t: torch.Tensor, keys: torch.Tensor, sigma: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x_t and the velocity target of clips x (C, T, M), in x's dtype. Only x gets a gradient.

    t holds a time per clip (C,) or per frame (C, T), and keys an int64 key per clip. Raises ValueError with the wanted
    shape, dtype or device if a tensor does not fit.
    """
    check_rows("x", x)
    clips, frames, _ = x.shape
    if t.shape not in ((clips,), (clips, frames)) or t.device != x.device:
        raise ValueError(f"t is {tuple(t.shape)} on {t.device}, wanted ({clips},) or ({clips}, {frames}) on {x.device}")
    check_tensor("keys", keys, (clips,), x)
    if keys.dtype != torch.int64:
        raise ValueError(f"keys are {keys.dtype}, wanted torch.int64")
    if backend_of(x) == "reference":
        return flow_mix_ref(x, t, keys, sigma)
    return _flow_mix(x, t.detach().float(), keys, float(sigma))
