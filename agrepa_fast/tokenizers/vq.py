"""RepCodec-style vector quantiser of a teacher's frames: convolutional encoder, codebook, convolutional decoder.

Huang, Meng & Ko 2023, "RepCodec: A Speech Representation Codec for Speech Tokenization" (arXiv 2309.00169), with its
sizes: as wide as the frames; two blocks of two residual units (ELU, kernel 3, ELU, kernel 1) on either side; one
codebook kept by moving averages, straight-through gradients. Two differences: frames are first centred and scaled by
one number, so that one learning rate serves every teacher; and codes start from k-means, and unused ones are started
again (vector-quantize-pytorch).

Encoder and decoder see a frame with its neighbours, unlike k-means over single frames.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from ..errors import UserError
from ..files import file_sha256
from .base import FrameTokenizer

FORMAT = "agrepa-vq-1"
_AVERAGED = 15  # frames per code in the codebook's moving averages, RepCodec's (decay 0.8, 3 frames a code and step)
_COMMITMENT = 1 / 45  # against the reconstruction, RepCodec's
_DEAD_SHARE = 0.05  # a code with less than this share of its fair number of frames starts again from a frame


class Coded(NamedTuple):
    reconstruction: torch.Tensor  # (B, T, dim) in the scale of the frames that came in
    ids: torch.Tensor  # (B, T / stride) int64, -1 where nothing is valid
    loss: torch.Tensor  # (): mean squared error of the normalised frames, and the commitment


def _masked(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return x (B, C, T) with zeros where mask (B, T) is False, as a convolution sees them beyond the end of a clip."""
    return x if mask is None else x * mask.unsqueeze(1)


