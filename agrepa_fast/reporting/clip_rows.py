"""Clips of a report: the same clip in several versions, each with its sound and its picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..audio.waves import decode, wave_fault
from ..errors import UserError
from .page.document import Clip, Version
from .page.media import log_mel, mel_uri, mp3_uri

BUDGET = 11_000_000  # bytes of a page's clips; the rest of it has room below the limit of 15 MB


class Recorded(NamedTuple):
    """A clip of a report. files: name of the version -> its recording; the first gives the colours of all pictures.
    notes: name -> figures of that version."""

    name: str
    files: Mapping[str, Path]
    text: str = ""
    notes: Mapping[str, Sequence[str]] = {}


def clips_within_budget(recorded: Sequence[Recorded], most: int) -> list[Clip]:
    """Return the first clips, at most `most`, and no more than a page has room for; but at least one."""
    clips, size = [], 0
    for one in recorded[:most]:
        clip = _clip(one)
        size += sum(len(version.audio) + len(version.mel) for version in clip.versions)
        if clips and size > BUDGET:
            break
        clips.append(clip)
    return clips


def count_shown(clips: Sequence[Clip], recorded: Sequence[Recorded]) -> str:
    """Return a sentence if a page does not show all clips."""
    return "" if len(clips) == len(recorded) else f" The first {len(clips)} of {len(recorded)}."


def _clip(recorded: Recorded) -> Clip:
    versions, faults, scale = [], [], None
    for name, path in recorded.files.items():
        try:
            wave, rate = decode(path, path.name)
        except UserError as error:
            faults.append(f"{name}: {error}")
            continue
        if fault := wave_fault(wave) if len(wave) else "it is empty":
            faults.append(f"{name}: {path.name}: {fault}")
            continue
        mel = log_mel(wave, rate)
        scale = mel if scale is None else scale
        notes = recorded.notes.get(name, ())
        versions.append(Version(name, mp3_uri(wave, rate), mel_uri(mel, scale), len(wave) / rate, notes))
    return Clip(recorded.name, versions, recorded.text, faults)
