from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from agrepa_fast import AudioDiT
from agrepa_fast.config import ModelConfig
from agrepa_fast.flow import flow_loss
from agrepa_fast.kernels import force_backend
from agrepa_fast.models import backbone

from ..testing import small_batch, small_model

POSITIONS = ["rotary_conv", "sinusoidal"]


@pytest.mark.parametrize("position", POSITIONS)
def test_padding_frames_change_nothing(position):
    """Garbage in the padding of x_t, reference and tokens reaches no valid output, hidden state or loss."""
    model, (mel, condition), t = small_model(position=position), small_batch(), torch.tensor([0.2, 0.5, 0.9])
    padding = (torch.arange(37) >= condition.lengths[:, None])[..., None]
    tokens = torch.where(torch.arange(9) >= condition.token_lengths[:, None], 29, condition.tokens)
    dirty = replace(condition, tokens=tokens, reference=condition.reference + 1e3 * padding)
    clean_out = model(mel, t, condition, capture=(1, 4), pooled=True)
    dirty_out = model(mel + 1e3 * padding, t, dirty, capture=(1, 4), pooled=True)
    assert torch.equal(clean_out.v, dirty_out.v)
    assert not clean_out.v[padding.expand_as(mel)].any()
    for layer in (1, 4):
        assert torch.equal(clean_out.hidden[layer], dirty_out.hidden[layer])
    target = torch.randn_like(mel)
    a, b = (
        flow_loss(v, target + noise * padding, condition.lengths) for v, noise in ((clean_out.v, 0), (dirty_out.v, 1e3))
    )
    assert torch.equal(a, b)


@pytest.mark.parametrize("position", POSITIONS)
def test_a_clip_alone_gives_what_it_gives_in_a_batch(position):
    model, (mel, condition), t = small_model(position=position), small_batch(), torch.tensor([0.2, 0.5, 0.9])
    out = model(mel, t, condition, capture=(2,), pooled=True)
    for clip, length in enumerate(condition.lengths.tolist()):
        one = condition[clip : clip + 1]
        one = replace(one, tokens=one.tokens[:, : one.token_lengths], reference=one.reference[:, :length])
        alone = model(mel[clip : clip + 1, :length], t[clip : clip + 1], one, capture=(2,), pooled=True)
        torch.testing.assert_close(out.v[clip, :length], alone.v[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.hidden[2][clip], alone.hidden[2][0], atol=1e-5, rtol=1e-5)


def test_captured_layers_are_block_outputs_numbered_from_one(model):
    mel, condition = small_batch()
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda *args: outputs.append(args[2]))
    hidden = model(mel, torch.full((3,), 0.5), condition, capture=(1, 3)).hidden
    assert list(hidden) == [1, 3]
    assert torch.equal(hidden[1], outputs[0])
    assert torch.equal(hidden[3], outputs[2])
    pooled = model(mel, torch.full((3,), 0.5), condition, capture=(3,), pooled=True).hidden[3]
    for clip, length in enumerate(condition.lengths.tolist()):
        torch.testing.assert_close(pooled[clip], outputs[2][clip, :length].mean(0))


@pytest.mark.parametrize(
    ("backend", "recompute"),
    [("reference", True), ("native", False), ("native", True), pytest.param("triton", True, marks=pytest.mark.drill)],
)
def test_queries_and_keys_are_those_whose_products_are_taken(recompute, backend):
    """Attention of their softmax is the branch's output; nothing else changes; gradients reach the weights."""
    model, (mel, condition), t = small_model(qk_norm=True), small_batch(), torch.full((3,), 0.5)
    for norm in (model.blocks[2].attn.q_norm, model.blocks[2].attn.k_norm):
        torch.nn.init.uniform_(norm, 0.5, 1.5)
    if recompute:
        model.recompute_layers()
    qkv, outputs = [], []
    model.blocks[2].attn.qkv.register_forward_hook(lambda *args: qkv.append(args[2]))
    model.blocks[2].attn.out.register_forward_hook(lambda *args: outputs.append(args[2]))
    with force_backend(backend):
        out = model(mel, t, condition, capture=(3,), attention=(1, 3))
        plain = model(mel, t, condition, capture=(3,))
        assert list(out.attention) == [1, 3]
        assert not plain.attention
        assert torch.equal(out.v, plain.v)
        assert torch.equal(out.hidden[3], plain.hidden[3])
        q, k = out.attention[3]
        gradients = torch.autograd.grad((q * k.flip(0)).sum(), [model.blocks[2].attn.qkv.weight, model.in_x.weight])
    assert all(gradient.any() for gradient in gradients)
    v = qkv[0].unflatten(-1, (3, 2, 16))[:, :, 2].transpose(1, 2)
    for clip, length in enumerate(condition.lengths.tolist()):
        weights = (q[clip, :, :length] @ k[clip, :, :length].mT / 4).softmax(-1)
        wanted = model.blocks[2].attn.out((weights @ v[clip, :, :length]).transpose(0, 1).flatten(1))
        torch.testing.assert_close(outputs[0][clip, :length], wanted, atol=1e-5, rtol=1e-5)


