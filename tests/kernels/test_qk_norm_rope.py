import math

import pytest
import torch

from agrepa_fast.kernels import force_backend, qk_norm_rope
from agrepa_fast.models.audio_dit.conditioning import rotary_tables

from .accuracy import DEVICE, assert_as_accurate, assert_repeatable, fused_backends

WIDE = (2, 37, 3, 48)  # frames beyond a chunk of 32, heads and head width no powers of two, more rows than a tile
# (N, T, H, E), interleaved, norm, rope, dtype
CASES = [
    ((2, 1, 2, 8), True, True, True, torch.float32),  # one token
    (WIDE, True, True, True, torch.float32),
    (WIDE, True, True, False, torch.float32),
    (WIDE, True, False, True, torch.float32),
    (WIDE, False, True, True, torch.float32),
    (WIDE, False, False, True, torch.bfloat16),
    (WIDE, True, True, True, torch.bfloat16),
    (WIDE, False, True, False, torch.bfloat16),
    ((1, 150, 1, 6), True, True, True, torch.float32),  # a head narrower than the smallest block, beyond several tiles
]


def inputs(n, frames, heads, width, dtype, norm):
    torch.manual_seed(0)
    qkv = torch.randn(n, frames, 3 * heads * width + 5, device=DEVICE)
    qkv[:, 0] *= 1e-3  # eps matters here
    tensors = {"qkv": qkv.to(dtype)}
    if norm:
        tensors |= {name: (torch.randn(width, device=DEVICE) + 1).to(dtype) for name in ("q_weight", "k_weight")}
    shapes = [(n, heads, frames, width)] * 3
    return tensors, [torch.randn(shape, device=DEVICE) for shape in shapes]


def caller(heads, width, frames, rope, **options):
    tables = rotary_tables(frames, width, DEVICE) if rope else None
    packed = 3 * heads * width

    def call(qkv, q_weight=None, k_weight=None):  # rows of a wider tensor
        return qk_norm_rope(qkv[..., 2 : packed + 2], heads, tables, q_weight=q_weight, k_weight=k_weight, **options)

    return call


@pytest.mark.parametrize("backend", fused_backends())
@pytest.mark.parametrize(("shape", "interleaved", "norm", "rope", "dtype"), CASES, ids=str)
def test_as_accurate_as_the_reference(shape, interleaved, norm, rope, dtype, backend):
    _, frames, heads, width = shape
    call = caller(heads, width, frames, rope, interleaved=interleaved, rotary_heads=(heads + 1) // 2)
    assert_as_accurate(call, *inputs(*shape, dtype, norm), backend)


@pytest.mark.parametrize("backend", fused_backends())
def test_odd_head_width_without_positions(backend):
    shape = (2, 5, 2, 7)
    assert_as_accurate(caller(2, 7, 5, False), *inputs(*shape, torch.float32, True), backend)


@pytest.mark.parametrize("backend", fused_backends())
def test_weight_gradients_over_many_chunks(backend):
    """Each of q's and k's weights sums over 2 rows, 12 chunks of frames (native) and 2 of heads (Triton)."""
    shape = (2, 90, 8, 16)
    assert_as_accurate(caller(8, 16, 90, True), *inputs(*shape, torch.float32, True), backend)


@pytest.mark.parametrize("backend", fused_backends())
def test_repeatable(backend):
    assert_repeatable(caller(3, 16, 70, True), *inputs(2, 70, 3, 16, torch.float32, True), backend)


@pytest.mark.parametrize("backend", fused_backends())
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)])
def test_outputs_that_nothing_used(used, norm, backend):
    """Their gradients arrive as None."""
    tensors, gradients = inputs(2, 5, 3, 8, torch.float32, norm)

    def call(**leaves):
        outputs = caller(3, 8, 5, True)(**leaves)
        nothing = sum(0 * leaf.sum() for leaf in leaves.values())  # every leaf has a gradient on every backend
        return *(outputs[i] for i in used), nothing

    assert_as_accurate(call, tensors, [*(gradients[i] for i in used), torch.ones((), device=DEVICE)], backend)


@pytest.mark.parametrize("backend", fused_backends())
def test_gradients_of_any_stride(backend):
    tensors, gradients = inputs(2, 5, 3, 8, torch.float32, True)
    strided = [
        gradients[0].transpose(1, 2).contiguous().transpose(1, 2),  # as from attention on (N, T, H, E)
        gradients[1][:, :1].expand(-1, 3, -1, -1),  # as from a sum over heads
        gradients[2].transpose(2, 3).contiguous().transpose(2, 3),  # last dimension not contiguous
    ]
    assert_as_accurate(caller(3, 8, 5, True), tensors, strided, backend)


@pytest.mark.parametrize("backend", fused_backends())
def test_layout_is_what_attention_takes(backend):
    tensors, _ = inputs(2, 5, 3, 8, torch.float32, False)
    qkv = tensors["qkv"][..., :72]
    with force_backend(backend):
        q, k, v = qk_norm_rope(qkv, 3, rotary_tables(5, 8, DEVICE))
    assert q.stride() == k.stride() == (120, 8, 24, 1)
    assert v.stride() == (qkv.stride(0), 8, qkv.stride(1), 1)
    assert v.data_ptr() == qkv[..., 48:].data_ptr()


