"""Training engine for audio flow-matching transformers whose alignment goes to the layers that cause the velocity.

The public names are imported on first use: a loader process needs none of them.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if not Path(__file__).with_name("kernels").is_dir():  # a checkout, where kernels/ is beside this package
    __path__.append(str(Path(__file__).parents[1]))

from . import openmp  # noqa: F401 - before torch

if TYPE_CHECKING:  # the same names as in _HOMES; a test compares them
    from .alignment.objective import Objective as Objective
    from .attribution.ablate import ablate as ablate
    from .attribution.foga import foga as foga
    from .attribution.gate_plan import count_block_forwards as count_block_forwards
    from .attribution.gates import multi_gate as multi_gate
    from .attribution.points import ProbeBatch as ProbeBatch
    from .attribution.scores import LayerScores as LayerScores
    from .attribution.selection import LayerSelection as LayerSelection
    from .attribution.selection import NotRankableError as NotRankableError
    from .attribution.selection import select_layers as select_layers
    from .checkpoints.weights import load_model as load_model
    from .config import Config as Config
    from .config_file import load_config as load_config
    from .errors import UserError as UserError
    from .models.audio_dit.block import GatedDiTBlock as GatedDiTBlock
    from .models.audio_dit.dit import AudioDiT as AudioDiT
    from .models.backbone import Backbone as Backbone
    from .models.backbone import Layer as Layer
    from .models.backbone import Velocity as Velocity
    from .models.condition import Condition as Condition
    from .models.fuse import fuse as fuse

__version__ = "0.2.0"

_HOMES = {
    "AudioDiT": "models.audio_dit.dit",
    "Backbone": "models.backbone",
    "Condition": "models.condition",
    "Config": "config",
    "GatedDiTBlock": "models.audio_dit.block",
    "Layer": "models.backbone",
    "LayerScores": "attribution.scores",
    "LayerSelection": "attribution.selection",
    "NotRankableError": "attribution.selection",
    "Objective": "alignment.objective",
    "ProbeBatch": "attribution.points",
    "UserError": "errors",
    "Velocity": "models.backbone",
    "ablate": "attribution.ablate",
    "count_block_forwards": "attribution.gate_plan",
    "foga": "attribution.foga",
    "fuse": "models.fuse",
    "load_config": "config_file",
    "load_model": "checkpoints.weights",
    "multi_gate": "attribution.gates",
    "select_layers": "attribution.selection",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
