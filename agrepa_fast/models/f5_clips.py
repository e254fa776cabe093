"""F5-TTS's networks clip by clip: conditions that are dropped for some clips of a batch, and padding that changes none.

The classes below take the place of the package's, in place: weights and their names stay. The package drops the text of
a whole batch, and its text encoder normalises over the padding, as its attention attends to it.
"""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..kernels import valid_frames
from .audio_dit.attention import attend


def swap(module: nn.Module, base: type) -> None:
    """Let `base` go before the class of a module."""
    module.__class__ = type(type(module).__name__, (base, type(module)), {"__module__": type(module).__module__})


class TextPerClip:
    """Their text embedding; drop_text may be a tensor (N,) bool."""

    def forward(self, text: torch.Tensor, seq_len: int | torch.Tensor, drop_text: bool | torch.Tensor = False):
        """Return (N, T, text_dim) of text (N, T), -1 in the padding."""
        if isinstance(drop_text, torch.Tensor):
            kept, dropped = (super(TextPerClip, self).forward(text, seq_len, flag) for flag in (False, True))
            out = torch.where(drop_text.view(-1, 1, 1), dropped, kept)
        else:
            out = super().forward(text, seq_len, drop_text)
        return F.pad(out, (0, 0, 0, text.shape[1] - out.shape[1]))  # theirs ends with the longest clip


class TextOfOwnFrames:
    """A text embedding in which no clip depends on others, or on its padding."""

    def forward(self, text: torch.Tensor, seq_len: int | torch.Tensor, drop_text: bool | torch.Tensor = False):
        """Return (N, T, text_dim) of text (N, T), -1 in the padding. seq_len: lengths (N,), or T if nothing is padding.
        drop_text: for all clips, or (N,). Raises ValueError for more frames than the encoder has positions."""
        ids, frames = text + 1, text.shape[1]  # 0 fills the frames after the text
        valid = None
        if isinstance(seq_len, torch.Tensor):
            valid = valid_frames(seq_len, frames).unsqueeze(-1)
            ids = torch.where(valid.squeeze(-1), ids, 0)
        of_text = ids != 0
        kept = of_text.unsqueeze(-1) if self.mask_padding and self.extra_modeling else valid
        if drop_text is not False:
            ids = torch.where(torch.as_tensor(drop_text, device=ids.device).view(-1, 1), 0, ids)
        x = self.text_embed(ids)
        if self.extra_modeling:
            if frames > (most := len(self.freqs_cis)):
                raise ValueError(f"{frames} frames: F5's text encoder has positions for {most}, lower data.max_seconds")
            x = x + self.freqs_cis[:frames]
        x = _zero_outside(x, kept)
        for block in self.text_blocks if self.extra_modeling else ():
            x = _zero_outside(block(x, valid), kept)
        if getattr(self, "average_upsampling", False):  # DiT's alone
            x = _spread(x, of_text.sum(1), seq_len)
        return x


