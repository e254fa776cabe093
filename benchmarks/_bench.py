"""What every benchmark shares: results checked against float64 first, interleaved timing with its spread, peak memory,
a plain table, and one JSON a run with machine and commit. Needs torch alone, and no installed package."""

import argparse
import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results")
sys.path.insert(0, str(ROOT))  # a GPU machine has the checkout, not always the installed package

Results = dict[str, torch.Tensor]  # outputs and gradients by name
FEW = 64  # numbers whose RMS error is luck
_FLUSH_BYTES = 256 * 2**20  # several times a GPU's L2
_flush: torch.Tensor | None = None


class Allowed(NamedTuple):
    """RMS error: so many times plain PyTorch's, and a share of the result's RMS."""

    factor: float
    floor: float


FUSED = Allowed(1.5, 1e-7)  # as accurate as plain PyTorch; the floor is for results where that happens to be exact
BASELINE = Allowed(5.0, 1e-4)  # not wrong: inductor sums thousands of fp32 rows in a row, wrong gradients are far off


class Phases(NamedTuple):
    """One way to compute a thing. backward gets what forward returned; None: there is none."""

    forward: Callable[[], object]
    backward: Callable[[object], object] | None = None


def _stamp() -> torch.cuda.Event | float:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start, end) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def _flush_l2() -> None:
    """Throw the tensors out of the GPU's cache: in training, other layers have been there since."""
    global _flush
    if torch.cuda.is_available():
        if _flush is None:
            _flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        _flush.zero_()


def spread(values: list[float]) -> dict[str, float]:
    fifths = quantiles(values, n=5, method="inclusive")
    return {"median_s": median(values), "p20_s": fifths[0], "p80_s": fifths[3]}


def time_phases(methods: dict[str, Phases], repeats: int, warmup: int = 2, *, apart: bool = True) -> dict[str, dict]:
    """Seconds of forward, backward and both for each method, and its peak extra GPU memory. Methods take turns, so
    drift hits all alike. apart: on a GPU, the cache is flushed before the backward as it is before the forward."""
    cuda = torch.cuda.is_available()
    seconds = {name: {"forward": [], "backward": [], "both": []} for name in methods}
    peak = dict.fromkeys(methods, 0)
    _flush_l2()
    for repeat in range(warmup + repeats):
        for name, (forward, backward) in methods.items():
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            _flush_l2()
            stamps = [_stamp()]
            output = forward()
            stamps += [_stamp()] * 2
            if backward is not None:
                if apart:
                    _flush_l2()
                    stamps[2] = _stamp()
                backward(output)
                stamps.append(_stamp())
            del output
            if cuda:
                torch.cuda.synchronize()
                peak[name] = max(peak[name], torch.cuda.max_memory_allocated() - before)
            if repeat < warmup:
                continue
            taken = [_seconds(*stamps[:2]), _seconds(*stamps[2:]) if backward is not None else 0.0]
            for phase, value in zip(seconds[name], (*taken, sum(taken)), strict=True):
                seconds[name][phase].append(value)
    results = {}
    for name, (_, backward) in methods.items():
        phases = seconds[name] if backward is not None else {"forward": seconds[name]["forward"]}
        results[name] = {phase: spread(values) for phase, values in phases.items()}
        if cuda:
            results[name]["peak_memory_mib"] = peak[name] / 2**20
    return results


def peak_memory_mib(call: Callable[[], object]) -> float:
    """Memory that one call holds at its highest beyond what there was before: on a GPU what was allocated there, on a
    CPU the process's resident pages, looked at every millisecond."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left in the heap would be taken from there unseen
    page, statm = os.sysconf("SC_PAGE_SIZE"), Path("/proc/self/statm")
    resident, done = [int(statm.read_text().split()[1])], threading.Event()

    def watch() -> None:
        while not done.wait(1e-3):
            resident.append(int(statm.read_text().split()[1]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return (max(resident) - resident[0]) * page / 2**20


def time_interleaved(
    calls: dict[str, Callable[[], object]], repeats: int, warmup: int = 1
) -> dict[str, dict[str, float]]:
    """Median, p20 and p80 seconds of each call, and its peak extra GPU memory; the calls take turns."""
    timed = time_phases({name: Phases(call) for name, call in calls.items()}, repeats, warmup)
    return {name: result.pop("forward") | result for name, result in timed.items()}


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def disagreement(got: Results, plain: Results, exact: Results, allow: Allowed) -> str:
    """Empty when every output and gradient is as close to `exact` as allowed, else the worst one. A few numbers may be
    less lucky than PyTorch's."""
    worst, message = 1.0, ""
    for name, wanted in exact.items():
        luck = 8 if wanted.numel() < FEW else 1
        allowed = luck * (allow.factor * rms(plain[name] - wanted) + allow.floor * rms(wanted)) + 1e-30
        error = rms(got[name] - wanted)
        if not error <= worst * allowed:  # NaN is wrong too
            worst = error / allowed
            message = f"{name}: RMS error {error:.1e}, allowed {allowed:.1e}"
    return message


