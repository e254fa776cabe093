"""The train and validation splits of a domain. Both depend on the clips alone, not on the ranks that decoded them."""

import hashlib
import math
from functools import partial

from .decode import Clip


def split_clips(clips: list[Clip], val_share: float) -> dict[str, list[Clip]]:
    """Return {"train": …, "val": …}, each in the order of hashed names."""
    held_out = validation_groups(clips, val_share)
    splits = {"train": [], "val": []}
    for clip in sorted(clips, key=lambda clip: name_hash("order", clip.name)):
        splits["val" if clip.recording.split_group in held_out else "train"].append(clip)
    return splits


def validation_groups(clips: list[Clip], share: float) -> set[str]:
    """Return the groups held out: those whose hash is below `share`, and then the next ones until they hold that
    share of the clips."""
    sizes: dict[str, int] = {}
    for clip in clips:
        sizes[clip.recording.split_group] = sizes.get(clip.recording.split_group, 0) + 1
    held_out, count = set(), 0
    for group in sorted(sizes, key=partial(name_hash, "split"))[: len(sizes) - 1]:  # one stays for training
        if name_hash("split", group) / 2**160 >= share and count >= math.ceil(share * len(clips)):
            break
        held_out.add(group)
        count += sizes[group]
    return held_out


def name_hash(salt: str, name: str) -> int:
    """Return 160 bits that place a name in an order, or below a share, that no other name changes."""
    return int.from_bytes(hashlib.sha1(f"{salt}:{name}".encode()).digest(), "big")
