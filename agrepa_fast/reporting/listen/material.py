"""The recordings of a listening test: of each system and of the truth, in folders with equal file names."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...audio.waves import SOUNDFILE_SUFFIXES, decode
from ...errors import UserError
from ...evaluation.stored import read_clips
from ...files import file_sha256

TRUTH, ANCHOR = "truth", "anchor"  # the hidden reference, and the truth without its high frequencies


class Material(NamedTuple):
    """systems: name -> (clip -> recording), in the user's order; truth: clip -> recording; domains: clip -> its domain,
    "" where it is unknown."""

    systems: dict[str, dict[str, Path]]
    truth: dict[str, Path]
    domains: dict[str, str]


class _System(NamedTuple):
    name: str
    recordings: dict[str, Path]
    truth: dict[str, Path] | None
    domains: dict[str, str]


def read_material(paths: Sequence[Path], truth: Path | None) -> Material:
    """Return the recordings of folders that `agrepa evaluate` wrote, of runs with one such folder, and of plain folders
    of recordings. truth: a folder with the truth of every clip, which plain folders need.

    Raises UserError unless all systems have the same clips, and one truth.
    """
    found = [_read_system(path) for path in paths]
    names = [one.name for one in found]
    taken = {TRUTH, ANCHOR, *(name for name in names if names.count(name) > 1)}
    systems = {}
    for path, one in zip(paths, found, strict=True):
        name = str(path) if one.name in taken else one.name
        if name in systems or name in (TRUTH, ANCHOR):
            raise UserError(
                f"{path}: a system of a test cannot be named twice, nor {TRUTH} or {ANCHOR}: rename the folder"
            )
        systems[name] = one.recordings
    first, *others = systems.items()
    for name, recordings in others:
        if recordings.keys() != first[1].keys():
            only = sorted(recordings.keys() ^ first[1].keys())
            raise UserError(
                f"{first[0]} and {name} have other clips: {len(only)} are in one alone ({', '.join(only[:3])}"
                f"{', …' if len(only) > 3 else ''}); give every system all clips, by equal file names"
            )
    given = [_recordings(truth)] if truth else [one.truth for one in found if one.truth is not None]
    if not given:
        raise UserError(f"{paths[0]} has no truth: name the folder of the real recordings with --truth")
    _check_truths(given, list(first[1]))
    return Material(systems, given[0], {clip: domain for one in found for clip, domain in one.domains.items()})


def _read_system(path: Path) -> _System:
    folder = path
    if not (path / "results.json").is_file() and (path / "config.yaml").is_file():
        evaluated = sorted(found.parent for found in path.glob("evaluate*/results.json"))
        if len(evaluated) != 1:
            names = f" ({', '.join(found.name for found in evaluated)})" if evaluated else ""
            raise UserError(f"{path} has {len(evaluated)} evaluations{names}: run agrepa evaluate, or name one of them")
        folder = evaluated[0]
    if not (folder / "results.json").is_file():
        return _System(path.resolve().name, _recordings(path), None, {})
    if not (folder / "wavs" / "truth").is_dir():
        raise UserError(
            f"{folder} has no truths of its own, as an evaluation of recordings or of a list has none: name the folder "
            "of the samples, and --truth FOLDER"
        )
    truth, samples = (_recordings(folder / "wavs" / row) for row in ("truth", "sample"))
    drawn_first = {clip: file for clip, file in samples.items() if clip in truth}
    domains = {row["key"]: row["domain"] for row in read_clips(folder / "clips.csv")}
    run = folder.resolve().parent if folder.name.startswith("evaluate") else folder.resolve()
    return _System(run.name, drawn_first, truth, domains)


def _recordings(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of recordings")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SOUNDFILE_SUFFIXES)
    if not files:
        raise UserError(f"{folder} holds no recordings ({', '.join(SOUNDFILE_SUFFIXES)})")
    recordings = {path.stem: path for path in files}
    if len(recordings) < len(files):
        raise UserError(f"{folder} has several recordings of one name: keep one of each")
    return recordings


def _same_sound(one: Path, other: Path) -> bool:
    """Return whether two files hold the same samples; headers may differ, by their dates for one."""
    if file_sha256(one) == file_sha256(other):
        return True
    (wave, rate), (other_wave, other_rate) = decode(one, str(one)), decode(other, str(other))
    return rate == other_rate and np.array_equal(wave, other_wave)


def _check_truths(truths: Sequence[dict[str, Path]], clips: Sequence[str]) -> None:
    for clip in clips:
        files = [truth.get(clip) for truth in truths]
        if None in files:
            raise UserError(f"the truth of {clip} is missing: every clip of the systems needs one, by its file name")
        if not all(_same_sound(files[0], other) for other in files[1:]):
            raise UserError(
                f"{clip} has another truth in {files[0].parent} than in {files[-1].parent}: evaluate the runs on the "
                "same data with one vocoder, or name one folder with --truth"
            )
