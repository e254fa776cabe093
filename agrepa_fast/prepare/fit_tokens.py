"""`agrepa tokens fit`: recordings -> frames of a teacher -> a vector quantiser in one .safetensors file.

Frames and the state of the training wait in <file>.fit, so an interrupted fit goes on where it stopped and, on a CPU,
ends with the same bytes.
"""

import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..audio.waves import wave_fault
from ..config import DataConfig
from ..corpora.folder import list_folder
from ..corpora.recordings import MAX_BAD_SHARE, Recording, Source, count_kinds, too_many_bad
from ..errors import UserError
from ..files import FolderLock, write_atomically
from ..tokenizers.vq import FORMAT, VqTokenizer, codec_bytes
from ..tokenizers.vq_config import VqFitConfig
from ..tokenizers.vq_fit import FitFrames, fit_codec, lost_variance
from .decode import cut_wave
from .job import digest
from .passes import BATCH, BatchPass
from .split import name_hash
from .targets import teacher_frames

_HELD_OUT = 0.05  # share of the recordings


def fit_tokens(path: Path, config: VqFitConfig, out: Path) -> dict:
    """Fit a vector quantiser on the recordings below `path` and write `out`. Returns the file's metadata, with the
    share of the variance of held-out frames that is lost: `held_out` {`vq`, `kmeans` with as many codes, …}.

    Does nothing if `out` is of the same recordings and settings. Raises UserError if it is of others, and for a folder
    without recordings, too many bad ones, and fewer frames than codes.
    """
    out, device = Path(out), "cuda" if torch.cuda.is_available() else "cpu"
    found, passed_over = list_folder(Path(path), "audio")
    print(f"{path}: {len(found)} recordings; not taken: {count_kinds(entry.kind for entry in passed_over)}")
    recordings = sorted(found, key=lambda r: name_hash("order", r.name))
    asked = digest([asdict(config), Source.of(str(path), "audio", recordings).identity])
    if out.is_file():
        about = VqTokenizer.load(out).about
        if about["asked"] != asked:
            raise UserError(f"{out} was fitted on other recordings, or with other settings: choose another --out")
        print(f"{out}: fitted before with the same settings, nothing to do")
        return about
    work = out.with_name(f"{out.name}.fit")
    with FolderLock(work, "choose another --out"):
        from ..teachers import load_teacher

        teacher = load_teacher(config.teacher, device)
        frames = _collect_frames(recordings, config, teacher, work / f"frames-{digest([teacher.identity, asked])}")
        if (count := sum(map(len, frames.train))) < config.codes:
            raise UserError(
                f"--codes={config.codes}: {path} gives only {count} teacher frames to fit on: add recordings, or lower "
                "--codes"
            )
        with torch.random.fork_rng():
            codec = fit_codec(frames, config, device, work / f"state-{asked}.safetensors")
        held_out = lost_variance(codec, frames, config, device)
        about = {"format": FORMAT, "asked": asked, "teacher": teacher.identity, "teacher_name": teacher.name}
        about |= {"dim": teacher.dim, "codes": config.codes, "stride": config.stride}
        about |= {"rate": teacher.rate / config.stride, "steps": config.steps, "held_out": held_out}
        write_atomically(out, codec_bytes(codec, about))
    shutil.rmtree(work)
    print(
        f"{out}: of the variance of {held_out['frames']} held-out frames {held_out['vq']:.2%} are lost, by k-means "
        f"with {config.codes} codes {held_out['kmeans']:.2%}; {held_out['used']:.1%} of the codes used there, "
        f"perplexity {held_out['perplexity']:.0f}"
    )
    return about


def _collect_frames(recordings: list[Recording], config: VqFitConfig, teacher, folder: Path) -> FitFrames:
    """Return the teacher frames of the first recordings that have enough together, some recordings held out."""
    folder.mkdir(exist_ok=True)
    data = DataConfig(max_seconds=config.max_seconds, min_seconds=min(0.01, config.max_seconds / 2))

    def read(batch: list[Recording]) -> list[np.ndarray | UserError]:
        return [_wave(recording, data, teacher.sample_rate) for recording in batch]

    def compute(batch: list[Recording], waves: list[np.ndarray | UserError]) -> Iterable[dict[str, np.ndarray]]:
        return ({"frames": frames} for frames in _frames(teacher, batch, waves))

    batches = [recordings[start : start + BATCH] for start in range(0, len(recordings), BATCH)]
    frames_of, total, bad = {}, 0, []
    with ThreadPoolExecutor(4) as pool, tqdm(total=config.max_frames, desc="teacher", unit="frame") as bar:
        frames = BatchPass(pool, folder, read, compute)
        for batch, _ in frames.each(batches):
            for recording in batch:
                of_recording = frames.result(recording)["frames"]
                total += len(of_recording)
                bar.update(len(of_recording))
                if len(of_recording):
                    frames_of[recording.name] = of_recording
                else:
                    bad.append(recording.name)
            if total >= config.max_frames:
                break
    if too_many_bad(len(bad), len(frames_of) + len(bad)):
        raise UserError(
            f"{len(bad)} of {len(frames_of) + len(bad)} recordings cannot be used ({', '.join(bad[:3]) or 'too few'}): "
            f"at most {MAX_BAD_SHARE:.0%} may be bad and at least 2 must be good"
        )
    names = sorted(frames_of, key=lambda name: name_hash("split", name))
    held_out = set(names[: max(1, round(_HELD_OUT * len(names)))])
    train = [frames for name, frames in frames_of.items() if name not in held_out]
    return FitFrames(train, [frames for name, frames in frames_of.items() if name in held_out])


def _wave(recording: Recording, data: DataConfig, rate: int) -> np.ndarray | UserError:
    try:
        wave = cut_wave(recording, data, rate)
    except UserError as error:
        return error
    fault = wave_fault(wave) if len(wave) else "no samples"
    return UserError(f"{recording.source}: {fault}") if fault else wave


def _frames(teacher, batch: list[Recording], waves: list[np.ndarray | UserError]) -> list[np.ndarray]:
    """Return teacher frames (S, dim) fp16 per recording, (0, dim) for a bad one."""
    good = [wave for wave in waves if not isinstance(wave, UserError)]
    of_waves = iter(teacher_frames(teacher, good) if good else [])
    result = []
    for recording, wave in zip(batch, waves, strict=True):
        frames = str(wave) if isinstance(wave, UserError) else next(of_waves)
        if isinstance(frames, str):
            print(f"skipped {frames if isinstance(wave, UserError) else f'{recording.source}: {frames}'}")
            frames = np.zeros((0, teacher.dim), np.float16)
        result.append(frames)
    return result
