"""The parts of gpu_suite.py. Each yields (key, value) per measurement, so a later failure loses none of them."""

import gc
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import bench_ada_norm
import bench_align_loss
import bench_block
import bench_flow_mix
import bench_gated_residual
import bench_linear_gelu
import bench_qk_norm_rope
import bench_velocity_change
import torch
import torch.nn.functional as F
from _baselines import TeacherStandIn, row_gates, sequential_velocities
from _bench import compare
from _results import ROOT
from _timing import Phases, time_interleaved, time_phases
from _training import OurStep, ReleasedStep, Sizes, awake_model, graphed, random_clips
from torch.nn.attention import SDPBackend, sdpa_kernel

from agrepa_fast import count_block_forwards, multi_gate
from agrepa_fast.attribution.foga import FogaProbe
from agrepa_fast.attribution.gate_plan import single_ablations
from agrepa_fast.attribution.points import ProbeBatch, ProbePoints
from agrepa_fast.kernels import force_backend, velocity_change

OPERATIONS = (
    bench_ada_norm,
    bench_gated_residual,
    bench_qk_norm_rope,
    bench_linear_gelu,
    bench_align_loss,
    bench_velocity_change,
    bench_flow_mix,
)
Measured = Iterator[tuple[str, object]]


@dataclass(frozen=True)
class Plan:
    """Sizes of the parts: the real ones, or tiny ones on a CPU."""

    sizes: Sizes = field(default_factory=Sizes)
    compiler: str = "inductor"
    large_batch: int = 64  # 60k tokens
    copy_bytes: int = 2**30
    gemm: int = 8192
    frame_counts: tuple[int, ...] = (938, 960, 1024)
    whisper: tuple[int, int, int] = (32, 1280, 1500)  # depth, width, frames
    beats: tuple[int, int, int] = (12, 768, 496)
    wide: tuple[int, int] = (1664, 30)  # width and depth of 1.5B parameters
    accuracy: tuple[str, ...] = (  # files of tests/
        *(f"kernels/test_{module.OP.name}" for module in OPERATIONS),
        "training/test_block",
    )
    accuracy_cases: str = "triton"  # what pytest -k takes

    @property
    def cuda(self) -> bool:
        return self.sizes.device == "cuda"

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.sizes.dim, self.sizes.frames, self.sizes.batch


DRY = Plan(
    Sizes(64, 3, 12, 2, 1, 8, 30, 16, 12, "cpu", torch.float32, 2),
    compiler="aot_eager",
    large_batch=3,
    copy_bytes=2**16,
    gemm=32,
    frame_counts=(12,),
    whisper=(1, 64, 8),
    beats=(1, 64, 8),
    wide=(128, 3),
    accuracy=("kernels/test_ada_norm",),
    accuracy_cases="triton and test_repeatable",
)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _median(call: Callable[[], object], repeats: int) -> float:
    return time_interleaved({"it": call}, repeats)["it"]["median_s"]


def ceilings(plan: Plan) -> Measured:
    """Measure the device's ceilings: copies, and matrix products at the model's shapes."""
    s, repeats = plan.sizes, plan.sizes.repeats
    real = plan.large_batch * s.frames * s.dim * 2
    for name, size in (("copy_gb_per_s", plan.copy_bytes), ("copy_60k_tokens_gb_per_s", real)):
        source = torch.empty(size, dtype=torch.uint8, device=s.device)
        target = torch.empty_like(source)
        yield name, 2 * size / _median(lambda: target.copy_(source), repeats) / 1e9  # noqa: B023 (called at once)
    rows = s.batch * s.frames
    products = {"qkv": (3 * s.dim, s.dim), "out": (s.dim, s.dim), "fc1": (4 * s.dim, s.dim), "fc2": (s.dim, 4 * s.dim)}
    shapes = {name: (rows, *sizes) for name, sizes in products.items()} | {"square": (plan.gemm,) * 3}
    for name, (m, n, k) in shapes.items():
        a, b = (torch.randn(size, k, dtype=s.dtype, device=s.device) for size in (m, n))
        took = _median(partial(F.linear, a, b), repeats)
        yield f"gemm_{name}", {"m, n, k": [m, n, k], "tflop_per_s": 2 * m * n * k / took / 1e12}


