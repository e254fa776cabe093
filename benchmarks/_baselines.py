"""Baselines: blocks in plain PyTorch, which load GatedDiTBlock's weights, and FoG-A without shared prefixes."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import _results  # noqa: F401 (puts the checkout on sys.path)
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from agrepa_fast import AudioDiT, Condition, GatedDiTBlock


class FlashBlock(GatedDiTBlock):
    """The block in plain PyTorch, with its own modulation Linear and flash attention. On an H100, GatedDiTBlock and
    PyTorch's default SDPA both take cuDNN's."""

    def forward(self, x, cond):
        """Return what GatedDiTBlock does without gates, rotary positions, masks and dropout."""
        modulations = self.modulation(F.silu(cond)).unsqueeze(1).chunk(6, dim=-1)
        scale1, shift1, scale2, shift2, gate1, gate2 = modulations
        h = x + gate1 * self._attend(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale1) + shift1)
        inner = F.gelu(self.ffn.fc1(F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale2) + shift2))
        return h + gate2 * self.ffn.fc2(inner)

    def _attend(self, y):
        q, k, v = self.attn.qkv(y).unflatten(-1, (3, self.attn.heads, -1)).permute(2, 0, 3, 1, 4)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return self.attn.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ReleasedBlock(FlashBlock):
    """The released AG-REPA block: attention as nn.MultiheadAttention computes it, weights included."""

    def _attend(self, y):
        rows, a = y.transpose(0, 1), self.attn
        attended, _weights = F.multi_head_attention_forward(
            rows, rows, rows, y.shape[-1], a.heads, a.qkv.weight, a.qkv.bias, None, None, False,
            0.0, a.out.weight, a.out.bias, need_weights=True,
        )  # fmt: skip
        return attended.transpose(0, 1)


def sequential_velocities(model: AudioDiT, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
    """Return velocities (L + 1, C, T, M): of the whole model, then of a forward without each block."""
    blocks, velocities = model.blocks, [model(x_t, t, condition).v]
    try:
        for left_out in range(len(blocks)):
            model.blocks = nn.ModuleList(block for number, block in enumerate(blocks) if number != left_out)
            velocities.append(model(x_t, t, condition).v)
    finally:
        model.blocks = blocks
    return torch.stack(velocities)


@contextmanager
def row_gates(model: AudioDiT, gates: torch.Tensor, clips: int) -> Iterator[None]:
    """Inside it, the model computes all variants of gates (V, L) as one batch of V * clips rows that share nothing."""
    for layer, block in enumerate(model.blocks):
        gate = gates[:, layer].repeat_interleave(clips)
        block.forward = partial(type(block).forward, block, gate=gate)
    try:
        yield
    finally:
        for block in model.blocks:
            del block.forward
