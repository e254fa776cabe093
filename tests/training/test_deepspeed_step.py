"""DeepSpeed's engine as a run builds it: its forward can be captured as a CUDA graph, and its step launches little."""

import pytest
import torch

from ..ranks import call_on_ranks
from .deepspeed_on_ranks import graphs_of_fragments, throughput_timers, updates, updates_at_stage_0


def test_no_forward_waits_for_the_gpu(preset, tmp_path):
    (found,) = call_on_ranks(1, throughput_timers, str(preset), tmp_path)
    assert found == dict.fromkeys(range(4), False)


def test_no_autograd_graph_over_the_parameters_outlives_a_step(preset, tmp_path):
    """It would hold AccumulateGrad nodes of the default stream, which forbid to capture a backward."""
    (found,) = call_on_ranks(1, graphs_of_fragments, str(preset), tmp_path)
    assert found.keys() == {(stage, engine) for stage in (1, 2) for engine in ("new", "loaded")}
    for case, graphs in found.items():
        assert len(graphs) > 40, case
        assert not any(graphs), case


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_update_looks_at_each_gradient_once_and_copies_none(ranks, preset, tmp_path):
    """DeepSpeed's own search for overflows and its norm take 2 to 17 operations more per parameter, in fp64."""
    for found in call_on_ranks(ranks, updates, str(preset), tmp_path):
        for case, update in found.items():
            assert update["operations"] < 7, case
            assert torch.float64 not in update["types"], case
            for ours, theirs in update["norms"]:
                assert ours == pytest.approx(theirs, rel=1e-5), case
                assert ours > 0


def test_stage_0_in_bf16_updates_as_deepspeed_does_by_fewer_operations(preset, tmp_path):
    (found,) = call_on_ranks(1, updates_at_stage_0, str(preset), tmp_path)
    ours, theirs = found["ours"], found["theirs"]
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-3)
    assert min(ours["norms"]) > 0.3  # clipped
    for mine, other in zip(ours["weights"], theirs["weights"], strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=0)
    assert ours["operations"] < theirs["operations"] / 2
