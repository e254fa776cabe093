"""FoG-A of all layers: one forward a layer, stacked gates, and prefix-shared, on the same model and clips.

python benchmarks/probe_throughput.py [--depths 12 24] [--dim 256] [--frames 200] [--clips 2] [--repeats 4] [--out FILE]

sequential      one forward of the whole model and one for each layer without it: L + L(L-1) block forwards
stacked         all L + 1 variants as one batch with a gate matrix: L(L+1)
prefix-shared   multi_gate: variants share what lies below their ablated block: L(L+1)/2
"""

import argparse
from contextlib import contextmanager
from functools import partial

import torch
from _bench import time_interleaved, write_json
from rich.console import Console
from rich.table import Table

from agrepa_fast import AudioDiT, Condition, count_block_forwards, multi_gate
from agrepa_fast.attribution.gates import single_ablations
from agrepa_fast.config import ModelConfig
from agrepa_fast.kernels import velocity_change

N_MELS, VOCAB = 80, 512


class Case:
    """A random model in evaluation mode and C clips at t = 0.5."""

    def __init__(self, depth: int, dim: int, frames: int, clips: int):
        torch.manual_seed(0)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = ModelConfig(
            dim=dim, depth=depth, heads=dim // 64, token_dim=dim, n_mels=N_MELS, vocab=VOCAB, position="rotary_conv"
        )
        self.model = AudioDiT(config).to(self.device).eval()
        for block in self.model.blocks:  # zero-initialised blocks would all score 0
            torch.nn.init.normal_(block.modulation.weight, std=0.1)
        self.clips, self.gates = clips, single_ablations(depth)
        self.x = torch.randn(clips, frames, N_MELS, device=self.device)
        self.t = torch.full((clips,), 0.5, device=self.device)
        self.lengths = torch.full((clips,), frames, device=self.device)
        tokens = torch.randint(0, VOCAB, (clips, frames // 2), device=self.device)
        self.condition = Condition(tokens, self.lengths // 2, torch.zeros_like(self.x), self.lengths)

    def velocity(self, rows: int = 1) -> torch.Tensor:
        return self.model(self.x.repeat(rows, 1, 1), self.t, self.condition).v

    @torch.no_grad()
    def sequential(self) -> torch.Tensor:
        base, variants = self.velocity(), []
        blocks = self.model.blocks
        for left_out in range(len(blocks)):
            self.model.blocks = torch.nn.ModuleList(b for number, b in enumerate(blocks) if number != left_out)
            variants.append(self.velocity())
        self.model.blocks = blocks
        return velocity_change(torch.stack(variants), base, self.lengths)

    @torch.no_grad()
    def stacked(self) -> torch.Tensor:
        with self._row_gates():
            v = self.velocity(len(self.gates)).unflatten(0, (-1, self.clips))
        return velocity_change(v[1:], v[0], self.lengths)

    @torch.no_grad()
    def prefix_shared(self) -> torch.Tensor:
        with multi_gate(self.model.blocks, self.gates, row_arguments=()):
            v = self.velocity(len(self.gates)).unflatten(0, (-1, self.clips))
        return velocity_change(v[1:], v[0], self.lengths)

    @contextmanager
    def _row_gates(self):
        for layer, block in enumerate(self.model.blocks):
            gate = self.gates[:, layer].repeat_interleave(self.clips).to(self.device)
            block.forward = partial(type(block).forward, block, gate=gate)
        try:
            yield
        finally:
            for block in self.model.blocks:
                del block.forward


def measure(depth: int, args: argparse.Namespace) -> dict:
    case = Case(depth, args.dim, args.frames, args.clips)
    methods = {"sequential": case.sequential, "stacked": case.stacked, "prefix-shared": case.prefix_shared}
    scores = {name: method() for name, method in methods.items()}
    forwards = {
        "sequential": depth * depth,
        "stacked": depth * (depth + 1),
        "prefix-shared": count_block_forwards(case.gates),
    }
    timed = time_interleaved(methods, args.repeats)
    for name, result in timed.items():
        result["block_forwards"] = forwards[name]
        result["max_score_difference"] = float((scores[name] - scores["sequential"]).abs().max())
        result["speed_up"] = timed["sequential"]["median_s"] / result["median_s"]
        if result["max_score_difference"] > 1e-5:
            raise SystemExit(
                f"L={depth}, {name}: scores differ by {result['max_score_difference']:.1e} from sequential"
            )
    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 24])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--out", help="JSON file (default: benchmarks/results/probe_throughput_<device>.json)")
    args = parser.parse_args()

    table = Table(title=f"FoG-A of all layers, {args.clips} clips of {args.frames} frames, width {args.dim}, fp32")
    for column in ("L", "method", "block forwards", "s (median)", "p20 to p80", "speed-up", "max |Δ score|"):
        table.add_column(column, justify="right")
    results = {}
    for depth in args.depths:
        results[f"L{depth}"] = timed = measure(depth, args)
        for name, r in timed.items():
            spread = f"{r['p20_s']:.3f} to {r['p80_s']:.3f}"
            cells = (r["block_forwards"], f"{r['median_s']:.3f}", spread, f"{r['speed_up']:.2f}x")
            table.add_row(str(depth), name, *map(str, cells), f"{r['max_score_difference']:.1e}")
    Console(width=110).print(table)
    print("wrote", write_json("probe_throughput", {"settings": vars(args), "results": results}, args.out))


if __name__ == "__main__":
    main()
