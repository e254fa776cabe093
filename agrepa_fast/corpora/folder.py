"""Recordings in a folder of audio files."""

import os
from pathlib import Path

from ..audio.waves import SOUNDFILE_SUFFIXES
from ..errors import UserError
from .recordings import Recording, Source, check_domain, key_of, printable, read_text, transcript_lines


def folder_source(path: Path, domain: str) -> Source:
    """The recordings below a folder; see folder_recordings."""
    check_domain(domain)
    return Source.of(str(path), domain, folder_recordings(path, domain))


def folder_recordings(path: Path, domain: str) -> list[Recording]:
    """Every wav, flac, mp3, ogg and opus file below `path`, sorted by relative path.

    Transcripts: `<name>.txt` beside the file, else LibriSpeech's `*.trans.txt` of its folder. Labels of general audio
    are the names of the folders above the file. Raises UserError when the folder is missing or holds no recordings.
    """
    if not path.is_dir():
        raise UserError(f"{path} is no folder: give one that holds recordings ({_suffixes()})")
    recordings = []
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        audio = [f for f in sorted(files) if Path(f).suffix.lower() in SOUNDFILE_SUFFIXES and not f.startswith(".")]
        audio = [f for f in audio if Path(folder, f).exists()]  # not links to nowhere
        lines = _folder_transcripts(Path(folder), files) if audio else {}
        recordings += [_file_recording(path, Path(folder, file), domain, lines) for file in audio]
    if not recordings:
        raise UserError(f"{path} holds no recordings: {_suffixes()} are looked for in it and its subfolders")
    return sorted(recordings, key=lambda recording: recording.source)


def _suffixes() -> str:
    return ", ".join(SOUNDFILE_SUFFIXES)


def _file_recording(root: Path, path: Path, domain: str, lines: dict[str, str]) -> Recording:
    inside = path.relative_to(root)
    transcript = path.with_suffix(".txt")
    text = read_text(transcript) if transcript.is_file() else lines.get(path.stem, "")
    labels = inside.parent.parts if domain == "audio" else ()
    source = printable(inside.as_posix())
    name, text = key_of(inside.as_posix()), " ".join(text.split())
    return Recording(name, str(path), domain, text, labels, source, "unknown", path.suffix[1:].lower())


def _folder_transcripts(folder: Path, files: list[str]) -> dict[str, str]:
    """LibriSpeech's transcripts of one folder."""
    return {
        name: text for f in files if f.endswith(".trans.txt") for name, text in transcript_lines(folder / f).items()
    }
