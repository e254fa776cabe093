"""Fused F5-TTS blocks against the package's own: values, gradients, and all that must stay as it was."""

import copy

import pytest
import torch

from agrepa_fast import fuse
from agrepa_fast.attribution.ablate import ablate
from agrepa_fast.models.fuse import FusedBlock

from ..attribution.test_peers import CLIPS, FRAMES, awake, f5_dit, f5_inputs
from ..ranks import call_on_ranks

FORMS = {
    "v1": {},
    "v0, rotation of one head": {"pe_attn_head": 1, "text_mask_padding": False},
    "norms of queries and keys": {"qk_norm": "rms_norm"},
    "masked attention": {"attn_mask_enabled": True},
    "long skip, activation checkpointing": {"long_skip_connection": True, "checkpoint_activations": True},
}


def pair(**options) -> tuple[torch.nn.Module, torch.nn.Module, dict]:
    """A model without dropout, in training mode, the same with fused blocks, and inputs."""
    torch.manual_seed(0)
    theirs, _, inputs = f5_dit(dropout=0.0, **options)
    theirs = awake(theirs).train()
    ours = copy.deepcopy(theirs)
    assert fuse(ours) == 6
    return theirs, ours, inputs


def gradients(model: torch.nn.Module, inputs: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    out = model(**inputs)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients_are_theirs(form, masked):
    theirs, ours, inputs = pair(**FORMS[form])
    inputs["mask"] = inputs["mask"] if masked else None
    (want, want_gradients), (found, found_gradients) = gradients(theirs, inputs), gradients(ours, inputs)
    assert relative(found, want) < 1e-5
    assert want_gradients.keys() == found_gradients.keys()
    for name, gradient in want_gradients.items():
        assert relative(found_gradients[name], gradient) < 1e-5, name


def test_bf16_is_as_near_to_fp32_as_theirs():
    theirs, ours, inputs = pair()
    with torch.no_grad():
        exact = theirs(**inputs)
        with torch.autocast("cpu", torch.bfloat16):
            errors = [relative(model(**inputs).float(), exact) for model in (ours, theirs)]
    assert errors[0] < 1.2 * errors[1]


def test_everything_else_stays_as_it_was():
    theirs, ours, inputs = pair()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    block, before = ours.transformer_blocks[0], theirs.transformer_blocks[0]
    assert isinstance(block, type(before))
    assert repr(block) == repr(before)
    calls = []
    block.register_forward_hook(lambda *_: calls.append(1))
    ours(**inputs)
    assert calls == [1]
    assert fuse(ours) == 6  # once more changes nothing
    copied = copy.deepcopy(ours)
    assert isinstance(copied.transformer_blocks[0], FusedBlock)
    assert torch.equal(copied(**inputs), ours(**inputs))


def test_a_block_with_a_forward_of_its_own_is_left_alone():
    theirs, blocks, _ = f5_dit()
    known = type(blocks[0])

    class Forked(known):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    class Renamed(known):
        pass

    blocks[0].__class__, blocks[1].__class__ = Forked, Renamed
    assert fuse(theirs) == 5
    assert type(blocks[0]) is Forked
    assert isinstance(blocks[1], Renamed)


def test_a_call_that_the_operations_lack_runs_their_forward():
    theirs, ours, _ = pair()
    x, t = torch.randn(CLIPS, FRAMES, 32), torch.randn(CLIPS, 32)
    angles, scale = torch.rand(1, FRAMES, 16).repeat_interleave(2, -1)[..., :16], torch.rand(1, FRAMES, 16) + 0.5
    want = theirs.transformer_blocks[0](x, t, rope=(angles, scale))
    assert torch.equal(ours.transformer_blocks[0](x, t, rope=(angles, scale)), want)


def test_fused_blocks_are_probed_alike():
    theirs, ours, _ = pair()
    want, found = (ablate(m, f5_inputs(), list(m.transformer_blocks), verify=0) for m in (theirs, ours))
    torch.testing.assert_close(found.values, want.values, rtol=1e-4, atol=1e-6)


def partitioned() -> float:
    import deepspeed
    from deepspeed.runtime.zero import GatheredParameters

    theirs, ours, inputs = pair()
    want, want_gradients = gradients(theirs, inputs)
    stage3 = {"stage": 3, "stage3_param_persistence_threshold": 0}
    ds_config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": stage3}
    engine, *_ = deepspeed.initialize(
        model=ours, config=ds_config, optimizer=torch.optim.AdamW(ours.parameters(), lr=0.0), dist_init_required=False
    )
    out = engine(**inputs)
    engine.backward((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum())
    from deepspeed.utils import safe_get_full_grad

    worst = relative(out.detach(), want)
    for name, parameter in engine.module.named_parameters():
        if name in want_gradients:
            worst = max(worst, relative(safe_get_full_grad(parameter), want_gradients[name]))
    with GatheredParameters(list(engine.module.parameters())):
        return worst


def test_under_zero_3():
    assert max(call_on_ranks(2, partitioned)) < 1e-5
