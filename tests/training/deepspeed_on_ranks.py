"""Engines of DeepSpeed from within, for test_deepspeed_step.py."""

from pathlib import Path

from agrepa_fast.zero.masters import master_parameters
from agrepa_fast.zero.state_files import load_engine, save_engine

from ..testing import Operations
from .in_process import ds_values, make_run


def throughput_timers(preset: str, folder: Path) -> dict[int, bool]:
    """Per stage, whether the timer that synchronises the GPU in each forward runs."""
    found = {}
    for stage in range(4):
        run, batches = make_run(preset, ds_values(stage), folder / str(stage))
        for step in range(3):  # the timer starts at its third
            run.step(batches, step)
        found[stage] = run.engine.tput_timer.config.enabled or run.engine.tput_timer.initialized
    return found


def graphs_of_fragments(preset: str, folder: Path) -> dict[tuple[int, str], list[bool]]:
    """Whether DeepSpeed's view of a parameter holds an autograd graph, for each parameter that has one, per stage: of a
    new engine, and of one that has loaded a checkpoint."""

    def graphs(engine) -> list[bool]:
        mappings = [parameter._hp_mapping for parameter in engine.module.parameters()]
        return [mapping.lp_fragment.requires_grad for mapping in mappings if mapping is not None]

    found = {}
    for stage in (1, 2):
        run, batches = make_run(preset, ds_values(stage), folder / str(stage))
        found[stage, "new"] = graphs(run.engine)
        run.step(batches, 0)
        save_engine(
            run.engine, folder / "saved" / str(stage), lambda function, *args, **kwargs: function(*args, **kwargs)
        )
        load_engine(run.engine, folder / "saved" / str(stage))
        found[stage, "loaded"] = graphs(run.engine)
    return found


def updates(preset: str, folder: Path) -> dict[tuple, dict]:
    """Per stage and precision, what engine.step() does: its operations per parameter, the types of their results, and
    the global norm, ours and DeepSpeed's own."""
    found = {}
    for stage in (1, 2, 3):
        for precision in ("fp32", "bf16"):
            run, batches = make_run(
                preset, ds_values(stage), folder / f"{stage}-{precision}", f"train.precision={precision}"
            )
            optimizer, step, norms = run.engine.optimizer, run.engine.step, []
            ours, theirs = optimizer.get_grad_norm_direct, type(optimizer).get_grad_norm_direct

            def both(gradients, params, optimizer=optimizer, ours=ours, theirs=theirs, norms=norms):
                norms.append((ours(gradients, params).item(), theirs(optimizer, gradients, params).item()))
                return ours(gradients, params)

            run.step(batches, 0)  # makes the optimizer's state
            optimizer.get_grad_norm_direct = both
            run.step(batches, 1)
            optimizer.get_grad_norm_direct = ours
            operations = Operations()

            def counted(step=step, operations=operations):
                with operations:
                    step()

            run.engine.step = counted
            run.step(batches, 2)
            parameters = sum(1 for _ in run.engine.module.parameters())
            per_parameter = len(operations.names) / parameters
            found[stage, precision] = {"norms": norms, "operations": per_parameter, "types": operations.types}
    return found


def updates_at_stage_0(preset: str, folder: Path) -> dict[str, dict]:
    """Four steps in bf16, by our update and by DeepSpeed's own: norms, masters, and operations per parameter."""
    found = {}
    for name in ("ours", "theirs"):
        run, batches = make_run(preset, ds_values(0), folder / name, "train.precision=bf16", "train.clip_norm=0.3")
        optimizer, norms = run.engine.optimizer, []
        if name == "theirs":
            del optimizer.step
        for step in range(3):
            run.step(batches, step)
            norms.append(float(run.engine.get_global_grad_norm()))
        step, operations = optimizer.step, Operations()

        def counted(step=step, operations=operations):
            with operations:
                return step()

        optimizer.step = counted
        run.step(batches, 3)
        weights = [master.detach().clone() for master in master_parameters(run.engine)]
        found[name] = {"norms": norms, "weights": weights, "operations": len(operations.names) / len(weights)}
    return found
