"""Phones of a clip's transcript, aligned to its wave by PocketSphinx: Voicebox's kind of tokens.

Le et al. 2023, "Voicebox", sec. 3.2. The package brings its acoustic model and the CMU dictionary, both of American
English. Voicebox's own aligner is the Montreal Forced Aligner, whose phones also know their place in the word.
"""

import re
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..files import file_sha256
from ..teachers.base import check_waves
from .base import WaveTokenizer

PHONES = (
    *("SIL", "AA", "AE", "AH", "AO", "AW", "AY", "B", "CH", "D", "DH", "EH", "ER", "EY", "F", "G", "HH", "IH", "IY"),
    *("JH", "K", "L", "M", "N", "NG", "OW", "OY", "P", "R", "S", "SH", "T", "TH", "UH", "UW", "V", "W", "Y", "Z", "ZH"),
)
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d+")
_HOP = 160  # samples of an id
_NAMES = {"+SPN+": "SIL", "+NSN+": "SIL", "+BRE+": "SIL"}  # noises of the model, which hold no phone


class PhoneTokens(WaveTokenizer):
    """Ids are places in PHONES."""

    sample_rate = 16000
    rate = sample_rate / _HOP
    codes = len(PHONES)

    def __init__(self) -> None:
        from pocketsphinx import Decoder, get_model_path

        folder = Path(get_model_path("en-us"))
        files = [folder / "cmudict-en-us.dict", *sorted((folder / "en-us").iterdir())]
        self.identity = {"spec": "phones", "files": {file.name: file_sha256(file) for file in files}}
        self._decoder = Decoder(lm=None, samprate=self.sample_rate, loglevel="FATAL")

    def encode(self, waves: list[np.ndarray], texts: list[str]) -> list[np.ndarray | str]:
        check_waves(waves)
        return [self._align(wave, text) for wave, text in zip(waves, texts, strict=True)]

    def _align(self, wave: np.ndarray, text: str) -> np.ndarray | str:
        try:
            words = self.spoken_words(text)
        except KeyError as error:
            return f"PocketSphinx's dictionary has no pronunciation of {error}"
        if not words:
            return "it has no transcript"
        samples = (np.clip(wave, -1.0, 1.0) * (2**15 - 1)).astype(np.int16).tobytes()
        self._decoder.reinit_feat()  # its estimate of the noise would go on from the clip before
        try:
            self._decoder.set_align_text(" ".join(words))  # words, then the phones of the pronunciations that it chose
            self._hear(samples)
            self._decoder.set_alignment()
            self._hear(samples)
            alignment = self._decoder.get_alignment()
        except RuntimeError:
            alignment = None
        if alignment is None:
            return "PocketSphinx finds no place for every word of its transcript"
        ids = np.zeros(-(-len(wave) // _HOP), np.int32)  # silence
        for phone in alignment.phones():
            ids[phone.start : phone.start + phone.duration] = PHONES.index(_NAMES.get(phone.name, phone.name))
        return ids

    def spoken_words(self, text: str) -> list[str]:
        """Return words of the dictionary that sound as a text. Raises KeyError for a word that has none."""
        words, acronyms = [], not text.isupper()
        for word in _WORD.findall(text.replace("\u2019", "'")):
            if not (known := self._known(word, acronyms)):
                raise KeyError(word)
            words += known
        return words

    def _known(self, word: str, acronyms: bool) -> list[str]:
        """Return words of the dictionary that sound as a word: itself, a digit's name, the letters of an acronym, or
        two that make it up. Numbers of several digits are read in several ways, and have none. acronyms: whether
        capitals mean one; they do not in LibriSpeech, whose texts have no other letters."""
        small = word.lower()
        if len(word) == 1 and word in "0123456789":
            return [_DIGITS[int(word)]]
        if self._decoder.lookup_word(small):
            return [small]
        if acronyms and word.isupper() and word.isascii() and word.isalpha():
            return list(small)
        halves = [(small[:cut], small[cut:]) for cut in range(2, len(small) - 1)]
        both = [pair for pair in halves if all(map(self._decoder.lookup_word, pair))]
        return list(max(both, key=lambda pair: min(map(len, pair)), default=()))

    def _hear(self, samples: bytes) -> None:
        self._decoder.start_utt()
        self._decoder.process_raw(samples, full_utt=True)
        self._decoder.end_utt()


def load_phones() -> PhoneTokens:
    """Return the tokenizer of `phones`. Raises UserError for a missing package."""
    try:
        return PhoneTokens()
    except ImportError as error:
        raise UserError(f"phones needs pocketsphinx ({error}): pip install 'agrepa_fast[phones]'") from error
