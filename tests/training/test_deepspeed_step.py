"""DeepSpeed's engine as a run builds it: its forward can be captured as a CUDA graph, and its step launches little."""

from ..ranks import call_on_ranks
from .deepspeed_on_ranks import throughput_timers


def test_no_forward_waits_for_the_gpu(preset, tmp_path):
    (found,) = call_on_ranks(1, throughput_timers, str(preset), tmp_path)
    assert found == dict.fromkeys(range(4), False)
