"""FoG-A on every backbone: block forwards, wall time against one forward per layer, and what foga-vjp ranks like it.

python benchmarks/probe_backbones.py [--cases NAME ...] [--shards FOLDER] [--steps 100] [--clips 8] [--repeats 4]
[--out FILE]

Models are small, and trained for `--steps` steps on the shards first: at random weights, layers score alike. Shards of
the demo (`agrepa prepare demo`) have neither text nor speakers: token ids stand in for text, and a clip's mean mel for
the speaker's vector. f5 needs f5-tts, cosyvoice1 and 2 need cosyvoice-minicpmo (docs/models.md).

leave-one-out   a forward of the model, and one without each layer, whose blocks do not run
prefix-shared   multi_gate: variants share the blocks before the layer that they lack
rank            Spearman's correlation over layers of foga-vjp and FoG-A, both of five times and one draw; top 3: shared

Half of the clips are timed, at t = 0.5.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from _results import print_table, write_json
from _timing import milliseconds, time_interleaved

from agrepa_fast import Backbone, Condition, count_block_forwards
from agrepa_fast.attribution.calls import name_arguments, positional_names
from agrepa_fast.attribution.foga import FogaProbe
from agrepa_fast.attribution.points import ProbeBatch, ProbePoints, clip_times, probe_condition
from agrepa_fast.attribution.vjp import FogaVjp
from agrepa_fast.config import FlowConfig, ModelConfig
from agrepa_fast.config_file import load_config
from agrepa_fast.data.index import load_index
from agrepa_fast.data.layout import BatchLayout
from agrepa_fast.data.loading import TrainBatches
from agrepa_fast.flow import flow_loss, reference_prefix, training_draws
from agrepa_fast.kernels import flow_mix, velocity_change
from agrepa_fast.models.registry import make_model
from agrepa_fast.seeds import clip_keys

FLOW = FlowConfig(sigma=1.0)
TEXT = 64  # ids of what stands in for text
_SIZES = {"dim": 128, "depth": 8, "heads": 2}
_ENCODER = {"linear_units": 128, "num_blocks": 1, "attention_heads": 2}
_UNET = {"n_blocks": 2, "num_heads": 2, "attention_head_dim": 32}
_COSYVOICE1 = {"width": 64, "encoder": _ENCODER, "estimator": _UNET | {"channels": [64, 64], "num_mid_blocks": 4}}
_COSYVOICE2 = {"encoder": _ENCODER, "estimator": _UNET | {"channels": [64], "num_mid_blocks": 6}}
_PAPER = {"skips": True, "position": "alibi", "time": "token", "ffn": "gelu", "qk_norm": False, "registers": 0}

# Cases of one backbone and different `layers` follow each other, and share their weights.
CASES: dict[str, dict] = {
    "audio_dit": {"backbone": "audio_dit", **_SIZES, "token_dim": 128, "position": "rotary_conv"},
    "voicebox": {"backbone": "voicebox", "options": _SIZES | _PAPER | {"token_dim": 128}},
    "f5": {"backbone": "f5", "options": _SIZES | {"text_dim": 64, "conv_layers": 2, "text_mask_padding": True}},
    "cosyvoice1 by stage": {"backbone": "cosyvoice1", "options": _COSYVOICE1},
    "cosyvoice1 by block": {"backbone": "cosyvoice1", "options": _COSYVOICE1 | {"layers": "blocks"}},
    "cosyvoice2 by stage": {"backbone": "cosyvoice2", "options": _COSYVOICE2},
    "cosyvoice2 by block": {"backbone": "cosyvoice2", "options": _COSYVOICE2 | {"layers": "blocks"}},
    "cosyvoice3": {"backbone": "cosyvoice3", "options": _SIZES | {"look_ahead_dim": 128}},
}


class Clips:
    """Endless batches of the shards, with what stands in for text and speakers."""

    def __init__(self, shards: str, clips: int):
        data = replace(load_config("demo", [f"data.path={shards}"]).data, workers=0)
        self.index = load_index(data.path)
        self._batches = TrainBatches(self.index, data, BatchLayout(clips, 1, 0, 1), seed=0, center=True)

    def next(self) -> ProbeBatch:
        """Return the next clips; their condition has no reference yet."""
        batch = next(self._batches)
        given, lengths = batch.condition, batch.condition.lengths
        mask = torch.arange(given.tokens.shape[1]) < given.token_lengths[:, None]
        speaker = batch.mel.sum(1) / lengths[:, None]
        condition = replace(given, text=torch.where(mask, given.tokens % TEXT, -1), speaker=speaker)
        return ProbeBatch(batch.mel, condition, batch.domain, batch.places)


def build(case: dict, clips: Clips) -> Backbone:
    torch.manual_seed(0)
    index = clips.index
    sizes = {"n_mels": index.n_mels, "vocab": index.vocab, "text_vocab": TEXT, "speaker_dim": index.n_mels}
    return make_model(ModelConfig(**case, **sizes))


def train(model: Backbone, clips: Clips, steps: int) -> tuple[float, float]:
    """Train by flow matching alone, and return the mean losses of the first and the last ten steps."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98)), []
    model.train()
    for step in range(steps):
        batch = clips.next()
        draws_keys, noise_keys = (clip_keys(0, step, batch.places, use) for use in ("draws", "noise"))
        draws = training_draws(FLOW, batch.condition.lengths, draws_keys)
        x_t, target = flow_mix(batch.mel, draws.t, noise_keys, FLOW.sigma)
        keep = {"keep_tokens": draws.keep_tokens, "keep_reference": draws.keep_reference}
        condition = replace(batch.condition, reference=reference_prefix(batch.mel, draws.hidden.start), **keep)
        loss = flow_loss(model(x_t, draws.t, condition).v, target, condition.lengths).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return sum(losses[:10]) / len(losses[:10]), sum(losses[-10:]) / len(losses[-10:])


