"""One optimizer step on random clips, and its CUDA graph."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from _bench import Results

from agrepa_fast import AudioDiT, Condition, LayerSelection
from agrepa_fast.alignment.heads import AlignmentHeads
from agrepa_fast.alignment.losses import alignment_loss
from agrepa_fast.alignment.pooled import Pooled
from agrepa_fast.config import FlowConfig, ModelConfig
from agrepa_fast.device import captured
from agrepa_fast.flow import flow_loss, reference_around, training_draws
from agrepa_fast.kernels import flow_mix
from agrepa_fast.seeds import clip_keys

FLOW = FlowConfig()


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model (AG-REPA, config A) and of its clips."""

    dim: int = 1024
    depth: int = 24
    frames: int = 938
    batch: int = 16
    small_batch: int = 4
    mels: int = 100
    vocab: int = 8192
    speech_teacher: int = 1280
    audio_teacher: int = 768
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    repeats: int = 10

    @property
    def heads(self) -> int:
        return max(1, self.dim // 64)

    @property
    def model(self) -> ModelConfig:
        sizes = {"dim": self.dim, "depth": self.depth, "heads": self.heads, "token_dim": self.dim}
        return ModelConfig(**sizes, n_mels=self.mels, vocab=self.vocab)

    @property
    def selection(self) -> LayerSelection:
        layers = (1, 2, self.depth)
        third = (1 / 3,) * 3
        return LayerSelection("fixed", {"speech": layers, "audio": layers}, {"speech": third, "audio": third})

    def clip_flops(self) -> float:
        """Return the operations of one clip's forward and backward in the blocks' matrix products and attention."""
        return 3 * self.depth * self.frames * (24 * self.dim**2 + 4 * self.frames * self.dim)


def awake_model(sizes: Sizes, dtype: torch.dtype) -> AudioDiT:
    """Return a random model whose modulations are not zero, so that every block does something."""
    torch.manual_seed(0)
    with torch.device(sizes.device):
        model = AudioDiT(sizes.model)
    for block in model.blocks:
        torch.nn.init.normal_(block.modulation.weight, std=0.1 / sizes.dim**0.5)
        torch.nn.init.normal_(block.modulation.bias, std=0.3)
    return model.to(dtype)


class Clips(NamedTuple):
    mel: torch.Tensor  # (B, T, mels)
    condition: Condition
    teacher: Results  # domain -> (B, E)
    domain: torch.Tensor  # (B,)


def random_clips(sizes: Sizes, clips: int, padded: bool = False) -> Clips:
    """Return clips, every other one speech, without references: the step draws these. padded: of half to full length,
    else all are full."""
    draw = torch.Generator().manual_seed(1)
    mel = torch.randn(clips, sizes.frames, sizes.mels, generator=draw)
    tokens = torch.randint(sizes.vocab, (clips, sizes.frames // 2), generator=draw)
    lengths = torch.full((clips,), sizes.frames)
    if padded:
        lengths[1:] = torch.randint(sizes.frames // 2, sizes.frames + 1, (clips - 1,), generator=draw)
    # made on the CPU, where Condition sees that nothing is padded
    condition = Condition(tokens, lengths // 2, torch.zeros_like(mel), lengths).to(sizes.device)
    widths = {"speech": sizes.speech_teacher, "audio": sizes.audio_teacher}
    teacher = {name: torch.randn(clips, width, generator=draw).to(sizes.device) for name, width in widths.items()}
    return Clips(mel.to(sizes.device), condition, teacher, (torch.arange(clips) % 2).to(sizes.device))


class OurStep:
    """Forward, loss with pooled alignment, backward, clipping, AdamW and EMA on one device, without DeepSpeed: bf16
    weights and fp32 masters. It never waits for the GPU, so a CUDA graph can capture it."""

    def __init__(self, sizes: Sizes, clips: int, padded: bool = False):
        self.clips = random_clips(sizes, clips, padded)
        self.model = awake_model(sizes, sizes.dtype)
        widths = {"speech": sizes.speech_teacher, "audio": sizes.audio_teacher}
        self.heads = AlignmentHeads(Pooled(), sizes.selection, [sizes.dim] * sizes.depth, widths, seed=0)
        self.heads.to(sizes.device)
        self.weights = list(self.model.parameters())
        self.masters = [weight.detach().float().clone() for weight in self.weights]
        self.average = [master.clone() for master in self.masters]
        self.trained = [*self.masters, *self.heads.parameters()]
        for trained in self.trained:
            trained.grad = torch.zeros_like(trained)
        on_gpu = sizes.device == "cuda"
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True, capturable=on_gpu)
        self.keys = [clip_keys(0, 0, range(clips), use).to(sizes.device) for use in ("draws", "noise")]

    def loss(self) -> torch.Tensor:
        clips = self.clips
        draws = training_draws(FLOW, clips.condition.lengths, self.keys[0])
        condition = replace(
            clips.condition,
            reference=reference_around(clips.mel, draws.hidden),
            keep_tokens=draws.keep_tokens,
            keep_reference=draws.keep_reference,
        )
        x_t, target = flow_mix(clips.mel, draws.t, self.keys[1], FLOW.sigma)
        out = self.model(x_t, draws.t, condition, capture=self.heads.selection.all_layers, pooled=True)
        flow = flow_loss(out.v, target, clips.condition.lengths).mean()
        return flow + alignment_loss(Pooled(), self.heads, out.hidden, clips, draws.t)[0]

    def __call__(self) -> torch.Tensor:
        loss = self.loss()
        gradients = torch.autograd.grad(loss, [*self.weights, *self.heads.parameters()])
        with torch.no_grad():
            kept, count = [trained.grad for trained in self.trained], len(self.masters)
            torch._foreach_copy_(kept[:count], gradients[:count])  # one dtype a call, or it copies one by one
            torch._foreach_copy_(kept[count:], gradients[count:])
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            torch._foreach_copy_(self.weights, self.masters)
            torch._foreach_lerp_(self.average, self.masters, 0.001)
        return loss.detach()


def graphed(call, warmup: int = 3):
    """Return a function that replays `call` as one CUDA graph, and the tensor that it fills. `call` runs `warmup` times
    before."""
    result = []

    def run() -> None:
        result[:] = [call()]

    replay = captured(run, torch.cuda.graph_pool_handle(), warmup)
    return replay, result[0]
