"""LibriSpeech, in the layout that it is published in."""

from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from .recordings import PassedOver, Recording, Source, key_characters, printable, read_transcripts, without_evaluation
from .walk import Walk

_LAYOUT = "LibriSpeech/<subset>/<speaker>/<chapter>/<speaker>-<chapter>-<n>.flac"


def librispeech_source(path: Path) -> Source:
    """Return LibriSpeech's recordings. `path` is its folder, the parent of that, or one subset.

    Names and order are torchaudio's, groups are speakers. Leaves out dev-* and test-* of a folder that has other
    subsets, too. A file without a line in its chapter's .trans.txt becomes a recording with a problem, and so does a
    line without a file.
    """
    recordings = []
    subsets, passed_over = _subsets(path)
    for subset in subsets:
        of_subset = [r for chapter in sorted(subset.glob("*/*/")) for r in _chapter(subset, chapter)]
        passed_over += _others(subset, {recording.path for recording in of_subset})
        speakers = len({recording.group for recording in of_subset})
        print(f"speech: {subset.name}, {len(of_subset)} recordings of {speakers} speakers")
        recordings += of_subset
    if not recordings:
        raise UserError(f"{path} holds no recordings: {_LAYOUT} is looked for")
    return Source.of(str(path), "speech", sorted(recordings, key=lambda recording: recording.name), passed_over)


def _subsets(path: Path) -> tuple[list[Path], list[PassedOver]]:
    """Return the subsets to train on, and the others."""
    path = path.absolute()  # a subset may be given as "."
    root = path / "LibriSpeech" if (path / "LibriSpeech").is_dir() else path
    if not root.is_dir():
        raise UserError(f"{path} is no folder: give the one of LibriSpeech ({_LAYOUT})")
    if _has_speakers(root):
        return [root], []
    children = sorted(root.iterdir())
    found = [child for child in children if child.is_dir() and _has_speakers(child)]
    passed_over = [
        PassedOver(printable(child.name), "file or folder without speakers", f"not {_LAYOUT}")
        for child in children
        if child not in found
    ]
    real: dict[Path, Path] = {}
    for folder in sorted(found, key=Path.is_symlink):  # a link beside its subset gives no second one
        if (first := real.setdefault(folder.resolve(), folder)) != folder:
            passed_over.append(PassedOver(printable(folder.name), "link", f"a link to {printable(first.name)}"))
    subsets = [folder for folder in found if folder in real.values()]
    chosen = without_evaluation("speech", subsets)
    passed_over += [PassedOver(subset.name, "subset", "for evaluation") for subset in subsets if subset not in chosen]
    return chosen, passed_over


def _others(subset: Path, taken: set[str]) -> list[PassedOver]:
    """Return the files of a subset that are neither recordings of the published layout nor their transcripts."""
    walk = Walk(subset)
    for folder, names in walk.folders():
        others = [name for name in names if f"{folder}/{name}" not in taken and not name.endswith(".trans.txt")]
        for name in walk.recordings(folder, others):
            walk.pass_over(f"{folder}/{name}", "file outside of the layout", f"not {_LAYOUT}")
    return [entry._replace(name=f"{printable(subset.name)}/{entry.name}") for entry in walk.passed_over]


def _has_speakers(folder: Path) -> bool:
    return any(child.name.isdigit() and child.is_dir() for child in folder.iterdir())


def _chapter(subset: Path, folder: Path) -> Iterator[Recording]:
    speaker, inside = folder.parent.name, f"{subset.name}/{folder.parent.name}/{folder.name}"
    names = {child.name for child in folder.iterdir()}
    transcript = f"{speaker}-{folder.name}.trans.txt"
    lines = read_transcripts(folder / transcript) if transcript in names else {}
    files = {name[: -len(".flac")] for name in names if name.endswith(".flac") and not name.startswith(".")}
    for utterance in sorted(files | lines.keys()):
        text = " ".join(lines.get(utterance, "").split())
        problem = "" if text else f"no transcript in {transcript}"
        if utterance not in files:
            problem = "the file is missing"
        yield Recording(
            name=key_characters(utterance),
            path=f"{folder}/{utterance}.flac",
            domain="speech",
            text=text,
            labels=(printable(subset.name),),
            source=printable(f"{inside}/{utterance}.flac"),
            licence="CC-BY-4.0",
            group=speaker,
            problem=problem,
        )
