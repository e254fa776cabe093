import pytest
import torch
import torch.nn.functional as F

from agrepa_fast import GatedDiTBlock
from agrepa_fast.kernels import force_backend
from agrepa_fast.models.audio_dit.conditioning import rotary_tables

from ..kernels.accuracy import DEVICE, assert_as_accurate, assert_repeatable, fused_backends


def block(**options) -> GatedDiTBlock:
    torch.manual_seed(0)
    made = GatedDiTBlock(16, 2, **options)
    torch.nn.init.normal_(made.modulation.weight, std=0.3)
    torch.nn.init.normal_(made.modulation.bias, std=0.3)
    return made


def test_starts_as_the_identity():
    x, cond = torch.randn(2, 5, 16), torch.randn(2, 16)
    for init in ("adaln_zero", "release"):
        made = GatedDiTBlock(16, 2)
        made.initialize(init)
        torch.testing.assert_close(made(x, cond), x)


def test_release_init_draws_the_modulation_and_zeroes_both_outputs():
    made = GatedDiTBlock(64, 2)
    made.initialize("release")
    assert made.modulation.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not made.attn.out.weight.any()
    assert not made.ffn.fc2.weight.any()


@pytest.mark.parametrize("gelu", ["erf", "tanh"])
def test_matches_a_plain_implementation_with_the_releases_chunk_order(gelu):
    """scale, shift, scale, shift, gate, gate: written out with torch.nn.MultiheadAttention, as the release does."""
    made, x, cond = block(gelu=gelu), torch.randn(3, 7, 16), torch.randn(3, 16)
    attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    attention.in_proj_weight, attention.in_proj_bias = made.attn.qkv.weight, made.attn.qkv.bias
    attention.out_proj.weight, attention.out_proj.bias = made.attn.out.weight, made.attn.out.bias
    gamma1, beta1, gamma2, beta2, alpha1, alpha2 = (
        part.unsqueeze(1)
        for part in F.linear(F.silu(cond), made.modulation.weight, made.modulation.bias).chunk(6, dim=-1)
    )
    y = F.layer_norm(x, (16,), eps=1e-6) * (1 + gamma1) + beta1
    h = x + alpha1 * attention(y, y, y, need_weights=False)[0]
    y = F.layer_norm(h, (16,), eps=1e-6) * (1 + gamma2) + beta2
    inner = F.gelu(made.ffn.fc1(y), approximate="none" if gelu == "erf" else "tanh")
    torch.testing.assert_close(made(x, cond), h + alpha2 * made.ffn.fc2(inner), atol=1e-5, rtol=1e-5)


def test_gate_zero_returns_the_input_exactly():
    made, x, cond = block(), torch.randn(4, 6, 16), torch.randn(2, 16)
    out = made(x, cond, gate=torch.tensor([1.0, 0.0, 0.5, 0.0]))
    assert torch.equal(out[[1, 3]], x[[1, 3]])
    full = made(x, cond)
    assert torch.equal(out[0], full[0])
    assert not torch.isclose(out[2], x[2]).all()


