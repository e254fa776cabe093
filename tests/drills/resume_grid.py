"""Resume runs with other ranks, another ZeRO stage, or both, in fp32 and bf16.

python -m tests.drills.resume_grid [--precision fp32 bf16] [--record]

A run of 5 steps is saved after step 3 at every stage on 1 and 2 ranks; a copy of it goes on from there at every stage
on 1 and 2 ranks. The result is the largest difference of any loss of steps 4 and 5 (training and validation) from the
uninterrupted run, and of any averaged weight at the end. In fp32 no loss may differ by more than 1e-5; in bf16 the
stages round differently.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from agrepa_fast.checkpoints.find import find_checkpoint

from ..ranks import run_training
from ..testing import write_small_shards
from .harness import curve_difference
from .results import record

LIMITS = {"fp32": 1e-5, "bf16": 2e-3}
SAVED = 3
OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
DS_CONFIGS = {
    "0": {"zero_optimization": {"stage": 0}},
    "1": {"zero_optimization": {"stage": 1}},
    "2": {"zero_optimization": {"stage": 2}},
    "3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    "2 offload": {"zero_optimization": OFFLOAD, "zero_force_ds_cpu_optimizer": False},
}
Layout = tuple[str, int]  # a key of DS_CONFIGS, and the number of ranks
ALL_LAYOUTS: tuple[Layout, ...] = (*product(DS_CONFIGS, (1, 2)),)


@dataclass(frozen=True)
class Pair:
    """A run saved with one layout and resumed with another."""

    precision: str
    saved: Layout
    resumed: Layout
    loss_difference: float
    weight_difference: float

    def kept(self) -> bool:
        return self.loss_difference <= LIMITS[self.precision]


def name_of(layout: Layout) -> str:
    return f"{layout[0]} x {layout[1]}"


def measure(precision: str, layouts: Sequence[Layout], folder: Path) -> list[Pair]:
    """Train with every layout, resume each run with every layout, and compare."""
    preset = str(write_small_shards(folder / "shards"))
    whole = {layout: folder / f"run-{name_of(layout)}" for layout in layouts}
    overrides = (f"train.precision={precision}", f"train.save_every={SAVED}", "train.keep=9")
    for layout, run in whole.items():
        _train(layout, "--preset", preset, f"run.dir={run}", *overrides)
    pairs = []
    for saved, resumed in product(layouts, layouts):
        run = folder / "resumed"
        shutil.copytree(whole[saved], run)
        _train(resumed, "--resume", f"step{SAVED:08d}", f"run.dir={run}")
        difference = curve_difference(whole[saved], run, SAVED, ("loss",))
        pairs.append(Pair(precision, saved, resumed, difference, _weight_difference(whole[saved], run)))
        shutil.rmtree(run)
    return pairs


def _train(layout: Layout, *arguments: str) -> None:
    stage, ranks = layout
    with tempfile.TemporaryDirectory() as folder:
        ds_config = Path(folder, "ds_config.json")
        ds_config.write_text(json.dumps(DS_CONFIGS[stage]))
        run_training(ranks, "--ds_config", str(ds_config), *arguments, cwd=Path(folder))


def _weight_difference(run: Path, other: Path) -> float:
    """Return the largest difference of any averaged weight in the newest checkpoints."""
    a, b = (load_file(find_checkpoint(folder, "latest") / "ema.safetensors") for folder in (run, other))
    return max((a[name] - b[name]).abs().max().item() for name in a.keys() | b.keys())


def summary(pairs: list[Pair]) -> list[str]:
    """Return one line per precision for results.md, and one per pair that differs by too much."""
    lines = []
    for precision in dict.fromkeys(pair.precision for pair in pairs):
        chosen = [pair for pair in pairs if pair.precision == precision]
        same = [pair.loss_difference for pair in chosen if pair.saved == pair.resumed]
        lines.append(
            f"- {precision}: {len(chosen)} pairs of layouts; largest difference of a loss "
            f"{max(pair.loss_difference for pair in chosen):.1e} ({max(same):.1e} if the layout stays; limit "
            f"{LIMITS[precision]:.0e}), of an averaged weight {max(pair.weight_difference for pair in chosen):.1e}"
        )
    wrong = [pair for pair in pairs if not pair.kept()]
    return lines + [f"- BROKEN: {name_of(p.saved)} to {name_of(p.resumed)}: {p.loss_difference:.1e}" for p in wrong]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=LIMITS)
    parser.add_argument("--record", action="store_true", help="write the summary to tests/drills/results.md")
    args = parser.parse_args()
    pairs: list[Pair] = []
    for precision in args.precision:
        with tempfile.TemporaryDirectory() as folder:
            measured = measure(precision, ALL_LAYOUTS, Path(folder))
        pairs += measured
        targets = list(map(name_of, ALL_LAYOUTS))
        table = Table(*["from | to", *targets], title=f"{precision}: largest difference of a loss")
        for layout in ALL_LAYOUTS:
            row = [f"{pair.loss_difference:.0e}" for pair in measured if pair.saved == layout]
            table.add_row(name_of(layout), *row)
        Console(width=160).print(table)
    print("\n".join(summary(pairs)))
    if args.record:
        record(
            "Resume grid", f"python -m tests.drills.resume_grid --precision {' '.join(args.precision)}", summary(pairs)
        )
    sys.exit(not all(pair.kept() for pair in pairs))


if __name__ == "__main__":
    main()
