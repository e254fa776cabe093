"""LibriSpeech, in the layout it is published in."""

from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from .recordings import Recording, Source, _without_evaluation, printable, safe, transcript_lines

LIBRISPEECH_LAYOUT = "LibriSpeech/<subset>/<speaker>/<chapter>/<speaker>-<chapter>-<n>.flac"


def librispeech_source(path: Path) -> Source:
    """LibriSpeech: `path` is its folder, the parent of that, or one subset. Names and order are torchaudio's.

    Of a folder with several subsets, dev-* and test-* are left out where there are others. A file without a line in
    its chapter's .trans.txt, and a line without its file, is a recording with a problem. Clips are grouped by speaker.
    """
    recordings = []
    for subset in _librispeech_subsets(path):
        found = [r for chapter in sorted(subset.glob("*/*/")) for r in _chapter(subset, chapter)]
        speakers = len({recording.group for recording in found})
        print(f"speech: {subset.name}, {len(found)} recordings of {speakers} speakers")
        recordings += found
    if not recordings:
        raise UserError(f"{path} holds no recordings: {LIBRISPEECH_LAYOUT} is looked for")
    return Source.of(str(path), "speech", sorted(recordings, key=lambda recording: recording.name))


def _librispeech_subsets(path: Path) -> list[Path]:
    path = path.absolute()  # a subset may be given as "."
    root = path / "LibriSpeech" if (path / "LibriSpeech").is_dir() else path
    if not root.is_dir():
        raise UserError(f"{path} is no folder: give the one of LibriSpeech ({LIBRISPEECH_LAYOUT})")
    if _has_speakers(root):
        return [root]
    subsets = [folder for folder in sorted(root.iterdir()) if folder.is_dir() and _has_speakers(folder)]
    return _without_evaluation("speech", subsets)


def _has_speakers(folder: Path) -> bool:
    return any(child.name.isdigit() and child.is_dir() for child in folder.iterdir())


def _chapter(subset: Path, folder: Path) -> Iterator[Recording]:
    inside, labels, group = f"{subset.name}/{folder.parent.name}/{folder.name}", (subset.name,), folder.parent.name
    names = {child.name for child in folder.iterdir()}
    transcript = f"{folder.parent.name}-{folder.name}.trans.txt"
    lines = transcript_lines(folder / transcript) if transcript in names else {}
    files = {name[: -len(".flac")] for name in names if name.endswith(".flac") and not name.startswith(".")}
    for utterance in sorted(files | lines.keys()):
        text = " ".join(lines.get(utterance, "").split())
        problem = "" if text else f"no transcript in {transcript}"
        if utterance not in files:
            problem = "the file is missing"
        yield Recording(
            safe(utterance),
            f"{folder}/{utterance}.flac",
            "speech",
            text,
            labels,
            printable(f"{inside}/{utterance}.flac"),
            "CC-BY-4.0",
            "flac",
            group=group,
            problem=problem,
        )
