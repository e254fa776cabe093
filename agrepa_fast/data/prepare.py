"""`agrepa prepare`: recordings -> log-mel, tokens and teacher vectors -> WebDataset shards with index.json.

Stages per domain: decode (cut once to data.max_seconds, resample, mel), teacher, tokens, shards. Results of each clip
wait in <out>/.work, written atomically, so an interrupted run goes on where it stopped and ends with the same bytes.
index.json is written last, and .work removed after it.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..config import DOMAINS, Config, DataConfig, UserError
from .clips import NOT_FEATURES, Clip, decode_stage, name_hash, validation_groups
from .encode import TeacherStage
from .features import frame_count
from .recordings import Source
from .shards import INDEX, SCHEMA, SPLITS, Index, Sample, load_index, write_atomically, write_index, write_shard
from .sources import demo_sources, folder_source
from .tokens import Codebook, CodeMels, codebook_bytes


def prepare_demo(config: Config, out: Path) -> Index:
    """Fetch the demo corpus and write it as shards into `out`; see prepare."""
    return _prepare(config.data, Path(out), demo_sources(config.data))


def prepare_folder(config: Config, path: Path, domain: str, out: Path) -> Index:
    """Write the recordings below `path` as shards of `domain` into `out`; see prepare."""
    return prepare(config, folder_source(Path(path), domain), out)


def prepare(config: Config, source: Source, out: Path) -> Index:
    """Write a source's recordings as shards into `out`, beside those of the other domain if any.

    Does nothing when that has been done. Raises UserError, in one line with the remedy, for too many bad recordings,
    too few for the codebook, and an `out` of other settings or other recordings.
    """
    return _prepare(config.data, Path(out), [source])


def _prepare(data: DataConfig, out: Path, sources: list[Source]) -> Index:
    content = _existing(data, out, sources)
    if all(source.domain in content["domains"] for source in sources):
        print(f"{out}: prepared before with the same settings, nothing to do")
        return load_index(out, verify=False)
    work = out / ".work"
    with _only_writer(out, work):
        content = _existing(data, out, sources)  # another process may have finished meanwhile
        teacher_of = cache(_load_teacher)
        for source in sources:
            if source.domain not in content["domains"]:
                entry, shards = _prepare_domain(data, out, work, source, teacher_of)
                content["domains"][source.domain] = entry
                content["shards"] += shards
        content["domains"] = {d: content["domains"][d] for d in DOMAINS if d in content["domains"]}
        content["shards"].sort(key=lambda shard: (DOMAINS.index(shard["domain"]), shard["split"], shard["file"]))
        write_index(out, content)
        shutil.rmtree(work)
    return load_index(out, verify=False)


def _existing(data: DataConfig, out: Path, sources: list[Source]) -> dict:
    """The content of out's index, or an empty one. UserError when its settings or recordings are others."""
    settings = {name: value for name, value in asdict(data).items() if name not in NOT_FEATURES}
    if not (out / INDEX).is_file():
        return {"schema": SCHEMA, "features": settings, "domains": {}, "shards": []}
    content = load_index(out, verify=False).content
    for name, value in settings.items():
        _same_setting(out, name, content["features"].get(name), value)
    for source in sources:
        there = content["domains"].get(source.domain)
        if there is None:
            continue
        name = f"{source.domain}_teacher"
        _same_setting(out, name, next(iter(there["teachers"].values()))["spec"], getattr(data, name))
        if there["recordings"]["identity"] != source.identity:
            changed = "changed since" if there["recordings"]["name"] == source.name else f"are not {source.name}'s"
            raise UserError(
                f"{out} holds {source.domain} recordings of {there['recordings']['name']}, which {changed}: "
                f"choose another --out, or remove {out}"
            )
    return content


def _same_setting(out: Path, name: str, there: object, wanted: object) -> None:
    if there != wanted:
        raise UserError(
            f"{out} was prepared with data.{name}={there}, not {wanted}: choose another --out, or remove {out}"
        )


