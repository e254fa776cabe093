"""Clips with a transcript of their own: models that take text train on them. The transcript of a clip that is a part of
its recording is that of the whole recording, and most general audio has none."""

from collections.abc import Iterable, Mapping


def transcribed(described: Iterable[Mapping]) -> dict:
    """Return the facts of a shard for index.json, from the `<key>.json` of its clips, in their order: `frames`,
    the mel frames of the clips with a transcript of their own, and `mask`, a hexadecimal number whose bit n is 1 if
    clip n is one of them."""
    mask = frames = 0
    for place, clip in enumerate(described):
        if clip["text"].strip() and not clip["cut"]:
            mask, frames = mask | 1 << place, frames + clip["frames"]
    return {"frames": frames, "mask": f"{mask:x}"}


def without_transcript(entry: Mapping) -> frozenset[int]:
    """Return the places of the clips without a transcript of their own, from a shard's entry in index.json."""
    mask = int(entry["transcribed"]["mask"], 16)
    return frozenset(place for place in range(entry["clips"]) if not mask >> place & 1)
