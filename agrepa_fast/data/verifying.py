"""`agrepa prepare --verify`: compare everything in index.json with the files of its folder."""

import math
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..errors import UserError
from ..ranks import ALONE, Ranks
from .index import SPLITS, Index, Shard, file_fault, index_files, read_index
from .reading import read_shard
from .samples import Sample
from .transcribed import transcribed

MAX_LINES = 20
_CLOSE = 1e-6  # relative: sums of the same numbers in another order


@dataclass
class _Findings:
    """Faults, keys and counts of the part that one rank has read, and the sums that the index's statistics rest on."""

    faults: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)  # files whose size or checksum differs from the index
    keys: Counter = field(default_factory=Counter)
    clips: Counter = field(default_factory=Counter)  # (domain, split)
    mel: dict[str, np.ndarray] = field(default_factory=dict)  # domain -> frames, sum, sum of squares of the train mels
    teacher: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)  # sums of the train clips' pooled vectors


def verify_folder(folder: Path, ranks: Ranks = ALONE) -> Index:
    """Read all of a folder of shards and return its index. Each rank reads its part.

    Checked are size and SHA-256 of every file, every clip with the targets of every teacher, counts, statistics, length
    buckets, and that no key occurs twice. Prints the first 20 faults and raises UserError if there are any.
    """
    index = ranks.from_rank_0(lambda: read_index(Path(folder)))
    files, findings = ranks.part_of(index_files(index.content)), _Findings()
    shards = [(split, shard) for domain in index.domains for split in SPLITS for shard in index.shards(split, domain)]
    total = sum(entry["bytes"] for entry in files)
    part = f", rank 0 of {ranks.world}" if ranks.world > 1 else ""
    with tqdm(total=total, desc=f"checksums{part}", unit="B", unit_scale=True, disable=ranks.rank > 0) as bar:
        for entry in files:
            if fault := file_fault(index.folder, entry, checksum=True):
                findings.faults.append(fault)
                findings.damaged.append(entry["file"])
            bar.update(entry["bytes"])
            ranks.check_others()
    damaged = {file for files in ranks.all_gather(findings.damaged) for file in files}  # one line per file is enough
    own, entries = ranks.part_of(shards), {entry["file"]: entry for entry in index.content["shards"]}
    with tqdm(total=sum(s.clips for _, s in own), desc=f"clips{part}", unit="clip", disable=ranks.rank > 0) as bar:
        for split, shard in own:
            if shard.path.name not in damaged:
                _read(index, split, shard, entries[shard.path.name], findings, damaged)
            bar.update(shard.clips)
            ranks.check_others()
    every = ranks.all_gather(findings)
    faults = [fault for one in every for fault in one.faults]
    if not faults:  # the sums lack clips that could not be read
        faults = _check_sums(index, every)
    if ranks.rank == 0:
        for fault in faults[:MAX_LINES]:
            print(fault, file=sys.stderr)
        if len(faults) > MAX_LINES:
            print(f"and {len(faults) - MAX_LINES} more", file=sys.stderr)
    if faults:
        count = f"{len(faults)} fault{'s' * (len(faults) > 1)}"
        raise UserError(f"{folder} has {count}: prepare the recordings again, into another folder or after removing it")
    return index


def _read(index: Index, split: str, shard: Shard, entry: dict, findings: _Findings, damaged: set[str]) -> None:
    """Read a shard once per teacher of its domain: reading checks every clip, and that sidecars are in its order.
    entry: the shard's in index.json."""
    domain, samples = shard.domain, None
    for name, teacher in index.content["domains"][domain]["teachers"].items():
        sidecar = (teacher["files"] or {}).get(shard.path.name)
        as_chosen = replace(index, chosen={domain: name})
        if any(beside["file"] in damaged for beside in as_chosen.sidecars(shard)):
            continue
        if teacher["files"] is not None and sidecar is None:
            findings.faults.append(f"{shard.path}: index.json names no sidecar of it for teacher {name}")
            continue
        try:
            read = read_shard(shard, as_chosen)
        except UserError as error:
            findings.faults.append(str(error))
            continue
        if samples is None:
            samples = read
            _count(split, shard, entry, samples, findings)
        if split == "train":
            total = findings.teacher.setdefault((domain, name), np.zeros(teacher["dim"]))
            total += sum(sample.pooled.astype(np.float64) for sample in read)


def _count(split: str, shard: Shard, entry: dict, samples: list[Sample], findings: _Findings) -> None:
    frames = sum(sample.frames for sample in samples)
    said = entry.get("transcribed")  # version 0.1 does not say it
    if said not in (None, transcribed(vars(sample) for sample in samples)):
        findings.faults.append(f"{shard.path} has transcripts in other clips than index.json says")
    if frames != shard.frames:
        findings.faults.append(f"{shard.path} has {frames} mel frames, not {shard.frames}")
    findings.keys.update(sample.key for sample in samples)
    findings.clips[shard.domain, split] += len(samples)
    if split == "train":
        sums = findings.mel.setdefault(shard.domain, np.zeros(3))
        for sample in samples:
            mel = sample.mel.astype(np.float64)
            sums += len(mel), mel.sum(), (mel**2).sum()


def _check_sums(index: Index, every: list[_Findings]) -> list[str]:
    """Return the faults of the index's counts and statistics, compared with the sums of all ranks."""
    faults = []
    keys = sum((one.keys for one in every), Counter())
    faults += [f"{index.folder}: clip {key} is there {times} times" for key, times in keys.items() if times > 1]
    for domain in index.domains:
        entry = index.content["domains"][domain]
        for split in SPLITS:
            clips = sum(one.clips[domain, split] for one in every)
            if clips != entry["clips"][split]:
                faults.append(f"{index.folder}: {clips} {domain} clips of {split}, not {entry['clips'][split]}")
        sums = sum(one.mel.get(domain, np.zeros(3)) for one in every)
        for name, value in zip(("frames", "sum", "sum_squares"), sums.tolist(), strict=True):
            if not math.isclose(value, entry["mel"][name], rel_tol=_CLOSE):
                faults.append(f"{index.folder}: {domain} mel {name} is {value}, not {entry['mel'][name]}")
        for name, teacher in entry["teachers"].items():
            total = sum(one.teacher.get((domain, name), 0.0) for one in every)
            if not np.allclose(total / entry["clips"]["train"], teacher["mean"], rtol=1e-5, atol=1e-6):
                faults.append(f"{index.folder}: the mean of {domain}'s teacher {name} differs")
    return faults
