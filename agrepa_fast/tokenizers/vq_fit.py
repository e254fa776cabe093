"""`agrepa tokens fit`: recordings -> frames of a teacher -> a FrameCodec (vq.py) in one .safetensors file.

Frames and, every few hundred steps, the state of the training wait in <file>.fit, written atomically: an interrupted
fit goes on where it stopped and, on a CPU, ends with the same bytes. Every draw of a step comes from (seed, step).
"""

import json
import math
import shutil
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..config import DataConfig
from ..corpora.folder import folder_recordings
from ..corpora.recordings import Recording, Source
from ..errors import UserError
from ..files import FolderLock, write_atomically
from ..prepare.decode import MAX_BAD, MAX_BAD_SHARE, ahead, cut_wave, digest, name_hash
from ..seeds import derive_seed
from .kmeans import Codebook, fit_frames
from .vq import FORMAT, FrameCodec, VqTokenizer, codec_bytes
from .vq_config import VqFitConfig

_WINDOW = 96  # frames, as RepCodec's
_CHUNK = 16  # recordings per call of the teacher
_HELD_OUT = 0.05
_INIT_FRAMES_PER_CODE = 8  # encoded frames that k-means starts the codebook from
_CLIP_NORM = 1.0
_SAVE_EVERY, _LOG_EVERY = 500, 100


def fit_vq(path: Path, config: VqFitConfig, out: Path) -> dict:
    """Fit on the recordings below `path` and write `out`. Returns the file's metadata, `held_out` among it: share of
    the variance of held-out frames that is lost, of the quantiser (`vq`) and of k-means with as many codes (`kmeans`).

    Does nothing when `out` is of the same recordings and settings. Raises UserError for an `out` that is not, a folder
    without recordings, too many bad ones and fewer frames than codes.
    """
    out, device = Path(out), "cuda" if torch.cuda.is_available() else "cpu"
    recordings = sorted(folder_recordings(Path(path), "audio"), key=lambda r: name_hash("order", r.name))
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
        frames = _Frames.of(recordings, config, teacher, work / f"frames-{digest([teacher.identity, asked])}")
        if sum(map(len, frames.train)) < config.codes:
            raise UserError(
                f"--codes={config.codes}: {path} gives only {sum(map(len, frames.train))} teacher frames to fit on: "
                f"add recordings, or lower --codes"
            )
        with torch.random.fork_rng():
            codec = _train(frames, config, teacher.dim, device, work / f"state-{asked}.safetensors")
        held_out = _held_out(codec, frames, config, device)
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


@dataclass
class _Frames:
    """Teacher frames (S, dim) fp16 per recording, some recordings held out."""

    train: list[np.ndarray]
    held_out: list[np.ndarray]

    @classmethod
    def of(cls, recordings: list[Recording], config: VqFitConfig, teacher, folder: Path) -> "_Frames":
        """Of the first recordings in hash order that have enough; each is run through the teacher once."""
        folder.mkdir(exist_ok=True)
        data = DataConfig(max_seconds=config.max_seconds, min_seconds=min(0.01, config.max_seconds / 2))
        chunks = [recordings[start : start + _CHUNK] for start in range(0, len(recordings), _CHUNK)]
        found, total, bad = {}, 0, []
        with ThreadPoolExecutor(4) as pool, tqdm(total=config.max_frames, desc="teacher", unit="frame") as bar:
            files = [folder / f"{number:06d}.safetensors" for number in range(len(chunks))]

            def waves(number: int) -> list[np.ndarray | UserError]:
                return [] if files[number].is_file() else [_wave(r, data, teacher.sample_rate) for r in chunks[number]]

            for number, loaded in enumerate(ahead(pool, waves, range(len(chunks)), depth=3)):
                if total >= config.max_frames:
                    break
                for name, frames in _chunk_frames(files[number], chunks[number], loaded, teacher).items():
                    if len(frames):
                        found[name] = frames
                        total += len(frames)
                        bar.update(len(frames))
                    else:
                        bad.append(name)
        if (len(bad) > MAX_BAD and len(bad) > MAX_BAD_SHARE * (len(found) + len(bad))) or len(found) < 2:
            raise UserError(
                f"{len(bad)} of {len(found) + len(bad)} recordings cannot be used ({', '.join(bad[:3]) or 'too few'}): "
                f"at most {MAX_BAD_SHARE:.0%} may be bad and at least 2 must be good"
            )
        names = sorted(found, key=lambda name: name_hash("split", name))
        held = set(names[: max(1, round(_HELD_OUT * len(names)))])
        return cls([found[n] for n in found if n not in held], [found[n] for n in found if n in held])


