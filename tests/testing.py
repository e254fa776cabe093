"""What several tests share: small models, batches and shards in the real format, and comparisons of runs."""

import csv
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from agrepa_fast.config import DataConfig, ModelConfig
from agrepa_fast.data.index import SCHEMA, write_index
from agrepa_fast.data.samples import Sample
from agrepa_fast.data.writing import write_shard
from agrepa_fast.data_config import ShardConfig
from agrepa_fast.files import file_sha256, write_atomically
from agrepa_fast.models.audio_dit.dit import AudioDiT
from agrepa_fast.models.condition import Condition
from agrepa_fast.settings import setting_names
from agrepa_fast.tokenizers.code_mels import codebook_bytes
from agrepa_fast.tokenizers.kmeans import Codebook

FRAMES, MEL_BINS, VOCAB = 37, 12, 30  # of the small model and batch
CLOCK = [f"train/{name}" for name in ("clips_per_s", "frames_per_s", "data_wait", "mfu", "peak_memory_gib")]
N_MELS, CODES, EXTRA_CODES, SPEAKER_DIM, TEACHER_DIMS = 8, 6, 9, 3, {"speech": 5, "audio": 7}

PRESET = """
model: {dim: 32, depth: 4, heads: 2, position: rotary_conv, time_scale: 1000.0, token_dim: 16, token_scale: 4.0}
data: {path: %s, sample_rate: 16000, n_mels: 8, f_max: 8000.0, codebook: 6, extra_tokens: null}
align: {k: 2}
flow: {steps: 4}
probe: {start_step: 1, every: 1, warmup_steps: 2, clips: 3, storage_clips: 8, times: [0.3, 0.7], chunk: 2}
train: {steps: 5, batch_clips: 8, lr: 2.0e-3, warmup_steps: 2, log_every: 1, val_every: 5, save_every: 100}
eval: {clips: 3, times: [0.5], vocoder: griffin-lim}
"""


def small_model(depth: int = 4, *, position: str = "rotary_conv", awake: bool = True, **fields) -> AudioDiT:
    """A random AudioDiT; `awake` gives the zero-initialised modulations values, so that every block does something."""
    torch.manual_seed(0)
    config = ModelConfig(
        dim=32,
        depth=depth,
        heads=2,
        position=position,
        token_dim=24,
        token_scale=5.0,
        time_scale=1000.0,
        n_mels=MEL_BINS,
        vocab=VOCAB,
        **fields,
    )
    model = AudioDiT(config)
    if awake:
        for block in model.blocks:
            torch.nn.init.normal_(block.modulation.weight, std=0.2)
            torch.nn.init.normal_(block.modulation.bias, std=0.2)
    return model


