"""Check an operation against float64, then time it fused, compiled by torch.compile and eager, on the same tensors."""

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from _results import print_table, write_json
from _timing import Phases, milliseconds, time_phases

Results = dict[str, torch.Tensor]  # outputs and gradients by name
FEW = 64  # numbers: of so few, the RMS error is luck
TINY, CALLS = (64, 8, 2), 8  # d, T, B; calls in one graph


class Allowed(NamedTuple):
    """The RMS error that a method may have: `factor` times plain PyTorch's, plus `floor` times the result's RMS."""

    factor: float
    floor: float


FUSED = Allowed(1.5, 1e-7)  # the floor is for results where plain PyTorch happens to be exact
BASELINE = Allowed(5.0, 1e-4)  # inductor sums thousands of fp32 rows one after another; wrong gradients are far off


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def disagreement(got: Results, plain: Results, exact: Results, allow: Allowed) -> str:
    """Return the largest error beyond the allowed one, in words, or an empty string. Results of few numbers get 8 times
    the allowance, since their errors vary."""
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
    """Return outputs of call(**inputs) and gradients of `leaves`, by name. `gradients` are those of the outputs."""
    outputs = as_tuple(call(**inputs))
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    if leaves:
        grads = differentiate(outputs, inputs, leaves, gradients)
        results |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return results


def differentiate(
    outputs, inputs: Results, leaves: Iterable[str], gradients: list[torch.Tensor], retain_graph: bool = False
) -> tuple:
    """Return the gradients of `leaves`, given those of the outputs. Outputs without a graph are left out."""
    pairs = zip(as_tuple(outputs), gradients, strict=True)
    outputs, gradients = zip(*((o, g) for o, g in pairs if o.requires_grad), strict=True)
    return torch.autograd.grad(outputs, [inputs[name] for name in leaves], gradients, retain_graph=retain_graph)


def as_tuple(outputs) -> tuple[torch.Tensor, ...]:
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(o for o in outputs if o is not None)


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a detached copy in `dtype` with the same requires_grad; integers keep their dtype."""
    made = tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
    return made.requires_grad_(tensor.requires_grad)


@dataclass(frozen=True)
class Op:
    """One operation to measure.

    make_inputs(d, T, B, dtype, device) returns tensors by argument name. `leaves` are the arguments that get gradients;
    without leaves there is no backward. traffic(d, T, B) returns the elements that forward and backward must move, and
    flops(d, T, B) their operations. dtype is that of training; None takes bf16 on a GPU and fp32 on a CPU.
    """

    name: str
    make_inputs: Callable[..., Results]
    fused: Callable
    reference: Callable
    leaves: tuple[str, ...]
    traffic: Callable[[int, int, int], tuple[int, int]]
    flops: Callable[[int, int, int], tuple[int, int]] | None = None
    dtype: torch.dtype | None = None


def compare(op: Op, shape: tuple[int, int, int], repeats: int, compiler: str = "inductor") -> dict[str, dict]:
    """Return the timings of fused, torch.compile(reference) and eager, on the same tensors. A method with wrong results
    is not timed; its entry is {"wrong": message}."""
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


def call_cost(op: Op, rounds: int = 300) -> dict[str, dict[str, float]]:
    """Return the microseconds of CPU time that a call takes on tensors so small that computing takes none: fused and
    eager, forward and backward, and without gradients. The least of many rounds, in which methods take turns.

    One graph holds CALLS calls, as a training step's holds many: a backward on a GPU starts with a change of threads,
    of which only Python's part of it must wait for the interpreter.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = op.dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    given = [op.make_inputs(*TINY, dtype, device) for _ in range(CALLS)]
    leaves = [inputs[name].requires_grad_() for inputs in given for name in op.leaves]
    gradients = [torch.randn_like(output) for output in as_tuple(op.reference(**given[0]))]

    def both(call):
        outputs = [output for inputs in given for output in as_tuple(call(**inputs))]
        pairs = [(o, g) for o, g in zip(outputs, CALLS * gradients, strict=True) if o.requires_grad]
        torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs])

    def forward(call):
        with torch.no_grad():
            for inputs in given:
                call(**inputs)

    kinds = ({"forward and backward": both} if op.leaves else {}) | {"without gradients": forward}
    costs = {kind: {"fused": float("inf"), "eager": float("inf")} for kind in kinds}
    for kind, run in kinds.items():
        for _ in range(rounds):
            for name, call in (("fused", op.fused), ("eager", op.reference)):
                start = time.perf_counter()
                run(call)
                taken = (time.perf_counter() - start) / CALLS
                costs[kind][name] = min(costs[kind][name], 1e6 * taken)
                if device == "cuda":
                    torch.cuda.synchronize()
    return costs


