"""Fit a FrameCodec (vq.py) on a teacher's frames.

Every draw of a step comes from (seed, step). The state of the training is written every few hundred steps.
"""

import json
import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..errors import UserError
from ..files import write_atomically
from ..seeds import derive_seed
from .kmeans import Codebook, fit_frames
from .vq import FrameCodec, VqTokenizer
from .vq_config import VqFitConfig

_WINDOW = 96  # frames, as RepCodec's
_INIT_FRAMES_PER_CODE = 8  # encoded frames that k-means starts the codebook from
_CLIP_NORM = 1.0
_SAVE_EVERY, _LOG_EVERY = 500, 100


@dataclass
class FitFrames:
    """Teacher frames (S, dim) fp16 per recording, some recordings held out."""

    train: list[np.ndarray]
    held_out: list[np.ndarray]


class Windows:
    """Windows of the train frames that begin at any frame with the same probability."""

    def __init__(self, clips: list[np.ndarray], config: VqFitConfig):
        self.clips, self.config = clips, config
        self.length = _WINDOW // config.stride * config.stride
        self.ends = list(accumulate(len(clip) for clip in clips))

    def batch(self, *seed: int | str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return windows (count, W, dim) float32 and their masks (count, W), False beyond the end of a recording."""
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


def fit_codec(frames: FitFrames, config: VqFitConfig, device: str, state: Path) -> FrameCodec:
    """Return a codec that is fitted on the train frames. `state` is a file that an interrupted fit goes on from; on a
    CPU it ends with the same bytes."""
    windows, dim = Windows(frames.train, config), frames.train[0].shape[1]
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
    """Return the share of the learning rate: a linear warm-up over a tenth of the steps, at most 1000, then a cosine
    decay to 0.1."""
    warmup = min(1000, max(1, steps // 10))
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


@torch.no_grad()
def _normalise(codec: FrameCodec, clips: list[np.ndarray]) -> None:
    """Centre every dimension, and scale all by one number, so that errors keep their proportions."""
    count = sum(map(len, clips))
    mean = sum(clip.sum(axis=0, dtype=np.float64) for clip in clips) / count
    square = sum((clip.astype(np.float64) ** 2).sum() for clip in clips) / count / len(mean)
    codec.mean.copy_(torch.from_numpy(mean))
    codec.scale.fill_(max(1e-8, square - float((mean**2).mean())) ** 0.5)


@torch.no_grad()
def _start_codebook(codec: FrameCodec, windows: Windows, config: VqFitConfig, device: str) -> None:
    """Start the codes from k-means over encoded frames, more of them than a batch has: with fewer frames than codes,
    several codes would start in one place."""
    needed = min(_INIT_FRAMES_PER_CODE * config.codes, windows.ends[-1])
    encoded, count, number = [], 0, 0
    while count < needed:
        batch, mask = windows.batch("first codes", number, count=config.batch)
        encoded.append(codec.encode(batch.to(device), mask.to(device))[mask[:, :: config.stride].to(device)])
        count, number = count + len(encoded[-1]), number + 1
    codec.quantizer._codebook.init_embed_(torch.cat(encoded)[None].float())


def _usage(counts: torch.Tensor) -> tuple[float, float]:
    """Return the perplexity of the codes, and the share of them that occur."""
    share = counts / counts.sum()
    return float(torch.exp(torch.special.entr(share).sum())), float((counts > 0).float().mean())


@torch.no_grad()
def lost_variance(codec: FrameCodec, frames: FitFrames, config: VqFitConfig, device: str) -> dict:
    """Return the share of the held-out frames' variance that is lost by the quantiser (`vq`) and by k-means with as
    many codes (`kmeans`), the number of `frames`, and `perplexity` and share (`used`) of the codes there."""
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
    """Load a state that _save_state wrote. Returns the number of steps done."""
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
