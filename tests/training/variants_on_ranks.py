"""Ways to compute the same steps, for test_engine.py."""

import functools
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from agrepa_fast.checkpoints.weights import load_weights
from agrepa_fast.config_file import load_config
from agrepa_fast.zero.construction import new_model
from agrepa_fast.zero.masters import full_weights, masters
from agrepa_fast.zero.update_ratio import update_ratio, weight_norm

from .in_process import ds_values, make_run

RECOMPUTE, COMPILE = "train.activation_checkpointing=true", "train.compile=true"
VARIANTS = {  # stage, offload, overrides
    "plain": (0, False, ()),
    "recomputed, partitioned": (3, False, (RECOMPUTE,)),
    "compiled": (2, False, (COMPILE, RECOMPUTE)),  # as inductor's input is made, without its slow code generation
    "compiled by inductor": (2, False, (COMPILE, RECOMPUTE)),
    "offloaded": (2, True, ()),
    "offloaded, partitioned": (3, True, ()),
    "dropout": (0, False, ("model.dropout=0.2",)),
    "dropout, recomputed, partitioned": (3, False, ("model.dropout=0.2", RECOMPUTE)),
}


def steps(preset: str, folder: Path, stage: int, offload: bool, overrides: tuple[str, ...]) -> dict:
    """Three steps; what they cost, and the update ratio beside the one from copies of the weights."""
    run, batches = make_run(preset, ds_values(stage, offload), folder, *overrides)
    torch.manual_seed(dist.get_rank())  # dropout
    forwards, losses, ratio, by_hand = [], [], None, None
    if COMPILE not in overrides:
        run.engine.module.blocks[0].register_forward_pre_hook(lambda *_: forwards.append(0))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for step in range(3):
        before = [part.clone() for part in masters(run.engine)]
        rate = run.engine.get_lr()[0]
        run.step(batches, step)
        squares = [
            sum((a - b).square().sum() for a, b in zip(masters(run.engine), before, strict=True)),
            sum(b.square().sum() for b in before),
        ]
        if stage > 0:
            for value in squares:
                dist.all_reduce(value)
        by_hand = (squares[0] / squares[1]).sqrt().item()
        ratio = update_ratio(run.engine, rate).item()
        losses.append(run.metrics.flush(step + 1)["train/loss"])
    norm = weight_norm(run.engine).item()
    weights = full_weights(run.engine)
    if dist.get_rank() == 0:
        save_file(weights, folder / "weights.safetensors")
    return {
        "name": folder.name,
        "losses": losses,
        "forwards": len(forwards),
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs,
        "breaks": len(torch._dynamo.utils.counters["graph_break"]),
        "ratio": ratio,
        "by_hand": by_hand,
        "norm": norm,
    }


def loaded(preset: str, weights: Path) -> bool:
    """Whether weights come back out of a partitioned model that they were loaded into."""
    import deepspeed

    config = load_config(preset, ["model.n_mels=8", "model.vocab=12"])
    values = ds_values(3) | {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": False}}
    values |= {"gradient_accumulation_steps": 1, "gradient_clipping": 1.0}
    model, saved = new_model(config, values), load_file(weights)
    assert model.partitioned
    assert all(parameter.numel() < saved[name].numel() for name, parameter in model.named_parameters())
    load_weights(model, weights, "this run's")
    same = []
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            same.append(torch.equal(parameter.data, saved[name]))
    return all(same)


def compute_variants(preset: str, folder: Path, names: list[str]) -> dict:
    """What this rank saw of every variant, by name."""
    if "compiled" in names:
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
    found = {name: steps(preset, folder / name, *VARIANTS[name]) for name in names}
    if dist.get_world_size() > 1:
        found["loaded"] = loaded(preset, folder / "plain" / "weights.safetensors")
    return found