def evaluate(call: Callable, inputs: Results, leaves: Iterable[str], gradients: list[torch.Tensor]) -> Results:
    """Outputs of call(**inputs), and the gradients of `leaves` for output gradients `gradients`, by name."""
    outputs = as_tuple(call(**inputs))
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    if leaves:
        grads = differentiate(outputs, inputs, leaves, gradients)
        results |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return results


def differentiate(outputs, inputs: Results, leaves: Iterable[str], gradients: list[torch.Tensor]) -> tuple:
    """Gradients of `leaves`, from those of the outputs that have any."""
    pairs = zip(as_tuple(outputs), gradients, strict=True)
    outputs, gradients = zip(*((o, g) for o, g in pairs if o.requires_grad), strict=True)
    return torch.autograd.grad(outputs, [inputs[name] for name in leaves], gradients)


def as_tuple(outputs) -> tuple[torch.Tensor, ...]:
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(o for o in outputs if o is not None)


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A detached copy in `dtype`, with the same need of a gradient; integers stay."""
    made = tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
    return made.requires_grad_(tensor.requires_grad)


@dataclass(frozen=True)
class Op:
    """One operation to measure. make_inputs(d, T, B, dtype, device) -> tensors by argument name; `leaves` need
    gradients (none: no backward). traffic(d, T, B) -> elements that forward and backward must move, flops(d, T, B)
    likewise. dtype: what the operation works on in training; None: the precision of the run."""

    name: str
    make_inputs: Callable[..., Results]
    fused: Callable
    reference: Callable
    leaves: tuple[str, ...]
    traffic: Callable[[int, int, int], tuple[int, int]]
    flops: Callable[[int, int, int], tuple[int, int]] | None = None
    dtype: torch.dtype | None = None


def compare(op: Op, shape: tuple[int, int, int], repeats: int, compiler: str = "inductor") -> dict[str, dict]:
    """Fused, torch.compile(reference) and eager on the same tensors. A method whose results are wrong is not timed: its
    entry is {"wrong": what}."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = op.dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    torch.manual_seed(0)
    inputs = op.make_inputs(*shape, dtype, device)
    for name in op.leaves:
        inputs[name].requires_grad_()
    torch._dynamo.reset()
    calls = {"fused": op.fused, "torch.compile": torch.compile(op.reference, backend=compiler, dynamic=False)}
    calls["eager"] = op.reference
    gradients = [torch.randn_like(output) for output in as_tuple(op.reference(**inputs))]
    exactly = {name: cast(value, torch.float64) for name, value in inputs.items()}
    exact = evaluate(op.reference, exactly, op.leaves, [g.double() for g in gradients])
    plain = evaluate(op.reference, inputs, op.leaves, gradients)
    results: dict[str, dict] = {}
    for name, call in calls.items():
        allow = FUSED if name == "fused" else BASELINE
        wrong = why_wrong(lambda call=call: evaluate(call, inputs, op.leaves, gradients), plain, exact, allow)
        results[name] = {"wrong": wrong} if wrong else {}
    del exactly, exact, plain

    def backward(outputs):
        return differentiate(outputs, inputs, op.leaves, gradients)

    right = {name: call for name, call in calls.items() if not results[name]}
    methods = {
        name: Phases(lambda call=call: call(**inputs), backward if op.leaves else None) for name, call in right.items()
    }
    for name, timed in time_phases(methods, repeats).items():
        for number, phase in enumerate(("forward", "backward")[: 2 if op.leaves else 1]):
            took = timed[phase]["median_s"]
            timed[phase]["gb_per_s"] = op.traffic(*shape)[number] * dtype.itemsize / took / 1e9
            if op.flops:
                timed[phase]["tflop_per_s"] = op.flops(*shape)[number] / took / 1e12
        results[name] = timed
    return results


def why_wrong(run: Callable[[], Results], plain: Results, exact: Results, allow: Allowed) -> str:
    """Why a method is not timed: its error beside the allowed one, or what it raised. Empty when it is right."""
    try:
        return disagreement(run(), plain, exact, allow)
    except Exception as error:  # a compiler's or a driver's failure of one method must not end the others
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def total_s(result: dict) -> float | None:
    """Median seconds of forward and backward together; None when it was wrong."""
    return None if "wrong" in result else result["both" if "both" in result else "forward"]["median_s"]


