"""CUDA graphs of the training step: on a CPU a stand-in with their rules takes their place, on a GPU they are real."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from agrepa_fast.data.stream import Batch
from agrepa_fast.flow import clip_keys, flow_loss
from agrepa_fast.kernels import flow_mix, philox_uniform
from agrepa_fast.training import graphs

from .conftest import small_batch, small_model


@pytest.fixture
def captures(monkeypatch):
    """What `captured` was called for; a capture is the operations of one call, on the same buffers, without Python."""
    made = []

    def capture(call, pool, warmup=2):
        for _ in range(warmup):
            call()
        operations = make_fx(lambda: call())()
        made.append(pool)
        return lambda: operations() and None

    monkeypatch.setattr(graphs, "captured", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: object())
    return made


def batch(frames=37, seed=1) -> Batch:
    mel, condition = small_batch((frames, 20, 11), frames, seed)
    teacher = {"speech": torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))}
    return Batch(("a", "b", "c"), torch.tensor([0, 1, 0]), mel, condition, teacher, (0, 1, 2))


class Step:
    """A model with a head of its own, and the losses of a micro-batch."""

    def __init__(self):
        self.model, self.head = small_model(), torch.nn.Linear(32, 5)
        self.aligns, self.calls = True, 0

    def parameters(self):
        return [*self.model.parameters(), *self.head.parameters()]

    def losses(self, given: Batch, keys: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        t = philox_uniform(keys[0], 1)[:, 0]
        x_t, target = flow_mix(given.mel, t, keys[1], 0.5)
        out = self.model(x_t, t, given.condition, capture=(2,), pooled=True)
        align = (self.head(out.hidden[2]) - given.teacher["speech"]).square().mean() if self.aligns else x_t.sum() * 0
        return {"flow_loss": flow_loss(out.v, target, given.condition.lengths).mean(), "align_loss": align}


def keys(step: int) -> torch.Tensor:
    return torch.stack([clip_keys(0, step, range(3), use) for use in ("draws", "noise")])


def gradients(step: Step, total: torch.Tensor) -> list[torch.Tensor | None]:
    for parameter in step.parameters():
        parameter.grad = None
    (total * 0.5).backward()  # 0.5: the share of a micro-batch
    return [None if p.grad is None else p.grad.clone() for p in step.parameters()]


def assert_equals_eager(step: Step, graphed: graphs.GraphedLosses, given: Batch, number: int) -> None:
    total, losses = graphed(given, keys(number), (step.aligns,))
    replayed = gradients(step, total)
    wanted = step.losses(given, keys(number))
    assert losses.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(losses[name], wanted[name].detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(total, sum(wanted.values()), atol=1e-6, rtol=1e-5)
    for mine, theirs in zip(replayed, gradients(step, sum(wanted.values())), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def test_replays_give_the_losses_and_gradients_of_live_weights_and_new_batches(captures):
    step, said = Step(), []
    graphed = graphs.GraphedLosses(step.losses, step.parameters, 2, said.append)
    for number in range(3):
        assert_equals_eager(step, graphed, batch(seed=number), number)
        with torch.no_grad():
            for parameter in step.parameters():  # an optimizer's step
                parameter.mul_(1.1)
    assert len(captures) == len(said) == 1
    before = step.calls
    graphed(batch(), keys(9), (True,))
    assert step.calls == before  # replayed: no Python of the losses


def test_shapes_beyond_the_limit_run_as_they_come(captures):
    step = Step()
    graphed = graphs.GraphedLosses(step.losses, step.parameters, 2, lambda line: None)
    for number, frames in enumerate((37, 29, 33, 37, 29, 33)):
        assert_equals_eager(step, graphed, batch(frames), number)
    assert len(captures) == 2
    assert captures[0] is captures[1]  # one pool


def test_other_layers_or_moved_weights_are_captured_again(captures):
    step = Step()
    graphed = graphs.GraphedLosses(step.losses, step.parameters, 2, lambda line: None)
    assert_equals_eager(step, graphed, batch(), 0)
    step.aligns = False
    assert_equals_eager(step, graphed, batch(), 1)  # the head has no gradient, instead of zeros
    step.model.blocks[1].ffn.fc1.weight.data = 2 * step.model.blocks[1].ffn.fc1.weight.data
    assert_equals_eager(step, graphed, batch(), 2)
    assert len(captures) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures on a GPU")
def test_real_graphs():
    step = Step()
    step.model.cuda()
    step.head.cuda()
    graphed = graphs.GraphedLosses(lambda *given: step.losses(*given), step.parameters, 2, lambda line: None)
    for number in range(4):
        given, step_keys = batch((37, 29)[number % 2], number).to(torch.device("cuda")), keys(number).cuda()
        total, losses = graphed(given, step_keys, (True,))
        replayed, wanted = gradients(step, total), step.losses(given, step_keys)
        torch.testing.assert_close(losses["flow_loss"], wanted["flow_loss"].detach(), atol=1e-5, rtol=1e-4)
        for mine, theirs in zip(replayed, gradients(step, sum(wanted.values())), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)
        with torch.no_grad():
            for parameter in step.parameters():
                parameter.mul_(1.1)
