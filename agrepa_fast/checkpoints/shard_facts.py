"""The shards of a run, as its checkpoints record them."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from ..data.index import SPLITS, Index
from ..errors import UserError
from ..files import read_json
from .find import EXPORT, REMEDY


def shard_facts(index: Index) -> dict:
    """Return the features, tokens and teachers that a run trains on. Further teachers of the shards are left out."""
    domains = {}
    for domain in index.domains:
        entry, name = index.content["domains"][domain], index.teacher(domain).name
        teacher = {key: value for key, value in entry["teachers"][name].items() if key != "files"}
        others = {key: value for key, value in entry.items() if key not in ("teachers", "speaker")}
        if index.speaker_dim is not None:
            others["speaker"] = entry["speaker"]["identity"]
        domains[domain] = others | {"teacher": {"name": name} | teacher}
    facts = {"mel": {"mean": index.mel_mean, "std": index.mel_std}, "features": index.features, "domains": domains}
    return facts if index.text is None else facts | {"text": index.text.identity}


def shard_hash(index: Index) -> str:
    """Return a SHA-256 over the checksums of the shards and over their facts: a resume needs the same."""
    files = [(shard["file"], shard["sha256"]) for shard in index.content["shards"]]
    for shard in (shard for domain in index.domains for split in SPLITS for shard in index.shards(split, domain)):
        files += [(sidecar["file"], sidecar["sha256"]) for sidecar in index.sidecars(shard)]
    return hashlib.sha256(json.dumps([files, shard_facts(index)], sort_keys=True).encode()).hexdigest()


def as_trained(index: Index, path: Path) -> Index:
    """Return the index of shards for the model of a checkpoint or an export: its mels are scaled as in training.

    Raises UserError if ids of tokens or of text mean something else in the shards than they did in training.
    """
    try:
        facts = _stored_facts(path)
        if facts is None:
            return index
        _check_ids(index, facts, path)
        return replace(index, trained=(float(facts["mel"]["mean"]), float(facts["mel"]["std"])))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: what it says of its shards is damaged ({error!r}): {REMEDY}") from error


def _check_ids(index: Index, facts: dict, path: Path) -> None:
    for domain in index.domains:
        now, then = index.content["domains"][domain], facts["domains"].get(domain, {})
        for role in ("tokens", "tokens2"):
            if role not in now or role not in then:
                continue
            # The file of a codebook also holds mels of the recordings; the ids of k-means are its own.
            parts = ("kind", "identity", "sha256") if now[role]["kind"] == "kmeans" else ("kind", "identity")
            if any(now[role].get(part) != then[role].get(part) for part in parts):
                raise UserError(
                    f"{index.folder}: its {domain} {role} are other ids than those that {path} was trained with: take "
                    "the shards of its training, or a tokenizer that is not fitted anew"
                )
    if index.text is not None and facts.get("text", index.text.identity) != index.text.identity:
        raise UserError(f"data.text={index.text.spec} has other ids than those that {path} was trained with")


def _stored_facts(path: Path) -> dict | None:
    """Return the facts that a checkpoint or an export was written with, None if it has none."""
    if (path / EXPORT).is_file():
        return read_json(path / EXPORT, REMEDY).get("shards")
    file = path / "shards.json"
    return read_json(file, REMEDY) if file.is_file() else None