def ratio(results: dict[str, dict], base: str, method: str) -> float | None:
    """How many times faster `method` is than `base`; None when either was wrong or is missing."""
    times = [total_s(results[name]) if name in results else None for name in (base, method)]
    return None if None in times else times[0] / times[1]


def milliseconds(timing: dict[str, float]) -> str:
    return f"{1e3 * timing['median_s']:.3f} ({1e3 * timing['p20_s']:.3f} to {1e3 * timing['p80_s']:.3f})"


def print_table(title: str, header: tuple[str, ...], rows: list[tuple]) -> None:
    cells = [tuple(map(str, row)) for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    print(f"\n{title}")
    for number, row in enumerate(cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


def op_rows(shape: str, results: dict[str, dict]) -> list[tuple]:
    rows = []
    for name, result in results.items():
        if "wrong" in result:
            rows.append((shape, name, "not timed", "wrong:", result["wrong"], "", "", ""))
            continue
        cells = []
        for phase in ("forward", "backward"):
            timing = result.get(phase)
            cells += ["", ""] if timing is None else [milliseconds(timing), f"{timing['gb_per_s']:.0f}"]
        speed = ratio(results, "eager", name)
        memory = f"{result['peak_memory_mib']:.0f}" if "peak_memory_mib" in result else ""
        rows.append((shape, name, *cells, "" if speed is None else f"{speed:.2f}x", memory))
    return rows


OP_HEADER = (
    "d, T, B",
    "method",
    "forward ms (p20 to p80)",
    "GB/s",
    "backward ms (p20 to p80)",
    "GB/s",
    "vs eager",
    "MiB",
)


def train_shapes() -> list[tuple[int, int, int]]:
    """(d, T, B): the sizes that are trained."""
    if torch.cuda.is_available():
        return [(1024, 938, 16), (1024, 938, 4)]
    return [(256, 400, 4), (512, 400, 2), (1024, 938, 1)]


def parse_shape(text: str) -> tuple[int, int, int]:
    sizes = tuple(int(part) for part in text.split(","))
    if len(sizes) != 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a shape is d,T,B, such as 256,400,4")
    return sizes


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shapes", nargs="+", type=parse_shape, default=train_shapes(), metavar="d,T,B")
    made.add_argument("--repeats", type=int, default=30 if torch.cuda.is_available() else 15, help="at least 2")
    made.add_argument(
        "--compiler", default="inductor", help="of the torch.compile baseline; aot_eager: quick, for tests"
    )
    made.add_argument("--out", help="JSON file (default: benchmarks/results/bench_<op>_<device>.json)")
    return made


def bench_op(ops: list[Op], description: str) -> None:
    """The program of one bench_<op>.py. Exits with 1 when the fused operation is less accurate than allowed."""
    args = parser(description).parse_args()
    results = {}
    for op in ops:
        results[op.name], rows = {}, []
        for shape in args.shapes:
            label = ", ".join(map(str, shape))
            results[op.name][label] = compare(op, shape, args.repeats, args.compiler)
            rows += op_rows(label, results[op.name][label])
        print_table(op.name, OP_HEADER, rows)
    settings = {"repeats": args.repeats, "compiler": args.compiler}
    print("\nwrote", write_json(f"bench_{ops[0].name}", {"settings": settings, "results": results}, args.out))
    if any("wrong" in result["fused"] for shapes in results.values() for result in shapes.values()):
        sys.exit(1)


def commit() -> str:
    """The commit measured, marked when the code (not the results) differs from it."""
    if shutil.which("git") is None:
        return "unknown"
    head, changed = (
        subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
        for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "agrepa_fast", "kernels", "csrc"])
    )
    return (head or "unknown") + ("-dirty" if changed else "")


def machine() -> dict[str, str]:
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    try:
        from triton import __version__ as triton
    except ModuleNotFoundError:
        triton = "none"
    from agrepa_fast.kernels import active_backend

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda or "none",
        "backend": active_backend(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "commit": commit(),
    }


def device_name() -> str:
    return torch.cuda.get_device_name().replace(" ", "-").lower() if torch.cuda.is_available() else "cpu"


def write_json(name: str, results: dict, out: str | Path | None = None) -> Path:
    """results/<name>_<cpu or the GPU's name>.json, or `out`."""
    path = Path(out) if out else RESULTS / f"{name}_{device_name()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
    return path
