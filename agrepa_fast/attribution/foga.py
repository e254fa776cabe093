"""FoG-A, forward-only gate ablation: how much the predicted velocity changes when one block is left out.

AG-REPA (arXiv 2603.01006): FoG-A_k = E[ ||v without block k - v|| / (||v|| + eps) ], no gradient, kept per domain.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn as nn

from ..config import DOMAINS
from ..device import CapturedPrograms
from ..flow import reference_prefix
from ..kernels import flow_mix, velocity_change
from ..models.audio_dit.conditioning import Condition
from ..seeds import clip_keys
from .gates import SAME_ROWS, multi_gate, prefix_order, single_ablations
from .scores import LayerScores

RECIPES = ("corrected", "official")
OFFICIAL_TIME = 0.8
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


class ProbeBatch(NamedTuple):
    """C clips to probe with. The noise of a clip depends on its place, so a clip gives the same score in any batch."""

    mel: torch.Tensor  # (C, T, n_mels) normalised
    condition: Condition
    domain: torch.Tensor  # (C,) index into DOMAINS
    places: tuple[int, ...]  # (C,) number of each clip among the probe's clips


class Measured(NamedTuple):
    """What one batch gave, still on its device: nothing has waited for it."""

    values: torch.Tensor  # (V - 1, C, times, draws)
    floor: torch.Tensor  # (C,)
    silent: torch.Tensor  # (C,) bool: the velocity is zero at some time

    def check(self, places: Sequence[int]) -> None:
        """Raises ValueError naming the clip whose velocity is zero, or the clip and layer whose score is not finite.
        Waits for the device."""
        values, silent = self.values.cpu(), self.silent.cpu()
        for clip, place in enumerate(places):
            if silent[clip]:
                raise ValueError(
                    f"probe clip {place}: the model's velocity is zero, so no relative change can be measured"
                )
            if not values[:, clip].isfinite().all():
                layer = int((~values[:, clip].isfinite()).flatten(1).any(1).nonzero()[0]) + 1
                raise ValueError(f"probe clip {place}, layer {layer}: the score is not finite")


class FogaProbe:
    """FoG-A of one model, again and again with its live weights, in L(L+1)/2 block forwards for each time and draw.

    graph: capture the work of each batch shape as CUDA graphs and replay them. Nothing can be captured under ZeRO-3,
    where weights exist only inside a forward. Other parameters: as foga.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        times: Sequence[float] = TIMES,
        draws: int = 1,
        gates: torch.Tensor | None = None,
        sigma: float = 0.5,
        seed: int = 0,
        kind: str = "block",
        blocks: Sequence[nn.Module] | None = None,
        max_rows: int | None = None,
        graph: bool = False,
    ):
        self.model, self.kind, self.max_rows = model, kind, max_rows
        self.times, self.draws, self.sigma, self.seed = tuple(times), draws, sigma, seed
        self.blocks = model_blocks(model, kind) if blocks is None else list(blocks)
        gates = _with_whole_model(gates, len(self.blocks))
        order = prefix_order(gates)
        self.gates = gates[order]
        self.back = order.argsort().to(next(model.parameters()).device)  # the place of each variant among self.gates
        self.programs = CapturedPrograms() if graph else None

    def launch(self, batch: ProbeBatch) -> Measured:
        """Queue the measurement of a batch: evaluation mode, the same noise for every variant (common random numbers).

        The modes of all modules and the random state are as before afterwards, also when it raises.
        """
        condition, values, silents = batch.condition.to(batch.mel.device), [], []
        with undisturbed(self.model), torch.no_grad():
            if self.programs is not None:
                self.programs.drop_stale(self.model.parameters())
            for time in self.times:
                t = torch.full_like(batch.mel[:, 0, 0], time)
                for draw in range(self.draws):
                    x_t = noised(batch, time, self.sigma, self.seed, draw)
                    changes, base, silent = self._run(self._variants, x_t, t, condition)
                    values.append(changes)
                    silents.append(silent)
                    if len(values) == 1:
                        (floor,) = self._run(self._whole_model, x_t, t, base, condition)
        silent = torch.stack(silents).any(0)
        return Measured(torch.stack(values, -1).unflatten(-1, (len(self.times), self.draws)), floor, silent)

    def _run(self, compute: Callable, *inputs) -> tuple[torch.Tensor, ...]:
        """compute(*inputs), replayed where programs are captured."""
        if self.programs is None:
            return compute(*inputs)
        key = compute.__name__, inputs[0].shape, inputs[-1].layout
        if key not in self.programs:
            self.programs.capture(key, compute, *inputs)
        return self.programs(key, *inputs)

    def _variants(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> tuple[torch.Tensor, ...]:
        """(V - 1, C) changes of every ablated variant; the whole model's velocity, fp32; (C,) whether it is zero."""
        variants = len(self.gates)
        options = {"kind": self.kind, "row_arguments": (), "max_rows": self.max_rows, "check_rows": False}
        with multi_gate(self.blocks, self.gates, **options):
            v = self.model(x_t.repeat(variants, 1, 1), t, condition).v
        v = v.unflatten(0, (variants, -1))[self.back]
        return velocity_change(v[1:], v[0], condition.lengths), v[0].float(), ~v[0].flatten(1).any(1)

    def _whole_model(
        self, x_t: torch.Tensor, t: torch.Tensor, base: torch.Tensor, condition: Condition
    ) -> tuple[torch.Tensor]:
        """(C,) the floor: the change of `base`, computed among the variants, against the model as it is."""
        v = self.model(x_t, t, condition).v.float()
        return (velocity_change(v[None], base, condition.lengths)[0],)


def model_blocks(model: nn.Module, kind: str = "block") -> list[nn.Module]:
    """The modules that FoG-A gates in a model like AudioDiT: its blocks, or every block's attention and FFN."""
    return (
        list(model.blocks) if kind == "block" else [part for block in model.blocks for part in (block.attn, block.ffn)]
    )


def part_names(depth: int, kind: str = "block") -> tuple[str, ...]:
    """LayerScores.names of what model_blocks lists: () for blocks, "1.attn", "1.ffn", ... for their parts."""
    layers = range(1, depth + 1)
    return () if kind == "block" else tuple(f"{layer}.{part}" for layer in layers for part in ("attn", "ffn"))


def foga(
    model: nn.Module,
    batch: ProbeBatch,
    *,
    times: Sequence[float] = TIMES,
    draws: int = 1,
    gates: torch.Tensor | None = None,
    sigma: float = 0.5,
    seed: int = 0,
    recipe: str = "corrected",
    kind: str = "block",
    blocks: Sequence[nn.Module] | None = None,
    max_rows: int | None = None,
) -> LayerScores:
    """Scores of all layers of `model`, in L(L+1)/2 block forwards for each time and draw, and L for the floor.

    Evaluation mode; the same noise for every variant (common random numbers). gates (V, L), first row all ones,
    replaces the single ablations; `values` then has V - 1 rows. kind "branch": the attention and the FFN of every block
    apart. blocks: default model_blocks(model, kind). max_rows bounds the rows that a block runs at once.

    recipe "official" is the release's, faults included: the clean mel as x_t at t = 0.8, odd layers only (the others
    are nan), one forward a layer, in training mode, so that dropout differs between them.

    The modes of all modules and the random state are as before afterwards, also when it raises. Raises ValueError when
    the first row of gates ablates something, a velocity is zero or not finite, or a block's rows depend on each other.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe={recipe!r}: {' or '.join(RECIPES)}")
    if recipe == "official":
        return official_foga(model, batch)
    options = {"gates": gates, "sigma": sigma, "seed": seed, "kind": kind, "blocks": blocks, "max_rows": max_rows}
    probe = FogaProbe(model, times=times, draws=draws, **options)
    measured = probe.launch(batch)
    measured.check(batch.places)
    if measured.floor.max() > SAME_ROWS.get(next(model.parameters()).dtype, 0.1):
        _refuse_dependent_rows(probe, batch)
    names = part_names(len(model.blocks), kind) if blocks is None and gates is None else ()
    floor, domain = measured.floor.cpu(), batch.domain.cpu()
    return LayerScores(measured.values.cpu(), floor, domain, tuple(times), names=names)


def _refuse_dependent_rows(probe: FogaProbe, batch: ProbeBatch) -> None:
    """The whole model computes another velocity among its variants than alone: raises ValueError naming the block."""
    clips, variants = batch.mel.shape[0], len(probe.gates)
    gated = multi_gate(probe.blocks, probe.gates, kind=probe.kind, row_arguments=())
    with undisturbed(probe.model), torch.no_grad(), gated:
        probe.model(batch.mel.repeat(variants, 1, 1), batch.mel.new_full((clips,), 0.5), batch.condition)
    raise ValueError("the model's rows depend on each other outside of its blocks: it cannot be gated exactly")


@torch.no_grad()
def official_foga(model: nn.Module, batch: ProbeBatch) -> LayerScores:
    """FoG-A as the released code computes it (models.py, fog_attribution, at 8c1371a): sqrt(mean(dv^2) + 1e-8) over
    sqrt(mean(v^2) + 1e-8) + 1e-8. Means are over valid frames (the release has no padding)."""
    eps, depth, lengths = 1e-8, len(model.blocks), batch.condition.lengths
    values = torch.full((depth, len(batch.places), 1, 1), torch.nan)
    count = lengths * batch.mel.shape[-1]

    def rms(x: torch.Tensor) -> torch.Tensor:  # the model's padding is zero
        return (x.float().square().sum((1, 2)) / count + eps).sqrt()

    with undisturbed(model):
        model.train()
        t = batch.mel.new_full((len(batch.places),), OFFICIAL_TIME)
        base = model(batch.mel, t, batch.condition).v
        energy = rms(base) + eps
        for left_out in range(0, depth, 2):
            with multi_gate(model.blocks, 1 - torch.eye(depth)[left_out : left_out + 1], row_arguments=()):
                v = model(batch.mel, t, batch.condition).v
            values[left_out, :, 0, 0] = (rms(v - base) / energy).cpu()
        again = model(batch.mel, t, batch.condition).v
    floor = (rms(again - base) / energy).cpu()
    Measured(values[::2], floor, ~base.flatten(1).any(1)).check(batch.places)
    return LayerScores(values, floor, batch.domain.cpu(), (OFFICIAL_TIME,), "official")


@torch.no_grad()
def ablate(
    model: nn.Module,
    inputs: dict,
    blocks: Sequence[nn.Module],
    *,
    gates: torch.Tensor | None = None,
    kind: str = "block",
    row_arguments: Sequence[str | int] | None = None,
    max_rows: int | None = None,
    domain: str = "audio",
) -> LayerScores:
    """LayerScores of any model at given inputs: how much model(**inputs) changes when each block is left out.

    inputs: keyword arguments; the first tensor has C rows, and every tensor with C rows is repeated for the variants,
    so name in `row_arguments` what a block must slice if that is not plain from its size. The output, or the first of a
    tuple, is the velocity, C rows of any shape. blocks, gates, kind, row_arguments, max_rows: as in multi_gate.
    Raises ValueError as foga and multi_gate do, and when the inputs have no rows.
    """
    gates = _with_whole_model(gates, len(blocks))
    clips = next((value.shape[0] for value in inputs.values() if isinstance(value, torch.Tensor) and value.ndim), None)
    if not clips:
        raise ValueError("the inputs hold no tensor with a row for every clip")
    order = prefix_order(gates)
    rows = {name: _repeat(value, clips, len(gates)) for name, value in inputs.items()}
    with undisturbed(model):
        with multi_gate(blocks, gates[order], kind=kind, row_arguments=row_arguments, max_rows=max_rows):
            v = _first(model(**rows))
        v = v.reshape(len(gates), clips, 1, -1)[order.argsort().to(v.device)]
        base = v[0]
        plain = _first(model(**inputs)).reshape(1, clips, 1, -1)
    change, floor = velocity_change(v[1:], base), velocity_change(plain, base)[0]
    measured = Measured(change[..., None, None].cpu(), floor.cpu(), ~base.flatten(1).any(1))
    measured.check(range(clips))
    if floor.max() > SAME_ROWS.get(base.dtype, 0.1):
        raise ValueError("the model's rows depend on each other outside of its blocks: it cannot be gated exactly")
    domains = torch.full((clips,), DOMAINS.index(domain))
    return LayerScores(measured.values, measured.floor, domains, (float("nan"),), "given")


def _with_whole_model(gates: torch.Tensor | None, depth: int) -> torch.Tensor:
    gates = single_ablations(depth) if gates is None else gates
    if not (gates[0] == 1).all():
        raise ValueError("the first row of gates is the whole model: all ones")
    return gates


def _repeat(value, clips: int, variants: int):
    has_rows = isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == clips
    return value.repeat(variants, *[1] * (value.ndim - 1)) if has_rows else value


def _first(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's mode and the random state are what they were afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
            yield
    finally:
        for module, training in modes:
            module.training = training


@lru_cache(maxsize=4096)
def probe_keys(seed: int, draw: int, places: tuple[int, ...], stream: str, device: torch.device) -> torch.Tensor:
    """clip_keys on the device, copied once: a copy from the host waits for everything that is queued there."""
    return clip_keys(seed, draw, places, stream).to(device)


def noised(batch: ProbeBatch, t: float, sigma: float, seed: int, draw: int) -> torch.Tensor:
    """x_t of a probe: the noise of a clip depends on seed, draw, t and the clip's place alone."""
    keys = probe_keys(seed, draw, batch.places, f"foga {t:g}", batch.mel.device)
    return flow_mix(batch.mel, torch.full_like(batch.mel[:, 0, 0], t), keys, sigma)[0]


def probe_condition(mel: torch.Tensor, condition: Condition, max_reference: float) -> Condition:
    """The condition of a probe or validation clip: nothing dropped, and half of the longest reference prefix."""
    reference = (0.5 * max_reference * condition.lengths).long().clamp(min=1)
    return replace(condition, reference=reference_prefix(mel, reference), keep_tokens=None, keep_reference=None)
