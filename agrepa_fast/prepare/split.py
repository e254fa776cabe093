"""The train and validation splits of a domain. Both depend on the clips alone, not on the ranks that decoded them."""

import hashlib
import math
from collections import Counter
from functools import partial

from .decode import Clip

_MOST = 3  # times the share; a larger group stays for training


def split_clips(clips: list[Clip], val_share: float) -> dict[str, list[Clip]]:
    """Return {"train": …, "val": …}, each in the order of hashed names. The splits share no group, unless all clips
    are of one: then they are split by name."""
    one = only_group(clips)
    group_of = {clip.name: clip.name if one else clip.recording.split_group for clip in clips}
    held_out = validation_groups(Counter(group_of.values()), val_share)
    splits = {"train": [], "val": []}
    for clip in sorted(clips, key=lambda clip: name_hash("order", clip.name)):
        splits["val" if group_of[clip.name] in held_out else "train"].append(clip)
    return splits


def only_group(clips: list[Clip]) -> str | None:
    """Return the group of the clips if it is the same one for all of several clips."""
    groups = {clip.recording.split_group for clip in clips}
    return groups.pop() if len(groups) == 1 < len(clips) else None


def validation_groups(sizes: dict[str, int], share: float) -> set[str]:
    """Return the groups held out: those whose hash is below `share`, and then the next ones until they hold that
    share of the clips. Passes over a group with which they would hold more than three times as much; if all are as
    large, the smallest is held out. sizes: clips by group."""
    wanted, held_out, count = math.ceil(share * sum(sizes.values())), set(), 0
    groups = sorted(sizes, key=partial(name_hash, "split"))
    for group in groups:
        enough = name_hash("split", group) / 2**160 >= share and count >= wanted
        if enough or len(held_out) == len(groups) - 1:  # one stays for training
            break
        if count + sizes[group] <= _MOST * wanted:
            held_out.add(group)
            count += sizes[group]
    return held_out or set(sorted(groups, key=sizes.__getitem__)[: len(groups) > 1])


def name_hash(salt: str, name: str) -> int:
    """Return 160 bits that place a name in an order, or below a share, that no other name changes."""
    return int.from_bytes(hashlib.sha1(f"{salt}:{name}".encode()).digest(), "big")
