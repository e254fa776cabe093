"""F5-TTS (Chen et al. 2024) and E2 TTS: the networks of the f5_tts package as a Backbone."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..kernels import valid_frames
from .backbone import Backbone, Layer, defaults_of
from .condition import Condition
from .f5_clips import AttentionOfOwnFrames, TappedUNet, TextBlockOfOwnFrames, TextOfOwnFrames, TextPerClip, swap
from .f5_package import import_network
from .fuse import fuse

_EMA_STATE = {"initted": torch.tensor(True), "step": torch.tensor(0)}  # of ema_pytorch, which their trainer uses


class F5(Backbone):
    """f5_tts's DiT (F5-TTS) or UNetT (E2), with weights of its names below `transformer.`

    n_mels, text_vocab: of the shards; `vocab`, of audio tokens, is not used. network: DiT or UNetT. fused: blocks run
    the operations of agrepa_fast.kernels; None: true for DiT, whose blocks are not slower with them. padding: "strict":
    it changes no clip; "upstream": the package's own. options: keywords of the network's class.
    """

    needs = frozenset({"text"})
    upstream_settings = MappingProxyType({"data.normalize": False, "flow.sigma": 1.0})
    neutral_options = frozenset({"fused", "checkpoint_activations"})

    @classmethod
    def option_defaults(cls, options: Mapping[str, object]) -> dict[str, object]:
        own = defaults_of(cls)
        return defaults_of(import_network(options.get("network", own["network"]))) | own

    def __init__(
        self,
        n_mels: int,
        vocab: int,
        text_vocab: int,
        network: str = "DiT",
        fused: bool | None = None,
        padding: str = "strict",
        **options,
    ):
        super().__init__()
        if fused and network != "DiT":
            raise ValueError(f"model.options.fused=true: {network} has no fused blocks, DiT has")
        self.fused = network == "DiT" if fused is None else fused
        self.transformer = import_network(network)(mel_dim=n_mels, text_num_embeds=text_vocab, **options)
        self.is_unet = network == "UNetT"
        self._swap_classes(strict=padding == "strict")
        self.upstream = f"f5_tts's {self._form(options)}; released weights are CC-BY-NC-4.0: no commercial use"
        self.replayable = padding == "strict"  # theirs waits for the longest clip
        object.__setattr__(self, "condition_tap", self.transformer.text_embed)  # no second name of its weights
        self.condition_width = self.condition_tap.text_embed.embedding_dim
        if self.is_unet:
            self.kind, self.row_arguments = "branch", ("mask",)
        else:
            self.row_arguments, self.state = ("t", "mask"), "x"

    def _swap_classes(self, strict: bool) -> None:
        net = self.transformer
        if self.is_unet:
            swap(net, TappedUNet)
            net.taps = nn.ModuleList(nn.Identity() for _ in net.layers)
        elif self.fused:
            fuse(net)
        swap(net.text_embed, TextOfOwnFrames if strict else TextPerClip)
        if not strict:
            return
        for block in net.text_embed.text_blocks if net.text_embed.extra_modeling else ():
            swap(block, TextBlockOfOwnFrames)
        for part in net.modules():
            if hasattr(part, "processor"):
                part.processor = AttentionOfOwnFrames(part.processor)

    def _form(self, options: dict) -> str:
        """Return which released model the options are of, for files of v0 and v1 have the same names and shapes."""
        if self.is_unet:
            return "E2"
        head, masked = options.get("pe_attn_head"), options.get("text_mask_padding", True)
        version = {(None, True): "v1", (1, False): "v0"}.get((head, masked), "neither v1 nor v0")
        return f"DiT, {version} by model.options.pe_attn_head={head} and text_mask_padding={masked} (no file says it)"

    def from_upstream(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Take the averaged or live weights of a CFM, as its trainer saves them, compiled or not."""
        plain = {name.removeprefix("ema_model.").replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
        return {
            name: tensor
            for name, tensor in plain.items()
            if name not in _EMA_STATE and not name.startswith("mel_spec.mel_stft.")  # old files have its tables
        }

    def to_upstream(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the state that their load_checkpoint and their trainer's EMA load strictly."""
        return {f"ema_model.{name}": tensor for name, tensor in state.items()} | _EMA_STATE

    @property
    def layers(self) -> list[Layer]:
        net = self.transformer
        if self.is_unet:
            return [
                Layer((attn, ff), net.dim, tap=tap, branches={"attn": attn, "ffn": ff})
                for (_, _, attn, _, ff), tap in zip(net.layers, net.taps, strict=True)
            ]
        return [Layer((block,), net.dim) for block in net.transformer_blocks]

    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        if condition.text is None:
            raise ValueError("F5 reads condition.text, which is missing: set data.text")
        frames, lengths = x_t.shape[1], condition.mask_lengths
        return self.transformer(
            x=x_t,
            cond=condition.reference,
            text=F.pad(condition.text[:, :frames], (0, max(0, frames - condition.text.shape[1])), value=-1),
            time=t,
            mask=None if lengths is None else valid_frames(lengths, frames),
            drop_text=False if condition.keep_tokens is None else ~condition.keep_tokens,
        )
