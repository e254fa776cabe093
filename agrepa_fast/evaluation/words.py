"""Word and character errors: texts made comparable, and their raw counts, so that any rate can be formed again."""

import re
import string
from collections.abc import Callable, Mapping
from typing import NamedTuple

Normaliser = Callable[[str], str]
_PUNCTUATION = re.compile(  # string.punctuation and zhon.hanzi.punctuation of zhon 2.1.1
    f"[{re.escape(string.punctuation)}\u00b7\u2013\u2014\u2018\u2019\u201b-\u201f\u2026\u2027\u3000-\u3003\u3008-\u3011"
    "\u3014-\u301f\u3030\u303e\u303f\ufe4f\ufe51\ufe54\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff64]"
)
_KEPT = {"seedtts": "'", "f5": ""}  # what a published definition keeps of it


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
    languages BasicTextNormalizer. seedtts: as process_one of seed-tts-eval's run_wer.py (752f429): lower case, without
    punctuation but the straight apostrophe, numbers as they are. f5: as run_asr_wer of F5-TTS's utils_eval.py
    (2ae2c9b), which drops that apostrophe, too. Both make every character a word in Chinese, and keep its case.
    """
    if name in _KEPT:
        return lambda text: _plain(text, _KEPT[name], language == "zh")
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    if language != "en":
        basic = BasicTextNormalizer()
        return lambda text: basic(text).strip()
    english = EnglishTextNormalizer(dict(spelling))
    return lambda text: english(text.replace("\u2019", "'")).strip()  # it knows straight apostrophes alone


def _plain(text: str, kept: str, chinese: bool) -> str:
    words = _PUNCTUATION.sub(lambda found: found[0] if found[0] in kept else "", text).split()
    return " ".join("".join(words)) if chinese else " ".join(words).lower()
