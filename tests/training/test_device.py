"""What captures as CUDA graphs do beside the graph: their streams, random states and inputs. On a CPU torch.cuda is a
stand-in."""

from contextlib import contextmanager, nullcontext
from unittest.mock import Mock

import pytest
import torch

from agrepa_fast import device
from agrepa_fast.device import CapturedProgram, CaptureError

from .graphs_on_ranks import capture, stand_in_for_cuda


@pytest.fixture
def streams(monkeypatch):
    """The streams that work was queued on, in order, and "capture" before that of a capture."""
    used = []

    @contextmanager
    def graph(*_, stream, **__):
        used.extend(("capture", stream))
        yield

    stand_in_for_cuda(monkeypatch, graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: used.append(stream) or nullcontext())
    return used


def test_warm_ups_leave_the_random_states_as_they_are(streams):
    draws = []
    torch.manual_seed(3)
    device.captured(lambda: draws.append(torch.rand(4)), None)
    torch.manual_seed(3)
    assert len(draws) == 3
    assert torch.equal(draws[2], torch.rand(4))  # what the graph draws is what a call without one would have drawn


def test_warm_ups_and_captures_share_one_stream(streams):
    for _ in range(2):
        device.captured(lambda: None, None)
    (stream,) = {used for used in streams if used != "capture"}
    assert streams == [stream, "capture", stream] * 2


def test_memory_that_a_warm_up_lacks_is_a_capture_that_fails(streams):
    with pytest.raises(CaptureError, match=r"^CUDA out of memory\. Tried$"):
        device.captured(Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried\n2 GiB")), None)
    with pytest.raises(RuntimeError, match="anything else"):
        device.captured(Mock(side_effect=RuntimeError("anything else")), None)


def test_expanded_inputs_keep_no_memory_of_their_own(monkeypatch):
    monkeypatch.setattr(device, "captured", capture)
    bytes_held = []

    def double(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        bytes_held.append(x.untyped_storage().nbytes())
        return 2 * x, 2 * y

    def inputs(value: float) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((1, 1, 1), value).expand(3, 5, 7), torch.full((4, 2), value)

    program = CapturedProgram(double, inputs(1.0), None)
    assert set(bytes_held) == {4}
    for value in (1.0, 2.5):
        for output, given in zip(program(*inputs(value)), inputs(value), strict=True):
            assert torch.equal(output, 2 * given)
    with pytest.raises(RuntimeError):
        program(torch.ones(3, 5, 7), torch.ones(4, 2))  # another layout is another program
