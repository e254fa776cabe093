"""Time FoG-A of all layers five ways on the same model and clips: block forwards, seconds, memory, score differences,
and the share of training that a probe every 200 steps takes.

python benchmarks/probe_throughput.py [--depths 12 24] [--dim 256] [--frames 200] [--clips 2] [--batch 16] [--repeats 4]
[--out FILE]

sequential      a forward of the whole model, and one without each layer: L + L(L-1) block forwards
stacked         all L + 1 variants as one batch with a gate matrix: L(L+1)
prefix-shared   multi_gate: variants share the blocks below their ablated block: L(L+1)/2
chunked         the same, at most a quarter of the rows at a time
probe           what a run does: the same, with the noise and the floor

On a GPU all of them are replayed CUDA graphs.
"""

import argparse
from collections.abc import Callable

import torch
from _baselines import row_gates, sequential_velocities
from _results import write_json
from _timing import peak_memory_mib, time_interleaved
from _training import graphed
from rich.console import Console
from rich.table import Table

from agrepa_fast import AudioDiT, Condition, count_block_forwards, multi_gate
from agrepa_fast.attribution.foga import FogaProbe
from agrepa_fast.attribution.gate_plan import GatePlan, single_ablations
from agrepa_fast.attribution.points import ProbeBatch, ProbePoints
from agrepa_fast.config import ModelConfig
from agrepa_fast.kernels import velocity_change

METHODS = ("sequential", "stacked", "prefix-shared", "chunked", "probe")
N_MELS, VOCAB = 80, 512
T, EVERY = 0.5, 200  # time of the probe; steps between two


