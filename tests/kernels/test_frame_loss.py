"""frame_loss_sum against its reference: deep and convolutional heads, chunks that end within a clip, exact zeros."""

import itertools
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from agrepa_fast.kernels import force_backend, frame_loss_sum
from agrepa_fast.kernels.frame_loss import frame_loss_ref

from .accuracy import DEVICE, assert_as_accurate, assert_repeatable, fused_backends

MODULE = import_module("agrepa_fast.kernels.frame_loss")
DEEP, CONV = ((24, 40, 33), 0), ((33,), 1)  # output widths of the layers; context
FP32, BF16 = (torch.float32,) * 2, (torch.bfloat16,) * 2  # of hidden states and heads
MIXED = torch.bfloat16, torch.float32


def inputs(widths, context, dtypes, clips=4, frames=23, width=12):
    """Return clips of `frames` to 0 frames: one at the end of a chunk, one that does not count at all."""
    torch.manual_seed(0)
    tensors = {"hidden": torch.randn(clips, frames, width, device=DEVICE).to(dtypes[0])}
    tensors["hidden"][::2] *= 3  # rows differ in length
    sizes = [(2 * context + 1) * width, *widths]
    for number, (i, o) in enumerate(zip(sizes, widths, strict=False)):
        tensors[f"w{number}"] = (torch.randn(o, i, device=DEVICE) * i**-0.5).to(dtypes[1])
        tensors[f"b{number}"] = torch.randn(o, device=DEVICE).to(dtypes[1])
    tensors["teacher"] = torch.randn(clips, frames, widths[-1] + 5, device=DEVICE)
    tensors["lengths"] = torch.linspace(frames, 0, clips, device=DEVICE).long()
    tensors["row_weights"] = torch.rand(clips, device=DEVICE)
    return tensors, [torch.tensor(-0.5, device=DEVICE)]  # the scaling in the backward is exact, also of bf16


def total(context):
    def call(hidden, teacher, lengths, row_weights, **parts):
        layers = [(parts[f"w{i}"], parts[f"b{i}"]) for i in range(len(parts) // 2)]
        return frame_loss_sum(hidden, teacher[..., 5:], lengths, row_weights, layers, context)[0]

    return call


@pytest.mark.parametrize("backend", fused_backends())
@pytest.mark.parametrize("projected", [4096, 10])  # 10 rows end within a clip of 23
@pytest.mark.parametrize("dtype", [FP32, MIXED, BF16], ids=str)
@pytest.mark.parametrize(("widths", "context"), [DEEP, CONV], ids=["deep", "conv"])
def test_as_accurate_as_the_reference(widths, context, dtype, projected, backend, monkeypatch):
    monkeypatch.setattr(MODULE, "PROJECTED", projected)
    assert_as_accurate(total(context), *inputs(widths, context, dtype), backend)


@pytest.mark.parametrize("backend", fused_backends())
def test_repeatable(backend, monkeypatch):
    monkeypatch.setattr(MODULE, "PROJECTED", 10)
    assert_repeatable(total(1), *inputs(*CONV, FP32), backend)


@pytest.mark.parametrize("backend", [*fused_backends(), "reference"])
def test_a_convolution_sees_zeros_beyond_each_clip_as_alone(backend, monkeypatch):
    monkeypatch.setattr(MODULE, "PROJECTED", 10)
    torch.manual_seed(0)
    conv, lengths = nn.Conv1d(6, 9, 3, padding=1).to(DEVICE), torch.tensor([13, 1, 8], device=DEVICE)
    hidden, teacher = (torch.randn(3, 13, width, device=DEVICE) for width in (6, 9))
    for row, length in enumerate(lengths):
        hidden[row, length:], teacher[row, length:] = float("nan"), float("inf")
    hidden.requires_grad_()
    layers = [(conv.weight.permute(0, 2, 1).flatten(1), conv.bias)]
    with force_backend(backend):
        mean, losses = frame_loss_sum(hidden, teacher, lengths, torch.full((3,), 1 / 3, device=DEVICE), layers, 1)
        ours = torch.autograd.grad(mean, [hidden, *conv.parameters()])
    wanted = []
    for row, length in enumerate(lengths):
        z = conv(hidden[None, row, :length].mT).mT[0]
        wanted.append((1 - F.cosine_similarity(z, teacher[row, :length], dim=-1)).mean())
    torch.testing.assert_close(losses, torch.stack(wanted).detach())
    naive = torch.autograd.grad(sum(wanted) / 3, [hidden, *conv.parameters()])
    for a, b in zip(ours, naive, strict=True):
        torch.testing.assert_close(a, b)
    assert not any(ours[0][row, length:].any() for row, length in enumerate(lengths))


def test_what_does_not_fit_is_named():
    hidden, teacher, lengths, weights = torch.ones(2, 5, 6), torch.ones(2, 5, 7), torch.tensor([5, 2]), torch.ones(2)
    w, b = torch.ones(7, 6), torch.ones(7)
    for given, message in (
        ((hidden[0], teacher, lengths, weights, [(w, b)]), r"hidden is torch.float32 \(5, 6\), wanted"),
        ((hidden, teacher[:, 1:], lengths, weights, [(w, b)]), r"teacher .*\(2, 5, 7\)"),
        ((hidden, teacher, lengths, weights, [(w, b)], 1), r"w1 .*\(H, 18\)"),
        ((hidden, teacher, lengths, weights, [(w, b.double())]), "b1 torch.float64: wanted torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            frame_loss_sum(*given)


def kept_by_autograd(loss: Callable[[], object], *inputs: torch.Tensor) -> int:
    """Bytes that autograd keeps for the backward of loss(), those of its inputs aside."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = loss()
    assert result is not None  # alive until here, and the tensors with it
    given = {x.untyped_storage()._cdata for x in inputs}
    return sum(size for storage, size in kept.items() if storage not in given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_plain_head_keeps_ten_times_the_gradients(dtype):
    """REPA's head for 128 clips of 10 s, width 1024 and Whisper's 1280 channels."""
    with torch.device("meta"):
        head = nn.Sequential(nn.Linear(1024, 2048), nn.SiLU(), nn.Linear(2048, 2048), nn.SiLU(), nn.Linear(2048, 1280))
        hidden = torch.empty(128, 938, 1024, dtype=dtype, requires_grad=True)
        teacher, lengths = torch.empty(128, 938, 1280), torch.empty(128, dtype=torch.int64)
    layers = [(part.weight, part.bias) for part in head.to(dtype) if isinstance(part, nn.Linear)]
    given = (hidden, teacher, lengths, *head.parameters())
    plain = kept_by_autograd(lambda: frame_loss_ref(hidden, teacher, lengths, layers), *given)
    assert plain >= 10 * gradient_bytes(hidden, layers)


def test_saved_for_the_backward_are_the_gradients_alone():
    layers = [(torch.randn(7, 6, requires_grad=True), torch.randn(7, requires_grad=True))]
    hidden, teacher, lengths, weights = (
        torch.randn(2, 50, 6),
        torch.randn(2, 50, 7),
        torch.tensor([50, 2]),
        torch.ones(2),
    )
    fused = kept_by_autograd(lambda: frame_loss_sum(hidden, teacher, lengths, weights, layers)[0])
    assert fused == gradient_bytes(hidden, layers)


def gradient_bytes(hidden, layers) -> int:
    return sum(x.numel() * x.element_size() for x in (hidden, *itertools.chain(*layers)))
