"""The parts of gpu_suite.py that measure kernels, blocks and probes. Each yields (key, value) per measurement, so that
a later failure loses none of them."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import bench_ada_norm
import bench_align_loss
import bench_block
import bench_frame_loss
import bench_fuse
import bench_gated_residual
import bench_linear_gelu
import bench_qk_norm_rope
import torch
import torch.nn.functional as F
from _attention import AttentionCase
from _bench import Allowed, Op, Results, as_tuple, compare, differentiate, why_wrong
from _gpu_steps import free
from _plan import Plan
from _results import ROOT
from _timing import peak_memory_mib, time_interleaved
from probe_throughput import Case

from agrepa_fast.kernels._launch import TILES, Tile

Measured = Iterator[tuple[str, object]]
SAME = Allowed(0.0, 2e-3)  # sums over other chunks of frames, rounded
OTHER_TILES = {
    "fwd": (Tile(4, 8), Tile(2, 4), Tile(1, 1), Tile(4, 4)),
    "bwd": (Tile(1, 4, 2, 16), Tile(1, 4, 2, 32), Tile(1, 4, 3, 32), Tile(1, 4, 1, 32), Tile(2, 8, 2, 32), Tile(2, 8)),
}


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


def attention(plan: Plan) -> Measured:
    """Attention forward and backward, over clips of one length and of several: all methods must agree."""
    for frames in plan.frame_counts:
        for kind in ("full", "padded"):
            yield f"T{frames} {kind}", AttentionCase(plan.sizes, frames, kind == "padded").measure()
            free()


def block(plan: Plan) -> Measured:
    """Four blocks, ours against released, eager and torch.compile; ours under torch.compile(fullgraph=True)."""
    yield "x".join(map(str, plan.shape)), bench_block.measure(plan.shape, plan.sizes.repeats, plan.compiler)[0]


def foga(plan: Plan) -> Measured:
    """FoG-A of all layers on two clips, every method as a replayed CUDA graph; and what a run's probe does."""
    s = plan.sizes
    case = Case(s.depth, s.dim, s.frames, 2, s.dtype)
    methods = case.methods()
    yield "block forwards", case.block_forwards()
    scores = {name: method() for name, method in methods.items()}
    yield "mean score", float(scores["sequential"].mean())
    for name, score in scores.items():
        yield f"{name} max score difference", float((score - scores["sequential"]).abs().max())
    yield "prefix-shared MiB", peak_memory_mib(methods["prefix-shared"])
    if plan.cuda:
        yield "waits for the GPU", _host_sync(methods["probe"])
    for name, result in time_interleaved(case.to_time(), s.repeats).items():
        yield name, result


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


def tiles(plan: Plan) -> Measured:
    """The norms' kernels with each tile, at 60k tokens and at a step's. The tile in use comes first."""
    for op in (bench_ada_norm.OP, bench_gated_residual.OP):
        for clips, phase in product((plan.large_batch, plan.sizes.batch), ("fwd", "bwd")):
            yield f"{op.name}_{phase} {clips * plan.sizes.frames} tokens", _time_tiles(plan, op, phase, clips)
            free()


def _time_tiles(plan: Plan, op: Op, phase: str, clips: int) -> dict[str, dict]:
    """Return seconds and GB/s of one kernel per tile, named rows x warps x stages x chunk, or {"wrong": message}
    for one that changes a result."""
    shape, kernel, backward = (*plan.shape[:2], clips), f"{op.name}_{phase}", phase == "bwd"
    inputs = op.make_inputs(*shape, plan.sizes.dtype, plan.sizes.device)
    for name in op.leaves:
        inputs[name].requires_grad_()
    outputs = as_tuple(op.fused(**inputs))
    gradients, in_use = [torch.randn_like(output) for output in outputs], TILES[kernel]

    def run(tile: Tile) -> Results:
        TILES[kernel] = tile
        if backward:
            made = differentiate(outputs, inputs, op.leaves, gradients, retain_graph=True)
        else:
            made = as_tuple(op.fused(**inputs))
        return {str(number): tensor.detach() for number, tensor in enumerate(made)}

    tiles = {"x".join(map(str, tile)): partial(run, tile) for tile in dict.fromkeys((in_use, *OTHER_TILES[phase]))}
    try:
        usual = run(in_use)
        wrong = {name: why_wrong(call, usual, usual, SAME) for name, call in tiles.items()}
        timed = time_interleaved({name: call for name, call in tiles.items() if not wrong[name]}, plan.sizes.repeats)
    finally:
        TILES[kernel] = in_use
    moved = op.traffic(*shape)[backward] * plan.sizes.dtype.itemsize
    for result in timed.values():
        result["gb_per_s"] = moved / result["median_s"] / 1e9
    return {name: {"wrong": wrong[name]} if wrong[name] else timed[name] for name in tiles}


def ops(plan: Plan) -> Measured:
    """A block's chain of norms and gates, its rotary positions and FFN, against torch.compile and eager."""
    for op in (bench_gated_residual.CHAIN, bench_qk_norm_rope.OP, bench_linear_gelu.OP):
        yield op.name, compare(op, plan.shape, plan.sizes.repeats, plan.compiler)
        free()


def alignment(plan: Plan) -> Measured:
    """Pooled alignment of three layers and frame-wise alignment of one, time and extra memory."""
    for name, op in (("pooled", bench_align_loss.OP), ("frames", bench_frame_loss.OPS[0])):
        yield name, compare(op, plan.shape, plan.sizes.repeats, plan.compiler)
        free()


def fuse(plan: Plan) -> Measured:
    """A DiT block of F5-TTS: the package's, compiled by torch.compile, and fused."""
    yield "x".join(map(str, plan.shape)), bench_fuse.measure(plan.shape, plan.sizes.repeats, plan.compiler)


PARTS: dict[str, Callable[[Plan], Measured]] = {
    part.__name__: part for part in (ceilings, accuracy, tiles, attention, block, foga, ops, alignment, fuse)
}
