"""Transcripts to ids, as F5-TTS makes them (f5_tts/model/utils.py of f5-tts 1.1.22). Loader processes call it."""

import hashlib
import io
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..files import local_path, read_text

UNKNOWN = 0  # the id of the space, which stands for a character that the vocabulary lacks, too
_INSTALL = "pip install 'agrepa_fast[f5]'"
_VOCABULARY = "infer/examples/vocab.txt"  # in the package f5_tts
_PLAIN = str.maketrans(";\u201c\u201d\u2018\u2019", ",\"\"''")


@dataclass(frozen=True)
class TextIds:
    """The ids of transcripts. spec: data.text. symbols: the id of each symbol; None: a byte of UTF-8 is an id. pinyin:
    Chinese characters become syllables first."""

    spec: str
    symbols: dict[str, int] | None = field(default=None, repr=False)
    pinyin: bool = False

    @property
    def size(self) -> int:
        """The number of ids."""
        return 256 if self.symbols is None else len(self.symbols)

    @property
    def identity(self) -> dict:
        """The facts that decide the ids."""
        sha256 = hashlib.sha256("\n".join(self.symbols or ()).encode()).hexdigest()
        return {"size": self.size, "pinyin": self.pinyin, "sha256": sha256}

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a transcript, (N,) int64."""
        if self.symbols is None:
            return np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        symbols = pinyin_symbols(text) if self.pinyin else text
        return np.array([self.symbols.get(symbol, UNKNOWN) for symbol in symbols], np.int64)


def load_text(spec: str | None) -> TextIds | None:
    """Return the ids that data.text names, or None for null: `bytes`, `chars:FILE`, `pinyin:FILE`, or `package:f5`,
    which is pinyin with the vocabulary of the installed package. Raises UserError for a file that is no vocabulary, and
    for a package that is missing."""
    if spec is None:
        return None
    kind, _, source = spec.partition(":")
    if kind == "bytes":
        return TextIds(spec)
    path = _packaged_vocabulary() if kind == "package" else local_path(source)
    if kind != "chars":
        missing = [name for name in ("rjieba", "pypinyin") if PathFinder.find_spec(name) is None]
        if missing:
            raise UserError(f"data.text={spec} needs the package {missing[0]}: {_INSTALL}")
    return TextIds(spec, _read_symbols(path), kind != "chars")


def _packaged_vocabulary() -> Path:
    """Return the vocabulary of F5-TTS's released models. The package is not imported: that takes seconds."""
    found = PathFinder.find_spec("f5_tts")
    folders = found.submodule_search_locations if found else None
    for folder in folders or ():
        if (path := Path(folder) / _VOCABULARY).is_file():
            return path
    where = f"has no {_VOCABULARY} in {next(iter(folders))}" if folders else "is not installed"
    raise UserError(f"data.text=package:f5: f5_tts {where}: {_INSTALL}, or give its vocabulary with pinyin:FILE")


def _read_symbols(path: Path) -> dict[str, int]:
    """Return the id of each symbol of a vocabulary: a line each, from 0 on, as F5-TTS's get_tokenizer reads it."""
    lines = [line.removesuffix("\n") for line in io.StringIO(read_text(path), newline=None)]
    symbols = {symbol: number for number, symbol in enumerate(lines)}
    if not lines or lines[UNKNOWN] != " ":
        first = repr(lines[0][:20]) if lines else "nothing"
        raise UserError(
            f"{path} begins with {first}, not with a line that is one space: it is no vocabulary of F5-TTS, "
            "whose first symbol stands for unknown characters, too"
        )
    if len(symbols) < len(lines):
        twice = next(symbol for number, symbol in enumerate(lines) if symbols[symbol] != number)
        raise UserError(f"{path} has the symbol {twice!r} in line {lines.index(twice) + 1} and again: remove one")
    return symbols


def pinyin_symbols(text: str) -> list[str]:
    """Return the symbols of a text as F5-TTS's convert_char_to_pinyin does: characters, and for Chinese ones a space
    and the syllable with its tone, ` ni3`. A space precedes an ASCII word that follows another one without it."""
    import rjieba

    symbols: list[str] = []
    for word in rjieba.cut(text.translate(_PLAIN)):
        size = len(word.encode())
        if size == len(word):
            if symbols and size > 1 and symbols[-1] not in " :'\"":
                symbols.append(" ")
            symbols += word
        elif size == 3 * len(word):  # read as a whole, which decides between readings
            for character, syllable in zip(word, _syllables(word), strict=True):
                symbols += [" ", syllable] if _is_chinese(character) else [syllable]
        else:
            for character in word:
                symbols += [" ", *_syllables(character)] if _is_chinese(character) else [character]
    return symbols


def _syllables(word: str) -> list[str]:
    from pypinyin import Style, lazy_pinyin

    return lazy_pinyin(word, style=Style.TONE3, tone_sandhi=True)


def _is_chinese(character: str) -> bool:
    return "\u3100" <= character <= "\u9fff"