def why_wrong(run: Callable[[], Results], plain: Results, exact: Results, allow: Allowed) -> str:
    """Return the reason not to time a method, its error or its exception; empty if the method is right."""
    try:
        return disagreement(run(), plain, exact, allow)
    except Exception as error:  # the failure of one method, in a compiler or a driver, must not end the others
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def total_s(result: dict) -> float | None:
    """Return the median seconds of a timing, of forward plus backward if it has both; None if it is wrong."""
    return None if "wrong" in result else result.get("both", result.get("forward", result))["median_s"]


def ratio(results: dict[str, dict], base: str, method: str) -> float | None:
    """Return the time of `base` over that of `method`, or None if one of them was wrong or is missing."""
    times = [total_s(results[name]) if name in results else None for name in (base, method)]
    return None if None in times else times[0] / times[1]


def op_rows(shape: str, results: dict[str, dict]) -> list[tuple]:
    rows = []
    for name, result in results.items():
        if "wrong" in result:
            rows.append((shape, name, "not timed", "wrong:", result["wrong"], "", "", "", ""))
            continue
        cells = []
        for phase in ("forward", "backward"):
            timing = result.get(phase)
            cells += ["", ""] if timing is None else [milliseconds(timing), f"{timing['gb_per_s']:.0f}"]
        speed = ratio(results, "eager", name)
        rows.append((shape, name, *cells, "" if speed is None else f"{speed:.2f}x", *gpu_cells(result)))
    return rows


def gpu_cells(result: dict) -> tuple[str, str]:
    """Return the cells that only a GPU run fills: the CPU's ms until the call was queued, and the peak extra MiB."""
    cpu = f"{1e3 * result['cpu']['median_s']:.2f}" if "cpu" in result else ""
    return cpu, f"{result['peak_memory_mib']:.0f}" if "peak_memory_mib" in result else ""


GPU_HEADER = ("CPU ms", "MiB")
OP_HEADER = (
    "d, T, B",
    "method",
    "forward ms (p20 to p80)",
    "GB/s",
    "backward ms (p20 to p80)",
    "GB/s",
    "vs eager",
    *GPU_HEADER,
)


def train_shapes() -> list[tuple[int, int, int]]:
    """Return the sizes (d, T, B) of training on this device."""
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
    made.add_argument("--call-cost", action="store_true", help="print the CPU time of a call on tiny tensors, and end")
    made.add_argument("--out", help="JSON file (default: benchmarks/results/bench_<op>_<device>.json)")
    return made


def bench_op(ops: list[Op], description: str) -> None:
    """Run the program of one bench_<op>.py. Exits with 1 if the fused operation is less accurate than allowed."""
    args = parser(description).parse_args()
    if args.call_cost:
        costs = [(op.name, kind, cost) for op in ops for kind, cost in call_cost(op).items()]
        rows = [
            (name, kind, *(f"{cost[m]:.0f}" for m in ("fused", "eager")), f"{cost['fused'] / cost['eager']:.2f}")
            for name, kind, cost in costs
        ]
        print_table("CPU time of a call", ("operation", "passes", "fused us", "eager us", "ratio"), rows)
        return
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