@pytest.mark.parametrize("backend", fused_backends())
def test_heads_beyond_the_first_are_left_alone(backend):
    qkv = torch.randn(2, 5, 72, device=DEVICE)
    with force_backend(backend):
        q, k, _ = qk_norm_rope(qkv, 3, rotary_tables(5, 8, DEVICE), rotary_heads=1)
    packed = qkv.view(2, 5, 3, 3, 8)
    assert torch.equal(q[:, 1:], packed[:, :, 0, 1:].transpose(1, 2))
    assert torch.equal(k[:, 1:], packed[:, :, 1, 1:].transpose(1, 2))


@pytest.mark.skipif(DEVICE == "cuda", reason="the native backend is the CPU's")
@pytest.mark.parametrize("norm", [True, False])
def test_compiles_whole(norm):
    tensors, _ = inputs(2, 9, 2, 8, torch.float32, norm)
    tables = rotary_tables(9, 8, DEVICE)

    def attend(qkv, q_weight=None, k_weight=None):
        q, k, v = qk_norm_rope(qkv[..., :48] * 2, 2, tables, q_weight=q_weight, k_weight=k_weight)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def gradients(function):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        y = function(**leaves)
        y.square().sum().backward()
        return [y.detach(), *(leaf.grad for leaf in leaves.values())]

    with force_backend("native"):
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        for got, wanted in zip(gradients(compiled), gradients(attend), strict=True):
            torch.testing.assert_close(got, wanted)
        with torch.no_grad():
            torch.testing.assert_close(compiled(**tensors), attend(**tensors))


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotates_each_pair_by_its_angle(interleaved):
    heads, width, frames = 2, 6, 5
    qkv = torch.randn(1, frames, 3 * heads * width, dtype=torch.float64)
    cos, sin = rotary_tables(frames, width, "cpu")
    q, k, v = qk_norm_rope(qkv, heads, (cos.double(), sin.double()), interleaved=interleaved, rotary_heads=1)
    for part, got in enumerate((q, k)):
        for frame in range(frames):
            for pair in range(width // 2):
                i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + width // 2)
                angle = frame * 10_000 ** (-2 * pair / width)
                a, b = (qkv[0, frame, part * heads * width + place].item() for place in (i, j))
                assert got[0, 0, frame, i].item() == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-6)
                assert got[0, 0, frame, j].item() == pytest.approx(a * math.sin(angle) + b * math.cos(angle), abs=1e-6)
    packed = qkv.view(1, frames, 3, heads, width)
    assert torch.equal(q[:, 1], packed[:, :, 0, 1])  # heads beyond the first n are left alone
    assert torch.equal(v, packed[:, :, 2].transpose(1, 2))


def test_norm_gives_unit_rms_times_weight():
    qkv = 7 * torch.randn(2, 3, 24)
    q, k, _ = qk_norm_rope(qkv, 2, q_weight=torch.full((4,), 3.0), k_weight=torch.ones(4))
    torch.testing.assert_close(q.square().mean(-1).sqrt(), torch.full((2, 2, 3), 3.0))
    torch.testing.assert_close(k.square().mean(-1).sqrt(), torch.ones(2, 2, 3))


def test_reference_gradients():
    cos, sin = (table.double() for table in rotary_tables(3, 4, "cpu"))
    qkv = torch.randn(2, 3, 24, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def call(x, q, k):
        return qk_norm_rope(x, 2, (cos, sin), q_weight=q, k_weight=k)

    assert torch.autograd.gradcheck(call, (qkv, *weights))


@pytest.mark.parametrize("norm", [True, False])
def test_registered_correctly(norm):
    options = (*rotary_tables(3, 4, "cpu"), *([torch.randn(4)] * 2 if norm else [None] * 2), True, 2, 1e-6)
    qkv, gradients = torch.randn(2, 3, 24), [torch.randn(2, 2, 3, 4) for _ in range(3)]
    torch.library.opcheck(torch.ops.agrepa.qk_norm_rope.default, (qkv, 2, *options))
    backward = torch.ops.agrepa.qk_norm_rope_backward.default
    torch.library.opcheck(backward, (*gradients, qkv if norm else None, *options))


def test_says_what_was_wanted():
    qkv, tables = torch.randn(2, 3, 24), rotary_tables(3, 4, "cpu")
    with pytest.raises(ValueError, match=r"wanted \(3, 2\)"):
        qk_norm_rope(qkv, 2, rotary_tables(4, 4, "cpu"))
    with pytest.raises(ValueError, match=r"sin is \(3, 1\), wanted \(3, 2\)"):
        qk_norm_rope(qkv, 2, (tables[0], tables[1][:, :1]))
    with pytest.raises(ValueError, match="5 heads"):
        qk_norm_rope(qkv, 5)
    with pytest.raises(ValueError, match="one of them is missing"):
        qk_norm_rope(qkv, 2, q_weight=torch.ones(4))
    with pytest.raises(ValueError, match=r"k_weight is \(3,\), wanted \(4,\)"):
        qk_norm_rope(qkv, 2, q_weight=torch.ones(4), k_weight=torch.ones(3))
    with pytest.raises(ValueError, match="rotary_heads is 3, wanted 0 to 2"):
        qk_norm_rope(qkv, 2, tables, rotary_heads=3)
    with pytest.raises(ValueError, match="even width"):
        qk_norm_rope(torch.randn(2, 3, 18), 2, rotary_tables(3, 3, "cpu"))
    with pytest.raises(ValueError, match="stride 3 in its last dimension"):
        qk_norm_rope(torch.randn(2, 24, 3).transpose(1, 2), 2, tables)
    with pytest.raises(ValueError, match=r"qkv is \(3, 24\), wanted \(N, T, D\)"):
        qk_norm_rope(qkv[0], 2)
