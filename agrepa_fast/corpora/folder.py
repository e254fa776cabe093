"""Recordings in a folder of audio files."""

from pathlib import Path

from ..audio.waves import SOUNDFILE_SUFFIXES
from ..errors import UserError
from .recordings import Recording, Source, check_domain, key_of_path, printable, read_text, read_transcripts
from .walk import walk_folders


def folder_source(path: Path, domain: str) -> Source:
    """Return the recordings below a folder as a source; see folder_recordings."""
    check_domain(domain)
    return Source.of(str(path), domain, folder_recordings(path, domain))


def folder_recordings(path: Path, domain: str) -> list[Recording]:
    """Return every wav, flac, mp3, ogg and opus file below `path` and below folders linked there, by relative path.

    Transcripts: `<name>.txt` beside the file, else LibriSpeech's `*.trans.txt` of its folder. Labels of general audio
    are the names of the folders above the file. Raises UserError if the folder is missing or holds no recordings.
    """
    suffixes = ", ".join(SOUNDFILE_SUFFIXES)
    if not path.is_dir():
        raise UserError(f"{path} is no folder: give one that holds recordings ({suffixes})")
    recordings = []
    for name, files in walk_folders(path):
        folder = Path(name)
        audio = [f for f in files if Path(f).suffix.lower() in SOUNDFILE_SUFFIXES and not f.startswith(".")]
        audio = [f for f in audio if (folder / f).exists()]  # no links to nowhere
        lines = _transcripts(folder, files) if audio else {}
        recordings += [_recording(path, folder / f, domain, lines) for f in audio]
    if not recordings:
        raise UserError(f"{path} holds no recordings: {suffixes} are looked for in it and its subfolders")
    return sorted(recordings, key=lambda recording: recording.source)


def _recording(root: Path, path: Path, domain: str, lines: dict[str, str]) -> Recording:
    inside = path.relative_to(root)
    transcript = path.with_suffix(".txt")
    text = read_text(transcript) if transcript.is_file() else lines.get(path.stem, "")
    return Recording(
        name=key_of_path(inside.as_posix()),
        path=str(path),
        domain=domain,
        text=" ".join(text.split()),
        labels=inside.parent.parts if domain == "audio" else (),
        source=printable(inside.as_posix()),
        licence="unknown",
    )


def _transcripts(folder: Path, files: list[str]) -> dict[str, str]:
    """Return {utterance: text} of LibriSpeech's transcripts in a folder."""
    return {
        name: text for f in files if f.endswith(".trans.txt") for name, text in read_transcripts(folder / f).items()
    }
