"""The wavs of an evaluation: each clip's truth, samples and codes, through one vocoder.

A batch is computed whole or taken whole, and its clips depend on the manifest alone: the wavs are the same on any
number of ranks and after any interruption.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ..audio.vocoder import Vocoder
from ..config import FlowConfig
from ..data.batch import Batch, collate
from ..data.index import Index
from ..data.samples import Sample
from ..fetch import cache_dir
from ..files import write_atomically
from ..flow import reference_prefix, sample
from ..models.backbone import Backbone
from ..models.condition import Condition
from ..prepare.passes import batches_by_length
from ..ranks import Ranks
from ..tokenizers.base import tokens_of_frames
from .manifest import Clip

ROWS = ("truth", "sample", "codes")  # the true mel, the model's, and the mean mel of each frame's token


@dataclass(frozen=True)
class Wav:
    """A clip of one row, as a file."""

    row: str
    clip: Clip
    path: Path


class Synthesis:
    """Writes the wavs of all rows into `folder`, and beside each but truth's the mel's distance from the truth."""

    def __init__(self, model: Backbone, index: Index, flow: FlowConfig, vocoder: Vocoder, folder: Path, device):
        self.model, self.index, self.flow, self.vocoder = model, index, flow, vocoder
        self.folder, self.device = folder, device
        self.code_mels = index.code_mels()

    def wavs(self, clips: Sequence[Clip]) -> list[Wav]:
        """Return all wavs that a run makes. Truth and codes have no noise, so they have one draw."""
        return [
            Wav(row, clip, self.folder / row / f"{clip.name}.wav")
            for row in ROWS
            for clip in clips
            if row == "sample" or clip.draw == 0
        ]

    def run(self, clips: Sequence[Clip], samples: Sequence[Sample], ranks: Ranks, progress: Callable) -> None:
        """Write the wavs that are missing; progress(number of clips) is called after each batch."""
        for row in ROWS:
            (self.folder / row).mkdir(parents=True, exist_ok=True)
        of_clip = {(s.domain, s.key): s for s in samples}
        wavs = {(wav.row, wav.clip): wav.path for wav in self.wavs(clips)}
        for batch in ranks.part_of(batches_by_length(clips)):
            paths = [wavs[row, clip] for row in ROWS for clip in batch if (row, clip) in wavs]
            if not all(map(_is_whole, paths)):
                for row, clip, mel, truth in self._mels(batch, [of_clip[c.domain, c.key] for c in batch]):
                    if (row, clip) in wavs:
                        self._write(wavs[row, clip], mel, truth)
            ranks.check_others()
            progress(len(batch))

    def _mels(
        self, clips: list[Clip], samples: list[Sample]
    ) -> Iterator[tuple[str, Clip, torch.Tensor, torch.Tensor | None]]:
        """Yield row, clip, its log-mel (T, n_mels), and for rows but truth the true one."""
        batch = collate(samples, tuple(range(len(samples))), self.index).to(self.device)
        condition = prefix_condition(batch, self.flow)
        keys = torch.tensor([clip.noise_key for clip in clips], dtype=torch.int64, device=self.device)
        sampled = sample(self.model, condition, keys, self.flow).float().cpu()
        for row, (clip, stored) in enumerate(zip(clips, samples, strict=True)):
            truth = torch.from_numpy(stored.mel).float()
            mel = sampled[row, : clip.frames] * self.index.mel_std + self.index.mel_mean
            yield "truth", clip, truth, None
            yield "sample", clip, mel, truth
            yield "codes", clip, torch.from_numpy(self.code_mels[tokens_of_frames(stored.tokens, stored.frames)]), truth

    def _write(self, path: Path, mel: torch.Tensor, truth: torch.Tensor | None) -> None:
        if truth is not None:  # first, since a clip is complete if its wav is there
            given = prefix_frames(torch.tensor([len(truth)]), self.flow).item()
            distance = float((mel - truth)[given:].abs().mean())
            write_atomically(path.with_suffix(".json"), json.dumps({"mel_l1": distance}), durable=False)
        write_atomically(path, self._wav(path.parent.name, mel), durable=False)

    def _wav(self, row: str, mel: torch.Tensor) -> bytes:
        """Return the file of a mel. Those of truth and codes are kept in the user's cache: every evaluation on the same
        shards has them, and the vocoder takes longer than most metrics."""
        if row == "sample":
            return self._vocode(mel)
        made = f"{self.vocoder.name} {self.vocoder.sample_rate}".encode() + mel.numpy().tobytes()
        kept = cache_dir() / "wavs" / f"{hashlib.sha256(made).hexdigest()[:32]}.wav"
        if not has_content(kept):
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(kept, self._vocode(mel), durable=False)
        return kept.read_bytes()

    def _vocode(self, mel: torch.Tensor) -> bytes:
        return wav_content(self.vocoder(mel).numpy(), self.vocoder.sample_rate)


def wav_content(wave: np.ndarray, rate: int) -> bytes:
    """Return the file of a wave (samples,) in [-1, 1], 16 bits per sample; floats if it is not finite, which 16 bits
    would hide from the metric models."""
    import soundfile

    content = io.BytesIO()
    subtype = "PCM_16" if np.isfinite(wave).all() else "FLOAT"
    soundfile.write(content, wave, rate, format="WAV", subtype=subtype)
    return content.getvalue()


def _is_whole(wav: Path) -> bool:
    """Return whether a wav is there, and beside it, but for truth, the distance of its mel. A crash of the machine may
    leave either without content."""
    if wav.parent.name != "truth":
        try:
            float(json.loads(wav.with_suffix(".json").read_bytes())["mel_l1"])
        except (OSError, ValueError, TypeError, KeyError):
            return False
    return has_content(wav)


def has_content(file: Path) -> bool:
    """Whether a file is there, and no crash of the machine has left it empty."""
    return file.is_file() and file.stat().st_size > 0


def prefix_frames(lengths: torch.Tensor, flow: FlowConfig) -> torch.Tensor:
    """Return the frames (C,) of each clip that a sample is given: flow.max_reference of it, at least one unless that is
    0."""
    frames = (flow.max_reference * lengths).long()
    return frames.clamp(min=1) if flow.max_reference > 0 else frames


def prefix_condition(batch: Batch, flow: FlowConfig) -> Condition:
    """Return the condition that validation clips are sampled from: their tokens and a prefix."""
    prefix = prefix_frames(batch.condition.lengths, flow)
    return replace(batch.condition, reference=reference_prefix(batch.mel, prefix))
