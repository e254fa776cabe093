"""Compile every Triton kernel for GPUs that are not here, by its real launch code, and compare its cost with limits.

    python benchmarks/compile_kernels.py [--archs 80 90 100] [--dims 256 1024 1152 1664] [--ops ada_norm ...] [--out F]
        [--tiles ada_norm_bwd=1,4,2,32 ...]

The public operations run on CPU tensors, forced onto the Triton path, forward and backward. A stub driver compiles each
launch for sm_80, sm_90 and sm_100 instead of starting it. compile_limits.json holds the limits per Triton version.

The main path is every load from a tensor of at least T x 100 elements, a clip's mel: all (N, T, D) tensors. Loads from
smaller tensors (statistics, modulations, rotary tables, pooled states) may be narrower and are printed apart.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported

import torch
import triton
from _results import RESULTS, write_json
from _sass import costs
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.compiler.errors import CompilationError
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from agrepa_fast.kernels import (
    ada_norm,
    align_loss,
    flow_mix,
    force_backend,
    frame_loss_sum,
    gated_residual,
    linear_gelu,
    qk_norm_rope,
    velocity_change,
)
from agrepa_fast.kernels._launch import TILES, Tile
from agrepa_fast.kernels._library import implementation

LIMITS = Path(__file__).with_name("compile_limits.json")
N, T, HEAD, MELS = 16, 938, 64, 100  # the batch of a training step on one GPU: 16 clips of 10 s
H100 = (90, 1024)  # architecture and width where limits["h100"] hold: programs per SM and barriers
LARGE = T * MELS  # elements of a tensor on the main path
LINE = "{:>3} {:>4}  {:30} {:28} {:>8} {:>4} {:>6} {:>6} {:>8} {:>6} {:>9}  {}"
COLUMNS = (
    "arch", "d", "kernel", "variant", "programs", "registers", "shared", "programs_per_sm", "barriers", "spills",
)  # fmt: skip
ARCHS, DIMS = (80, 90, 100), (256, 1024, 1152, 1664)


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, requires_grad=True)


def modulations(width: int) -> tuple[torch.Tensor, ...]:
    """Return the six views that GatedDiTBlock takes of one packed modulation."""
    return leaf(N, 6, width).unbind(-2)


def backward(*outputs: torch.Tensor) -> None:
    torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])


def run_ada_norm(width: int) -> None:
    scale, shift, *_ = modulations(width)
    backward(ada_norm(leaf(N, T, width), scale, shift))
    scale, shift, *_ = leaf(N, T, 6, width).unbind(-2)  # per-frame time
    backward(ada_norm(leaf(N, T, width), scale, shift))


def run_gated_residual(width: int) -> None:
    """Run it inside the block and at its end, as training does; then as the probe and alignment do."""
    _, _, scale, shift, gate1, gate2 = modulations(width)
    lengths, m = torch.full((N,), T), torch.empty(N)
    h, f = leaf(N, T, width), leaf(N, T, width)
    backward(*gated_residual(h, f, gate1, scale=scale, shift=shift)[:2])
    backward(gated_residual(h, f, gate2).h)
    backward(*gated_residual(h, f, gate1, m, scale=scale, shift=shift)[:2])
    aligned = gated_residual(h, f, gate2, m, lengths=lengths, time_sum=True)
    backward(aligned.h, aligned.time_sum)
    _, _, scale, shift, gate1, _ = leaf(N, T, 6, width).unbind(-2)  # per-frame time
    backward(*gated_residual(h, f, gate1, scale=scale, shift=shift)[:2])


def run_qk_norm_rope(width: int) -> None:
    heads, half = width // HEAD, HEAD // 2
    rope = torch.empty(T, half), torch.empty(T, half)
    weights = {"q_weight": leaf(HEAD), "k_weight": leaf(HEAD)}
    backward(*qk_norm_rope(leaf(N, T, 3 * width), heads, rope))
    backward(*qk_norm_rope(leaf(N, T, 3 * width), heads, rope, **weights))
    backward(*qk_norm_rope(leaf(N, T, 3 * width), heads, rope, **weights, interleaved=False, rotary_heads=1))


def run_linear_gelu(width: int) -> None:
    for gelu in ("erf", "tanh"):
        backward(linear_gelu(leaf(N, T, width), leaf(4 * width, width), leaf(4 * width), gelu))


def run_align_loss(width: int) -> None:
    """Run three layers of agrepa-a's 128 clips against a teacher of Whisper-large-v3's width, fp32 as in training."""
    layers, clips, teacher = 3, 8 * N, 1280
    heads = [
        leaf(layers, *shape, dtype=torch.float32) for shape in ((width, width), (width,), (teacher, width), (teacher,))
    ]
    weights, mask = torch.empty(layers), torch.ones(clips, dtype=torch.bool)
    pooled = leaf(layers, clips, width, dtype=torch.float32)
    backward(align_loss(pooled, *heads, torch.empty(clips, teacher), weights, mask))


def run_frame_loss(width: int) -> None:
    """Run one layer through REPA's head, in the run's precision as in training."""
    teacher, inner = 1280, 2 * width
    layers = [(leaf(o, i), leaf(o)) for i, o in ((width, inner), (inner, inner), (inner, teacher))]
    lengths, weights = torch.full((N,), T), torch.empty(N)
    backward(frame_loss_sum(leaf(N, T, width), torch.empty(N, T, teacher), lengths, weights, layers)[0])


def run_velocity_change(width: int) -> None:
    """Run 24 variants of two clips."""
    variants, base = torch.empty(24, 2, T, MELS, dtype=torch.bfloat16), torch.empty(2, T, MELS, dtype=torch.bfloat16)
    velocity_change(variants, base, torch.full((2,), T))


def run_flow_mix(width: int) -> None:
    flow_mix(torch.empty(N, T, MELS), torch.empty(N), torch.arange(N))


# operation -> function that runs it forward and backward at width d
CASES: dict[str, Callable[[int], None]] = {
    "ada_norm": run_ada_norm,
    "gated_residual": run_gated_residual,
    "qk_norm_rope": run_qk_norm_rope,
    "linear_gelu": run_linear_gelu,
    "align_loss": run_align_loss,
    "frame_loss": run_frame_loss,
    "velocity_change": run_velocity_change,
    "flow_mix": run_flow_mix,
}


class Stub:
    """The part of a driver that Triton needs to specialise arguments and compile."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # Triton caches kernels by device: one number would reuse sm_80's for sm_90

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cuda", 0)


