"""Parts of CosyVoice 1 and 2 from a checkout or a package, imported without its LLM, vocoder and server."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from ..errors import UserError
from ..torchaudio_import import make_torchaudio_importable

_INSTALL = (
    "put a CosyVoice checkout and its third_party/Matcha-TTS on PYTHONPATH, or "
    "pip install --no-deps cosyvoice-minicpmo==0.1.0; and pip install 'agrepa_fast[cosyvoice]'"
)
# The encoders' module imports these for a look-up of whole systems (cosyvoice/utils/class_utils.py), the U-Net's for a
# kind of block that CosyVoice does not use. They import onnxruntime and omegaconf, and make the root logger verbose.
_NOT_OF_FLOWS = ("cosyvoice.llm.llm", "cosyvoice.flow.flow", "cosyvoice.hifigan.generator", "cosyvoice.cli.model")
_LOOK_UP = "cosyvoice.utils.class_utils"


def import_part(module: str, name: str) -> type:
    """Return a class of CosyVoice by its module below `cosyvoice`. Raises UserError if CosyVoice or a package that the
    class needs is absent, or if this CosyVoice has no such class."""
    make_torchaudio_importable()  # diffusers imports transformers, and that its audio utilities
    try:
        with _stand_ins(*_NOT_OF_FLOWS, "conformer"):
            return getattr(importlib.import_module(f"cosyvoice.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{error}: {_INSTALL}") from error


class _StandIn(ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextmanager
def _stand_ins(*names: str) -> Iterator[None]:
    """Inside, modules of these names that are not imported yet are empty; afterwards they can be imported whole."""
    made = [name for name in names if name not in sys.modules]
    sys.modules.update({name: _StandIn(name) for name in made})
    look_up = sys.modules.get(_LOOK_UP)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]
        if look_up is None:
            sys.modules.pop(_LOOK_UP, None)
