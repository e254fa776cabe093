"""Time one DiT block of F5-TTS, forward and backward: as the package has it, compiled by torch.compile, and fused.

python benchmarks/bench_fuse.py [--shapes d,T,B ...] [--repeats N] [--compiler inductor] [--out FILE]

Needs f5-tts (`pip install f5-tts`). Values and all gradients are checked first; a wrong method is not timed. fp32 on a
CPU, bf16 by autocast on a GPU; dropout is on in the times and off in the checks.
"""

import copy
import sys

import torch
from _bench import parse_shape, parser, ratio
from _results import print_table, write_json
from _timing import Phases, milliseconds, time_phases

from agrepa_fast import fuse
from agrepa_fast.models.f5_package import import_network

HEAD = 64
HEADER = ("d, T, B", "method", "error", "forward ms (p20 to p80)", "backward ms", "both ms", "f5-tts = 1")
Shape = tuple[int, int, int]


class Method:
    """A block with its inputs."""

    def __init__(self, block: torch.nn.Module, inputs: dict, compiler: str | None = None):
        self.block, self.inputs = block, inputs
        self.run = block if compiler is None else torch.compile(block, backend=compiler, dynamic=False)
        self.leaves = [inputs["x"], inputs["t"], *block.parameters()]

    def forward(self) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=self.inputs["x"].is_cuda):
            return self.run(**self.inputs)

    def backward(self, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, self.leaves, torch.ones_like(out))


def build(shape: Shape, compiler: str) -> dict[str, Method]:
    DiTBlock = sys.modules[import_network("DiT").__module__].DiTBlock
    dim, frames, clips = shape
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    block = DiTBlock(dim, dim // HEAD, HEAD, ff_mult=2, dropout=0.1, attn_mask_enabled=False).to(device)
    angles = torch.arange(frames)[:, None] * 1e4 ** -(torch.arange(HEAD // 2) / (HEAD // 2))
    x, t = torch.randn(clips, frames, dim, device=device), torch.randn(clips, dim, device=device)
    inputs = {"x": x.requires_grad_(), "t": t.requires_grad_(), "mask": None}
    inputs["rope"] = angles.repeat_interleave(2, -1)[None].to(device), 1.0
    fused = copy.deepcopy(block)
    fuse(fused)
    copied = copy.deepcopy(block)
    return {
        "f5-tts": Method(block, inputs),
        "torch.compile": Method(copied, inputs, compiler),
        "fused": Method(fused, inputs),
    }


def largest_error(method: Method, right: Method) -> float:
    """Return the largest relative difference of the output and the gradients, without dropout."""

    def results(method: Method) -> list[torch.Tensor]:
        method.block.eval()
        out = method.forward()
        found = [out.detach(), *method.backward(out)]
        method.block.train()
        return found

    pairs = zip(results(method), results(right), strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def measure(shape: Shape, repeats: int, compiler: str) -> dict[str, dict]:
    """Return the timings of each method, with its error, and the package's time over its own. A method with a larger
    error than allowed is not timed, and says so as "wrong"."""
    torch._dynamo.reset()
    methods, limit = build(shape, compiler), 2e-2 if torch.cuda.is_available() else 1e-5
    errors = {name: largest_error(method, methods["f5-tts"]) for name, method in methods.items()}
    right = {name: Phases(m.forward, m.backward) for name, m in methods.items() if errors[name] <= limit}
    timed = time_phases(right, repeats, apart=False)
    results = {}
    for name, error in errors.items():
        if name in timed:
            results[name] = {"error": error} | timed[name] | {"over_f5_tts": ratio(timed, "f5-tts", name)}
        else:
            results[name] = {"error": error, "wrong": f"relative error {error:.1e}, allowed {limit:.0e}"}
    return results


def rows(label: str, results: dict[str, dict]) -> list[tuple]:
    """Return the rows of the table of HEADER."""
    found = []
    for name, result in results.items():
        if "wrong" in result:
            found.append((label, name, f"{result['error']:.1e}", "not timed, wrong", "", "", ""))
        else:
            times = [milliseconds(result[phase]) for phase in ("forward", "backward", "both")]
            found.append((label, name, f"{result['error']:.1e}", *times, f"{result['over_f5_tts']:.2f}x"))
    return found


def main() -> None:
    args = parser(__doc__)
    args.set_defaults(shapes=[parse_shape(shape) for shape in ("256,200,8", "512,200,4", "768,400,2", "1024,400,2")])
    args = args.parse_args()
    table, results = [], {}
    for shape in args.shapes:
        label = ", ".join(map(str, shape))
        results[label] = measure(shape, args.repeats, args.compiler)
        table += rows(label, results[label])
    print_table("one DiT block of F5-TTS, forward + backward", HEADER, table)
    made = {"settings": {"repeats": args.repeats, "compiler": args.compiler}, "results": results}
    print("\nwrote", write_json("bench_fuse", made, args.out))


if __name__ == "__main__":
    main()
