"""The networks of the f5_tts package, imported without its trainer."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from ..errors import UserError
from ..torchaudio_import import make_torchaudio_importable

NETWORKS = {"DiT": "dit", "UNetT": "unett"}
_INSTALL = "pip install 'agrepa_fast[f5]'"
_NOT_OF_NETWORKS = ("torchaudio", "librosa", "librosa.filters", "rjieba", "pypinyin")  # for waves and text


def import_network(name: str) -> type:
    """Return the package's class DiT or UNetT.

    The __init__ of f5_tts.model imports the trainer, and with it accelerate and wandb. It is not run here, and is at a
    later `import f5_tts.model`, with the same classes. Packages that only waves and text need may be absent. Raises
    ValueError for another name, and UserError if the package or one that the networks need is absent.
    """
    if name not in NETWORKS:
        raise ValueError(f"model.options.network={name}: {' or '.join(NETWORKS)}")
    module = f"f5_tts.model.backbones.{NETWORKS[name]}"
    make_torchaudio_importable()
    try:
        import f5_tts

        with _model_without_init(f5_tts), _stand_ins():
            return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise UserError(f"{error}: {_INSTALL}") from error


@contextmanager
def _model_without_init(package: ModuleType) -> Iterator[None]:
    """Inside, f5_tts.model is a bare package, unless it is imported already."""
    bare = ModuleType("f5_tts.model")
    bare.__path__ = [str(Path(folder) / "model") for folder in package.__path__]
    kept = sys.modules.setdefault(bare.__name__, bare)
    try:
        yield
    finally:
        if kept is bare:
            del sys.modules[bare.__name__]


class _StandIn(ModuleType):
    """A package that is absent: its names can be imported, and raise ImportError when they are used."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*_args, **_kwargs):
            raise ImportError(f"No module named {self.__name__!r}: {_INSTALL}")

        return absent


@contextmanager
def _stand_ins() -> Iterator[None]:
    absent = [name for name in _NOT_OF_NETWORKS if name not in sys.modules and not _is_installed(name)]
    sys.modules.update({name: _StandIn(name) for name in absent})
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name.partition(".")[0]) is not None
