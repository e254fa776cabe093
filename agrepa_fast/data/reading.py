"""Clips out of WebDataset shards: every member checked against what index.json says, no pickle, no path."""

import io
import json
import tarfile
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import numpy as np

from ..config import UserError
from .shards import Index, Sample, Shard, remedy


def read_shard(shard: Shard, index: Index) -> list[Sample]:
    """All clips of a shard, in its order. UserError, naming shard and member, for anything that is not as written."""
    samples = [_sample(raw, shard, index) for raw in _with_sidecar(shard, index)]
    if len(samples) != shard.clips:
        raise UserError(f"{shard.path} holds {len(samples)} clips, not {shard.clips}: {remedy(index.folder)}")
    return samples


def _with_sidecar(shard: Shard, index: Index) -> Iterator[dict]:
    """The raw samples of a shard, joined with the targets beside it where its teacher was added later."""
    sidecar = index.teacher(shard.domain).files.get(shard.path.name)
    if sidecar is None:
        yield from raw_samples(shard.path)
        return
    path = shard.path.with_name(sidecar)
    for raw, target in zip_longest(raw_samples(shard.path), raw_samples(path), fillvalue={"__key__": None}):
        if raw["__key__"] != target["__key__"]:
            raise UserError(
                f"{path} has clip {target['__key__']} where {shard.path.name} has {raw['__key__']}: add it again"
            )
        yield target | raw


def raw_samples(path: Path) -> Iterator[dict]:
    """WebDataset's samples of one tar: {"__key__": …, "mel.npy": bytes, …}."""
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    def refuse(error: Exception) -> bool:
        what = str(error).partition(" @ ")[0]  # WebDataset appends the stream's repr
        raise UserError(f"{path}: {what}: {remedy(path.parent)}") from error

    def files(stream) -> Iterator[dict]:
        for member in tar_file_iterator(stream, handler=refuse):
            name = member["fname"]
            # Members are files of one flat folder: no "/", hence nothing absolute and no parent folder.
            if "/" in name or "\\" in name or name.startswith("."):
                raise UserError(f"{path}: member {name!r} has a path: {remedy(path.parent)}")
            yield {**member, "__url__": str(path)}

    try:
        with path.open("rb") as stream:
            yield from group_by_keys(files(stream), handler=refuse, lcase=False)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): {remedy(path.parent)}") from error


def _sample(raw: dict, shard: Shard, index: Index) -> Sample:
    key, teacher = raw["__key__"], index.teacher(shard.domain)
    member = f"{key}.json"

    def check(right: bool, what: str) -> None:
        if not right:
            raise UserError(f"{shard.path}: {member}: {what}: {remedy(index.folder)}")

    def array(suffix: str) -> np.ndarray:
        nonlocal member
        member = f"{key}.{suffix}"
        value = np.load(io.BytesIO(raw[suffix]), allow_pickle=False)
        if not isinstance(value, np.ndarray):  # of a zip file it makes an archive
            raise ValueError("no array")
        return value

    try:
        meta = json.loads(raw["json"])
        frames, first, end = meta["frames"], *index.token_range(shard.domain)
        mel = array("mel.npy")
        shape = (frames, index.n_mels)
        check(mel.dtype == np.float16 and mel.shape == shape, f"{mel.dtype} {mel.shape} is not float16 {shape}")
        check(bool(np.isfinite(mel).all()), "not finite")
        tokens = array("tokens.npy")
        check(tokens.dtype == np.int32 and tokens.ndim == 1 and len(tokens) > 0, "not a row of int32 ids")
        check(first <= tokens.min() and tokens.max() < end, f"ids outside {first} to {end - 1}")
        extra = None
        if index.extra_vocab is not None:
            extra = array("tokens2.npy")
            check(extra.dtype == np.int32 and extra.shape == tokens.shape, f"not {len(tokens)} int32 ids, as tokens")
            check(extra.min() >= 0 and extra.max() < index.extra_vocab, f"ids outside 0 to {index.extra_vocab - 1}")
        vector = array(f"{teacher.name}.npy")
        check(vector.dtype == np.float16 and vector.shape[-1:] == (teacher.dim,), f"not float16 of {teacher.dim}")
        pooled, many = teacher.rate is None, vector.ndim == 2 and len(vector) > 0
        check(vector.ndim == 1 if pooled else many, f"{vector.shape} is not {'one vector' if pooled else 'frames'}")
        check(bool(np.isfinite(vector).all()), "not finite")
        check(meta["domain"] == shard.domain, f"domain {meta['domain']!r} in a shard of {shard.domain}")
        described = {name: meta[name] for name in ("domain", "text", "frames", "seconds", "cut", "source", "licence")}
        arrays = {"mel": mel, "tokens": tokens, "tokens2": extra, "teacher": vector}
        return Sample(key=key, labels=tuple(meta["labels"]), **arrays, **described)
    except KeyError as error:
        raise UserError(f"{shard.path}: {key} lacks {error}: {remedy(index.folder)}") from error
    except (ValueError, EOFError, TypeError) as error:
        raise UserError(f"{shard.path}: {member} is damaged ({error}): {remedy(index.folder)}") from error
