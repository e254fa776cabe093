"""Training engine for audio flow-matching transformers whose alignment goes to the layers that cause the velocity."""

from pathlib import Path

if not Path(__file__).with_name("kernels").is_dir():  # a checkout, where kernels/ is beside this package
    __path__.append(str(Path(__file__).parents[1]))

from . import openmp  # noqa: F401 - before torch
from .attribution.ablate import ablate
from .attribution.foga import foga
from .attribution.gate_plan import count_block_forwards
from .attribution.gates import multi_gate
from .attribution.points import ProbeBatch
from .attribution.scores import LayerScores
from .attribution.selection import LayerSelection, NotRankableError, select_layers
from .checkpoints.weights import load_model
from .config import Config
from .config_file import load_config
from .errors import UserError
from .models.audio_dit.block import GatedDiTBlock
from .models.audio_dit.conditioning import Condition
from .models.audio_dit.dit import AudioDiT, Velocity

__version__ = "0.1.0"

__all__ = [
    "AudioDiT",
    "Condition",
    "Config",
    "GatedDiTBlock",
    "LayerScores",
    "LayerSelection",
    "NotRankableError",
    "ProbeBatch",
    "UserError",
    "Velocity",
    "ablate",
    "count_block_forwards",
    "foga",
    "load_config",
    "load_model",
    "multi_gate",
    "select_layers",
]
