"""Time forward and backward of 4 blocks: released style, SDPA, torch.compile and ours, with equal weights and inputs.

python benchmarks/bench_block.py [--shapes d,T,B ...] [--repeats N] [--profile] [--out FILE]

released        attention computes and returns its weights, fp32
eager           the blocks' reference backend with SDPA; bf16 on a GPU, like all below
torch.compile   the same, compiled
ours            GatedDiTBlock on its own backend (native on a CPU, Triton on a GPU)

A GPU run adds the plain block with flash attention, compiled (`eager`, `torch.compile` and `ours` take cuDNN's), and
ours under torch.compile(fullgraph=True). Outputs and all gradients are checked first; a wrong method is not timed.
"""

import sys

import torch
import torch.nn as nn
from _baselines import FlashBlock, ReleasedBlock
from _bench import BASELINE, FUSED, GPU_HEADER, Results, cast, gpu_cells, parser, ratio, why_wrong
from _results import RESULTS, print_table, write_json
from _timing import Phases, milliseconds, time_phases

from agrepa_fast import GatedDiTBlock
from agrepa_fast.kernels import force_backend

BLOCKS, HEAD = 4, 64


class Stack(nn.Module):
    def __init__(self, kind: type[GatedDiTBlock], dim: int, heads: int):
        super().__init__()
        self.blocks = nn.ModuleList(kind(dim, heads) for _ in range(BLOCKS))

    def forward(self, x: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, cond)
        return x


class Method:
    """One way to run the stack: a kind of block in a dtype on a backend, compiled or not."""

    def __init__(self, kind, state: Results, inputs: Results, dy, dtype, backend=None, compiler=None, fullgraph=False):
        self.backend = backend
        self.x, self.cond = (cast(inputs[name], dtype).requires_grad_() for name in ("x", "cond"))
        self.dy = dy.to(dtype)
        with self.x.device:
            stack = Stack(kind, self.x.shape[-1], max(1, self.x.shape[-1] // HEAD))
        stack.load_state_dict(state)
        self.stack = stack.to(dtype)
        self.names = ["x", "cond", *(name for name, _ in stack.named_parameters())]
        self.leaves = [self.x, self.cond, *stack.parameters()]
        self.run = self.stack
        if compiler is not None:
            self.run = torch.compile(self.stack, backend=compiler, fullgraph=fullgraph, dynamic=False)

    def forward(self) -> torch.Tensor:
        with force_backend(self.backend):
            return self.run(self.x, self.cond)

    def backward(self, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with force_backend(self.backend):
            return torch.autograd.grad(out, self.leaves, self.dy)

    def results(self) -> Results:
        out = self.forward()
        gradients = zip(self.names, self.backward(out), strict=True)
        return {"out": out.detach()} | {f"d{name}": gradient for name, gradient in gradients}


def build(shape: tuple[int, int, int], compiler: str) -> tuple[dict[str, Method], Method]:
    """Return the methods by name, all with one state_dict, and the exact method that judges them."""
    d, t, b = shape
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    stack = Stack(GatedDiTBlock, d, max(1, d // HEAD))
    for block in stack.blocks:  # zero-initialised modulations would hide the branches
        nn.init.normal_(block.modulation.weight, std=0.1 / d**0.5)
        nn.init.normal_(block.modulation.bias, std=0.3)
    state = stack.state_dict()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    # Rounded to the run's precision once: every method starts from the same numbers.
    state = {name: value.to(dtype).float().to(device) for name, value in state.items()}
    inputs = {"x": torch.randn(b, t, d), "cond": torch.randn(b, d)}
    inputs = {name: value.to(device, dtype) for name, value in inputs.items()}
    given = (state, inputs, torch.randn(b, t, d, device=device).to(dtype))
    exact_dtype = torch.float32 if device == "cuda" else torch.float64  # fp32 is exact enough to judge bf16
    methods = {
        "released": Method(ReleasedBlock, *given, torch.float32),
        "eager": Method(GatedDiTBlock, *given, dtype, "reference"),
        "torch.compile": Method(GatedDiTBlock, *given, dtype, "reference", compiler),
        "ours": Method(GatedDiTBlock, *given, dtype),
    }
    if device == "cuda":
        methods["torch.compile, flash"] = Method(FlashBlock, *given, dtype, None, compiler)
        methods["ours, torch.compile"] = Method(GatedDiTBlock, *given, dtype, None, compiler, fullgraph=True)
    return methods, Method(GatedDiTBlock, *given, exact_dtype, "reference")


def measure(shape: tuple[int, int, int], repeats: int, compiler: str = "inductor") -> tuple[dict, dict[str, Method]]:
    """Return timings by method, or {"wrong": message}, and the methods that were timed."""
    torch._dynamo.reset()
    methods, exactly = build(shape, compiler)
    exact, plain = exactly.results(), methods["eager"].results()
    del exactly
    results = {}
    for name, method in methods.items():
        allow = FUSED if name.startswith("ours") else BASELINE
        wrong = why_wrong(method.results, plain, exact, allow)
        results[name] = {"wrong": wrong} if wrong else {}
    del exact, plain
    right = {name: method for name, method in methods.items() if not results[name]}
    phases = {name: Phases(method.forward, method.backward) for name, method in right.items()}
    results |= time_phases(phases, repeats, apart=False)
    for name, result in results.items():
        result["over_released"] = ratio(results, "released", name)
    return results, right


def rows(label: str, results: dict) -> list[tuple]:
    made = []
    for name, result in results.items():
        if "wrong" in result:
            made.append((label, name, "not timed, wrong:", result["wrong"], "", "", "", ""))
            continue
        times = [milliseconds(result[phase]) for phase in ("forward", "backward", "both")]
        over = result["over_released"]
        made.append((label, name, *times, "" if over is None else f"{over:.2f}x", *gpu_cells(result)))
    return made


HEADER = ("d, T, B", "method", "forward ms (p20 to p80)", "backward ms", "both ms", "released = 1", *GPU_HEADER)


def print_profile(name: str, method: Method) -> None:
    """Print the operators that take one method's time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(3):
            method.backward(method.forward())
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(f"\n{name}, three forwards and backwards")
    print(profile.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=60))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--profile", action="store_true", help="print where each method's time goes")
    args = arguments.parse_args()
    results, table = {}, []
    for shape in args.shapes:
        label = ", ".join(map(str, shape))
        results[label], timed = measure(shape, args.repeats, args.compiler)
        table += rows(label, results[label])
        if args.profile:
            for name, method in timed.items():
                print_profile(f"{label}: {name}", method)
        del timed
    print_table(f"{BLOCKS} blocks, forward + backward", HEADER, table)
    settings = {"blocks": BLOCKS, "repeats": args.repeats, "compiler": args.compiler}
    made = {"settings": settings, "results": results}
    out = args.out or RESULTS / f"bench_block_{'gpu' if torch.cuda.is_available() else 'cpu'}.json"
    print("\nwrote", write_json("bench_block", made, out))
    if any("wrong" in result["ours"] for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