def test_one_gemm_for_all_modulations_equals_one_a_block(model):
    """On a GPU the model joins them; here it is asked to."""
    mel, condition = small_batch()
    t, results = torch.tensor([0.2, 0.5, 0.9]), []
    for joined in (False, True):
        model.zero_grad()
        model._joins_modulations = lambda cond, joined=joined: joined
        v = model(mel, t, condition).v
        v.square().sum().backward()
        results.append([v, *(p.grad.clone() for p in model.parameters())])
    for apart, together in zip(*results, strict=True):
        torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)


def test_modulations_stay_apart_on_cpus_per_frame_and_under_zero_3(model):
    assert not model._joins_modulations(torch.randn(3, 32))
    on_gpu = SimpleNamespace(is_cuda=True, ndim=2)
    assert model._joins_modulations(on_gpu)
    assert not model._joins_modulations(SimpleNamespace(is_cuda=True, ndim=3))
    model.partitioned = True
    assert not model._joins_modulations(on_gpu)


def test_equal_lengths_are_not_masked_and_change_nothing(model):
    mel, condition = small_batch(lengths=(37, 37, 37))
    assert condition.mask_lengths is None
    assert condition[:2].mask_lengths is None
    assert small_batch()[1].mask_lengths is not None
    t = torch.tensor([0.2, 0.5, 0.9])
    free, masked = (model(mel, t, c, capture=(2,), pooled=True) for c in (condition, replace(condition, padded=True)))
    torch.testing.assert_close(free.v, masked.v, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(free.hidden[2], masked.hidden[2], atol=1e-5, rtol=1e-5)


def test_rows_share_conditions(model):
    mel, condition = small_batch()
    rows, t = torch.cat((mel, 2 * mel)), torch.tensor([0.2, 0.5, 0.9])
    both = model(rows, t, condition).v
    torch.testing.assert_close(both[:3], model(mel, t, condition).v, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both[3:], model(2 * mel, t, condition).v, atol=1e-5, rtol=1e-5)


def test_dropped_conditions_are_not_seen(model):
    mel, condition = small_batch()
    t, nothing = torch.full((3,), 0.5), torch.zeros(3, dtype=torch.bool)
    dropped = replace(condition, keep_tokens=nothing, keep_reference=nothing)
    other = replace(dropped, tokens=(condition.tokens + 1) % 30, reference=condition.reference + 1)
    assert torch.equal(model(mel, t, dropped).v, model(mel, t, other).v)
    assert not torch.equal(model(mel, t, dropped).v, model(mel, t, condition).v)


def test_token_embeddings_train(model):
    """The release computes them under no_grad."""
    mel, condition = small_batch()
    model(mel, torch.full((3,), 0.5), condition).v.square().sum().backward()
    used = set()
    for ids, count in zip(condition.tokens.tolist(), condition.token_lengths.tolist(), strict=True):
        used.update(ids[:count])
    gradient = model.tokens.embedding.weight.grad
    assert all(gradient[token].any() for token in used)
    assert model.tokens.project.weight.grad.any()


def test_says_what_is_wrong(model):
    mel, condition = small_batch()
    with pytest.raises(ValueError, match="1 to 4"):
        model(mel, torch.zeros(3), condition, capture=(-1,))
    with pytest.raises(ValueError, match="C divides rows"):
        model(mel[:2], torch.zeros(3), condition)
    with pytest.raises(ValueError, match="set both"):
        AudioDiT(ModelConfig(dim=16, depth=1, heads=2))


def test_layer_0_is_the_token_condition(model):
    mel, condition = small_batch()
    condition = replace(condition, keep_tokens=torch.tensor([True, True, False]))
    out = model(mel, torch.full((3,), 0.5), condition, capture=(0, 1)).hidden
    assert torch.equal(out[0], model.tokens(condition, 37))
    pooled = model(mel, torch.full((3,), 0.5), condition, capture=(0,), pooled=True).hidden[0]
    for clip, length in enumerate(condition.lengths.tolist()):
        torch.testing.assert_close(pooled[clip], out[0][clip, :length].mean(0))
    assert not pooled[2].any()


def test_layers_are_recomputed_for_gradients_alone(monkeypatch):
    """Checkpointing reads the random state first, which is an error while a CUDA graph of a probe is captured."""
    calls = []
    monkeypatch.setattr(backbone, "checkpoint", lambda forward, *args, **_: calls.append(forward) or forward(*args))
    layer = backbone._recomputed(torch.nn.Linear(3, 3).forward)
    with torch.no_grad():
        layer(torch.ones(2, 3))
    assert not calls
    layer(torch.ones(2, 3))
    assert len(calls) == 1
