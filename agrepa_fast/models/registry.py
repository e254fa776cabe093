"""The model that a configuration names: AudioDiT, one of other people's, or a Backbone of the user's."""

from collections.abc import Callable, Collection

import torch.nn as nn

from ..config import ModelConfig
from ..errors import UserError
from ..settings import check
from ..their_code import named_object, their_error
from .audio_dit.dit import AudioDiT
from .backbone import Backbone

_OURS = {
    "cosyvoice1": "agrepa_fast.models.cosyvoice_unet:CosyVoice1",
    "cosyvoice2": "agrepa_fast.models.cosyvoice_unet:CosyVoice2",
    "cosyvoice3": "agrepa_fast.models.cosyvoice3:CosyVoice3",
    "f5": "agrepa_fast.models.f5:F5",
    "voicebox": "agrepa_fast.models.voicebox:Voicebox",
}


def make_model(
    config: ModelConfig, prediction: str = "velocity", finish: Callable[[nn.Module], nn.Module] = lambda part: part
) -> Backbone:
    """Return a new model of the configuration. prediction: flow.prediction. finish: as in AudioDiT; a user's model is
    one part.

    model.backbone=MODULE:CLASS is called with n_mels, vocab and model.options, as keywords; with text_vocab and
    speaker_dim if it needs them; and with padding="upstream" if that is set. Raises UserError if it cannot be imported
    or made, or if it is no Backbone.
    """
    model = AudioDiT(config, finish) if config.backbone == "audio_dit" else finish(_other_model(config))
    model.predicts = prediction
    return model


def _other_model(config: ModelConfig) -> Backbone:
    """Return a new model of a class other than AudioDiT. Raises UserError as make_model does."""
    name = f"model.backbone={config.backbone}"
    place = _OURS.get(config.backbone, config.backbone)
    if not all(place.partition(":")):
        raise UserError(f"{name}: audio_dit, {', '.join(_OURS)}, or MODULE:CLASS of a Backbone of yours")
    try:
        make = named_object(place)
        model = make(**_sizes(config, getattr(make, "needs", ())), **config.options)
    except Exception as error:  # anything, in code that is not ours
        raise UserError(f"{name}: {their_error(error)}") from error
    if not isinstance(model, Backbone):
        raise UserError(f"{name} is a {type(model).__name__}: derive it from agrepa_fast.Backbone")
    if not model.layers:
        raise UserError(f"{name}: `layers` is empty: return one Layer for each block")
    return model


def _sizes(config: ModelConfig, needs: Collection[str]) -> dict[str, object]:
    """Return the arguments of the class besides its options."""
    values: dict[str, object] = {"n_mels": config.n_mels, "vocab": config.vocab}
    if "text" in needs:
        check(config.text_vocab, "it takes text: set data.text, or a preset that does")
        values["text_vocab"] = config.text_vocab
    if "speaker" in needs:
        check(config.speaker_dim, "it takes speaker vectors: prepare with data.speaker")
        values["speaker_dim"] = config.speaker_dim
    return values if config.padding == "strict" else values | {"padding": config.padding}
