"""The states of the averaged weights that a step compares with."""

from copy import deepcopy
from types import SimpleNamespace

import torch

from agrepa_fast.config import FlowConfig
from agrepa_fast.kernels import flow_mix
from agrepa_fast.seeds import clip_keys
from agrepa_fast.training.draws import LATER, averaged_states, draw_condition
from agrepa_fast.zero.ema import Ema

from ..testing import small_batch, small_model
from .test_ema import Engine


def test_averaged_states_are_of_the_average_nearer_to_the_data_for_the_steps_noise_and_condition():
    model, (mel, condition) = small_model(dropout=0.3).train(), small_batch()
    ema, averaged = Ema(Engine(model), decay=0.5), deepcopy(model).eval()
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(0.1)
    live = deepcopy(model.state_dict())
    flow, batch = FlowConfig(drop_tokens=0.5), SimpleNamespace(mel=mel, condition=condition)
    keys = torch.stack([clip_keys(0, 3, range(3), use) for use in ("draws", "noise")])
    found = averaged_states(model, ema, flow, batch, keys, (2, 4))
    assert model.training
    assert all(torch.equal(weights, live[name]) for name, weights in model.state_dict().items())
    assert list(found) == [2, 4]
    assert not found[2].requires_grad

    draws, condition = draw_condition(flow, batch, keys[0])
    x_t, velocity = flow_mix(mel, draws.t, keys[1], flow.sigma)
    with torch.no_grad():
        near, far = (averaged(x_t + d * velocity, draws.t + d, condition, capture=(2, 4)).hidden for d in (0, LATER))
        for row in range(3):  # the time of each clip is its own draw: find it
            later = torch.linspace(0, LATER, 401)
            place, speed = x_t[row] + later[:, None, None] * velocity[row], draws.t[row] + later
            rows = condition[row : row + 1].map(lambda x: x.expand(401, *x.shape[1:]).contiguous())
            errors = (averaged(place, speed, rows, capture=(4,)).hidden[4] - found[4][row]).abs().amax((1, 2))
            spread = (near[4][row] - far[4][row]).abs().max()
            assert errors.min() < 0.01 * spread
            assert 0 < errors.argmin() < 400
