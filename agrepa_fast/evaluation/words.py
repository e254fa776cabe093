"""Word and character errors: texts made comparable, and their raw counts, so that any rate can be formed again."""

import re
import string
import unicodedata
from collections.abc import Callable, Mapping
from typing import NamedTuple

Normaliser = Callable[[str], str]
_KEPT = "'"  # seed-tts-eval keeps the apostrophe and drops all other punctuation


class Errors(NamedTuple):
    """Counts of one text against its reference. units: words or characters of the reference."""

    units: int
    substituted: int
    deleted: int
    inserted: int

    @property
    def total(self) -> int:
        return self.substituted + self.deleted + self.inserted

    @property
    def capped(self) -> int:
        """The errors, at most one per unit: a recogniser that invents text counts as one that hears nothing."""
        return min(self.total, self.units)


def word_errors(reference: str, heard: str) -> Errors:
    """Return the errors of normalised texts by words (jiwer's alignment). An empty reference has units 0."""
    import jiwer

    if not reference.split():
        return Errors(0, 0, 0, len(heard.split()))
    found = jiwer.process_words(reference, heard)
    return Errors(len(reference.split()), found.substitutions, found.deletions, found.insertions)


def character_errors(reference: str, heard: str) -> Errors:
    """Return the errors of normalised texts by characters, spaces among them."""
    import jiwer

    if not reference:
        return Errors(0, 0, 0, len(heard))
    found = jiwer.process_characters(reference, heard)
    return Errors(len(reference), found.substitutions, found.deletions, found.insertions)


def load_normaliser(name: str, language: str, spelling: Mapping[str, str]) -> Normaliser:
    """Return the function that both texts go through before they are compared (metrics.text).

    whisper: transformers' EnglishTextNormalizer with British and American spellings, which a Whisper has; for other
    languages BasicTextNormalizer. seedtts: as seed-tts-eval's run_wer.py: lower case,
    without punctuation but the apostrophe, numbers as they are; characters are words in Chinese.
    """
    if name == "seedtts":
        return _seedtts_chinese if language == "zh" else _seedtts
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    if language != "en":
        basic = BasicTextNormalizer()
        return lambda text: basic(text).strip()
    english = EnglishTextNormalizer(dict(spelling))
    return lambda text: english(text.replace("\u2019", "'")).strip()  # it knows straight apostrophes alone


def _seedtts(text: str) -> str:
    text = "".join(letter for letter in text if letter == _KEPT or not _is_punctuation(letter))
    return re.sub(" +", " ", text).strip().lower()


def _seedtts_chinese(text: str) -> str:
    return " ".join(_seedtts(text).replace(" ", ""))


def _is_punctuation(letter: str) -> bool:
    return letter in string.punctuation or unicodedata.category(letter).startswith("P")
