"""Steps, log lines and probes with every call counted for which the host would wait for a GPU, for test_waits.py."""

from collections import Counter
from pathlib import Path

import torch

from agrepa_fast import device
from agrepa_fast.attribution import variants
from agrepa_fast.probing.fixed_clips import probe_clips
from agrepa_fast.probing.probe import ClipProbe
from agrepa_fast.training import run as training

from .in_process import CPU, ds_values, make_run
from .waits import waits

CASES = [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "bf16")]
_in_graphs: list[Counter] = []  # of each capture


def capture(call, pool, warmup: int = 2):
    """A stand-in for device.captured that notes what a capture would hold."""
    for _ in range(warmup):
        call()
    with waits() as inside:
        call()
    _in_graphs.append(inside)
    return call


def count_waits(preset: str, folder: Path, cases: list[tuple[int, str]] = CASES) -> dict[tuple, dict[str, Counter]]:
    """Return per stage and precision the calls of a step, eager and with graphs, of a log line, of both probes'
    launches, and of all that graphs hold."""
    device.captured = capture
    torch.cuda.graph_pool_handle = lambda: object()
    found = {}
    for stage, precision in cases:
        _in_graphs.clear()
        counted = found[stage, precision] = {}
        for graphs in (0, 1) if stage < 3 else (0,):
            place = folder / f"{stage}-{precision}-{graphs}"
            overrides = (f"train.precision={precision}", f"train.graphs={graphs}")
            run, batches = make_run(preset, ds_values(stage), place, *overrides)
            for optimizer in (run.engine.basic_optimizer, run.choice.aligner.optimizer):
                for group in optimizer.param_groups:
                    group.update(fused=True, foreach=False)  # as on a GPU
            for step in range(2):  # the optimizer's state is made, and a graph captured
                run.step(batches, step)
            with waits() as counted["graphs" if graphs else "step"]:
                run.step(batches, 2)
            with waits() as counted["log"]:
                run.log(3)
        clips = probe_clips(run.context.index, run.config, CPU, one_shape=stage < 3)
        list(clips.chunks())  # are made once
        for measure in ("foga", "foga-vjp"):
            probe = ClipProbe(run.engine.module, clips, measure=measure)
            probe.launch().read()  # captured
            with waits() as counted[measure]:
                probe.launch()
        counted["held"] = sum(_in_graphs, Counter())
        counted["captures"] = len(_in_graphs)
    return found


def count_planted(preset: str, folder: Path) -> dict[tuple, dict[str, Counter]]:
    """count_waits of a step and a probe that read a number of their own each."""
    training_loss, velocity_change = training.training_loss, variants.velocity_change

    def reading_loss(*given):
        loss = training_loss(*given)
        assert loss.sum().item() >= 0
        return loss

    def reading_change(v, *given):
        return velocity_change(v[:, v[0, :, 0, 0] == v[0, :, 0, 0]], *given)

    training.training_loss, variants.velocity_change = reading_loss, reading_change
    return count_waits(preset, folder, [(2, "fp32")])