class _ResidualUnit(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=1, bias=False)
        self.mix = nn.Conv1d(width, width, 1, bias=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return _masked(x + self.mix(F.elu(self.conv(F.elu(x)))), mask)


class _Block(nn.Module):
    """Two residual units, then a convolution that divides the length by `stride`; with `up`, for the decoder, the
    reverse."""

    def __init__(self, width: int, stride: int, up: bool):
        super().__init__()
        self.up = up
        self.units = nn.ModuleList(_ResidualUnit(width) for _ in range(2))
        if stride == 1:
            self.conv = nn.Conv1d(width, width, 3, padding=1)
        elif up:
            self.conv = nn.ConvTranspose1d(
                width, width, 2 * stride, stride, padding=(stride + 1) // 2, output_padding=stride % 2
            )
        else:
            self.conv = nn.Conv1d(width, width, 2 * stride, stride, padding=stride - 1)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None, mask_after: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.up:
            x = _masked(self.conv(x), mask)
        for unit in self.units:
            x = unit(x, mask)
        return x if self.up else _masked(self.conv(x), mask_after)


class FrameCodec(nn.Module):
    """Turns frames (B, T, dim) into one of `codes` ids per `stride` frames, and back.

    fair: frames per code of one training batch if all codes get as many. Only training depends on it.
    """

    def __init__(self, dim: int, codes: int, stride: int = 1, fair: float = 1.0):
        try:
            from vector_quantize_pytorch import VectorQuantize
        except ImportError as error:
            raise UserError(
                f"vq:FILE and `agrepa tokens fit` need vector-quantize-pytorch ({error}): pip install 'agrepa_fast[vq]'"
            ) from error
        super().__init__()
        self.dim, self.codes, self.stride = dim, codes, stride
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(()))
        self.enter = nn.Conv1d(dim, dim, 3, padding=1, bias=False)
        self.encoder = nn.ModuleList(_Block(dim, s, up=False) for s in (1, stride))
        self.project = nn.Conv1d(dim, dim, 3, padding=1, bias=False)
        self.quantizer = VectorQuantize(
            dim,
            codes,
            decay=max(0.8, 1 - fair / _AVERAGED),
            kmeans_init=True,
            threshold_ema_dead_code=_DEAD_SHARE * fair,
            commitment_weight=1.0,
            rotation_trick=False,
            sync_codebook=False,
        )
        # A code that is started again counts as its fair share; otherwise it would be dead before its first use.
        self.quantizer._codebook.reset_cluster_size = fair
        self.widen = nn.Conv1d(dim, dim, 3, padding=1, bias=False)
        self.decoder = nn.ModuleList(_Block(dim, s, up=True) for s in (stride, 1))
        self.leave = nn.Conv1d(dim, dim, 3, padding=1, bias=False)

    def normalised(self, frames: torch.Tensor) -> torch.Tensor:
        return (frames.float() - self.mean) / self.scale

    def encode(self, frames: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return (B, T / stride, dim), the vectors whose nearest codes are the ids, of frames (B, T, dim) with T a
        multiple of stride. mask: (B, T), True where valid. Padding does not change the vectors of a clip."""
        after = None if mask is None else mask[:, :: self.stride]
        x = self.enter(_masked(self.normalised(frames).transpose(1, 2), mask))
        first, second = self.encoder
        x = second(first(_masked(x, mask), mask, mask), mask, after)
        return self.project(x).transpose(1, 2)

    def decode(self, quantized: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return normalised frames (B, T, dim) of codes (B, T / stride, dim)."""
        after = None if mask is None else mask[:, :: self.stride]
        x = self.widen(_masked(quantized.transpose(1, 2), after))
        first, second = self.decoder
        return self.leave(second(first(_masked(x, after), mask), mask)).transpose(1, 2)

    def forward(self, frames: torch.Tensor, mask: torch.Tensor | None = None, commitment: float = _COMMITMENT) -> Coded:
        z = self.encode(frames, mask)
        quantized, ids, distance = self.quantizer(z, mask=None if mask is None else mask[:, :: self.stride])
        decoded = self.decode(quantized, mask).float()
        error = (decoded - self.normalised(frames)) ** 2
        error = error.mean() if mask is None else error[mask].mean()
        return Coded(decoded * self.scale + self.mean, ids, error + commitment * distance)


class VqTokenizer(FrameTokenizer):
    """A fitted FrameCodec, read from the file that `agrepa tokens fit` wrote. about: the file's metadata, with the
    identity of the `teacher` whose frames it takes."""

    def __init__(self, codec: FrameCodec, about: dict, identity: dict, device: str = "cpu"):
        self.codec, self.about, self.identity = codec.eval().to(device), about, identity
        self.codes, self.stride, self.device = codec.codes, codec.stride, torch.device(device)

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> "VqTokenizer":
        """Return the tokenizer in a file. Raises UserError for a file of another kind, and for a damaged one."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["json"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if about["format"] != FORMAT:
                raise KeyError(f"format {about['format']}")
            codec = FrameCodec(about["dim"], about["codes"], about["stride"])
            codec.load_state_dict(tensors)
        except FileNotFoundError as error:
            raise UserError(f"vq:{path}: no such file: fit one with `agrepa tokens fit … --out {path}`") from error
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"vq:{path} holds no vector quantiser ({reason}): fit it again, into a new file") from error
        identity = {"spec": f"vq:{path}", "sha256": file_sha256(path), "teacher": about["teacher"]}
        return cls(codec, about, identity, device)

    @torch.inference_mode()
    def encode(self, frames: np.ndarray) -> np.ndarray:
        """Return (ceil(S / stride),) int32 of frames (S, dim)."""
        padded, mask = self._padded(frames)
        return self.codec.quantizer(self.codec.encode(padded, mask))[1][0].int().cpu().numpy()

    @torch.inference_mode()
    def reconstruct(self, frames: np.ndarray) -> np.ndarray:
        """Return the frames (S, dim) float32 that the decoder makes of the ids of frames (S, dim)."""
        return self.codec(*self._padded(frames)).reconstruction[0, : len(frames)].cpu().numpy()

    def _padded(self, frames: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = torch.from_numpy(frames).to(self.device).float().unsqueeze(0)
        rest = -len(frames) % self.codec.stride
        if not rest:
            return x, None
        mask = torch.arange(len(frames) + rest, device=self.device) < len(frames)
        return F.pad(x, (0, 0, 0, rest)), mask.unsqueeze(0)


def codec_bytes(codec: FrameCodec, about: dict) -> bytes:
    """Return the content of a codec's file: all tensors, and `about` as JSON in the header."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in codec.state_dict().items()}
    return save(tensors, {"json": json.dumps(about, sort_keys=True)})
