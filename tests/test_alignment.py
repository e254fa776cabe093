import json

import pytest
import torch
import torch.nn.functional as F

from agrepa_fast.alignment.heads import AlignmentHeads
from agrepa_fast.alignment.objectives import alignment_loss
from agrepa_fast.attribution.selection import LayerSelection, unmeasured_selection
from agrepa_fast.config import AlignConfig, UserError

from .conftest import small_batch

SELECTION = LayerSelection("foga", {"speech": (1, 3), "audio": (2,)}, {"speech": (0.75, 0.25), "audio": (1.0,)})
DIMS = {"speech": 5, "audio": 7}


def heads(seed: int = 0) -> AlignmentHeads:
    return AlignmentHeads(SELECTION, 32, DIMS, seed)


def teachers(rows: int) -> dict[str, torch.Tensor]:
    return {name: torch.randn(rows, dim) for name, dim in DIMS.items()}


def test_loss_by_hand():
    made, hidden = heads(), {layer: torch.randn(4, 32) for layer in (1, 2, 3)}
    teacher, domain = teachers(4), torch.tensor([0, 1, 0, 1])
    mean, loss = alignment_loss(made, hidden, teacher, domain)
    torch.testing.assert_close(mean, loss.mean())
    assert not loss.requires_grad
    for row in range(4):
        name = ("speech", "audio")[domain[row]]
        wanted = 0
        for layer, weight in zip(SELECTION.layers[name], SELECTION.weights[name], strict=True):
            h = hidden[layer][row]
            z = made.heads[f"{name}_L{layer}"](h / (h.square().mean() + 1e-6).sqrt())
            wanted += weight * (1 - F.cosine_similarity(z, teacher[name][row], dim=0))
        torch.testing.assert_close(loss[row], wanted)


def test_gradients_reach_the_selected_layers_and_their_blocks_only(model):
    mel, condition = small_batch()
    out = model(mel, torch.full((3,), 0.5), condition, capture=(1, 2, 3), pooled=True)
    alignment_loss(heads(), out.hidden, teachers(3), torch.tensor([0, 1, 0]))[0].backward()
    reached = [
        block.ffn.fc1.weight.grad is not None and bool(block.ffn.fc1.weight.grad.any()) for block in model.blocks
    ]
    assert reached == [True, True, True, False]  # L4 lies above the deepest selected layer


def test_an_absent_domain_gives_exact_zeros():
    made, hidden = heads(), {layer: torch.randn(4, 32, requires_grad=True) for layer in (1, 2, 3)}
    teacher = teachers(4)
    teacher["audio"] = torch.zeros(4, 7)
    alignment_loss(made, hidden, teacher, torch.zeros(4, dtype=torch.long))[0].backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.any()) == ("speech" in name)
    assert torch.equal(hidden[2].grad, torch.zeros(4, 32))


def test_heads_depend_on_seed_and_name_alone():
    torch.manual_seed(1)
    a = heads()
    torch.manual_seed(2)
    b = heads()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    other = AlignmentHeads(LayerSelection("fixed:3", {"speech": (3,)}, {"speech": (1.0,)}), 32, DIMS, 0)
    assert torch.equal(other.heads["speech_L3"][0].weight, a.heads["speech_L3"][0].weight)
    assert not torch.equal(a.heads["speech_L1"][0].weight, a.heads["speech_L3"][0].weight)
    assert not torch.equal(heads(seed=1).heads["speech_L1"][0].weight, a.heads["speech_L1"][0].weight)


@pytest.mark.parametrize(("strategy", "layers"), [("fixed:4,2,2", (2, 4)), ("shallow", (1, 2, 3)), ("none", None)])
def test_unmeasured_strategies(strategy, layers):
    chosen = unmeasured_selection(AlignConfig(strategy=strategy), 8, ("speech", "audio"), seed=0)
    if layers is None:
        assert chosen.all_layers == ()
        return
    assert chosen.layers == {"speech": layers, "audio": layers}
    assert sum(chosen.weights["audio"]) == pytest.approx(1)


def test_random_layers_depend_on_the_seed():
    sets = {
        unmeasured_selection(AlignConfig(strategy="random"), 8, ("speech", "audio"), seed).layers["speech"]
        for seed in range(9)
    }
    assert len(sets) > 3
    assert all(len(set(layers)) == 3 and min(layers) >= 1 and max(layers) <= 8 for layers in sets)
    again = [unmeasured_selection(AlignConfig(strategy="random"), 8, ("speech",), 4).layers for _ in range(2)]
    assert again[0] == again[1]


def test_foga_needs_scores():
    with pytest.raises(UserError, match="needs a probe"):
        unmeasured_selection(AlignConfig(strategy="foga"), 8, ("speech",), 0)


def test_selection_survives_json(tmp_path):
    SELECTION.save(tmp_path / "selection.json")
    assert LayerSelection.from_dict(json.loads((tmp_path / "selection.json").read_text())) == SELECTION