@contextmanager
def _only_writer(out: Path, work: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    try:
        work.mkdir(parents=True, exist_ok=True)
        with FileLock(work / "lock", timeout=0):
            yield
    except Timeout as error:
        raise UserError(f"{out}: another `agrepa prepare` is writing there: wait for it") from error
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another --out") from error


def _load_teacher(spec: str):
    import torch

    from ..teachers import load_teacher

    return load_teacher(spec, "cuda" if torch.cuda.is_available() else "cpu")


def _prepare_domain(
    data: DataConfig, out: Path, work: Path, source: Source, teacher_of: Callable
) -> tuple[dict, list[dict]]:
    """All stages of one domain. Returns its entry in the index, and its shards'."""
    recordings = source.recordings()
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        clips, skipped = decode_stage(data, work, source.domain, recordings, pool)
        held_out = validation_groups(clips, data.val_share)
        splits = {"train": [], "val": []}
        for clip in sorted(clips, key=lambda clip: name_hash("order", clip.recording.name)):
            splits["val" if clip.recording.split_group in held_out else "train"].append(clip)
        teacher = teacher_of(getattr(data, f"{source.domain}_teacher"))
        stage = TeacherStage(data, work, source.domain, teacher, splits, pool)
        codebook = stage.run()
    entry, shards = _write_stage(data, out, source.domain, splits, stage, codebook)
    entry["recordings"] = {"name": source.name, "identity": source.identity}
    entry["skipped"] = skipped
    return entry, shards


def _write_stage(
    data: DataConfig, out: Path, domain: str, splits: dict, stage: TeacherStage, codebook: Codebook
) -> tuple[dict, list[dict]]:
    offset, teacher = DOMAINS.index(domain) * data.codebook, stage.teacher
    mels, values, pooled_sum = CodeMels(data.codebook, data.n_mels), np.zeros(3), np.zeros(teacher.dim)
    seconds = dict.fromkeys(SPLITS, 0.0)
    longest = frame_count(round(data.max_seconds * data.sample_rate), data)
    shards = []

    def samples(split: str, clips: list[Clip]) -> Iterator[Sample]:
        for clip in clips:
            tokens, pooled = stage.tokens_and_pooled(clip)
            sample = _sample(clip, tokens + np.int32(offset), pooled)
            seconds[split] += sample.seconds
            if split == "train":
                mel = sample.mel.astype(np.float64)
                values[:] += len(mel), mel.sum(), (mel**2).sum()
                pooled_sum[:] += pooled
                mels.add(tokens, sample.mel)
            bar.update()
            yield sample

    with tqdm(total=sum(map(len, splits.values())), desc=f"{domain}: shards", unit="clip") as bar:
        for split, clips in splits.items():
            for number, start in enumerate(range(0, len(clips), data.shard_clips)):
                path = out / f"{split}-{domain}-{number:04d}.tar"
                written = write_shard(path, samples(split, clips[start : start + data.shard_clips]), teacher.name)
                shards.append({**written, "split": split, "domain": domain, "bucket": longest})
    _remove_stale(out, domain, {shard["file"] for shard in shards})
    content = codebook_bytes(codebook, mels.means())
    file = out / f"codebook-{domain}.safetensors"
    write_atomically(file, content)
    tokens = {"kind": "kmeans", "vocab": data.codebook, "offset": offset, "rate": teacher.rate, "teacher": teacher.name}
    tokens |= {"file": file.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    mean = (pooled_sum / len(splits["train"])).tolist()
    entry = {
        "clips": {split: len(clips) for split, clips in splits.items()},
        "seconds": {split: round(total, 3) for split, total in seconds.items()},
        "mel": {"frames": int(values[0]), "sum": values[1], "sum_squares": values[2]},
        "tokens": tokens,
        "teachers": {
            teacher.name: {
                "spec": getattr(data, f"{domain}_teacher"),
                "dim": teacher.dim,
                "rate": None,
                "identity": teacher.identity,
                "mean": mean,
                "files": None,
            }
        },
    }
    return entry, shards


def _sample(clip: Clip, tokens: np.ndarray, pooled: np.ndarray) -> Sample:
    recording = clip.recording
    with np.load(clip.file, allow_pickle=False) as stored:
        mel, seconds, cut = stored["mel"], round(float(stored["seconds"]), 4), bool(stored["cut"])
    described = {name: getattr(recording, name) for name in ("domain", "text", "labels", "source", "licence")}
    return Sample(
        key=recording.name,
        frames=len(mel),
        seconds=seconds,
        cut=cut,
        mel=mel,
        tokens=tokens,
        teacher=pooled,
        **described,
    )


def _remove_stale(out: Path, domain: str, keep: set[str]) -> None:
    """Shards that an interrupted run with other settings left: no index names them."""
    pattern = re.compile(rf"\.?({'|'.join(SPLITS)})-{domain}-\d{{4,}}\.tar(\.part)?")
    for path in out.iterdir():
        if pattern.fullmatch(path.name) and path.name not in keep:
            path.unlink()
