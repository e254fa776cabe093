"""Whether another model than AudioDiT does what Backbone promises, tried on two short random clips before a run."""

from dataclasses import replace

import torch

from ..config import FlowConfig, ModelConfig
from ..errors import UserError
from ..models.backbone import Backbone
from ..models.condition import Condition
from ..their_code import their_error
from .foga import FogaProbe
from .points import ProbeBatch, ProbePoints, clip_times, evaluation_mode

_FRAMES = (24, 17)
_PADDING_CHANGES = 1e-3  # relative; rounding explains less


def check_model(model: Backbone, config: ModelConfig, flow: FlowConfig) -> list[str]:
    """Return a warning if the padding of a batch changes the velocity of a clip, and one if the model does not drop the
    tokens that it is told to.

    Raises UserError if the model raises anything, returns another shape, has layers of another width than it says, or
    cannot be gated exactly. Its weights are whole, on the CPU.
    """
    name = type(model).__name__
    try:
        with evaluation_mode(model), torch.no_grad():
            batch = _random_clips(config)
            _check_states(model, batch)
            FogaProbe(model, ProbePoints((0.5,))).check_blocks(batch)
            change = _change_by_padding(model, batch)
            ignored = (flow.drop_tokens or flow.drop_all or flow.guidance != 1) and _ignores_drops(model, batch)
    except Exception as error:  # anything, in code that is not ours
        raise UserError(f"{name}: {their_error(error)}") from error
    warnings = []
    if change > _PADDING_CHANGES:
        remedy = "mask by condition.lengths" if config.padding == "strict" else "model.padding=strict keeps it out"
        warnings.append(f"{name}: padding changes the velocity of a clip by {change:.1%}: {remedy}")
    if ignored:
        warnings.append(
            f"{name}: the velocity of a clip has its tokens although condition.keep_tokens is False, so "
            "guidance does nothing; leave them out there, or set flow.drop_tokens=0 flow.drop_all=0 flow.guidance=1"
        )
    return warnings


def _random_clips(config: ModelConfig) -> ProbeBatch:
    draw, lengths = torch.Generator().manual_seed(0), torch.tensor(_FRAMES)
    valid = (torch.arange(_FRAMES[0]) < lengths[:, None])[..., None]
    mel = torch.randn(2, _FRAMES[0], config.n_mels, generator=draw) * valid
    tokens, extra, text = (
        None if count is None else torch.randint(0, count, (2, _FRAMES[0] // 2), generator=draw)
        for count in (config.vocab, config.extra_vocab, config.text_vocab)
    )
    if text is not None:
        text = torch.where(torch.arange(text.shape[1]) < lengths[:, None] // 3, text, -1)
    speaker = None if config.speaker_dim is None else torch.randn(2, config.speaker_dim, generator=draw)
    reference = torch.where(torch.arange(_FRAMES[0])[:, None] < 6, mel, 0)
    condition = Condition(tokens, lengths // 2, reference, lengths, extra_tokens=extra, text=text, speaker=speaker)
    return ProbeBatch(mel, condition, torch.zeros(2, dtype=torch.int64), (0, 1))


def _check_states(model: Backbone, batch: ProbeBatch) -> None:
    """Raise ValueError if a layer's states have another width than it says, or are not those of frames at a stride:
    other tokens before them, or the frames that a convolution without padding lacks, would put each frame beside the
    target of another."""
    layers = range(1, len(model.layers) + 1)
    out = model(batch.mel, clip_times(batch, 0.5), batch.condition, capture=tuple(layers))
    for number, layer in enumerate(model.layers, 1):
        shape = tuple(out.hidden[number].shape)
        if len(shape) != 3 or shape[0] != 2 or shape[2] != layer.width:
            raise ValueError(f"layer {number} says width={layer.width}, and its states are {shape}, not (2, T, width)")
        stride = -(-_FRAMES[0] // shape[1])
        if shape[1] != -(-_FRAMES[0] // stride):
            raise ValueError(
                f"layer {number} has {shape[1]} states for {_FRAMES[0]} frames, where a stride leaves T/1, T/2, …: set "
                "Layer.tap to a module behind which there are states of frames alone"
            )


def _change_by_padding(model: Backbone, batch: ProbeBatch) -> float:
    """Return the relative change of the shorter clip's velocity by the frames that pad it."""
    frames, tokens = _FRAMES[1], int(batch.condition.token_lengths[1])
    short = batch.condition[1:]
    alone = replace(
        short,
        tokens=short.tokens[:, :tokens],
        reference=short.reference[:, :frames],
        extra_tokens=None if short.extra_tokens is None else short.extra_tokens[:, :tokens],
        text=None if short.text is None else short.text[short.text >= 0].unsqueeze(0),
        padded=False,
    )
    t = clip_times(batch, 0.5)
    padded = model(batch.mel, t, batch.condition).v[1, :frames]
    single = model(batch.mel[1:, :frames], t[1:], alone).v[0]
    norm = single.norm()
    return float((padded - single).norm() / norm) if norm > 0 else 0.0


def _ignores_drops(model: Backbone, batch: ProbeBatch) -> bool:
    """Return whether other ids change the velocity, and dropping them does not."""
    given = batch.condition
    text = None if given.text is None else torch.where(given.text > 0, given.text - 1, given.text)
    others = replace(given, tokens=given.tokens.flip(1), text=text)
    dropped = replace(given, keep_tokens=torch.zeros(2, dtype=torch.bool))
    now, other, without = (model(batch.mel, clip_times(batch, 0.5), c).v for c in (given, others, dropped))
    return torch.equal(now, without) and not torch.equal(now, other)
