"""Steps of AdamW and Muon on ranks beside torch's own optimizers on whole tensors, for test_optimizers.py."""

from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad

from agrepa_fast.tensor_files import save_tensors
from agrepa_fast.zero.masters import full_weights, masters, trained_parameters
from agrepa_fast.zero.recut import load_recut
from agrepa_fast.zero.state_files import load_engine, save_engine, step_counters
from agrepa_fast.zero.update_ratio import update_ratio

from .in_process import ds_values, make_run, state
from .nonfinite_on_ranks import Spoilt

SETTINGS = ("train.lr=0.01", "train.warmup_steps=0", "train.weight_decay=0.1", "train.clip_norm=0.3")
STEPS = 4


def follow(preset: str, folder: Path, stage: int, optimizer: str, *overrides: str) -> dict:
    """Four steps of a run, with their gradients and what comes of them: losses, weights before and after (whole, on
    rank 0), the update ratio beside the one by hand, and whether a step that is not finite has changed anything."""
    run, batches = make_run(preset, ds_values(stage), folder, f"train.optimizer={optimizer}", *SETTINGS, *overrides)
    engine, gradients, rates = run.engine, [], []
    before, step = full_weights(engine), engine.step
    whole_at_once = stage == 0 and not engine.bfloat16_enabled()

    def kept_step() -> None:
        named = trained_parameters(engine.module)
        whole = {name: p.grad if whole_at_once else safe_get_full_grad(p) for name, p in named}
        gradients.append({name: gradient.float().clone() for name, gradient in whole.items()})
        rates.append(engine.get_lr()[0])
        step()

    unmoved = update_ratio(engine, 0.01).item()
    engine.step, losses = kept_step, []
    for number in range(STEPS):
        earlier = [part.clone() for part in masters(engine)]
        run.step(batches, number)
        losses.append(run.metrics.flush(number + 1)["train/loss"])
    squares = torch.stack(
        [
            sum((new - old).square().sum() for new, old in zip(masters(engine), earlier, strict=True)),
            sum(old.square().sum() for old in earlier),
        ]
    )
    if stage > 0:
        dist.all_reduce(squares)
    ratios = update_ratio(engine, rates[-1]).item(), (squares[0] / squares[1]).sqrt().item()
    after, kept = full_weights(engine), state(run)

    engine.step = step
    run.step(Spoilt(batches, 0), STEPS)  # on the last rank
    same = all(torch.equal(kept[name], now) for name, now in state(run).items())
    facts = {"losses": losses, "unmoved": unmoved, "ratios": ratios, "skipped": same and not engine.was_step_applied()}
    if dist.get_rank() == 0:
        facts |= {"before": before, "after": after, "gradients": gradients, "rates": rates}
    return facts


def by_torch(found: dict, matrices: dict[str, int], undecayed: set[str]) -> dict[str, torch.Tensor]:
    """Return the weights after the same gradients by torch.optim's Muon, for the named weights as so many matrices, and
    AdamW for the rest."""
    whole = {name: torch.nn.Parameter(found["before"][name].clone()) for name in found["gradients"][0]}
    parts = {name: [torch.nn.Parameter(p.clone()) for p in whole[name].chunk(n)] for name, n in matrices.items()}
    rest = {name: p for name, p in whole.items() if name not in parts}
    plain = [p for name, p in rest.items() if name in undecayed]
    decayed = [p for name, p in rest.items() if name not in undecayed]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}]
    optimizers = [torch.optim.AdamW(groups)]
    if parts:
        all_parts = [*chain(*parts.values())]
        optimizers.append(torch.optim.Muon(all_parts, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    for gradients, rate in zip(found["gradients"], found["rates"], strict=True):
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        scale = min(1.0, 0.3 / (norm + 1e-6))
        for name, gradient in gradients.items():
            owners = parts.get(name, [whole[name]])
            for owner, part in zip(owners, gradient.chunk(len(owners)), strict=True):
                owner.grad = part * scale
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
    return {name: torch.cat(parts[name]).detach() if name in parts else p.detach() for name, p in whole.items()}


def follow_all(preset: str, folder: Path, cases: list[tuple[int, str, tuple[str, ...]]]) -> list[dict]:
    """`follow` of every case (stage, optimizer, overrides)."""
    return [follow(preset, folder / str(n), stage, name, *more) for n, (stage, name, more) in enumerate(cases)]


ALONE = ("align.weight=0", "align.bitc_speech=0", "align.bitc_audio=0")  # no heads, whose state these files have not


def save_and_go_on(preset: str, folder: Path, stages: list[int]) -> dict[int, dict]:
    """Per stage: two steps of Muon, saved, and two more; the counters at the save, the later losses and the weights."""
    found = {}
    for stage in stages:
        run, batches = make_run(preset, ds_values(stage), folder, "train.optimizer=muon", *SETTINGS, *ALONE)
        for step in (0, 1):
            run.step(batches, step)
        path = folder / f"stage{stage}"
        path.mkdir(exist_ok=True)
        save_engine(run.engine, path, lambda function, *args, **kwargs: function(*args, **kwargs))
        whole = full_weights(run.engine)
        if dist.get_rank() == 0:
            save_tensors(whole, path / "model.safetensors")
        found[stage] = {"counters": step_counters(run.engine)} | _go_on(run, batches)
    return found


def recut_without_updates(preset: str, folder: Path) -> list[dict]:
    """Save a run at stage 2 whose every step was skipped, go on at stage 0, and return the moments there."""
    folder.mkdir(parents=True)
    saved, _ = make_run(preset, ds_values(2), folder, "train.optimizer=muon", *SETTINGS, *ALONE)
    save_engine(saved.engine, folder, lambda function, *args, **kwargs: function(*args, **kwargs))
    save_tensors(full_weights(saved.engine), folder / "model.safetensors")
    run, batches = make_run(preset, ds_values(0), folder, "train.optimizer=muon", *SETTINGS, *ALONE)
    load_recut(run.engine, folder, 2, step_counters(saved.engine), print)
    states = run.engine.basic_optimizer.state.values()
    moments = [{name: torch.as_tensor(value).clone() for name, value in state.items()} for state in states]
    run.step(batches, 0)
    return moments


def resume(preset: str, folder: Path, cases: list[tuple[Path, int, dict, int, bool]]) -> list[dict]:
    """Per case (folder, its stage and counters, stage, same layout): the losses and weights of two steps more."""
    found = []
    for path, saved_stage, counters, stage, same_layout in cases:
        run, batches = make_run(preset, ds_values(stage), folder, "train.optimizer=muon", *SETTINGS, *ALONE)
        if same_layout:
            load_engine(run.engine, path)
        else:
            load_recut(run.engine, path, saved_stage, counters, print)
        for _ in range(2):
            next(batches)
        found.append(_go_on(run, batches))
    return found


def _go_on(run, batches) -> dict:
    run.metrics.flush(2)
    losses = []
    for step in (2, 3):
        run.step(batches, step)
        losses.append(run.metrics.flush(step + 1)["train/loss"])
    return {"losses": losses, "weights": full_weights(run.engine)}


def time_embedding(preset: str, folder: Path) -> torch.Tensor:
    """Return the embedding (9, 192) of nine flow times after 30 steps by Muon at the rate of the preset `demo`."""
    settings = ("model.dim=192", "train.optimizer=muon", "train.lr=4e-3", "train.warmup_steps=0", "train.steps=30")
    run, batches = make_run(preset, ds_values(0), folder, *settings, "train.final_lr=1.0")
    for number in range(30):
        run.step(batches, number)
    with torch.no_grad():
        return run.engine.module.time(torch.linspace(0, 1, 9))
