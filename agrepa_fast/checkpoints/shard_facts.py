"""The shards of a run, as its checkpoints record them."""

import hashlib
import json

from ..data.index import SPLITS, Index


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