def small_batch(lengths: tuple[int, ...] = (37, 20, 11), frames: int = FRAMES, seed: int = 1):
    """(mel (C, T, n_mels), Condition) with random content, references and padding that is zero."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(lengths)
    mask = (torch.arange(frames) < lengths[:, None])[..., None]
    mel = torch.randn(len(lengths), frames, MEL_BINS, generator=draw) * mask
    tokens = torch.randint(0, VOCAB, (len(lengths), 9), generator=draw)
    token_lengths = (lengths * 9 // frames).clamp(min=2)
    reference = mel * (torch.arange(frames) < lengths[:, None] // 4)[..., None]
    return mel, Condition(tokens, token_lengths, reference, lengths)


def write_small_shards(
    folder: Path,
    buckets: tuple[int, ...] = (25,),
    extra: bool = False,
    shard_clips: int = 8,
    texts: bool = False,
    teacher_rate: float | None = None,
    attention: tuple[int, ...] | None = None,
) -> Path:
    """Two domains, 22 training and 5 validation clips each of 9 to 25 frames; returns a preset for them. buckets: the
    bounds, in frames and rising, of what training shards hold. extra: with second tokens, topology B. texts: 14 + 4
    clips of speech have a transcript of their own, 5 + 1 that of a longer recording; all have a speaker's vector.
    teacher_rate: of the teacher's frames; None: its targets are vectors. attention: (layers, 2, heads, width) of the
    queries and keys stored with its frames."""
    folder.mkdir(parents=True)
    draw, extra_draw = np.random.default_rng(0), np.random.default_rng(1)
    settings = asdict(DataConfig(sample_rate=16000, n_mels=8, f_max=8000.0, codebook=CODES))
    if extra:
        settings |= {"extra_tokens": "vq:none", "extra_codebook": EXTRA_CODES}
    if texts:
        settings["speaker"] = "campplus:none"
    features = {name: settings[name] for name in setting_names(ShardConfig)}
    content = {"schema": SCHEMA, "features": features, "domains": {}, "shards": []}
    for number, (domain, dim) in enumerate(TEACHER_DIMS.items()):
        train = [_sample(draw, domain, dim, number * CODES, i) for i in range(22)]
        val = [_sample(draw, domain, dim, number * CODES, 100 + i) for i in range(5)]
        for sample in (*train, *val) if extra else ():
            sample.tokens2 = extra_draw.integers(0, EXTRA_CODES, len(sample.tokens)).astype(np.int32)
        for sample in (*train, *val) if teacher_rate else ():
            count = max(1, round(sample.seconds * teacher_rate))
            sample.teacher = (sample.teacher + extra_draw.normal(size=(count, dim))).astype(np.float16)
            if attention:
                sample.attention = extra_draw.normal(size=(count, *attention)).astype(np.float16)
        for place, sample in enumerate((*train, *val)) if texts and domain == "speech" else ():
            sample.cut, sample.text = place % 4 == 3, "" if place % 8 == 5 else f"say {place}"
        for sample in (*train, *val) if texts else ():
            sample.speaker = extra_draw.normal(size=SPEAKER_DIM).astype(np.float32)
        below, parts = 0, [(buckets[-1], "val", val)]
        for bound in buckets:
            parts.append((bound, "train", [s for s in train if below < s.frames <= bound]))
            below = bound
        for bound, split, samples in parts:
            written = sum((entry["split"], entry["domain"]) == (split, domain) for entry in content["shards"])
            for start in range(0, len(samples), shard_clips):
                path = folder / f"{split}-{domain}-{written + start // shard_clips:04d}.tar"
                entry = write_shard(path, samples[start : start + shard_clips], f"teacher_{domain}")
                content["shards"].append(entry | {"split": split, "domain": domain, "bucket": bound})
        mels = np.concatenate([sample.mel for sample in train]).astype(np.float64)
        book = folder / f"codebook-{domain}.safetensors"
        codebook = Codebook(draw.normal(size=(CODES, dim)).astype(np.float32))
        write_atomically(book, codebook_bytes(codebook, draw.normal(size=(CODES, N_MELS)).astype(np.float32)))
        content["domains"][domain] = {
            "mel": {"frames": len(mels), "sum": mels.sum(), "sum_squares": (mels**2).sum()},
            "tokens": {
                "kind": "kmeans",
                "spec": "kmeans",
                "offset": number * CODES,
                "vocab": CODES,
                "file": book.name,
                "bytes": book.stat().st_size,
                "sha256": file_sha256(book),
            },
            **({"speaker": {"dim": SPEAKER_DIM, "identity": {}, "files": None}} if texts else {}),
            "teachers": {
                f"teacher_{domain}": {
                    "spec": DataConfig().speech_teacher,
                    "dim": dim,
                    "rate": teacher_rate,
                    **({"attention": list(attention)} if attention else {}),
                    "identity": {},
                    "mean": np.mean([s.pooled for s in train], axis=0).tolist(),
                    "files": None,
                }
            },
        }
    write_index(folder, content)
    preset = folder / "preset.yaml"
    values = PRESET % folder
    if extra:
        values = values.replace("extra_tokens: null", f"extra_tokens: vq:none, extra_codebook: {EXTRA_CODES}")
        values = values.replace("token_dim: 16", f"token_dim: 16, extra_vocab: {EXTRA_CODES}")
    preset.write_text(values)
    return preset


def _sample(draw: np.random.Generator, domain: str, dim: int, first_token: int, number: int) -> Sample:
    frames, tokens = int(draw.integers(9, 26)), int(draw.integers(4, 9))
    return Sample(
        key=f"{domain}{number:04d}",
        domain=domain,
        text="",
        labels=(),
        frames=frames,
        seconds=frames * 0.016,
        cut=False,
        source="random",
        licence="none",
        mel=(draw.normal(size=(frames, N_MELS)) * 2 - 5).astype(np.float16),
        tokens=draw.integers(first_token, first_token + CODES, tokens).astype(np.int32),
        teacher=draw.normal(size=dim).astype(np.float16),
    )


def write_small_whisper(folder: Path) -> Path:
    """A random Whisper of width 32 and two layers, as transformers saves it."""
    from agrepa_fast.audio.waves import import_torchaudio

    import_torchaudio()  # transformers imports it
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

    torch.manual_seed(0)
    small = {"d_model": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 60}
    layers = {"encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    ids = {"pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
    model = WhisperModel(WhisperConfig(**small, **layers, **ids, suppress_tokens=None, begin_suppress_tokens=None))
    model.save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    return folder


def metrics(run: Path) -> dict[int, dict[str, float]]:
    """step -> all values of metrics.jsonl, but for what the clock and the machine decide."""
    merged: dict[int, dict[str, float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        step = values.pop("step")
        for name in CLOCK:
            values.pop(name, None)
        merged.setdefault(step, {}).update(values)
    return merged


def assert_same_curve(run: Path, other: Path, first_step: int = 0, tolerance: float = 1e-5) -> None:
    a, b = metrics(run), metrics(other)
    assert a.keys() == b.keys()
    for step in (step for step in a if step >= first_step):
        for name in a[step].keys() & b[step].keys():
            if "loss" in name:
                assert a[step][name] == pytest.approx(b[step][name], abs=tolerance), (step, name)
        assert a[step].keys() - {"train/grad_norm"} == b[step].keys() - {"train/grad_norm"}
    averaged = [json.loads((r / "summary.json").read_text())["val/flow_loss"]["ema"] for r in (run, other)]
    assert averaged[0] == pytest.approx(averaged[1], abs=tolerance)
    for left, right in zip(*(attribution(r) for r in (run, other)), strict=True):
        assert left[:5] == right[:5]
        assert left[5] == pytest.approx(right[5], abs=tolerance), left


def attribution(run: Path) -> list[tuple]:
    with (run / "attribution.csv").open() as file:
        rows = csv.DictReader(file)
        return [(r["step"], r["measure"], r["domain"], r["layer"], r["t"], float(r["score"])) for r in rows]


class Operations(TorchDispatchMode):
    """Names of the operations inside, and of the types of their results."""

    def __init__(self):
        super().__init__()
        self.names, self.types = [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(str(function))
        self.types |= {part.dtype for part in torch.utils._pytree.tree_leaves(result) if isinstance(part, torch.Tensor)}
        return result
