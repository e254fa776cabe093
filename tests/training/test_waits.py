"""How often the host waits for a GPU: in a step, in a log line, and in a probe's launch; never inside a CUDA graph."""

import pytest

from ..ranks import call_on_ranks
from .waits_on_ranks import CASES, count_planted, count_waits

VALID = "deepspeed.runtime.utils is_invalid_grad_norm: item"  # whether the global norm is finite
STEP = {  # per stage and precision, what one optimizer step waits for
    (0, "fp32"): {"agrepa_fast.zero.optimizers _clip: item": 1},
    (0, "bf16"): {"agrepa_fast.zero.lean_step step: item": 1},
    (1, "bf16"): {VALID: 2},  # the second directly follows the first, in the clipping
    (2, "fp32"): {VALID: 2},
    (2, "bf16"): {VALID: 2},
    (3, "bf16"): {VALID: 1},
}
LOG = {  # what a line of metrics.jsonl waits for, after any number of steps
    "agrepa_fast.training.run log: item": 1,
    "agrepa_fast.training.metrics flush: to": 2,
    "agrepa_fast.training.metrics flush: tolist": 1,
    "agrepa_fast.training.metrics flush: tensor": 1,
    "agrepa_fast.training.metrics flush: item": 1,
    "agrepa_fast.training.lost_clips report: tensor": 1,
    "agrepa_fast.training.lost_clips report: item": 1,
}
FREE = {
    "agrepa_fast.training.run _next: tolist",  # of a batch on the host
    "agrepa_fast.device to_device: to",  # from pinned memory if to a GPU
    "agrepa_fast.models.condition __post_init__: item",  # on a CPU alone
    "agrepa_fast.models.condition <lambda>: to",  # to where the batch is
    "agrepa_fast.zero.update_ratio _global: to",  # likewise, unless the weights are offloaded
}


@pytest.fixture(scope="module")
def found(preset, tmp_path_factory):
    (found,) = call_on_ranks(1, count_waits, str(preset), tmp_path_factory.mktemp("waits"))
    return found


def on_a_gpu(counted):
    return {place: number for place, number in counted.items() if place not in FREE}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_waits_for_the_gradient_norm_alone(case, found):
    assert on_a_gpu(found[case]["step"]) == STEP[case]
    if case[0] < 3:
        assert on_a_gpu(found[case]["graphs"]) == STEP[case]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_log_line_waits_for_its_numbers(case, found):
    assert on_a_gpu(found[case]["log"]) == LOG


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("measure", ["foga", "foga-vjp"])
def test_a_probe_is_launched_without_waiting(measure, case, found):
    assert on_a_gpu(found[case][measure]) == {}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_graph_holds_nothing_that_waits(case, found):
    assert found[case]["captures"] == (3 if case[0] < 3 else 0)  # a step, and the probe's two programs
    assert on_a_gpu(found[case]["held"]) == {}


def test_planted_reads_are_found(preset, tmp_path):
    (found,) = call_on_ranks(1, count_planted, str(preset), tmp_path)
    counted = {name: on_a_gpu(places) for name, places in found[2, "fp32"].items() if name != "captures"}
    read, masked = {"agrepa_fast.training.run losses: item": 1}, "agrepa_fast.attribution.variants changes: mask"
    assert counted["step"] == counted["graphs"] == STEP[2, "fp32"] | read
    assert counted["foga"] == {masked: 6}  # three chunks at two times
    assert counted["held"] == read | {masked: 1}