class TextBlockOfOwnFrames:
    """Their ConvNeXt V2 block, whose response norm (GRN) is taken over the clip's own frames."""

    def forward(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        """Return x (N, T, D) after the block, for x that is zero outside of valid (N, T, 1)."""
        y = self.norm(self.dwconv(x.transpose(1, 2)).transpose(1, 2))
        y = _zero_outside(self.act(self.pwconv1(y)), valid)
        return x + self.pwconv2(self.grn(y))


class AttentionOfOwnFrames:
    """Their processor of attention on valid frames alone, by `attend`. With a mask theirs would hold it for every head
    and pair of frames on a GPU, and might take a kernel whose backward is wrong."""

    attn_mask_enabled = True  # a fused block asks

    def __init__(self, theirs: Callable):
        self.theirs, self.pe_attn_head, self.attn_backend = theirs, theirs.pe_attn_head, theirs.attn_backend

    def __call__(self, attn: nn.Module, x: torch.Tensor, mask: torch.Tensor | None = None, rope=None) -> torch.Tensor:
        """Return (N, T, D), zero in the padding. mask (N, T): True on valid frames, which come first."""
        if mask is None:
            return self.theirs(attn, x, rope=rope)
        q, k, v = (
            part(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.q_norm is not None:
            q, k = attn.q_norm(q), attn.k_norm(k)
        q, k = (self._rotated(heads, rope).to(v.dtype) for heads in (q, k))
        attended = attend(q, k, v, mask.sum(1))
        return attn.to_out[1](attn.to_out[0](attended)).masked_fill(~mask.unsqueeze(-1), 0.0)

    def _rotated(self, heads: torch.Tensor, rope) -> torch.Tensor:
        from x_transformers.x_transformers import apply_rotary_pos_emb

        angles, _ = rope  # no xPos: F5 and E2 have none
        count = heads.shape[1] if self.pe_attn_head is None else self.pe_attn_head
        return torch.cat((apply_rotary_pos_emb(heads[:, :count], angles), heads[:, count:]), dim=1)


class TappedUNet:
    """Their UNetT with a tap behind each layer, and with `mask` for its convolutions and text, too."""

    def forward(
        self,
        x: torch.Tensor,
        cond: torch.Tensor,
        text: torch.Tensor,
        time: torch.Tensor,
        mask: torch.Tensor | None = None,
        drop_text: bool | torch.Tensor = False,
    ) -> torch.Tensor:
        """Return the velocity (N, T, M). mask (N, T): True on valid frames."""
        strict = isinstance(self.text_embed, TextOfOwnFrames)
        lengths = mask.sum(1) if strict and mask is not None else x.shape[1]
        embedded = self.text_embed(text, lengths, drop_text=drop_text)
        x = self.input_embed.proj(torch.cat((x, cond, embedded), dim=-1))
        x = self.input_embed.conv_pos_embed(x, mask=mask if strict else None) + x
        x = torch.cat((self.time_embed(time).unsqueeze(1), x), dim=1)  # the time is a token before the first frame
        mask = None if mask is None else F.pad(mask, (1, 0), value=True)
        rope = self.rotary_embed.forward_from_seq_len(x.shape[1])
        skips = []
        for number, (skip_proj, attn_norm, attn, ff_norm, ff) in enumerate(self.layers):
            if number < self.depth // 2:
                skips.append(x)
            else:
                x = self._join(x, skips.pop(), skip_proj)
            x = attn(attn_norm(x), rope=rope, mask=mask) + x
            x = ff(ff_norm(x)) + x
            self.taps[number](x[:, 1:])
        return self.proj_out(self.norm_out(x)[:, 1:])

    def _join(self, x: torch.Tensor, skip: torch.Tensor, project: nn.Module | None) -> torch.Tensor:
        if self.skip_connect_type == "concat":
            return project(torch.cat((x, skip), dim=-1))
        return x + skip if self.skip_connect_type == "add" else x


def _spread(x: torch.Tensor, counts: torch.Tensor, lengths: int | torch.Tensor) -> torch.Tensor:
    """Return x (N, T, D), whose first counts (N,) frames are text, with each of them repeated so that they fill the
    clip: equally often, the last ones once more."""
    place = torch.arange(x.shape[1], device=x.device)
    if not isinstance(lengths, torch.Tensor):  # made on the device: a CUDA graph cannot copy from the host
        lengths = counts.new_full((1,), lengths)
    counts, lengths = counts.unsqueeze(1), lengths.view(-1, 1)
    times = lengths // counts.clamp(min=1)
    plain = counts - (lengths - counts * times)  # tokens that are not repeated once more
    late = plain + (place - plain * times) // (times + 1)
    source = torch.where(place < plain * times, place // times, late).clamp(min=0, max=x.shape[1] - 1)
    spread = x.gather(1, source.unsqueeze(-1).expand(-1, -1, x.shape[2]))
    return torch.where(((place < lengths) & (counts > 0)).unsqueeze(-1), spread, 0)


def _zero_outside(x: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    return x if valid is None else torch.where(valid, x, 0)
