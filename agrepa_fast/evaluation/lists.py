"""Lists of the utterances of published benchmarks: texts to say, prompts with the voices, and true recordings.

read_list(Path("librispeech_pc_test_clean_cross_sentence.lst"), Path("LibriSpeech/test-clean"))   # F5-TTS's
read_list(Path("seedtts_testset/en/meta.lst"), None)                                              # seed-tts-eval's
read_list(Path("LibriSpeech/test-clean"), None)                                # the transcripts of LibriSpeech itself
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..corpora.librispeech import librispeech_source
from ..errors import UserError
from ..files import read_text

_LIBRISPEECH = re.compile(r"(\d+)-(\d+)-\d+")  # speaker, chapter and number of an utterance
_FORMATS = (
    "6 columns by tabs (F5-TTS: prompt's utterance, seconds, text; utterance, seconds, text) or 4 or 5 by | "
    "(seed-tts-eval: utterance, prompt's text, prompt's recording, text, true recording)"
)


class Utterance(NamedTuple):
    """An utterance of a list.

    key          name of its sample: <key>.wav
    prompt       recording of the voice to have, None if the list has none, with its transcript prompt_text
    truth        recording of the text, None if the list names no such file
    lead         characters before the text, besides the usual space, for a model that reads prompt_text first
    """

    key: str
    text: str
    prompt: Path | None
    prompt_text: str
    truth: Path | None
    lead: str = ""


def read_list(path: Path, recordings: Path | None) -> list[Utterance]:
    """Return the utterances of a list, whose format its first line shows.

    F5-TTS's LibriSpeech-PC list names LibriSpeech's utterances, whose recordings are in the folder `recordings`.
    seed-tts-eval's meta.lst names files, relative to `recordings`, or to the list if that is None; without a fifth
    column, wavs/<utterance>.wav is the true recording, if it is there. A folder is a subset of LibriSpeech, with its
    transcripts. Raises UserError, with the line, for columns, utterances and recordings that are not right.
    """
    if path.is_dir():
        return _librispeech(path, recordings)
    lines = [(number, line.strip()) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty: a list has a line per utterance")
    read = _format(path, lines[0][1], recordings)
    utterances, seen = [], {}
    for number, line in lines:
        try:
            utterances.append(_checked(read(line), seen))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from error
        seen[utterances[-1].key] = number
    return utterances


def _librispeech(path: Path, recordings: Path | None) -> list[Utterance]:
    if recordings is not None:
        raise UserError(f"--reference {recordings}: the recordings of {path} are beside its transcripts: leave it out")
    found = []
    for recording in librispeech_source(path).recordings():
        if recording.problem:
            raise UserError(f"{recording.source}: {recording.problem}")
        found.append(Utterance(Path(recording.path).stem, recording.text, None, "", Path(recording.path)))
    return found


def _format(path: Path, line: str, recordings: Path | None) -> Callable[[str], Utterance]:
    if line.count("\t") == 5:
        if recordings is None:
            raise UserError(f"{path} names utterances of LibriSpeech: give its test-clean with --reference FOLDER")
        return lambda line: _f5(line, recordings)
    if line.count("|") in (3, 4):
        return lambda line: _seed_tts(line, recordings or path.parent)
    raise UserError(f"{path} is no list that is known: its first line has neither {_FORMATS}")


def _f5(line: str, recordings: Path) -> Utterance:
    columns = line.split("\t")
    if len(columns) != 6:
        raise ValueError(f"{len(columns)} columns, not 6")
    prompt, _, prompt_text, key, _, text = columns
    files = []
    for name in (prompt, key):
        if (found := _LIBRISPEECH.fullmatch(name)) is None:
            raise ValueError(f"{name!r} is no utterance of LibriSpeech, as 61-70968-0000 is")
        files.append(recordings / found[1] / found[2] / f"{name}.flac")
    return Utterance(key, text.strip(), files[0], prompt_text.strip(), files[1], lead=" ")


def _seed_tts(line: str, root: Path) -> Utterance:
    columns = [column.strip() for column in line.split("|")]
    if len(columns) not in (4, 5):
        raise ValueError(f"{len(columns)} columns, not 4 or 5")
    key, prompt_text, prompt, text, *truth = columns
    file = root / (truth[0] if truth else f"wavs/{key}.wav")
    return Utterance(key, text, root / prompt, prompt_text, file if truth or file.is_file() else None)


def _checked(utterance: Utterance, seen: dict[str, int]) -> Utterance:
    """Return an utterance. Raises ValueError if a part of it is missing, or if its name is no name or was seen."""
    key = utterance.key
    if not key or key.startswith(".") or Path(key).name != key:
        raise ValueError(f"{key!r} names no utterance")
    if key in seen:
        raise ValueError(f"{key} is in line {seen[key]} already")
    for name, text in (("text", utterance.text), ("text of the prompt", utterance.prompt_text)):
        if not text:
            raise ValueError(f"{key} has no {name}")
    for name, file in (("prompt", utterance.prompt), ("true recording", utterance.truth)):
        if file is not None and not file.is_file():
            raise ValueError(f"the {name} {file} is missing: --reference FOLDER says where recordings are")
    return utterance
