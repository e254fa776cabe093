"""Validation clips, resynthesised and sampled, as wavs and as pictures of their mels."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from ..audio.vocoder import Vocoder, load_vocoder
from ..config import DOMAINS, Config
from ..data.batch import Batch, collate
from ..data.index import Index
from ..data.reading import fixed_clips
from ..evaluation.synthesis import prefix_condition
from ..files import check_writable, write_atomically
from ..flow import sample
from ..seeds import clip_keys
from ..tokenizers.base import tokens_of_frames
from .figure import new_figure
from .opened import SAMPLING, open_checkpoint


def sample_clips(
    model: nn.Module, index: Index, config: Config, per_domain: int, device, *, progress: bool
) -> tuple[Batch, torch.Tensor]:
    """Return the first validation clips of every domain, and the normalised mels (B, T, n_mels) that the model samples
    from their tokens and a prefix of each clip."""
    clips = [s for domain in index.domains for s in fixed_clips(index, "val", domain, per_domain, "--clips")]
    batch = collate(clips, tuple(range(len(clips))), index).to(device)
    condition = prefix_condition(batch, config.flow)
    keys = clip_keys(config.run.seed, 0, batch.places, "sample").to(device)
    return batch, sample(model, condition, keys, config.flow, progress=progress)


def write_samples(
    batch: Batch, sampled: torch.Tensor, index: Index, vocoder: Vocoder, folder: Path, plot: Path | None = None
) -> list[str]:
    """Write <domain>-<n>-truth.wav (resynthesised), -sample.wav and -codes.wav (the mean mel of each token) per clip
    into `folder`, and the mels of truth and sample into `plot`. Returns the names of the wavs."""
    folder.mkdir(parents=True, exist_ok=True)
    names, panels, count = [], [], {}
    tokens, code_mels = batch.condition.tokens.cpu().numpy(), index.code_mels()
    for row, length in enumerate(batch.condition.lengths.tolist()):
        domain = DOMAINS[batch.domain[row]]
        count[domain] = count.get(domain, 0) + 1
        own = tokens[row, : batch.condition.token_lengths[row]]
        log_mels = {
            kind: mels[row, :length].float().cpu() * index.mel_std + index.mel_mean
            for kind, mels in (("truth", batch.mel), ("sample", sampled))
        }
        log_mels["codes"] = torch.from_numpy(code_mels[tokens_of_frames(own, length)])
        for kind, log_mel in log_mels.items():
            name = f"{domain}-{count[domain]}-{kind}"
            if not log_mel.isfinite().all():
                print(f"{name}: the mel is not finite: its wav says nothing")
            _write_wav(folder / f"{name}.wav", vocoder(log_mel).numpy(), vocoder.sample_rate)
            names.append(f"{name}.wav")
            if kind != "codes":
                panels.append((f"{name}: {batch.keys[row]}", log_mel))
    if plot is not None:
        plot_mels(panels, plot, seconds_per_frame=index.features["hop_length"] / index.features["sample_rate"])
    return names


def _write_wav(path: Path, wave: np.ndarray, rate: int) -> None:
    import soundfile

    content = io.BytesIO()  # for a file, soundfile's error on a full disk is "System error."
    soundfile.write(content, wave, rate, format="WAV", subtype="PCM_16")
    write_atomically(path, content.getvalue(), durable=False)


def sample_checkpoint(checkpoint: Path, overrides: Sequence[str], *, live: bool, clips: int, out: Path | None) -> None:
    """Run `agrepa sample`: write wavs and mel.png of a checkpoint's samples. clips: per domain. live: the live weights
    instead of their moving average. out: None for a folder beside the checkpoints."""
    opened = open_checkpoint(checkpoint, overrides, live=live, uses=("data", *SAMPLING, "eval.vocoder", "run.seed"))
    out = out or opened.beside("sample")
    check_writable(out, "--out")
    vocoder = load_vocoder(opened.config.eval.vocoder, opened.config.data, "cpu")
    batch, sampled = sample_clips(opened.model, opened.index, opened.config, clips, opened.device, progress=True)
    names = write_samples(batch, sampled, opened.index, vocoder, out, out / "mel.png")
    print(f"wrote {len(names)} wavs and mel.png to {out} (vocoder: {vocoder.name})")


def plot_mels(panels: list[tuple[str, torch.Tensor]], path: Path, seconds_per_frame: float) -> None:
    """Draw log-mels (T, n_mels) with their titles: one row per clip on one colour scale, truth left and sample right.
    panels: truth and sample in turns."""
    figure = new_figure(10, 2.6 * (len(panels) // 2))
    rows = figure.subplots(len(panels) // 2, 2, squeeze=False)
    for number, (title, mel) in enumerate(panels):
        row, column = divmod(number, 2)
        axes = rows[row][column]
        truth = panels[2 * row][1]
        axes.imshow(
            mel.T.numpy(),
            origin="lower",
            aspect="auto",
            cmap="magma",
            vmin=truth.min(),
            vmax=truth.max(),
            extent=(0, mel.shape[0] * seconds_per_frame, 0, mel.shape[1]),
        )
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("s")
        axes.set_ylabel("mel bin")
    figure.savefig(path, dpi=110)