class WithoutProducts(TorchDispatchMode):
    """Inside it, matrix products return uninitialised results: they take seconds on a CPU, and no value matters."""

    PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")  # and linear, whose weight is transposed

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if ours := implementation(func):
            with self:
                return ours(*args, **kwargs or {})
        name = func._schema.name.partition("::")[2]
        if name in self.PRODUCTS or name == "linear":
            left, right = args[-2:] if name in self.PRODUCTS else (args[0], args[1].t())
            return left.new_empty((*left.shape[:-1], right.shape[-1]))
        return func(*args, **kwargs or {})


@dataclass
class Launched:
    """A compiled kernel and its launch."""

    name: str
    variant: str  # flags that are on, and -name for pointers that are None
    programs: int  # that the last launch starts
    kernel: CompiledKernel
    sizes: dict[str, int]  # tensor argument -> elements, the most of all launches


@contextmanager
def recording(arch: int) -> Iterator[dict[str, Launched]]:
    """Inside it, launches compile for this architecture. Yields the dict that they fill, an entry per kernel."""
    launched, run = {}, JITFunction.run

    def compile_only(self, *args, grid, warmup=False, **options):
        given = dict(zip(self.arg_names, args, strict=False)) | options
        on = [name.lower() for name, value in given.items() if value is True]
        off = ["-" + name.removesuffix("_ptr") for name, value in given.items() if value is None]
        variant = " ".join(on + off)
        kernel = run(self, *args, grid=(1,), warmup=True, **options)
        made = Launched(self.__name__, variant, math.prod(grid), kernel, {})
        sizes = launched.setdefault(kernel.hash, made).sizes
        for name, value in given.items():
            if isinstance(value, torch.Tensor):
                sizes[name] = max(sizes.get(name, 0), value.numel())

    driver.set_active(Stub(arch))
    JITFunction.run = compile_only
    try:
        yield launched
    finally:
        JITFunction.run = run


def compile_case(operation: str, width: int, arch: int) -> tuple[list[dict], str | None]:
    """Return a row of costs per kernel that the operation launches, forward and backward, and the error if one came."""
    error = None
    with recording(arch) as launched, force_backend("triton"), WithoutProducts():
        try:
            CASES[operation](width)
        except CompilationError as failed:
            error = str(failed)
    if not launched and error is None:
        error = "no kernel was launched"
    rows = []
    for one in launched.values():
        place = {"operation": operation, "arch": one.kernel.metadata.target.arch, "d": width}
        kind = {"kernel": one.name, "variant": one.variant, "programs": one.programs}
        rows.append(place | kind | costs(one.kernel, one.sizes, LARGE))
    return rows, error


