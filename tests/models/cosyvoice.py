"""Small flows of CosyVoice 1 and 2, ours and the package's with the same weights, and clips for them."""

import importlib
import logging
import sys
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch

from agrepa_fast.errors import UserError
from agrepa_fast.models.condition import Condition
from agrepa_fast.models.cosyvoice_package import import_part
from agrepa_fast.models.cosyvoice_unet import CosyVoice1, CosyVoice2

from ..attribution.test_peers import INSTALL, StandIn

MELS, CODES, VOICE = 80, 30, 12  # theirs solves its ODE for 80 mels alone
_ENCODER = {"attention_heads": 2, "linear_units": 32, "num_blocks": 1}
_ENCODER |= {"dropout_rate": 0.0, "positional_dropout_rate": 0.0, "attention_dropout_rate": 0.0}
_ESTIMATOR = {"n_blocks": 2, "num_mid_blocks": 1, "num_heads": 2, "attention_head_dim": 8}
OPTIONS = {
    1: {"width": 32, "encoder": _ENCODER, "estimator": _ESTIMATOR | {"channels": [16, 24]}},
    2: {
        "encoder": _ENCODER | {"static_chunk_size": 5},
        "estimator": _ESTIMATOR | {"channels": [16], "static_chunk_size": 10},
    },
}
_RECIPE = {"sigma_min": 1e-6, "solver": "euler", "training_cfg_rate": 0.2, "inference_cfg_rate": 0.7}


def ours(version: int, n_mels=MELS, codes=CODES, voice=VOICE, **options) -> CosyVoice1 | CosyVoice2:
    """A random flow without dropout, in evaluation mode. Skips the test if the package is absent."""
    torch.manual_seed(0)
    sizes = {"n_mels": n_mels, "vocab": 2 * codes, "speaker_dim": voice}
    try:
        model = (CosyVoice1 if version == 1 else CosyVoice2)(**sizes, **OPTIONS[version], **options)
    except UserError:
        if find_spec("cosyvoice") is not None:  # installed: an import that fails is a fault
            raise
        pytest.skip(INSTALL)
    return model.eval()


def theirs(model: CosyVoice1 | CosyVoice2, state: dict, t_scheduler: str = "cosine") -> torch.nn.Module:
    """The package's flow in the sizes of ours with the weights of a flow.pt, loaded as its programs load them."""
    with _trainer_left_out():
        flow, matching = (importlib.import_module(f"cosyvoice.flow.{name}") for name in ("flow", "flow_matching"))
    n_mels, voice = model.condition_width, model.spk_embed_affine_layer.in_features
    first = isinstance(model, CosyVoice1)
    fresh = ours(1 if first else 2, n_mels, model.codes, voice, padding="upstream")
    recipe = SimpleNamespace(**_RECIPE, t_scheduler=t_scheduler)
    cfm = matching.ConditionalCFM if first else matching.CausalConditionalCFM
    parts = {
        "encoder": fresh.encoder,
        "decoder": cfm(3 * n_mels, recipe, n_spks=1, spk_emb_dim=n_mels, estimator=fresh.decoder.estimator),
        "input_size": fresh.input_embedding.embedding_dim,
        "output_size": n_mels,
        "spk_embed_dim": voice,
        "vocab_size": model.codes,
    }
    if first:
        made = flow.MaskedDiffWithXvec(**parts, length_regulator=fresh.length_regulator)
    else:
        made = flow.CausalMaskedDiffWithXvec(**parts)
    made.load_state_dict(state, strict=True)
    return made.eval()


@contextmanager
def _trainer_left_out():
    """Inside, what the flow classes import of Matcha's trainer and of omegaconf is empty."""
    logs = ModuleType("matcha.utils.pylogger")
    logs.get_pylogger = logging.getLogger
    settings = ModuleType("omegaconf")
    settings.DictConfig = dict
    made = {"matcha.utils": StandIn("matcha.utils"), "matcha.utils.pylogger": logs, "omegaconf": settings}
    absent = {name: module for name, module in made.items() if name not in sys.modules}
    sys.modules.update(absent)
    try:
        import_part("flow.decoder", "ConditionalDecoder")
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def clips(lengths: tuple[int, ...], frames: int | None = None, seed: int = 1) -> tuple[torch.Tensor, Condition]:
    """Mels, zero in the padding, and their conditions. A clip has half as many tokens as frames."""
    draw, frames, lengths = torch.Generator().manual_seed(seed), frames or max(lengths), torch.tensor(lengths)
    valid = (torch.arange(frames) < lengths[:, None])[..., None]
    mel = torch.randn(len(lengths), frames, MELS, generator=draw) * valid
    tokens = torch.randint(0, CODES, (len(lengths), (frames + 1) // 2), generator=draw)
    reference = torch.where(torch.arange(frames)[:, None] < 5, mel, 0)
    speaker = torch.randn(len(lengths), VOICE, generator=draw)
    return mel, Condition(tokens, lengths // 2, reference, lengths, speaker=speaker)


def alone(condition: Condition, clip: int) -> Condition:
    """The condition of one clip, without padding."""
    one, length = condition[clip : clip + 1], int(condition.lengths[clip])
    tokens = one.tokens[:, : int(one.token_lengths)]
    return replace(one, tokens=tokens, reference=one.reference[:, :length], padded=False)


def relative(found: torch.Tensor, want: torch.Tensor) -> float:
    return float(((found - want).norm() / want.norm().clamp(min=1e-12)).detach())
