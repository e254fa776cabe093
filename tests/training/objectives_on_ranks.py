"""Steps with every alignment objective, for test_objective_ranks.py."""

from copy import deepcopy
from pathlib import Path

import torch

from .in_process import ds_values, make_run


def curves(preset: str, folder: Path, stages: dict[str, tuple[int, ...]]) -> dict[tuple[str, int], dict]:
    """Three steps per objective and stage: losses, the heads' weights, and whether their state comes back."""
    found = {}
    for name, of_objective in stages.items():
        for stage in of_objective:
            options = (f"align.objective={name}", "align.decay=linear", "train.ema_decay=0.5")
            if stage == 3:
                options += ("train.activation_checkpointing=true",)
            run, batches = make_run(preset, ds_values(stage), folder / f"{name}{stage}", *options)
            losses = []
            for step in range(3):
                run.step(batches, step)
                losses.append(run.metrics.flush(step + 1))
            aligner = run.choice.aligner
            before = {part: weights.clone() for part, weights in aligner.export().items()}
            state = deepcopy(aligner.state_dict())
            run.step(batches, 3)
            aligner.load_state_dict(state)
            back = all(torch.equal(before[part], weights) for part, weights in aligner.export().items())
            found[name, stage] = {"losses": losses, "heads": before, "back": back}
    return found
