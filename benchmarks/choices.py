"""How far the weights of hard and soft choices move if only kernels, seed, noise or clips change.

python benchmarks/choices.py [--warmups native:0 reference:0 ...] [--out FILE] [section.field=value ...]

Trains the demo's warm-up without alignment for each backend and seed, measures FoG-A of each, and compares the weights
lambda that two sets of evidence give: their total-variation distance, from 0 (equal) to 1 (no layer in common). Runs go
to runs/choices/<backend>-seed<seed>. The same command goes on after an interruption; finished runs are not repeated:
remove their folders after a change of the code.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import combinations, product
from pathlib import Path
from unittest import mock

import torch
from _results import print_table, run_program, write_json

from agrepa_fast.attribution.scores import LayerScores
from agrepa_fast.attribution.selection import select_layers
from agrepa_fast.config import DOMAINS
from agrepa_fast.config_file import load_config
from agrepa_fast.evaluation.jobs import run_jobs, training_job, write_plan

RUNS = Path("runs/choices")
STEPS = 200  # of the warm-up
CLIPS = 16  # per domain in one set of evidence
DRAWS = 2  # noise draws measured; a set has one
HALVES = 2  # disjoint sets of clips
CHANGES = ("noise", "clips", "backend", "seed")
ALIKE = {  # the parts of (backend, seed, clips, noise) that two sets of evidence share
    "noise": (0, 1, 2),
    "clips": (0, 1, 3),
    "backend": (1, 2, 3),
    "seed": (0, 2, 3),
}


def measure(backend: str, seed: str, overrides: list[str]) -> LayerScores:
    """Return FoG-A of the warm-up of a backend and a seed, which is trained and measured unless that is done."""
    folder = RUNS / f"{backend}-seed{seed}"
    settings = ("align.strategy=none", f"train.steps={STEPS}", "train.final_lr=1.0", f"run.seed={seed}", *overrides)
    job = training_job(f"{backend}, seed {seed}", folder, ("--ds_config", "zero2.json", *settings), STEPS)
    write_plan([job], folder.with_suffix(".json"), f"remove {RUNS} first")
    with mock.patch.dict(os.environ, AGREPA_BACKEND=backend):  # of the two processes
        if run_jobs([job], print):
            raise SystemExit(f"{folder}: the warm-up failed")
        if not (folder / "choices.pt").is_file():
            subprocess.run([sys.executable, __file__, "--measure", folder], check=True)
    return LayerScores(**torch.load(folder / "choices.pt"))


def measure_run(folder: Path) -> None:
    """Write the scores of a run to <run>/choices.pt."""
    from agrepa_fast.probing.fixed_clips import probe_clips
    from agrepa_fast.probing.probe import ClipProbe
    from agrepa_fast.reporting.opened import open_checkpoint

    sizes = [f"probe.clips={HALVES * CLIPS}", f"probe.draws={DRAWS}"]
    opened = open_checkpoint(folder, sizes, live=True, uses=("probe",))
    clips = probe_clips(opened.index, opened.config, opened.device)
    scores = ClipProbe(opened.model, clips).launch(STEPS, progress=True).read()
    torch.save(asdict(scores), folder / "choices.pt.part")
    (folder / "choices.pt.part").rename(folder / "choices.pt")


def evidence(scores: LayerScores) -> Iterator[tuple[tuple[int, int], LayerScores]]:
    """Yield ((set of clips, draw), the scores of that set alone): CLIPS clips per domain, one draw."""
    for half, draw in product(range(HALVES), range(DRAWS)):
        rows = torch.cat([(scores.domain == DOMAINS.index(d)).nonzero()[half::HALVES, 0] for d in scores.domains()])
        one = {name: getattr(scores, name)[rows] for name in ("floor", "domain")}
        yield (half, draw), replace(scores, values=scores.values[:, rows, :, draw : draw + 1], **one)


def weights(scores: LayerScores, domain: str, k: int, choice: str, per_time: bool) -> torch.Tensor:
    """Return lambda (times or 1, L), 0 for layers that are not chosen."""
    made = select_layers(scores, k, choice=choice, per_time=per_time)
    rows = torch.tensor(made.weights_at[domain] if per_time else (made.weights[domain],))
    places = torch.tensor(made.layers[domain]) - 1
    return torch.zeros(len(rows), scores.depth).index_copy(1, places, rows)


def describe(scores: LayerScores, k: int) -> dict:
    """Return the layers of both choices, and how probable the Top-K of each domain is."""
    made = {choice: select_layers(scores, k, choice=choice) for choice in ("hard", "soft")}
    sure = {domain: measured["top_k_probability"] for domain, measured in made["hard"].evidence.items()}
    return {choice: selection.describe() for choice, selection in made.items()} | {"top_k_probability": sure}


def distances(choices: dict[tuple, torch.Tensor], change: str) -> list[float]:
    """Return the total-variation distance, the mean over times, of every pair that differs by one change alone."""
    alike = ALIKE[change]
    return [
        float((choices[a] - choices[b]).abs().sum(1).mean() / 2)
        for a, b in combinations(choices, 2)
        if all((a[part] == b[part]) == (part in alike) for part in range(4))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = [f"{backend}:{seed}" for backend, seed in product(("native", "reference"), range(3))]
    parser.add_argument("--warmups", nargs="+", metavar="BACKEND:SEED", default=everything)
    parser.add_argument("--k", type=int, default=3)
    parser.add_argument("--out", help="JSON file (default: benchmarks/results/choices_<device>.json)")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # in a process with a backend of its own
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    args = parser.parse_intermixed_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    if args.measure is not None:
        measure_run(args.measure)
        return
    load_config("demo", [*args.overrides, f"align.k={args.k}"])  # refuses what no model here has
    sets = {
        (backend, seed, *part): one
        for backend, _, seed in (text.partition(":") for text in args.warmups)
        for part, one in evidence(measure(backend, seed, args.overrides))
    }
    results, rows = [], []
    for per_time, domain in product((False, True), next(iter(sets.values())).domains()):
        made = {
            choice: {key: weights(one, domain, args.k, choice, per_time) for key, one in sets.items()}
            for choice in ("hard", "soft")
        }
        heads = {choice: sum(int((w > 0).any(0).sum()) for w in of.values()) / len(of) for choice, of in made.items()}
        for change in CHANGES:
            moved = {choice: distances(of, change) for choice, of in made.items()}
            if not moved["hard"]:
                continue
            entry = {"per_time": per_time, "domain": domain, "change": change, "pairs": len(moved["hard"])}
            entry |= {choice: [sum(of) / len(of), max(of)] for choice, of in moved.items()}  # mean, max
            results.append(entry | {"heads": list(heads.values())})
            cells = [f"{value:.2f}" for choice in made for value in entry[choice]]
            cells += [f"{number:.1f}" for number in heads.values()]
            rows.append(("per time" if per_time else "one set", domain, change, entry["pairs"], *cells))
    layers = {
        f"{backend}, seed {seed}": describe(one, args.k)
        for (backend, seed, *part), one in sets.items()
        if part == [0, 0]
    }
    header = (
        "weights",
        "domain",
        "change",
        "pairs",
        "hard mean",
        "max",
        "soft mean",
        "max",
        "hard heads",
        "soft heads",
    )
    print_table(f"distance of lambda between two sets of evidence, K = {args.k}", header, rows)
    print("wrote", write_json("choices", {"k": args.k, "choices": layers, "distances": results}, args.out))


if __name__ == "__main__":
    run_program(main)