def test_branch_gates_are_attention_then_ffn():
    made, x, cond = block(), torch.randn(2, 6, 16), torch.randn(2, 16)
    no_ffn = made(x, cond, gate=torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    torch.nn.init.zeros_(made.ffn.fc2.weight)
    torch.nn.init.zeros_(made.ffn.fc2.bias)
    torch.testing.assert_close(no_ffn, made(x, cond))


OPTIONS = [{}, {"qk_norm": True, "gelu": "tanh"}]


def whole_block(options):
    """block(x, cond, ...) as a function of its inputs and parameters, and those inputs: rows over fewer conditions,
    an odd number of frames past a chunk, lengths, gates of every kind, the time-sum."""
    torch.manual_seed(0)
    made = GatedDiTBlock(48, 3, **options).to(DEVICE)
    inputs = {name: torch.randn_like(value) * 0.2 for name, value in made.named_parameters()}
    inputs |= {"x": torch.randn(6, 37, 48, device=DEVICE), "cond": torch.randn(3, 48, device=DEVICE)}
    gates = torch.tensor([[1, 1], [0, 1], [1, 0], [0.5, 0.25], [0, 0], [1, 0.5]], device=DEVICE)
    lengths = torch.tensor([37, 20, 1], device=DEVICE)

    def call(x, cond, **parameters):
        rope = tuple(table.to(x.dtype) for table in rotary_tables(37, 16, DEVICE))
        options = {"rope": rope, "gate": gates, "lengths": lengths, "time_sum": True}
        out, total = torch.func.functional_call(made, parameters, (x, cond), options)
        return torch.where((torch.arange(37, device=DEVICE) < lengths[:, None]).repeat(2, 1)[..., None], out, 0), total

    gradients = [torch.randn(6, 37, 48, device=DEVICE), torch.randn(6, 48, device=DEVICE)]
    return call, inputs, gradients


@pytest.mark.parametrize("backend", fused_backends())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_as_accurate_as_the_reference(options, dtype, backend):
    call, inputs, gradients = whole_block(options)
    inputs = {name: value.to(dtype) for name, value in inputs.items()}
    assert_as_accurate(call, inputs, gradients, backend)


@pytest.mark.parametrize("backend", fused_backends())
def test_repeatable(backend):
    assert_repeatable(*whole_block(OPTIONS[1]), backend)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_state_dict_is_that_of_a_plain_block_on_every_backend(options):
    """Strict loading both ways; nothing but Linear layers and two norm weights, so a plain block can hold it."""

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            linear, module = torch.nn.Linear, torch.nn.Module
            self.modulation, self.attn, self.ffn = linear(16, 96), module(), module()
            self.attn.qkv, self.attn.out = linear(16, 48), linear(16, 16)
            self.ffn.fc1, self.ffn.fc2 = linear(16, 64), linear(64, 16)
            if options.get("qk_norm"):
                self.attn.q_norm, self.attn.k_norm = (torch.nn.Parameter(torch.ones(8)) for _ in range(2))

    outputs = []
    plain, x, cond = Plain(), torch.randn(2, 5, 16), torch.randn(2, 16)
    for backend in (*fused_backends(), "reference"):
        with force_backend(backend):
            made = block(**options)
            made.load_state_dict(plain.state_dict(), strict=True)
            plain.load_state_dict(made.state_dict(), strict=True)
            outputs.append(made.to(DEVICE)(x.to(DEVICE), cond.to(DEVICE)))
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("time_sum", "compiler"),
    [pytest.param(False, "inductor", marks=pytest.mark.drill), (True, "aot_eager"), (False, "aot_eager")],
)
def test_compiles_without_graph_breaks(time_sum, compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # not what an earlier version of an op was compiled to
    made = block(qk_norm=True).to(DEVICE)
    x, cond = torch.randn(4, 7, 16, device=DEVICE), torch.randn(2, 16, device=DEVICE)
    options = {
        "rope": rotary_tables(7, 8, DEVICE),
        "lengths": torch.tensor([7, 4], device=DEVICE),
        "time_sum": time_sum,
    }
    results = []
    for call in (made, torch.compile(made, fullgraph=True, backend=compiler)):
        made.zero_grad()
        rows = x.clone().requires_grad_()
        out = call(rows, cond, **options)
        sum(part.square().sum() for part in (out if time_sum else (out,))).backward()
        results.append([out[0] if time_sum else out, rows.grad, *(p.grad.clone() for p in made.parameters())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-4)


def test_time_sum_is_that_of_the_valid_frames():
    made, x, cond = block(), torch.randn(4, 7, 16), torch.randn(2, 16)
    lengths = torch.tensor([7, 3])
    out, total = made(x, cond, lengths=lengths, time_sum=True)
    assert torch.equal(out, made(x, cond, lengths=lengths))
    for row in range(4):
        torch.testing.assert_close(total[row], out[row, : lengths[row % 2]].sum(0), atol=1e-5, rtol=1e-5)


def test_rows_use_the_condition_of_their_place():
    made, x, cond = block(), torch.randn(6, 5, 16), torch.randn(3, 16)
    lengths = torch.tensor([5, 3, 2])
    torch.testing.assert_close(
        made(x, cond, lengths=lengths), made(x, cond.repeat(2, 1), lengths=lengths.repeat(2)), atol=1e-6, rtol=1e-6
    )


def test_ready_modulation_equals_cond():
    made, x, cond = block(), torch.randn(2, 5, 16), torch.randn(2, 16)
    ready = made.modulation(F.silu(cond)).view(2, 6, 16)
    assert torch.equal(made(x, None, modulation=ready), made(x, cond))


def test_per_frame_condition_equals_a_constant_one():
    made, x, cond = block(), torch.randn(2, 5, 16), torch.randn(2, 16)
    per_frame = cond[:, None].expand(2, 5, 16)
    torch.testing.assert_close(made(x, per_frame), made(x, cond), atol=1e-6, rtol=1e-6)
    changed = torch.cat((per_frame[:, :4], per_frame[:, 4:] + 1), dim=1)
    assert not torch.isclose(made(x, changed)[:, 4], made(x, cond)[:, 4]).all()


@pytest.mark.parametrize("qk_norm", [False, True])
def test_padding_never_reaches_valid_frames(qk_norm):
    made, cond, lengths = block(qk_norm=qk_norm), torch.randn(2, 16), torch.tensor([7, 4])
    x, rope = torch.randn(2, 7, 16), rotary_tables(7, 8, "cpu")
    other = x.clone()
    other[1, 4:] = 1e4
    a, b = (made(rows, cond, rope=rope, lengths=lengths) for rows in (x, other))
    assert torch.equal(a[1, :4], b[1, :4])
    torch.testing.assert_close(
        a[1:, :4], made(x[1:, :4], cond[1:], rope=rotary_tables(4, 8, "cpu")), atol=1e-5, rtol=1e-5
    )


def test_gradients_reach_every_parameter():
    made = block(qk_norm=True)
    made(torch.randn(2, 5, 16), torch.randn(2, 16), rope=rotary_tables(5, 8, "cpu")).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in made.parameters())


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match="3 heads"):
        GatedDiTBlock(16, 3)
    with pytest.raises(ValueError, match="gate"):
        block()(torch.randn(4, 5, 16), torch.randn(2, 16), gate=torch.ones(3))
