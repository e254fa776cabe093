"""Objectives of a user's: losses, the trial before a run, and heads in a checkpoint."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from agrepa_fast.alignment.aligner import Aligner
from agrepa_fast.alignment.losses import alignment_loss
from agrepa_fast.alignment.registry import make_objective
from agrepa_fast.config_file import load_config
from agrepa_fast.errors import UserError
from agrepa_fast.tensor_files import save_tensors

from ..testing import small_model
from .test_objectives import DIMS, DOMAINS, LAYERS, LENGTHS, SELECTION, WIDTHS, clips, heads_of, states

THEIRS = """
import torch
import torch.nn as nn
import torch.nn.functional as F
from agrepa_fast import Objective

class Mine(Objective):
    def head(self, width, target_width):
        return nn.Linear(width, target_width)

    def loss(self, head, tap, target, mask, t):
        distance = 1 - F.cosine_similarity(head(tap), target.unsqueeze(1), dim=-1)
        return t + (1 + t) * torch.where(mask, distance, 0).sum(1) / mask.sum(1).clamp(min=1)

class Padded(Mine):
    def loss(self, head, tap, target, mask, t):
        return head(tap).mean((1, 2))

class NotFinite(Mine):
    def loss(self, head, tap, target, mask, t):
        return head(tap).sum((1, 2)) / mask.sum(1)

class Scalar(Mine):
    def loss(self, head, tap, target, mask, t):
        return tap.mean()

class Broken(Mine):
    def loss(self, head, tap, target, mask, t):
        raise KeyError("gone")

class Mixed(Mine):
    tap = target = "frames"

    def loss(self, head, tap, target, mask, t):
        return (F.mse_loss(head(tap), target, reduction="none").mean(2) * mask).sum(1) / mask.sum(1).clamp(min=1)

class NoLoss(Objective):
    pass

class Plain:
    pass

class Sliced(Mine):
    tap = target = "frames"

    def loss(self, head, tap, target, mask, t):
        direction = torch.randn(target.shape[-1])
        return (((head(tap.float()) - target) @ direction).square() * mask).sum(1) / mask.sum(1).clamp(min=1)

class Tied(Mine):
    def head(self, width, target_width):
        first, second = nn.Linear(width, width), nn.Linear(width, width)
        second.weight = first.weight
        return nn.Sequential(first, second, nn.Linear(width, target_width))

class Transposed(Mine):
    def head(self, width, target_width):
        made = nn.Linear(width, target_width)
        made.weight = nn.Parameter(torch.randn(width, target_width).T, requires_grad=False)
        return made

class Lazy(Mine):
    def head(self, width, target_width):
        return nn.Sequential(nn.LazyLinear(width), nn.Linear(width, target_width))

class Elsewhere(Objective):
    tap = "everything"

class Attends(Objective):
    attention = True
"""


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    (tmp_path / "their_objective.py").write_text(THEIRS)
    monkeypatch.chdir(tmp_path)
    return "their_objective"


def test_a_users_objective_counts_frames_and_clips_as_ours_do(theirs):
    objective = make_objective(f"{theirs}:Mine", WIDTHS, DIMS)
    made, batch, hidden, t = heads_of(objective), clips(), states(pooled=False), torch.rand(4)
    mean, losses = alignment_loss(objective, made, hidden, batch, t)
    wanted = torch.zeros(4)
    for row, length in enumerate(LENGTHS):
        name = tuple(DIMS)[DOMAINS[row]]
        for layer, weight in zip(LAYERS[name], SELECTION.weights[name], strict=True):
            z = made.of(name, layer)(hidden[layer][row, :length])
            distance = 1 - F.cosine_similarity(z, batch.teacher[name][row][None], dim=-1)
            wanted[row] = wanted[row] + weight * (t[row] + (1 + t[row]) * distance.mean())
    torch.testing.assert_close(losses, wanted.detach())
    leaves = [*made.parameters(), hidden[1], hidden[2], hidden[3]]
    ours, naive = torch.autograd.grad(mean, leaves), torch.autograd.grad(wanted.mean(), leaves)
    for a, b in zip(ours, naive, strict=True):
        torch.testing.assert_close(a, b)
    again = make_objective(f"{theirs}:Mine", WIDTHS, DIMS)
    assert all(torch.equal(a, b) for a, b in zip(heads_of(again).parameters(), made.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{}:Gone", "align.objective=their_objective:Gone: AttributeError"),
        ("{}:Plain", "derive it from agrepa_fast.Objective"),
        ("{}:NoLoss", "NoLoss has no loss"),
        ("{}:Elsewhere", "tap='everything': frames, pooled are known"),
        ("{}:Attends", "attention=True: objectives of ours alone take attention"),
        ("{}:Scalar", r"Scalar.loss returned \(\), not \(3,\)"),
        ("{}:Broken", "their_objective.py:29, in loss: KeyError: 'gone'"),
        ("{}:Padded", "padding changes the loss of a clip"),
        ("{}:NotFinite", "not finite"),
        ("{}:Lazy", "a head's layers need their sizes from the start: nn.Linear, not nn.LazyLinear"),
    ],
)
def test_what_cannot_be_an_objective_is_refused_in_one_line(name, message, theirs):
    with pytest.raises(UserError, match=message) as refusal:
        make_objective(name.format(theirs), WIDTHS, DIMS)
    assert "\n" not in str(refusal.value)


def test_an_objective_may_draw_numbers(theirs):
    state = torch.get_rng_state()
    make_objective(f"{theirs}:Sliced", WIDTHS, DIMS)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["Tied", "Transposed"])
def test_heads_are_saved_whatever_memory_their_weights_share(name, theirs, tmp_path):
    model = small_model()

    def aligner() -> Aligner:
        config = load_config("demo", [f"align.objective={theirs}:{name}", "align.strategy=fixed:1,3"])
        return Aligner(config, model, DIMS, torch.device("cpu"))

    made, other = aligner(), aligner()
    made.select(SELECTION)
    with torch.no_grad():
        for parameter in made.heads.parameters():
            parameter.add_(1)
    save_tensors(made.export(), tmp_path / "heads.safetensors")
    other.load_state_dict(made.state_dict())
    saved = load_file(tmp_path / "heads.safetensors")
    for key, weight in other.heads.heads.state_dict().items():
        assert torch.equal(weight, saved[f"heads.{key}"])
        assert torch.equal(weight, made.heads.heads.state_dict()[key])


def test_an_objective_of_frames_is_tried_in_the_models_dtype(theirs):
    make_objective(f"{theirs}:Mixed", WIDTHS, DIMS)
    with pytest.raises(UserError, match=r"their_objective.py:35, in loss: RuntimeError: mat1 and mat2"):
        make_objective(f"{theirs}:Mixed", WIDTHS, DIMS, torch.bfloat16)