def accuracy(plan: Plan) -> Measured:
    """Run the accuracy tests of tests/ with compiled kernels instead of interpreted ones. Compiling takes most of the
    time, so the files run side by side, each on its share of the cores."""
    if importlib.util.find_spec("xdist") is None:
        raise ModuleNotFoundError("the accuracy tests need pytest and pytest-xdist: pip install -e '.[test]'")
    workers = (os.cpu_count() or 1) // len(plan.accuracy) if plan.cuda else 0  # 0: in pytest's own process
    command = [sys.executable, "-m", "pytest", "-n", str(workers), "-rf", "--tb=no", "-k", plan.accuracy_cases]
    running = {
        name: subprocess.Popen([*command, f"tests/{name}.py"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for name in plan.accuracy
    }
    for name, process in running.items():
        output, _ = process.communicate()
        passed = re.search(r"(\d+) passed", output)
        failed = [line.removeprefix("FAILED ") for line in output.splitlines() if line.startswith("FAILED ")]
        if not passed and not failed:  # nothing ran
            failed = [f"exit code {process.returncode}: {output.strip()[-300:]}"]
        yield name, {"passed": int(passed[1]) if passed else 0, "failed": failed}


def sdpa(plan: Plan) -> Measured:
    """Attention backends, forward and backward, on views of one packed projection as the model makes them."""
    s = plan.sizes
    backends = {name: getattr(SDPBackend, f"{name.upper()}_ATTENTION") for name in ("flash", "cudnn", "efficient")}
    for frames in plan.frame_counts:
        packed = torch.randn(s.batch, frames, 3 * s.dim, dtype=s.dtype, device=s.device, requires_grad=True)
        dy = torch.randn(s.batch, s.heads, frames, s.dim // s.heads, dtype=s.dtype, device=s.device)

        def forward(backend, packed=packed):
            with sdpa_kernel(backend):
                q, k, v = packed.unflatten(-1, (3, s.heads, -1)).permute(2, 0, 3, 1, 4)
                return F.scaled_dot_product_attention(q, k, v)

        def backward(out, packed=packed, dy=dy):
            return torch.autograd.grad(out, packed, dy)

        flops = 4 * s.batch * frames**2 * s.dim
        for name, backend in (backends | {"math": SDPBackend.MATH}).items():
            try:
                timed = time_phases({name: Phases(partial(forward, backend), backward)}, s.repeats)[name]
                timed["tflop_per_s"] = 3.5 * flops / timed["both"]["median_s"] / 1e12
            except RuntimeError as error:  # a backend that this device or shape does not have
                timed = {"wrong": str(error).strip().splitlines()[0]}
            yield f"T{frames} {name}", timed


def ops(plan: Plan) -> Measured:
    """Every operation, fused against torch.compile and eager, and the bandwidth of the largest at 60k tokens."""
    gated, (dim, frames, _) = bench_gated_residual, plan.shape
    yield "gated_residual 60k", compare(gated.OP, (dim, frames, plan.large_batch), plan.sizes.repeats, plan.compiler)
    measured_here = (module.OP for module in OPERATIONS if module is not bench_align_loss)
    for op in (gated.CHAIN, *measured_here):
        _free()
        yield op.name, compare(op, plan.shape, plan.sizes.repeats, plan.compiler)


def alignment(plan: Plan) -> Measured:
    """Pooled and frame-wise alignment of three layers, time and extra memory."""
    for name, op in (("pooled", bench_align_loss.OP), ("frames", bench_align_loss.FRAMES)):
        yield name, compare(op, plan.shape, plan.sizes.repeats, plan.compiler)
        _free()


def block(plan: Plan) -> Measured:
    """Four blocks, ours against released, eager and torch.compile; ours under torch.compile(fullgraph=True)."""
    yield "x".join(map(str, plan.shape)), bench_block.measure(plan.shape, plan.sizes.repeats, plan.compiler)[0]


def foga(plan: Plan) -> Measured:
    """FoG-A of all layers on two clips: sequential, stacked, prefix-shared, and that in a CUDA graph."""
    s = plan.sizes
    model, clips = awake_model(s, s.dtype).eval().requires_grad_(False), 2
    batch, gates = random_clips(s, clips), single_ablations(s.depth)
    t = torch.full((clips,), 0.5, device=s.device)
    x_t = batch.mel.to(s.dtype)
    repeated = x_t.repeat(len(gates), 1, 1)

    def rows():
        return model(repeated, t, batch.condition).v.unflatten(0, (len(gates), clips))

    def score(velocities: torch.Tensor) -> torch.Tensor:
        return velocity_change(velocities[1:], velocities[0], batch.condition.lengths)

    on_device = gates.to(s.device)

    def stacked():
        with row_gates(model, on_device, clips):
            return score(rows())

    def prefix_shared():
        with multi_gate(model.blocks, gates, row_arguments=(), check_rows=False):
            return score(rows())

    calls = {
        "sequential": lambda: score(sequential_velocities(model, x_t, t, batch.condition)),
        "stacked": stacked,
        "prefix-shared": prefix_shared,
    }
    yield "block_forwards", count_block_forwards(gates)
    with torch.no_grad():
        scores = {name: call() for name, call in calls.items()}
        for name, score_of in scores.items():
            yield f"{name} max score difference", float((score_of - scores["sequential"]).abs().max())
        yield "mean score", float(scores["sequential"].mean())
        for name, result in time_interleaved(calls, max(2, s.repeats // 2)).items():
            yield name, result
        if not plan.cuda:
            return
        probe = FogaProbe(model, ProbePoints((0.5,)), graph=True)
        given = ProbeBatch(batch.mel, batch.condition, torch.zeros(clips, dtype=torch.long), tuple(range(clips)))
        measured = probe.launch(given)  # captures
        eager = FogaProbe(model, ProbePoints((0.5,))).launch(given)
        yield "graphed max score difference", float((measured.values - eager.values).abs().max())
        yield "host_sync", _host_sync(prefix_shared) or _host_sync(lambda: probe.launch(given))
        yield "graphed", time_interleaved({"graphed": lambda: probe.launch(given)}, s.repeats)["graphed"]


def _host_sync(call: Callable[[], object]) -> str:
    """Return the error of an operation in `call` that waits for the GPU, or an empty string."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def step(plan: Plan) -> Measured:
    """The whole optimizer step, eager and as a CUDA graph; against the reference backend; with 1.5B parameters."""
    s = plan.sizes

    def timed(sizes: Sizes, call: Callable[[], object], clips: int) -> dict:
        result = time_interleaved({"step": call}, sizes.repeats, warmup=3)["step"]
        took = result["median_s"]
        return result | {"clips_per_s": clips / took, "tflop_per_s": clips * sizes.clip_flops() / took / 1e12}

    for clips in (s.batch, s.small_batch):
        ours = OurStep(s, clips)
        first = [ours() for _ in range(4)]
        yield f"ours B{clips}", timed(s, ours, clips)
        del ours
        _free()
        if not plan.cuda:
            continue
        graph_step = OurStep(s, clips)
        replay, loss = graphed(graph_step)  # three steps of warm-up; the replay is the fourth
        replay()
        yield f"graphed B{clips} loss difference", float((loss - first[3]).abs() / first[3].abs())
        yield f"graphed B{clips}", timed(s, replay, clips)
        del graph_step, replay, loss
        _free()
    for clips in (s.batch, s.small_batch):
        with force_backend("reference"):
            yield f"reference B{clips}", timed(s, OurStep(s, clips), clips)
        _free()
    wide = replace(s, dim=plan.wide[0], depth=plan.wide[1], repeats=max(2, s.repeats // 2))
    for clips in (s.batch, s.batch // 2):
        try:
            ours = OurStep(wide, clips)
            parameters = sum(weight.numel() for weight in ours.weights)
            yield "wide", timed(wide, ours, clips) | {"parameters": parameters, "clips": clips}
            return
        except torch.OutOfMemoryError:  # again with half as many clips; the result holds their number
            ours = None
        _free()


def released(plan: Plan) -> Measured:
    """Measure the released recipe's step, the same with bf16, SDPA and cached teachers, and its teachers' time in the
    run's precision. Teachers are stand-ins of their size."""
    s, repeats = plan.sizes, max(2, plan.sizes.repeats // 3)
    with torch.device(s.device):
        teachers = TeacherStandIn(*plan.whisper), TeacherStandIn(*plan.beats)
    for name, given in (("released", teachers), ("with bf16, SDPA and cached teachers", None)):
        recipe = ReleasedStep(s, given)
        result = time_interleaved({"step": recipe}, repeats)["step"]
        yield name, result | {"clips_per_s": s.small_batch / result["median_s"]}
        del recipe
        _free()
    whisper, beats = (teacher.to(s.dtype) for teacher in teachers)
    half = max(1, s.batch // 2)
    for name, teacher, clips in (
        ("whisper", whisper, s.batch),
        ("whisper half", whisper, half),
        ("beats half", beats, half),
    ):
        yield f"{name}, run's precision", time_interleaved({"it": partial(teacher, clips)}, repeats)["it"]


def zero2(plan: Plan) -> Measured:
    """One rank's real step through DeepSpeed, ZeRO stage 2."""
    missing = [name for name in ("deepspeed", "webdataset") if importlib.util.find_spec(name) is None]
    if missing:
        yield "not measured", f"{' and '.join(missing)} not installed"
        return
    from agrepa_fast.alignment.aligner import Aligner
    from agrepa_fast.config import Config, DataConfig, TrainConfig
    from agrepa_fast.data.batch import Batch
    from agrepa_fast.data.layout import BatchLayout
    from agrepa_fast.training.context import RunContext
    from agrepa_fast.training.run import Run
    from agrepa_fast.zero.ds_config import find_ds_config, resolve_ds_config
    from agrepa_fast.zero.ema import Ema
    from agrepa_fast.zero.engine import build_engine
    from agrepa_fast.zero.process_group import join_process_group

    s = plan.sizes
    os.environ.setdefault("LOCAL_RANK", "0")
    device = join_process_group()
    config = Config(model=s.model, data=DataConfig(n_mels=s.mels), train=TrainConfig(batch_clips=s.batch))
    ds_config = resolve_ds_config(find_ds_config("zero2.json"), config.train, BatchLayout(s.batch, 1, 0, 1), device)
    engine = build_engine(awake_model(s, torch.float32), config, ds_config)
    aligner = Aligner(config, {"speech": s.speech_teacher, "audio": s.audio_teacher}, device)
    aligner.select(s.selection)
    numbers = {name: lambda *_, **__: None for name in ("add", "count_batch", "skip")}  # a step only hands it numbers
    metrics = SimpleNamespace(**numbers, print=print)
    ema = Ema(engine, config.train.ema_decay)
    choice = SimpleNamespace(aligner=aligner, keep_gradient_norms=lambda *_: None)  # nothing is measured here
    index = SimpleNamespace(domains=())  # the one batch comes from no shards
    run = Run(RunContext(config, index, device, 0, 1, Path()), engine, ema, choice, metrics)
    engine.module.train()
    clips = random_clips(replace(s, device="cpu"), s.batch)
    places = tuple(range(s.batch))
    batch = Batch(tuple(map(str, places)), clips.domain, clips.mel, clips.condition, clips.teacher, places)
    result = time_interleaved({"step": lambda: run.step(iter([batch]), 0)}, s.repeats)["step"]
    yield "ours", result | {"clips_per_s": s.batch / result["median_s"]}


PARTS: dict[str, Callable[[Plan], Measured]] = {
    part.__name__: part for part in (ceilings, accuracy, block, step, foga, ops, alignment, released, sdpa, zero2)
}