class Case:
    """A random model in evaluation mode and C clips at t = 0.5."""

    def __init__(self, depth: int, dim: int, frames: int, clips: int, dtype: torch.dtype = torch.float32):
        torch.manual_seed(0)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = ModelConfig(
            dim=dim, depth=depth, heads=dim // 64, token_dim=dim, n_mels=N_MELS, vocab=VOCAB, position="rotary_conv"
        )
        self.model = AudioDiT(config).to(self.device, dtype).eval()
        for block in self.model.blocks:  # zero-initialised blocks would all score 0
            torch.nn.init.normal_(block.modulation.weight, std=0.1)
        gates = single_ablations(depth)
        self.clips, self.plan, self.gates = clips, GatePlan(gates), gates.to(self.device)  # graphs need them in place
        self.batch = random_batch(clips, frames, self.device)
        points = ProbePoints((T,))
        self.x, self.condition = points.x_t(self.batch, T, 0), self.batch.condition
        self.t, self.lengths = torch.full((clips,), T, device=self.device), self.condition.lengths
        self.probe = FogaProbe(self.model, points, graph=self.device.type == "cuda")

    def all_variants(self) -> torch.Tensor:
        """Return the velocities of a batch with every variant of every clip, (V, C, T, M)."""
        return self.model(self.x.repeat(len(self.gates), 1, 1), self.t, self.condition).v.unflatten(0, (-1, self.clips))

    def scores(self, velocities: torch.Tensor) -> torch.Tensor:
        """Return the changes (L, C) of all variants against the first."""
        return velocity_change(velocities[1:], velocities[0], self.lengths)

    @torch.no_grad()
    def sequential(self) -> torch.Tensor:
        return self.scores(sequential_velocities(self.model, self.x, self.t, self.condition))

    @torch.no_grad()
    def stacked(self) -> torch.Tensor:
        with row_gates(self.model, self.gates, self.clips):
            return self.scores(self.all_variants())

    @torch.no_grad()
    def prefix_shared(self, max_rows: int | None = None) -> torch.Tensor:
        options = {"row_arguments": (), "check_rows": False, "max_rows": max_rows}
        with multi_gate(self.model.blocks, self.plan, **options):
            return self.scores(self.all_variants())

    def chunked(self) -> torch.Tensor:
        return self.prefix_shared(len(self.gates) * self.clips // 4)

    def launched(self) -> torch.Tensor:
        """With what a run's probe does besides: the noise, the floor (L block forwards more), the copies."""
        return self.probe.launch(self.batch).values[..., 0, 0]

    def methods(self) -> dict[str, Callable[[], torch.Tensor]]:
        """Return the methods by name; each gives the scores (L, C)."""
        ways = (self.sequential, self.stacked, self.prefix_shared, self.chunked, self.launched)
        return dict(zip(METHODS, ways, strict=True))

    def to_time(self) -> dict[str, Callable[[], object]]:
        """Return the methods as they are timed: on a GPU as replays of CUDA graphs, since a run replays its probe."""
        methods = self.methods()
        if self.device.type == "cuda":
            methods |= {name: graphed(methods[name])[0] for name in METHODS[:-1]}  # the last captures itself
        return methods

    def block_forwards(self) -> dict[str, int]:
        """Return how often each method runs a block."""
        depth, shared = len(self.model.blocks), count_block_forwards(self.gates.cpu())
        counts = (depth * depth, depth * (depth + 1), shared, shared, shared + depth)
        return dict(zip(METHODS, counts, strict=True))


def random_batch(clips: int, frames: int, device) -> ProbeBatch:
    mel = torch.randn(clips, frames, N_MELS, device=device)
    lengths = torch.full((clips,), frames, device=device)
    tokens = torch.randint(0, VOCAB, (clips, frames // 2), device=device)
    condition = Condition(tokens, lengths // 2, torch.zeros_like(mel), lengths, padded=False)
    return ProbeBatch(mel, condition, torch.zeros(clips, dtype=torch.long), tuple(range(clips)))


def training_step(case: Case, batch: int, frames: int):
    """A function that runs one training step of the model: forward, backward, AdamW."""
    clips = random_batch(batch, frames, case.device)
    optimizer = torch.optim.AdamW(case.model.parameters(), lr=0.0)  # the weights stay, so that scores stay

    def step() -> None:
        t = torch.rand(batch, device=case.device)
        case.model(clips.mel, t, clips.condition).v.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(depth: int, args: argparse.Namespace) -> dict:
    case = Case(depth, args.dim, args.frames, args.clips)
    methods, forwards = case.methods(), case.block_forwards()
    scores = {name: method() for name, method in methods.items()}
    timed = time_interleaved(case.to_time(), args.repeats)
    step = time_interleaved({"step": training_step(case, args.batch, args.frames)}, max(2, args.repeats // 2))["step"]
    for name, result in timed.items():
        result["block_forwards"] = forwards[name]
        result["peak_memory_mib"] = peak_memory_mib(methods[name])
        result["max_score_difference"] = float((scores[name] - scores["sequential"]).abs().max())
        result["speed_up"] = timed["sequential"]["median_s"] / result["median_s"]
        result["share_of_training"] = result["median_s"] / (EVERY * step["median_s"] + result["median_s"])
        if result["max_score_difference"] > 1e-5:
            raise SystemExit(
                f"L={depth}, {name}: scores differ by {result['max_score_difference']:.1e} from sequential"
            )
    return timed | {"training step": step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 24])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="clips of the training step that the share refers to")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--out", help="JSON file (default: benchmarks/results/probe_throughput_<device>.json)")
    args = parser.parse_args()

    table = Table(title=f"FoG-A of all layers, {args.clips} clips of {args.frames} frames, width {args.dim}, fp32")
    columns = ("L", "method", "block forwards", "s (median)", "p20 to p80", "speed-up", "MiB", "of training", "max |Δ|")
    for column in columns:
        table.add_column(column, justify="right")
    results = {}
    for depth in args.depths:
        results[f"L{depth}"] = timed = measure(depth, args)
        for name, r in timed.items():
            cells = [str(depth), name, "", f"{r['median_s']:.3f}", f"{r['p20_s']:.3f} to {r['p80_s']:.3f}"]
            if name != "training step":
                cells[2] = str(r["block_forwards"])
                cells += [f"{r['speed_up']:.2f}x", f"{r['peak_memory_mib']:.0f}", f"{r['share_of_training']:.2%}"]
                cells += [f"{r['max_score_difference']:.1e}"]
            table.add_row(*cells)
    Console(width=120).print(table)
    print(f"of training: one probe at one time every {EVERY} steps of {args.batch} clips")
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    print("wrote", write_json("probe_throughput", {"settings": settings, "results": results}, args.out))


if __name__ == "__main__":
    main()
