import pytest
import torch
import torch.nn.functional as F

from agrepa_fast.models.audio_dit import attention
from agrepa_fast.models.audio_dit.attention import attend, segment_bounds


def varlen_by_segments(q, k, v, bounds_q, bounds_k, longest_q, longest_k, dropout_p=0.0):
    """What flash-attn documents for flash_attn_varlen_func (flash_attn_interface.py), one segment at a time."""
    assert torch.equal(bounds_q, bounds_k)
    assert bounds_q.dtype == torch.int32
    assert (bounds_q.diff() >= 0).all()
    assert bounds_q.diff().max() <= longest_q == longest_k
    out = torch.full_like(q, float("nan"))
    for start, end in zip(bounds_q[:-1].tolist(), bounds_q[1:].tolist(), strict=True):
        one = (x[start:end].transpose(0, 1) for x in (q, k, v))
        out[start:end] = F.scaled_dot_product_attention(*one, dropout_p=dropout_p).transpose(0, 1)
    return out


def inputs(dtype=torch.bfloat16):
    torch.manual_seed(0)
    packed = torch.randn(6, 9, 3, 2, 8).to(dtype)  # rows, frames, qkv, heads, width: views as qk_norm_rope makes them
    return [x.transpose(1, 2) for x in packed.unbind(2)]


@pytest.mark.parametrize("lengths", [(9, 4, 1), (9, 9, 9), (3, 9, 8)])
def test_varlen_segments_equal_the_masked_softmax(monkeypatch, lengths):
    lengths = torch.tensor(lengths)
    masked = attend(*inputs(), lengths)
    monkeypatch.setattr(attention, "flash_attn_varlen_func", varlen_by_segments)
    packed = attend(*inputs(), lengths)
    valid = (torch.arange(9) < lengths[:, None]).repeat(2, 1)
    torch.testing.assert_close(packed[valid], masked[valid], atol=1e-2, rtol=1e-2)
    assert packed.isfinite().all()


def test_fp32_never_goes_to_flash_attn(monkeypatch):
    """flash-attn computes in half precision only."""
    monkeypatch.setattr(attention, "flash_attn_varlen_func", None)
    wanted = attend(*inputs(torch.float32), torch.tensor([9, 4]))
    monkeypatch.setattr(attention, "flash_attn_varlen_func", lambda *_, **__: pytest.fail("called"))
    assert torch.equal(attend(*inputs(torch.float32), torch.tensor([9, 4])), wanted)


def test_segments_are_valid_frames_then_padding():
    assert segment_bounds(torch.tensor([5, 2]), 4, 5).tolist() == [0, 5, 5, 7, 10, 15, 15, 17, 20]


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
