"""Compare layer-selection strategies by the demo run's losses, at equal steps and the same seed. Not a speed benchmark.

python benchmarks/strategies.py [--strategies none foga ...] [--seeds 0] [--out FILE] [section.field=value ...]

Runs go to runs/strategies/<strategy>-seed<seed>-<overrides>. A finished run is not repeated: remove its folder after a
change of the code.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from _results import write_json
from rich.console import Console
from rich.table import Table

STRATEGIES = ["none", "foga", "foga-vjp", "gradnorm", "lasp", "shallow", "deep", "random", "fixed:4"]


def run(strategy: str, seed: int, overrides: list[str]) -> dict:
    """Run the demo preset through the real launcher, unless that is done; return its summary."""
    name = "-".join([strategy, f"seed{seed}", *overrides])
    folder = Path("runs/strategies") / re.sub(r"[^\w.-]", "-", name)
    if folder.exists() and not (folder / "summary.json").is_file():
        raise SystemExit(f"{folder} holds an unfinished run: remove it")
    if not folder.exists():
        launcher = Path(sys.executable).with_name("deepspeed")
        settings = [f"align.strategy={strategy}", f"run.seed={seed}", f"run.dir={folder}", *overrides]
        subprocess.run([launcher, "agrepa_fast/train.py", "--ds_config", "zero2.json", *settings], check=True)
    return json.loads((folder / "summary.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", help="JSON file (default: benchmarks/results/strategies_<device>.json)")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    args = parser.parse_intermixed_args()

    table = Table(title="demo preset: validation flow loss by strategy")
    for column in ("strategy", "seed", "step 0", "end", "end, EMA", "speech", "audio", "clips/s", "train s", "layers"):
        table.add_column(column)
    results = {}
    for seed in args.seeds:
        for strategy in args.strategies:
            summary = run(strategy, seed, args.overrides)
            losses, by_domain = summary["val/flow_loss"], summary["val/flow_loss_by_domain"]
            kept = {"clips_per_s": summary["clips_per_s"], "layers": summary["selection"]}
            results[f"{strategy}, seed {seed}"] = losses | by_domain | kept
            cells = [losses["first"], losses["last"], losses["ema"], by_domain["speech"], by_domain["audio"]]
            table.add_row(
                strategy,
                str(seed),
                *(f"{value:.3f}" for value in cells),
                f"{summary['clips_per_s']:.1f}",
                f"{summary['seconds']['train']:.0f}",
                summary["selection"] or "",
            )
    Console(width=150).print(table)
    print("wrote", write_json("strategies", {"overrides": args.overrides, "runs": results}, args.out))


if __name__ == "__main__":
    main()
