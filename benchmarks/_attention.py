"""Ways to attend over clips of one length or of several, checked against each other and timed."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from _bench import Allowed, Results, why_wrong
from _timing import Phases, time_phases
from _training import Sizes
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from agrepa_fast.kernels import valid_frames
from agrepa_fast.models.audio_dit.attention import attend, segment_bounds

CLOSE = Allowed(2.0, 1e-3)  # kernels round the weights of attention at different places
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


class AttentionCase:
    """A packed projection (N, T, 3 D) as the model makes it, of clips of full length, or if padded of half to full."""

    def __init__(self, s: Sizes, frames: int, padded: bool):
        torch.manual_seed(0)
        self.sizes, self.lengths, self.mask = s, None, None
        self.packed = torch.randn(s.batch, frames, 3 * s.dim, dtype=s.dtype, device=s.device, requires_grad=True)
        self.dy = torch.randn(s.batch, frames, s.dim, dtype=s.dtype, device=s.device)
        self.valid = torch.ones(s.batch, frames, dtype=torch.bool, device=s.device)
        if padded:
            self.lengths = torch.randint(frames // 2, frames + 1, (s.batch,), device=s.device)
            self.valid = valid_frames(self.lengths, frames)
            self.mask = self.valid[:, None, None]
            self.dy *= self.valid[..., None]

    def measure(self) -> dict[str, dict]:
        """Return the timings by method, or {"wrong": message} for one that is wrong on valid frames."""
        exact = self._results(self._math, self.packed.detach().float().requires_grad_())
        plain = self._results(self._math, self.packed)
        methods = self._methods()
        made = {}
        for name, method in methods.items():
            if wrong := why_wrong(partial(self._results, method, self.packed), plain, exact, CLOSE):
                made[name] = {"wrong": wrong}
        phases = {
            name: Phases(partial(method, self.packed), lambda out: torch.autograd.grad(out, self.packed, self.dy))
            for name, method in methods.items()
            if name not in made
        }
        return made | time_phases(phases, self.sizes.repeats)

    def _methods(self) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        methods = {name: partial(self._sdpa, backend) for name, backend in BACKENDS.items()}
        if self.lengths is not None:
            del methods["flash"]  # takes no mask
            if self.packed.is_cuda:
                methods["varlen_attn"] = self._varlen
        return methods | {"attend": lambda packed: attend(*self._split(packed), self.lengths)}

    def _results(self, method: Callable, packed: torch.Tensor) -> Results:
        out = method(packed)
        (dpacked,) = torch.autograd.grad(out, packed, self.dy.to(out.dtype))
        return {"out": out.detach()[self.valid], "dqkv": dpacked[self.valid]}

    def _split(self, packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return packed.unflatten(-1, (3, self.sizes.heads, -1)).permute(2, 0, 3, 1, 4).unbind()

    def _sdpa(self, backend: SDPBackend, packed: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*self._split(packed), attn_mask=self.mask)
        return out.transpose(1, 2).flatten(2)

    def _math(self, packed: torch.Tensor) -> torch.Tensor:
        return self._sdpa(SDPBackend.MATH, packed)

    def _varlen(self, packed: torch.Tensor) -> torch.Tensor:
        rows, frames = packed.shape[:2]
        q, k, v = packed.flatten(0, 1).unflatten(-1, (3, self.sizes.heads, -1)).unbind(1)
        bounds = segment_bounds(self.lengths, rows, frames)
        return varlen_attn(q, k, v, bounds, bounds, frames, frames).flatten(1).unflatten(0, (rows, frames))