@contextmanager
def without(model: Backbone, number: int, shapes: dict[int, torch.Size]) -> Iterator[None]:
    """Inside, a layer's parts do not run: blocks hand on their state, branches give zeros of their outputs' shapes."""
    parts = model.layers[number].parts

    def skip(names: list[str], part: int, *args, **kwargs) -> torch.Tensor:
        arguments = name_arguments(names, args, kwargs)
        if model.kind == "branch":
            return next(x for x in arguments.values() if isinstance(x, torch.Tensor)).new_zeros(shapes[part])
        return arguments[dict(enumerate(names)).get(model.state, model.state)]

    own = [part.__dict__.get("forward") for part in parts]
    for part in parts:
        part.forward = partial(skip, positional_names(part.forward), id(part))
    try:
        yield
    finally:
        for part, forward in zip(parts, own, strict=True):
            del part.forward
            if forward is not None:
                part.forward = forward


@torch.no_grad()
def leave_one_out(model: Backbone, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
    """Return the changes (L, C) of the velocity by one forward without each layer."""
    shapes: dict[int, torch.Size] = {}
    handles = [
        part.register_forward_hook(lambda part, _args, out: shapes.update({id(part): out.shape}))
        for layer in model.layers
        for part in layer.parts
    ]
    base = model(x_t, t, condition).v
    for handle in handles:
        handle.remove()
    found = []
    for number in range(len(model.layers)):
        with without(model, number, shapes):
            found.append(model(x_t, t, condition).v)
    return velocity_change(torch.stack(found), base, condition.lengths)


def ranks(values: torch.Tensor) -> torch.Tensor:
    return values.argsort().argsort().double()


def agreement(exact: torch.Tensor, estimate: torch.Tensor) -> dict[str, float]:
    """Return Spearman's correlation of two scores (L,), and how many of their three largest are the same."""
    top = [set(scores.topk(min(3, len(scores))).indices.tolist()) for scores in (exact, estimate)]
    return {
        "rank_correlation": float(torch.corrcoef(torch.stack((ranks(exact), ranks(estimate))))[0, 1]),
        "top_3_shared": len(top[0] & top[1]),
    }


def measure(model: Backbone, batch: ProbeBatch, repeats: int) -> dict:
    """Return the costs of both ways at t = 0.5, and the agreement of foga-vjp with FoG-A at five times."""
    half = slice(0, (len(batch.mel) + 1) // 2)
    few = ProbeBatch(*(part[half] for part in batch))
    points = ProbePoints((0.5,), sigma=FLOW.sigma)
    probe, t = FogaProbe(model, points), clip_times(few, 0.5)
    probe.check_blocks(few)
    x_t = points.x_t(few, 0.5, 0)

    @torch.no_grad()
    def shared() -> torch.Tensor:
        return probe._ablate(x_t, t, few.condition)[0]

    calls: dict[str, Callable] = {
        "leave-one-out": partial(leave_one_out, model, x_t, t, few.condition),
        "prefix-shared": shared,
    }
    scores = {name: call() for name, call in calls.items()}
    difference = float((scores["prefix-shared"] - scores["leave-one-out"]).abs().max())
    if not difference <= 1e-5:
        raise SystemExit(f"{type(model).__name__}: scores differ by {difference:.1e} from leaving out one layer")
    timed = time_interleaved(calls, repeats)
    sizes = [len(layer.parts) for layer in model.layers]
    timed["leave-one-out"]["block_forwards"] = sum(sizes) * len(sizes)
    timed["prefix-shared"]["block_forwards"] = count_block_forwards(probe.variants.gates)
    times = ProbePoints(sigma=FLOW.sigma)
    with torch.no_grad():
        exact = FogaProbe(model, times).launch(batch).values.mean((1, 2, 3))
    estimate = FogaVjp(model, times).launch(batch).values.mean((1, 2, 3))
    speed_up = timed["leave-one-out"]["median_s"] / timed["prefix-shared"]["median_s"]
    found = {"layers": len(sizes), "speed_up": speed_up, "max_score_difference": difference}
    return found | timed | agreement(exact, estimate) | {"foga": exact.tolist(), "foga-vjp": estimate.tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--shards", default="data/demo", help="prepared shards (default: the demo's)")
    parser.add_argument("--steps", type=int, default=100, help="training steps of 8 clips before the measurement")
    parser.add_argument("--clips", type=int, default=8, help="clips that are measured")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--out", help="JSON file (default: benchmarks/results/probe_backbones_<device>.json)")
    args = parser.parse_args()

    measured = Clips(args.shards, args.clips).next()
    measured = measured._replace(condition=probe_condition(measured.mel, measured.condition, FLOW))
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "shards")}
    table, results, weights = [], {}, {}
    for name in args.cases:
        print(f"{name} ...", flush=True)
        clips, backbone = Clips(args.shards, 8), CASES[name]["backbone"]
        model = build(CASES[name], clips)
        if backbone not in weights:
            losses = train(model, clips, args.steps)
            weights = {backbone: (model.state_dict(), losses)}
        state, losses = weights[backbone]
        model.load_state_dict(state)
        results[name] = found = {"loss": losses} | measure(model.eval(), measured, args.repeats)
        ways = [found["leave-one-out"], found["prefix-shared"]]
        forwards, times = ([str(way["block_forwards"]) for way in ways], [milliseconds(way) for way in ways])
        agreeing = (f"{found['rank_correlation']:.2f}", found["top_3_shared"])
        trained = f"{losses[0]:.2f} to {losses[1]:.2f}"
        row = (name, found["layers"], *forwards, *times, f"{found['speed_up']:.2f}x")
        table.append((*row, f"{found['max_score_difference']:.0e}", *agreeing, trained))
        written = write_json("probe_backbones", {"settings": settings, "results": results}, args.out)
    header = ("case", "L", "forwards, out", "shared", "leave-one-out ms", "prefix-shared ms", "ratio", "max |Δ|")
    print_table("FoG-A of all layers at one time", (*header, "rank of vjp", "top 3", "loss"), table)
    print("\nwrote", written)


if __name__ == "__main__":
    main()