def broken_limits(row: dict, limits: dict) -> list[str]:
    """Return a message per limit that a row of costs breaks."""
    wide = limits["main_load_bits"].get(str(row["d"]), 0)
    registers = limits["registers"].get(row["kernel"])
    broken = []
    if row["spills"] > limits["spills"]:
        broken.append(f"{row['spills']} spills, allowed {limits['spills']}")
    if row["main_load_bits"] is not None and row["main_load_bits"] < wide:
        broken.append(f"a main load of {row['main_load_bits']} bits, wanted {wide}")
    if registers is None:
        broken.append(f"{row['registers']} registers, and no limit in {LIMITS.name}")
    elif row["registers"] > registers:
        broken.append(f"{row['registers']} registers, allowed {registers}")
    if (row["arch"], row["d"]) == H100 and "per_frame" not in row["variant"]:
        held = limits.get("h100", {}).get(row["kernel"], {"programs_per_sm": 0, "barriers": math.inf})
        if row["programs_per_sm"] < held["programs_per_sm"]:
            broken.append(f"{row['programs_per_sm']} programs per SM, wanted {held['programs_per_sm']}")
        if row["barriers"] > held["barriers"]:
            broken.append(f"{row['barriers']} barriers, allowed {held['barriers']}")
    return broken


def limits_of(version: str) -> dict:
    """Return the limits of this Triton version (major.minor). Raises ValueError if there are none."""
    limits = json.loads(LIMITS.read_text())
    series = ".".join(version.split(".")[:2])
    if series not in limits:
        raise ValueError(f"{LIMITS.name} has no limits for Triton {series}, only for {', '.join(limits)}: add them")
    return limits[series]


def summary(rows: list[dict]) -> dict[str, dict[str, dict]]:
    """Return per architecture and operation: number of kernels, most registers, most spills, narrowest load in bits of
    the main path at each width, and narrowest other load."""
    made: dict[str, dict[str, dict]] = {}
    for arch, operation in dict.fromkeys((row["arch"], row["operation"]) for row in rows):
        group = [row for row in rows if (row["arch"], row["operation"]) == (arch, operation)]
        main: dict[int, int] = {}
        for row in group:
            if row["main_load_bits"] is not None:
                main[row["d"]] = min(row["main_load_bits"], main.get(row["d"], row["main_load_bits"]))
        made.setdefault(f"sm_{arch}", {})[operation] = {
            "kernels": len(group),
            "registers": max(row["registers"] for row in group),
            "spills": max(row["spills"] for row in group),
            "shared": max(row["shared"] for row in group),
            "main_load_bits": main,
            "other_load_bits": min((bits for row in group for bits in row["other_load_bits"].values()), default=None),
        }
    return made


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--archs", type=int, nargs="+", default=ARCHS)
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS)
    parser.add_argument("--ops", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", default=RESULTS / "compile_kernels.json")
    parser.add_argument("--tiles", nargs="+", default=[], metavar="kernel=rows,warps,stages,chunk")
    args = parser.parse_args(arguments)
    for kernel, _, numbers in (tile.partition("=") for tile in args.tiles):
        TILES[kernel] = Tile(*map(int, numbers.split(",")))

    limits, results, failures = limits_of(triton.__version__), [], 0
    names = ("programs", "regs", "shared", "per SM", "barriers", "spills", "main load", "other loads")
    print(LINE.format("sm", "d", "kernel", "variant", *names))
    for arch, width, operation in product(args.archs, args.dims, args.ops):
        compiled, error = compile_case(operation, width, arch)
        if error:
            print(f"{arch:>3} {width:>4}  BROKEN: {operation}: {error}")
            failures += 1
        for row in compiled:
            others = ", ".join(f"{name} {bits}" for name, bits in sorted(row["other_load_bits"].items()))
            print(LINE.format(*(row[name] for name in COLUMNS), row["main_load_bits"] or "-", others))
            for broken in broken_limits(row, limits):
                failures += 1
                print(f"    BROKEN: {broken}")
        results += compiled
    path = write_json("compile_kernels", {"broken_limits": failures, **summary(results)}, args.out)
    print(f"{len(results)} kernels compiled, {failures} limits broken; {path}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
