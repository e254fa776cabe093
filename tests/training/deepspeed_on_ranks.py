"""Engines of DeepSpeed from within, for test_deepspeed_step.py."""

from pathlib import Path

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


def graphs_of_fragments(preset: str, folder: Path) -> dict[int, list[bool]]:
    """Per stage, whether DeepSpeed's view of a parameter holds an autograd graph, for each parameter that has one."""
    found = {}
    for stage in (1, 2):
        run, _ = make_run(preset, ds_values(stage), folder / str(stage))
        mappings = [parameter._hp_mapping for parameter in run.engine.module.parameters()]
        found[stage] = [mapping.lp_fragment.requires_grad for mapping in mappings if mapping is not None]
    return found
