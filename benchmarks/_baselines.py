"""Baselines: the released recipe written from its description, plain SDPA, and FoG-A without shared prefixes.

Blocks load GatedDiTBlock's weights unchanged."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import _results  # noqa: F401 (puts the checkout on sys.path)
import torch
import torch.nn as nn
import torch.nn.functional as F

from agrepa_fast import AudioDiT, Condition, GatedDiTBlock


class PlainBlock(GatedDiTBlock):
    """The block in plain PyTorch, with its own modulation Linear and PyTorch's default SDPA."""

    def forward(self, x, cond, *, modulation=None, rope=None, lengths=None, time_sum=False):
        """Return what GatedDiTBlock does without gates, rotary positions and masks. `modulation` is ignored."""
        modulations = self.modulation(F.silu(cond)).unsqueeze(1).chunk(6, dim=-1)
        scale1, shift1, scale2, shift2, gate1, gate2 = modulations
        h = x + gate1 * self._attend(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale1) + shift1)
        inner = F.gelu(self.ffn.fc1(F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale2) + shift2))
        dropout, training = self.ffn.dropout, self.training
        ffn = F.dropout(self.ffn.fc2(F.dropout(inner, dropout, training)), dropout, training)
        out = h + gate2 * ffn
        return (out, out.float().sum(1)) if time_sum else out

    def _attend(self, y):
        q, k, v = self.attn.qkv(y).unflatten(-1, (3, self.attn.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.attn.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ReleasedBlock(PlainBlock):
    """The released AG-REPA block: attention as nn.MultiheadAttention computes it, weights included."""

    def _attend(self, y):
        rows, a = y.transpose(0, 1), self.attn
        attended, _weights = F.multi_head_attention_forward(
            rows, rows, rows, y.shape[-1], a.heads, a.qkv.weight, a.qkv.bias, None, None, False,
            a.dropout, a.out.weight, a.out.bias, training=self.training, need_weights=True,
        )  # fmt: skip
        return attended.transpose(0, 1)


def with_blocks(model: AudioDiT, kind: type[PlainBlock]) -> AudioDiT:
    """Replace the model's blocks by blocks of this kind with the same weights and options; return the model."""
    for number, block in enumerate(model.blocks):
        out = block.attn.out
        with out.weight.device:
            plain = kind(out.in_features, block.attn.heads, dropout=block.ffn.dropout, gelu=block.ffn.gelu)
        plain.load_state_dict(block.state_dict())
        model.blocks[number] = plain.to(out.weight.dtype)
    return model


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


class TeacherStandIn(nn.Module):
    """A transformer encoder of a teacher's size with random weights, to measure its time.

    Whisper-large-v3 is 32 x 1280 over 1500 frames for clips of any length, BEATs 12 x 768 over 496 patches of 10 s."""

    def __init__(self, depth: int, width: int, frames: int):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False).eval()
        self.frames, self.width = frames, width

    @torch.no_grad()
    def forward(self, clips: int) -> torch.Tensor:
        weight = self.encoder.layers[0].linear1.weight
        return self.encoder(torch.ones(clips, self.frames, self.width, dtype=weight.dtype, device=weight.device)).mean(
            1
        )
