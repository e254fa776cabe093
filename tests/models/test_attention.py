from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from torch.nn.attention.varlen import varlen_attn

from agrepa_fast.models.audio_dit import attention
from agrepa_fast.models.audio_dit.attention import attend, segment_bounds, varlen_kernel


def varlen_by_segments(q, k, v, bounds_q, bounds_k, longest_q, longest_k):
    """What PyTorch documents for varlen_attn, and flash-attn for flash_attn_varlen_func, one segment at a time."""
    assert torch.equal(bounds_q, bounds_k)
    assert bounds_q.dtype == torch.int32
    assert (bounds_q.diff() >= 0).all()
    assert bounds_q.diff().max() <= longest_q == longest_k
    segments = [slice(start, end) for start, end in zip(bounds_q[:-1].tolist(), bounds_q[1:].tolist(), strict=True)]
    parts = [[x[segment].transpose(0, 1) for x in (q, k, v)] for segment in segments]
    return torch.cat([F.scaled_dot_product_attention(*part).transpose(0, 1) for part in parts])


def packed_inputs(dtype=torch.bfloat16) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(6, 9, 3, 2, 8).to(dtype)  # rows, frames, qkv, heads, width: views as qk_norm_rope makes them


def inputs(dtype=torch.bfloat16) -> list[torch.Tensor]:
    return [x.transpose(1, 2) for x in packed_inputs(dtype).unbind(2)]


@pytest.mark.parametrize("lengths", [(9, 4, 1), (9, 9, 9), (3, 9, 8)])
def test_varlen_segments_equal_the_masked_softmax(monkeypatch, lengths):
    """Also in the gradients, and whatever the padding of the loss's gradient holds."""
    lengths = torch.tensor(lengths)
    valid = (torch.arange(9) < lengths[:, None]).repeat(2, 1)
    results = []
    for kernel in (None, varlen_by_segments):
        monkeypatch.setattr(attention, "varlen_kernel", lambda q, dropout, kernel=kernel: kernel)
        packed = packed_inputs(torch.float32).requires_grad_()
        out = attend(*(x.transpose(1, 2) for x in packed.unbind(2)), lengths)
        (gradient,) = torch.autograd.grad((out * valid[..., None]).square().sum(), packed)
        results.append((out, gradient))
    (masked, masked_gradient), (segments, gradient) = results
    torch.testing.assert_close(segments[valid], masked[valid])
    torch.testing.assert_close(gradient[valid], masked_gradient[valid])
    assert segments.isfinite().all()
    assert not gradient[~valid].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lengths", [None, (9, 4, 1)])
def test_a_bias_is_added_to_the_scores_and_padding_gets_no_weight(lengths, dtype):
    """Also in the gradients."""
    torch.manual_seed(2)
    bias, tolerance = 3 * torch.randn(2, 9, 9).to(dtype), {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    lengths = None if lengths is None else torch.tensor(lengths)
    valid = torch.ones(6, 9, dtype=bool) if lengths is None else (torch.arange(9) < lengths[:, None]).repeat(2, 1)
    packed = packed_inputs(dtype).requires_grad_()
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    scores = q @ k.transpose(-1, -2) / 8**0.5 + bias
    wanted = (scores.masked_fill(~valid[:, None, None], -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)
    found = attend(q, k, v, lengths, bias=bias)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    gradients = [
        torch.autograd.grad((out * valid[..., None]).square().sum(), packed, retain_graph=True)[0]
        for out in (found, wanted)
    ]
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


def test_a_bias_may_have_another_dtype():
    torch.manual_seed(2)
    x, bias = torch.randn(1, 2, 40, 8, dtype=torch.float64), torch.randn(2, 40, 40)
    wanted = ((x @ x.transpose(-1, -2) / 8**0.5 + bias.double()).softmax(-1) @ x).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attend(x, x, x, None, bias=bias), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [None, (9, 4, 1)])
def test_products_in_bf16_equal_the_fused_attention(monkeypatch, lengths):
    """Where a CPU has bf16 instructions and a gradient is wanted; elsewhere SDPA computes it."""
    lengths = None if lengths is None else torch.tensor(lengths)
    results = []
    for products in (False, True):
        monkeypatch.setattr(attention, "_BF16_PRODUCTS", products)
        packed = packed_inputs().requires_grad_()
        out = attend(*(x.transpose(1, 2) for x in packed.unbind(2)), lengths)
        results.append((out, torch.autograd.grad(out.float().square().sum(), packed)[0]))
        with torch.no_grad():
            results[-1] += (attend(*(x.transpose(1, 2) for x in packed.unbind(2)), lengths),)
    for fused, products in zip(*results, strict=True):
        torch.testing.assert_close(products, fused, atol=3e-2, rtol=3e-2)
    assert not torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][2], results[1][2])


