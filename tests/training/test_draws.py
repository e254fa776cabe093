"""The draws of a step, and the states of the averaged weights that the step is compared with."""

import itertools
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from agrepa_fast.config import FlowConfig
from agrepa_fast.data.layout import BatchLayout
from agrepa_fast.data.plan import BatchPlan
from agrepa_fast.kernels import flow_mix, philox_uniform
from agrepa_fast.seeds import clip_keys
from agrepa_fast.training.draws import LATER, averaged_states, draw_condition
from agrepa_fast.zero.ema import Ema

from ..ranks import call_on_ranks
from ..testing import small_batch, small_model
from .in_process import ds_values, make_run
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
    later = LATER * philox_uniform(~keys[0], 1)[:, 0]
    assert 0 <= later.min() < later.max() <= 0.2
    t = (draws.t + later).clamp(max=1)
    x = x_t + (t - draws.t)[:, None, None] * velocity  # further on the same path
    with torch.no_grad():
        wanted = averaged(x, t, condition, capture=(2, 4)).hidden
    for layer in (2, 4):
        torch.testing.assert_close(found[layer], wanted[layer], rtol=1e-3, atol=1e-3)


def draws_of_a_start(preset: str, folder: Path) -> list[tuple]:
    """The plan's seed and the first keys of a run with random weights, of the two after it, and of the last again."""
    run, batches = make_run(preset, ds_values(0), folder)
    batch, found = next(iter(batches)), []
    layout = BatchLayout(run.config.train.batch_clips, 1, 0, 1)
    for generation in (0, 1, 2, 2):
        run.context = context = replace(run.context, generation=generation)
        plan = BatchPlan.of(context.index, run.config, layout, 0.0, context.draws_seed)
        found.append((plan.seed, run._to_device(batch, 0)[1].tolist()))  # of the clips' order, and of noise and times
    return found


def test_a_run_draws_other_clips_and_noise_than_those_that_trained_its_weights_before(preset, tmp_path):
    ((*given, again),) = call_on_ranks(1, draws_of_a_start, str(preset), tmp_path)
    assert given[-1] == again
    for seeds_or_keys in zip(*given, strict=True):
        assert all(one != other for one, other in itertools.combinations(seeds_or_keys, 2))
