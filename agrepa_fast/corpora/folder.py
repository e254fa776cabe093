"""Recordings in a folder of audio files."""

from pathlib import Path

from ..audio.waves import AUDIO_SUFFIXES
from ..errors import UserError
from .descriptions import MAX_DESCRIPTION
from .recordings import (
    PassedOver,
    Recording,
    Source,
    check_domain,
    count_kinds,
    key_of_path,
    printable,
    read_text,
    read_transcripts,
)
from .walk import Walk


def folder_source(path: Path, domain: str) -> Source:
    """Return the recordings below a folder as a source; see list_folder."""
    check_domain(domain)
    recordings, passed_over = list_folder(path, domain)
    return Source.of(str(path), domain, recordings, passed_over)


def list_folder(path: Path, domain: str) -> tuple[list[Recording], list[PassedOver]]:
    """Return the audio files below `path` and below folders linked there, by relative path, and everything else there.

    Transcripts: `<name>.txt` or `.TXT` beside the file, else LibriSpeech's `*.trans.txt` of its folder; a recording
    whose .txt cannot be read has a problem. Labels of general audio are the names of the folders above the file. Raises
    UserError if the folder is missing or holds no recordings.
    """
    suffixes = ", ".join(AUDIO_SUFFIXES)
    if not path.is_dir():
        raise UserError(f"{path} is no folder: give one that holds recordings ({suffixes})")
    walk, recordings = Walk(path), []
    for name, files in walk.folders():
        stems = {Path(file).stem for file in files if Path(file).suffix.lower() in AUDIO_SUFFIXES}
        # Of a.TXT and a.txt, a.txt is taken.
        texts = {Path(file).stem: file for file in files if Path(file).suffix.lower() == ".txt"}
        texts = {stem: file for stem, file in texts.items() if stem in stems}
        of_many = {file for file in files if stems and file.endswith(".trans.txt")}
        audio = walk.recordings(name, files, of_many.union(texts.values()))
        lines = _transcripts(Path(name), files) if audio else {}
        recordings += [_recording(path, Path(name, file), domain, texts, lines) for file in audio]
    if not recordings:
        seen = count_kinds(entry.kind for entry in walk.passed_over)
        raise UserError(
            f"{path} holds no recordings: {suffixes} are looked for in it and its subfolders, which hold {seen}"
        )
    return sorted(recordings, key=lambda recording: recording.source), walk.passed_over


def _recording(root: Path, path: Path, domain: str, texts: dict[str, str], lines: dict[str, str]) -> Recording:
    inside = path.relative_to(root)
    text, problem = _text(path.with_name(texts.get(path.stem, f"{path.stem}.txt")), lines.get(path.stem, ""))
    return Recording(
        name=key_of_path(inside.as_posix()),
        path=str(path),
        domain=domain,
        text=" ".join(text.split()),
        labels=tuple(map(printable, inside.parent.parts)) if domain == "audio" else (),
        source=printable(inside.as_posix()),
        licence="unknown",
        problem=problem,
    )


def _text(file: Path, line: str) -> tuple[str, str]:
    """Return the text of a recording, and why it cannot be read, or ""."""
    try:
        if not file.is_file():
            return line, ""
        if file.stat().st_size > MAX_DESCRIPTION:
            return "", f"{printable(file.name)}: too long for a transcript"
        return read_text(file), ""
    except (UserError, OSError) as error:
        return "", printable(str(error).removeprefix(f"{file.parent}/"))


def _transcripts(folder: Path, files: list[str]) -> dict[str, str]:
    """Return {utterance: text} of LibriSpeech's transcripts in a folder."""
    return {
        name: text for f in files if f.endswith(".trans.txt") for name, text in read_transcripts(folder / f).items()
    }