def test_products_drop_weights_of_attention(monkeypatch):
    monkeypatch.setattr(attention, "_BF16_PRODUCTS", True)
    q, k, v = inputs()
    outs = torch.stack([attend(q, k, torch.ones_like(v), None, dropout=0.5) for _ in range(200)]).float()
    assert outs.mean().item() == pytest.approx(1.0, abs=0.02)
    assert outs.std(0).min() > 0.05


def on_gpu(dtype=torch.bfloat16, width=64, **others) -> SimpleNamespace:
    return SimpleNamespace(is_cuda=True, dtype=dtype, shape=(4, 2, 9, width), **others)


def test_the_kernel_for_clips_of_different_lengths(monkeypatch):
    monkeypatch.setattr(attention, "_TORCH_HAS_FLASH", True)
    monkeypatch.setattr(attention, "flash_attn_varlen_func", None)
    assert varlen_kernel(on_gpu(), 0.0) is varlen_attn
    assert varlen_kernel(on_gpu(), 0.1) is None  # varlen_attn has no dropout
    assert varlen_kernel(on_gpu(torch.float32), 0.0) is None
    assert varlen_kernel(on_gpu(width=12), 0.0) is None  # it wants whole vectors of 8
    assert varlen_kernel(inputs()[0], 0.0) is None  # on a CPU


def test_flash_attn_where_torch_has_no_such_kernel(monkeypatch):
    monkeypatch.setattr(attention, "flash_attn_varlen_func", lambda *_, dropout_p: dropout_p)
    monkeypatch.setattr(attention, "_TORCH_HAS_FLASH", True)
    assert varlen_kernel(on_gpu(), 0.1)() == 0.1
    monkeypatch.setattr(attention, "_TORCH_HAS_FLASH", False)
    assert varlen_kernel(on_gpu(), 0.0)() == 0.0
    assert varlen_kernel(on_gpu(torch.float32), 0.0) is None


def test_segments_are_valid_frames_then_padding():
    bounds = segment_bounds(torch.tensor([5, 2]), 4, 5)
    assert bounds.tolist() == [0, 5, 5, 7, 10, 15, 15, 17, 20]
    assert bounds.dtype == torch.int32


class OnGpu(torch.Tensor):
    """A tensor that claims to be on a GPU."""

    is_cuda = True


def test_a_mask_never_meets_cudnn(monkeypatch):
    """Its backward gives NaN at some lengths (pytorch issue 196678)."""
    monkeypatch.setattr(attention, "varlen_kernel", lambda q, dropout: None)
    orders, plain = [], attention.sdpa_kernel

    def record(order, **options):
        orders.append(order)
        return plain(order, **options)

    monkeypatch.setattr(attention, "sdpa_kernel", record)
    q, k, v = (x.as_subclass(OnGpu) for x in inputs(torch.float32))
    attend(q, k, v, None)
    attend(q, k, v, torch.tensor([9, 4, 9]))
    assert orders[0][0] == SDPBackend.CUDNN_ATTENTION
    assert orders[1][0] == SDPBackend.EFFICIENT_ATTENTION
    assert SDPBackend.CUDNN_ATTENTION not in orders[1]


def test_no_lengths_no_mask(monkeypatch):
    seen = []
    plain = F.scaled_dot_product_attention

    def record(*args, attn_mask=None, **options):
        seen.append(attn_mask)
        return plain(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    attend(*inputs(torch.float32), None)
    attend(*inputs(torch.float32), torch.tensor([9, 4, 9]))
    assert seen[0] is None
    assert seen[1].shape == (6, 1, 1, 9)