def _wave(recording: Recording, data: DataConfig, rate: int) -> np.ndarray | UserError:
    try:
        wave = cut_wave(recording, data, rate)
    except UserError as error:
        return error
    usable = len(wave) > 0 and np.isfinite(wave).all()
    return wave if usable else UserError(f"{recording.source}: empty, or not finite")


def _chunk_frames(file: Path, chunk: list[Recording], waves: list, teacher) -> dict[str, np.ndarray]:
    """Name -> frames of a chunk, an empty array for a bad recording; kept in `file`, or read from it."""
    from safetensors.numpy import load_file, save

    if not file.is_file():
        good = [wave for wave in waves if not isinstance(wave, UserError)]
        of_wave = iter(teacher.frames(good) if good else [])
        result = {}
        for recording, wave in zip(chunk, waves, strict=True):
            if isinstance(wave, UserError):
                print(f"skipped {wave}")
            frames = np.zeros((0, teacher.dim)) if isinstance(wave, UserError) else next(of_wave)
            frames = frames.astype(np.float16)
            if not np.isfinite(frames).all():
                raise UserError(f"{recording.source}: teacher {teacher.name} gives values that fp16 cannot hold")
            result[recording.name] = frames
        write_atomically(file, save(result))
    return load_file(file)


class _Windows:
    """Windows of the train frames, as likely to begin at any frame: batches (B, W, dim), masks (B, W)."""

    def __init__(self, clips: list[np.ndarray], config: VqFitConfig):
        self.clips, self.config = clips, config
        self.length = _WINDOW // config.stride * config.stride
        self.ends = list(accumulate(len(clip) for clip in clips))

    def batch(self, *seed: int | str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        draw = np.random.default_rng(derive_seed(self.config.seed, *seed) % 2**63)
        frames = torch.zeros(count, self.length, self.clips[0].shape[1])
        mask = torch.zeros(count, self.length, dtype=torch.bool)
        for row, place in enumerate(draw.integers(self.ends[-1], size=count).tolist()):
            number = bisect_right(self.ends, place)
            clip = self.clips[number]
            start = place - self.ends[number] + len(clip)
            window = clip[max(0, min(start, len(clip) - self.length)) :][: self.length]
            frames[row, : len(window)] = torch.from_numpy(window)
            mask[row, : len(window)] = True
        return frames, mask


def _train(frames: _Frames, config: VqFitConfig, dim: int, device: str, state: Path) -> FrameCodec:
    windows = _Windows(frames.train, config)
    torch.manual_seed(derive_seed(config.seed, "weights"))
    fair = config.batch * windows.length / config.stride / config.codes
    codec = FrameCodec(dim, config.codes, config.stride, fair).to(device)
    optimizer = torch.optim.Adam(codec.parameters(), lr=config.lr, betas=(0.5, 0.9))
    first = _load_state(state, codec, optimizer) if state.is_file() else 0
    if first == 0:
        _normalise(codec, frames.train)
        _start_codebook(codec, windows, config, device)
    counts, losses = torch.zeros(config.codes, device=device), []
    with tqdm(total=config.steps, initial=first, desc="fit", unit="step") as bar:
        for step in range(first, config.steps):
            torch.manual_seed(derive_seed(config.seed, "revived codes", step))
            batch, mask = windows.batch("windows", step, count=config.batch)
            mask = None if mask.all() else mask.to(device)
            with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
                coded = codec(batch.to(device), mask)
            if not torch.isfinite(coded.loss):
                raise UserError(f"step {step}: the loss is not finite: lower --lr")
            optimizer.zero_grad()
            coded.loss.backward()
            torch.nn.utils.clip_grad_norm_(codec.parameters(), _CLIP_NORM)
            optimizer.param_groups[0]["lr"] = config.lr * _schedule(step, config.steps)
            optimizer.step()
            losses.append(coded.loss.detach())
            counts += torch.bincount(coded.ids[coded.ids >= 0], minlength=config.codes)
            bar.update()
            done = step + 1
            if done % _LOG_EVERY == 0 or done == config.steps:
                perplexity, used = _usage(counts)
                loss = f"{torch.stack(losses).mean():.4f}"
                bar.set_postfix(loss=loss, perplexity=f"{perplexity:.0f}", used=f"{used:.1%}")
                counts.zero_()
                losses.clear()
            if done % _SAVE_EVERY == 0 or done == config.steps:
                _save_state(state, codec, optimizer, done)
    return codec.eval()


def _schedule(step: int, steps: int) -> float:
    """Share of the learning rate: a linear warm-up over a tenth of the steps, at most 1000, then a cosine to 0.1."""
    warmup = min(1000, max(1, steps // 10))
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


@torch.no_grad()
def _normalise(codec: FrameCodec, clips: list[np.ndarray]) -> None:
    """Mean of every dimension, and one standard deviation for all: errors keep their proportions."""
    count = sum(map(len, clips))
    mean = sum(clip.sum(axis=0, dtype=np.float64) for clip in clips) / count
    square = sum((clip.astype(np.float64) ** 2).sum() for clip in clips) / count / len(mean)
    codec.mean.copy_(torch.from_numpy(mean))
    codec.scale.fill_(max(1e-8, square - float((mean**2).mean())) ** 0.5)


@torch.no_grad()
def _start_codebook(codec: FrameCodec, windows: _Windows, config: VqFitConfig, device: str) -> None:
    """k-means over more encoded frames than a batch has: with fewer than codes it would start several in one place."""
    needed = min(_INIT_FRAMES_PER_CODE * config.codes, windows.ends[-1])
    encoded, found, number = [], 0, 0
    while found < needed:
        batch, mask = windows.batch("first codes", number, count=config.batch)
        encoded.append(codec.encode(batch.to(device), mask.to(device))[mask[:, :: config.stride].to(device)])
        found, number = found + len(encoded[-1]), number + 1
    codec.quantizer._codebook.init_embed_(torch.cat(encoded)[None].float())


def _usage(counts: torch.Tensor) -> tuple[float, float]:
    """Perplexity of the codes, and the share of them that occur."""
    share = counts / counts.sum()
    return float(torch.exp(torch.special.entr(share).sum())), float((counts > 0).float().mean())


@torch.no_grad()
def _held_out(codec: FrameCodec, frames: _Frames, config: VqFitConfig, device: str) -> dict:
    """The share of the held-out frames' variance that is lost, by the quantiser and by k-means."""
    tokenizer = VqTokenizer(codec, {}, {}, device)
    enough = fit_frames(config.codes)
    draw = np.random.default_rng(config.seed)
    train = np.concatenate(frames.train)
    picked = draw.permutation(len(train))[:enough]
    codebook = Codebook.fit(train[np.sort(picked)].astype(np.float32), config.codes, "fitted")
    mean, errors, counts = codec.mean.cpu().numpy(), np.zeros(3), torch.zeros(config.codes)
    for clip in tqdm(frames.held_out, "held out", unit="recording", leave=False):
        clip = clip.astype(np.float32)
        means = codebook.centroids[codebook.encode(clip)]
        errors += [((clip - x) ** 2).sum() for x in (tokenizer.reconstruct(clip), means, mean)]
        counts += torch.bincount(torch.from_numpy(tokenizer.encode(clip)).long(), minlength=config.codes)
    perplexity, used = _usage(counts)
    lost = {"vq": errors[0] / errors[2], "kmeans": errors[1] / errors[2]}
    return {"frames": sum(map(len, frames.held_out)), **lost, "perplexity": perplexity, "used": used}


def _save_state(path: Path, codec: FrameCodec, optimizer: torch.optim.Adam, step: int) -> None:
    from safetensors.torch import save

    tensors = {f"codec.{name}": tensor.detach().contiguous() for name, tensor in codec.state_dict().items()}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{number}.{name}": value for name, value in values.items()}
    write_atomically(path, save(tensors, {"json": json.dumps({"step": step})}))


def _load_state(path: Path, codec: FrameCodec, optimizer: torch.optim.Adam) -> int:
    """The step it goes on from."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        step = json.loads(file.metadata()["json"])["step"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    codec.load_state_dict({n.removeprefix("codec."): t for n, t in tensors.items() if n.startswith("codec.")})
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("adam."):
            _, number, key = name.split(".")
            moments.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return step
