import pytest
import torch
import torch.nn.functional as F

from agrepa_fast.models.audio_dit.conditioning import TokenCondition, interpolate_tokens, sinusoids

from ..testing import small_batch


@pytest.mark.parametrize(("tokens", "frames"), [(5, 17), (9, 9), (11, 4), (1, 6)])
def test_interpolation_is_torchs_linear_for_each_clip_alone(tokens, frames):
    embedded = torch.randn(2, 11, 3)
    out = interpolate_tokens(embedded, torch.tensor([tokens, 11]), torch.tensor([frames, 20]), 20)
    alone = F.interpolate(embedded[:1, :tokens].transpose(1, 2), size=frames, mode="linear", align_corners=False)
    torch.testing.assert_close(out[0, :frames], alone[0].T, atol=1e-5, rtol=1e-5)


def test_interpolation_by_hand():
    """2 tokens to 4 frames: centres at -0.25, 0.25, 0.75, 1.25 of the token axis, clamped at both ends."""
    out = interpolate_tokens(torch.tensor([[[0.0], [8.0]]]), torch.tensor([2]), torch.tensor([4]), 4)
    assert out.flatten().tolist() == [0.0, 2.0, 6.0, 8.0]


def test_a_tokens_gradient_sums_its_frames_beyond_the_precision_of_bf16():
    """A thousand frames each: added one by one in bf16, the sum would stop at 256."""
    embedded = torch.zeros(1, 4, 8, dtype=torch.bfloat16, requires_grad=True)
    interpolate_tokens(embedded, torch.tensor([4]), torch.tensor([4000]), 4000).sum().backward()
    torch.testing.assert_close(embedded.grad, torch.full_like(embedded, 1000), rtol=0.01, atol=0)


def test_frames_have_unit_norm_and_dropped_clips_are_zero():
    module = TokenCondition(30, 16)
    _, condition = small_batch()
    keep = torch.tensor([True, False, True])
    out = module(
        type(condition)(condition.tokens, condition.token_lengths, condition.reference, condition.lengths, keep), 37
    )
    torch.testing.assert_close(out[[0, 2]].norm(dim=-1), torch.ones(2, 37))
    assert torch.equal(out[1], torch.zeros(37, 16))


def test_projection_starts_as_the_identity_and_codes_can_start_from_their_mels():
    module = TokenCondition(30, 16)
    assert torch.equal(module.project.weight, torch.eye(16))
    mels = torch.randn(30, 12)
    module.start_from(mels)
    assert torch.equal(module.embedding.weight[:, :12], mels)


def test_sinusoids_by_hand():
    out = sinusoids(torch.tensor([2.0]), 4)
    torch.testing.assert_close(
        out,
        torch.tensor([[2.0, 0.02, 2.0, 0.02]])
        .cos()
        .where(torch.tensor([True, True, False, False]), torch.tensor([[2.0, 0.02, 2.0, 0.02]]).sin()),
    )
