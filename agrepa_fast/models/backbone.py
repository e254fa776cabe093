"""The protocol of velocity models. All of agrepa_fast above models/ knows a model by it alone.

class Mine(Backbone):
    def __init__(self, n_mels, vocab, dim=256):
        super().__init__()
        self.net, self.dim, self.no_token = MyTransformer(n_mels, vocab + 1, dim), dim, vocab

    @property
    def layers(self):
        return [Layer((block,), width=self.dim) for block in self.net.blocks]

    def velocity(self, x_t, t, condition):
        ids = condition.tokens
        if condition.keep_tokens is not None:
            ids = ids.where(condition.keep_tokens[:, None], self.no_token)
        return self.net(x_t, t, ids, condition.reference, lengths=condition.lengths)
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from ..errors import UserError
from ..kernels import valid_frames
from .audio_dit.conditioning import keep_clips, zero_padding
from .condition import Condition


class Velocity(NamedTuple):
    v: torch.Tensor  # (N, T, n_mels), zero in the padding
    hidden: dict[int, torch.Tensor]  # layer -> its states (N, T', width), or their masked time-mean (N, width)
    attention: Mapping[int, Sequence[torch.Tensor]] = MappingProxyType({})  # layer -> queries, keys (N, H, T', E)


class Layer(NamedTuple):
    """A part of the model that is measured, chosen and aligned as one: L1, L2, …

    parts: modules that FoG-A leaves out together, in the order of running. width: channels of its states. tap: the
    module whose output (N, T', width) is the layer's state; None: the last part. branches: name -> module for probes
    that leave out attention and FFN apart.
    """

    parts: tuple[nn.Module, ...]
    width: int
    tap: nn.Module | None = None
    branches: Mapping[str, nn.Module] = MappingProxyType({})


class Backbone(nn.Module):
    """A velocity model v(x_t, t, condition). A subclass writes `layers` and `velocity`, and sets other attributes.

    kind: "block" if a layer's parts contain their residual sum; "branch" if their outputs are added outside of them.
    row_arguments, state: arguments of the parts with a row per clip, and the one that is handed on from block to block,
    as in multi_gate; None: found by their size and in a first forward.
    condition_width, condition_tap: channels of the token condition, layer 0, which BiT-C and LASP need, and the module
    whose output (N, T, condition_width) it is; None: the model has none.
    needs: the fields of a condition that `velocity` reads beyond tokens and reference: "text", "speaker". The class is
    then called with text_vocab, the number of text ids, or speaker_dim, channels of the speaker's vector.
    upstream, upstream_suffix: the package that the model comes from, with its version and its weights' licence, for the
    line of train.start_from; and how the names of its weight files end.
    upstream_settings: of a run whose mels and noise are those of that package's weights; a run with others is warned.
    neutral_options: names of model.options that change no velocity in evaluation mode, beside those with "dropout" in
    them: train.start_from takes a run that has other values of these.
    attention_cost: FLOPs of a pair of frames over those of a frame, for train.batch_frames; set by the builder.
    partitioned: weights are whole only inside a module's forward (ZeRO-3); set by the engine.
    predicts: "velocity", or "x" if `velocity` returns the clean mel, from which `forward` computes the velocity; set
    by make_model (flow.prediction).
    replayable: the velocity is a function of weights, arguments and PyTorch's random state alone, so training replays
    CUDA graphs of it by default; a graph would repeat the choices that Python made at its capture.
    tells_attention: `forward` can return the queries and keys of layers, as align.objective=haste needs them.
    """

    kind = "block"
    row_arguments: Sequence[str | int] | None = None
    state: str | int | None = None
    condition_width: int | None = None
    needs: frozenset[str] = frozenset()
    upstream = ""
    upstream_suffix = ".safetensors"
    upstream_settings: Mapping[str, object] = MappingProxyType({})
    neutral_options: frozenset[str] = frozenset()
    attention_cost = 0.0
    partitioned = False
    predicts = "velocity"
    replayable = False
    tells_attention = False

    def __init__(self) -> None:
        super().__init__()
        self.condition_tap: nn.Module | None = None

    @classmethod
    def option_defaults(cls, options: Mapping[str, object]) -> dict[str, object]:
        """Return the values of model.options that are left out. options: those that are given."""
        return defaults_of(cls)

    @property
    def layers(self) -> Sequence[Layer]:
        """Return the layers in the order of running."""
        raise NotImplementedError(f"{type(self).__name__} has no layers: return a list of Layer")

    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        """Return the velocity (N, T, n_mels) at x_t (N, T, n_mels) and times t (N,), for N conditions; the clean mel if
        `predicts` is "x". Frames beyond condition.lengths are padding, and must not change those of the clip. A
        clip whose condition.keep_tokens is False gets no tokens, text or speaker; a reference that is dropped is zero.
        """
        raise NotImplementedError(f"{type(self).__name__} has no velocity(x_t, t, condition)")

    def forward(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        condition: Condition,
        *,
        capture: tuple[int, ...] = (),
        pooled: bool = False,
        attention: tuple[int, ...] = (),
    ) -> Velocity:
        """Return the velocity at x_t (N, T, n_mels), for times t (C,) and C conditions; row n has condition n mod C.

        capture: 1-based layers whose states come back in `hidden`, and 0 for the token condition, averaged over valid
        frames if pooled. attention: layers whose queries and keys come back in `attention`, of a model that tells them.
        Raises ValueError if the conditions do not divide the rows, if a layer does not exist, and for a velocity of
        another shape than x_t.
        """
        copies = self.check_inputs(x_t, t, condition, capture, attention)
        condition = replace(condition, reference=keep_clips(condition.reference, condition.keep_reference))
        if copies > 1:
            condition = condition.map(lambda tensor: tensor.repeat(copies, *[1] * (tensor.ndim - 1)))
            condition = replace(condition, copies=copies)
            t = t.repeat(copies)
        hidden: dict[int, torch.Tensor] = {}
        handles = [self._tap(number, hidden) for number in capture]
        half = next((p.dtype for p in self.parameters() if p.dtype in (torch.bfloat16, torch.float16)), None)
        try:
            with torch.autocast(x_t.device.type, dtype=half, enabled=half is not None):
                v = self.velocity(x_t, t, condition)
        finally:
            for handle in handles:
                handle.remove()
        if not isinstance(v, torch.Tensor) or v.shape != x_t.shape:
            found = tuple(v.shape) if isinstance(v, torch.Tensor) else f"a {type(v).__name__}"
            raise ValueError(f"{type(self).__name__}.velocity returned {found} for x_t {tuple(x_t.shape)}")
        if missed := [layer for layer in capture if layer not in hidden]:
            raise ValueError(f"{type(self).__name__}: the tap of layer {missed[0]} did not run in its velocity")
        if pooled:
            hidden = {layer: pool_frames(h, condition.lengths, x_t.shape[1]) for layer, h in hidden.items()}
        return Velocity(self.as_velocity(v, x_t, t, condition), hidden)

    def as_velocity(self, out: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        """Return the velocity (N, T, n_mels) of the network's output `out`, zero in the padding. t (C,) or (C, T).

        If `predicts` is "x", it is (out - x_t) / (1 - t) in fp32 (Li & He 2025, arXiv 2511.13720): on the path
        x_t = (1 - t) sigma eps + t x, the clean mel x gives the target x - sigma eps. 1 - t counts as 1e-4 or more.
        """
        if self.predicts == "x":
            left = (1 - t.float()).clamp(min=1e-4).view(len(t), -1, 1)
            out = ((out.float() - x_t.float()).unflatten(0, (-1, len(t))) / left).flatten(0, 1)
        return zero_padding(out, condition.mask_lengths)

    def check_inputs(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        condition: Condition,
        capture: tuple[int, ...],
        attention: tuple[int, ...] = (),
    ) -> int:
        """Return the number of rows per condition. Raises ValueError as `forward` does."""
        conditions, first = condition.lengths.shape[0], 1 if self.condition_width is None else 0
        if x_t.shape[0] % conditions or t.shape[0] != conditions:
            raise ValueError(
                f"{x_t.shape[0]} rows and {t.shape[0]} times over {conditions} conditions: C times, C divides rows"
            )
        if outside := [layer for layer in capture if not first <= layer <= len(self.layers)]:
            about = ", 0 is the condition" if first == 0 else ""
            raise ValueError(f"capture={outside}: layers are numbered 1 to {len(self.layers)}{about}")
        if attention and not (self.tells_attention and {*attention} <= {*range(1, len(self.layers) + 1)}):
            raise ValueError(
                f"attention={attention}: {type(self).__name__} cannot tell queries and keys of these layers"
            )
        return x_t.shape[0] // conditions

    def _tap(self, number: int, hidden: dict[int, torch.Tensor]) -> RemovableHandle:
        if number == 0:
            tap = self.condition_tap
        else:
            layer = self.layers[number - 1]
            tap = layer.tap or layer.parts[-1]

        def keep(_module: nn.Module, _args: tuple, output) -> None:
            hidden[number] = output if isinstance(output, torch.Tensor) else output[0]

        return tap.register_forward_hook(keep)

    def recompute_layers(self) -> None:
        """Let training keep only each part's inputs for the backward (activation checkpointing)."""
        for layer in self.layers:
            for part in layer.parts:
                part.forward = _recomputed(part.forward)

    def start_from_codes(self, code_mels: torch.Tensor, gathered: Callable) -> None:
        """Begin from each code's mean mel (vocab, n_mels), normalised, if the model has a use for it. gathered(list of
        parameters): a context in which partitioned ones are whole."""

    def from_upstream(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the weights and buffers of this model, by its own names, from those of a file of the package that the
        model comes from (train.start_from). Raises UserError, which names the key, for those of another model."""
        raise UserError(f"{type(self).__name__} reads no other package's weights: it has no from_upstream(state)")

    def to_upstream(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the content of that package's file, from this model's weights and buffers (export --upstream)."""
        raise UserError(f"{type(self).__name__} writes no other package's weights: it has no to_upstream(state)")


def defaults_of(made: Callable) -> dict[str, object]:
    """Return the parameters of a class or function that have a default."""
    parameters = inspect.signature(made).parameters.values()
    return {part.name: part.default for part in parameters if part.default is not part.empty}


def _recomputed(forward: Callable) -> Callable:
    @wraps(forward)  # gates look for the names of its arguments
    def recompute(*args, **kwargs):
        if not torch.is_grad_enabled():  # checkpoint would read the random state, which a CUDA graph cannot
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return recompute


def pool_frames(hidden: torch.Tensor, lengths: torch.Tensor, frames: int) -> torch.Tensor:
    """Return the mean (N, D) fp32 of hidden (N, T', D) over the valid frames of clips of lengths (N,), padded to
    `frames`."""
    valid = valid_states(hidden, lengths, frames)
    mask = valid_frames(valid, hidden.shape[1]).unsqueeze(-1)
    return torch.where(mask, hidden.float(), 0).sum(1) / valid.unsqueeze(1)


def valid_states(hidden: torch.Tensor, lengths: torch.Tensor, frames: int) -> torch.Tensor:
    """Return the number (N,) of valid frames in hidden (N, T', D) of clips of lengths (N,), padded to `frames`.

    T' may be T over a stride, as in a U-Net: a clip then has ceil(length / stride) valid frames.
    """
    stride = -(-frames // hidden.shape[1])
    return (lengths + stride - 1) // stride
