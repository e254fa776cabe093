"""Alignment objectives against naive versions: values and gradients, ragged lengths, mixed domains, exact zeros."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from agrepa_fast import config
from agrepa_fast.alignment.heads import AlignmentHeads
from agrepa_fast.alignment.losses import alignment_loss
from agrepa_fast.alignment.objective import OF_LAYERS, Objective
from agrepa_fast.alignment.registry import OBJECTIVES, check_layers
from agrepa_fast.alignment.schedule import align_factor
from agrepa_fast.alignment.stretch import stretch
from agrepa_fast.attribution.selection import LayerSelection
from agrepa_fast.config_file import load_config
from agrepa_fast.data.batch import TeacherFrames
from agrepa_fast.errors import UserError
from agrepa_fast.kernels import align_loss_sum, force_backend
from agrepa_fast.reporting.objectives import attention_flops
from agrepa_fast.seeds import derive_seed

DIMS = {"speech": 5, "audio": 7}
WIDTHS = (8, 8, 12, 8)
LAYERS = {"speech": (1, 3), "audio": (1, 2)}
SELECTION = LayerSelection("foga", LAYERS, {"speech": (0.75, 0.25), "audio": (0.4, 0.6)})
SAME_WIDTH = LayerSelection("foga", {"speech": (1,), "audio": (1, 2)}, {"speech": (1.0,), "audio": (0.4, 0.6)})
ATTENTION = (2, 2, 3, 5)  # layers that the teacher's shards hold, queries and keys, heads, width
FRAMES, LENGTHS, COUNTS = 11, (11, 4, 1, 7), torch.tensor([6, 2, 1, 3])  # mel frames, teacher frames
DOMAINS = (0, 1, 0, 1)


def clips(domains=DOMAINS) -> SimpleNamespace:
    """A batch of ragged clips, whose targets are zero in the rows of the other domain, as a loader makes them."""
    torch.manual_seed(1)
    domain, lengths = torch.tensor(domains), torch.tensor(LENGTHS)
    teacher, frames, attention = {}, {}, {}
    for number, (name, dim) in enumerate(DIMS.items()):
        there = domain == number
        teacher[name] = torch.randn(len(domains), dim) * there[:, None]
        values = torch.randn(len(domains), 6, dim) * there[:, None, None]
        frames[name] = TeacherFrames(values.half(), COUNTS * there)
        attention[name] = (torch.randn(len(domains), 6, *ATTENTION) * there.view(-1, *[1] * 5)).half()
    rest = {"mel": torch.zeros(len(domains), FRAMES, 2), "condition": SimpleNamespace(lengths=lengths)}
    targets = {"teacher": teacher, "teacher_frames": frames, "attention": attention}
    return SimpleNamespace(domain=domain, **targets, **rest)


def states(pooled: bool) -> dict[int, torch.Tensor]:
    """Hidden states of all layers; padding is not finite."""
    torch.manual_seed(2)
    shape = (len(LENGTHS),) if pooled else (len(LENGTHS), FRAMES)
    made = {layer: torch.randn(*shape, width) for layer, width in enumerate(WIDTHS, 1)}
    if not pooled:
        for hidden in made.values():
            hidden[torch.arange(FRAMES) >= torch.tensor(LENGTHS)[:, None]] = float("nan")
    return {layer: hidden.requires_grad_() for layer, hidden in made.items()}


def queries_keys(layers: dict[int, torch.Tensor]) -> dict[int, list[torch.Tensor]]:
    """Queries and keys (N, 2, T, 4) of these layers; padding is not finite."""
    torch.manual_seed(3)
    made = {layer: torch.randn(2, len(LENGTHS), 2, FRAMES, 4) for layer in layers}
    for both in made.values():
        padding = torch.arange(FRAMES) >= torch.tensor(LENGTHS)[:, None]
        both.masked_fill_(padding[:, None, :, None], float("nan"))
    return {layer: [part.clone().requires_grad_() for part in both] for layer, both in made.items()}


def heads_of(objective, widths=DIMS, selection=SELECTION) -> AlignmentHeads:
    return AlignmentHeads(objective, selection, WIDTHS, widths, seed=0)


def test_pooled_has_the_bits_of_its_operation():
    """Values, gradients and initial weights are those of AG-REPA's objective as the engine had it before others."""
    objective, batch, hidden, t = OBJECTIVES["pooled"](), clips(), states(pooled=True), torch.rand(4)
    made = heads_of(objective)
    total = 0
    for number, (name, layers) in enumerate(LAYERS.items()):
        for layer in layers:
            head = nn.Sequential(
                nn.Linear(*[WIDTHS[layer - 1]] * 2), nn.GELU(), nn.Linear(WIDTHS[layer - 1], DIMS[name])
            )
            generator = torch.Generator().manual_seed(derive_seed(0, f"{name}_L{layer}"))
            for linear in (head[0], head[2]):
                nn.init.xavier_uniform_(linear.weight, generator=generator)
                nn.init.zeros_(linear.bias)
            ours = made.heads[f"{name}_L{layer}"].state_dict()
            assert all(torch.equal(value, ours[key]) for key, value in head.state_dict().items())
        mask, share = batch.domain == number, torch.full((4,), 0.25)
        alone = [[layer] for layer in layers] if name == "speech" else [list(layers)]  # L1 and L3 differ in width
        for group in alone:
            stacked = F.rms_norm(torch.stack([hidden[k] for k in group]), (WIDTHS[group[0] - 1],), eps=1e-6)
            parts = [made.heads[f"{name}_L{k}"] for k in group]
            weights = [torch.stack([getattr(p[i], kind) for p in parts]) for i in (0, 2) for kind in ("weight", "bias")]
            lambdas = torch.tensor([SELECTION.weights[name][layers.index(k)] for k in group])
            total = total + align_loss_sum(stacked, *weights, batch.teacher[name], lambdas, mask, share)[0]
    leaves = [*made.parameters(), hidden[1], hidden[2], hidden[3]]
    mean, losses = alignment_loss(objective, made, hidden, batch, t)
    assert torch.equal(mean, total)
    assert not losses.requires_grad
    ours, wanted = torch.autograd.grad(mean, leaves), torch.autograd.grad(total, leaves)
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


def naive_pooled(h, head, teacher, frames, length):
    return 1 - F.cosine_similarity(head(h / (h.square().mean() + 1e-6).sqrt()), teacher, dim=0)


def naive_frames(h, head, teacher, frames, length):
    y = F.interpolate(frames.T[None], size=length, mode="linear", align_corners=False)[0].T
    return (1 - F.cosine_similarity(head(h), y, dim=-1)).mean()


def naive_irepa(h, head, teacher, frames, length):
    y = F.interpolate(frames.T[None], size=length, mode="linear", align_corners=False)[0].T
    y = (y - y.mean(0)) / (y.std(0, unbiased=False) + 1e-6)
    return (1 - F.cosine_similarity(head(h.T[None])[0].T, y, dim=-1)).mean()


def naive_layersync(h, head, teacher, frames, length):
    return (1 - F.cosine_similarity(h, frames[:length], dim=-1)).mean()


def naive_sra(h, head, teacher, frames, length):
    off = (head(h) - frames[:length]).abs()
    return torch.where(off < 0.05, off.square() / 0.1, off - 0.025).mean()


def naive_attention(q, k, teacher):
    """The cross-entropy of maps over the teacher's frames. q, k (H, T, E) valid frames; teacher (S, 2, H', E')."""
    total, count, heads = 0, len(teacher), min(len(q), teacher.shape[2])
    for head in range(heads):
        # Each frame as `count` equal pieces: T * count pieces, of which every mean takes T.
        q_mean, k_mean = (x[head].repeat_interleave(count, 0).unflatten(0, (count, -1)).mean(1) for x in (q, k))
        wanted = (teacher[:, 0, head] @ teacher[:, 1, head].T).softmax(-1)
        total = total + F.cross_entropy(q_mean @ k_mean.T / q.shape[-1] ** 0.5, wanted)  # a mean over rows
    return total / heads


NAIVE = {
    "pooled": naive_pooled,
    "frames": naive_frames,
    "irepa": naive_irepa,
    "haste": naive_frames,  # and naive_attention
    "layersync": naive_layersync,
    "sra": naive_sra,
}


def case(name, domains=DOMAINS):
    """(objective, heads, states of a step, batch): layers compare with the next, whose width is theirs. Queries and
    keys of the layers are the batch's `told`."""
    objective, batch = OBJECTIVES[name](), clips(domains)
    hidden, batch.averaged = states(objective.tap == "pooled"), states(False)
    batch.told = queries_keys(hidden) if objective.attention else {}
    if objective.target in ("deeper", "averaged"):
        return objective, heads_of(objective, dict.fromkeys(DIMS, 8), SAME_WIDTH), hidden, batch
    return objective, heads_of(objective), hidden, batch


def next_layer(layer: int) -> int:
    return {1: 2, 2: 4}[layer]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_gradients_are_those_of_each_clip_alone(name):
    objective, made, hidden, batch = case(name)
    t, wanted = torch.rand(4), []
    for row, length in enumerate(LENGTHS):
        domain, each = tuple(DIMS)[DOMAINS[row]], []
        values, counts = batch.teacher_frames[domain]
        for layer, weight in zip(made.selection.layers[domain], made.selection.weights[domain], strict=True):
            frames = values[row, : counts[row]].float()
            if objective.target in ("deeper", "averaged"):
                of_model = hidden if objective.target == "deeper" else batch.averaged
                frames = of_model[next_layer(layer)][row].detach()
            h, head, given = hidden[layer][row], made.of(domain, layer), (batch.teacher[domain][row], frames, length)
            each.append(weight * NAIVE[name](h if h.ndim == 1 else h[:length], head, *given))
            if objective.attention:  # the domain's two layers with the teacher's two
                place = made.selection.layers[domain].index(layer)
                teacher = batch.attention[domain][row, : counts[row], place].float()
                each.append(weight * naive_attention(*(x[row, :, :length] for x in batch.told[layer]), teacher))
        wanted.append(sum(each))
    mean, losses = alignment_loss(objective, made, hidden, batch, t, next_layer, batch.told)
    torch.testing.assert_close(losses, torch.stack(wanted).detach())
    torch.testing.assert_close(mean, losses.mean())
    assert not losses.requires_grad
    leaves = [*made.parameters(), *(hidden[layer] for layer in made.selection.all_layers)]
    leaves += [part for layer in made.selection.all_layers for part in batch.told.get(layer, ())]
    ours, naive = torch.autograd.grad(mean, leaves), torch.autograd.grad(sum(wanted) / 4, leaves)
    for a, b in zip(ours, naive, strict=True):
        torch.testing.assert_close(a, b)
    others = [states for layer, states in hidden.items() if layer not in made.selection.all_layers]
    mean = alignment_loss(objective, made, hidden, batch, t, next_layer, batch.told)[0]
    assert not any(torch.autograd.grad(mean, [*others, *batch.averaged.values()], allow_unused=True))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_absent_domain_gives_exact_zeros(name):
    objective, made, hidden, batch = case(name, (0, 0, 0, 0))
    mean, _ = alignment_loss(objective, made, hidden, batch, torch.rand(4), next_layer, batch.told)
    mean.backward()
    for head, parameter in made.heads.named_parameters():
        assert bool(parameter.grad.any()) == head.startswith("speech"), head
    (of_audio,) = {*made.selection.layers["audio"]} - {*made.selection.layers["speech"]}
    assert torch.equal(hidden[of_audio].grad, torch.zeros_like(hidden[of_audio]))
    assert hidden[1].grad.isfinite().all()
    if objective.attention:
        assert not any(part.grad.any() for part in batch.told[of_audio])
        assert all(part.grad.isfinite().all() and part.grad.any() for part in batch.told[1])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_products_of_a_head_are_those_that_the_page_of_objectives_counts(name):
    """Two FLOPs per row and weight in the forward, four in the backward; fused operations have the same products."""
    objective, made, hidden, batch = case(name)
    with force_backend("reference"), FlopCounterMode(display=False) as counter:
        alignment_loss(objective, made, hidden, batch, torch.rand(4), next_layer, batch.told)[0].backward()
    rows = len(LENGTHS) if objective.tap == "pooled" else len(LENGTHS) * FRAMES
    counted = 6 * rows * sum(p.numel() for p in made.parameters() if p.ndim > 1)
    if objective.attention:
        counted += len(LENGTHS) * sum(map(len, LAYERS.values())) * attention_flops(FRAMES, 6, 2, 4, 5)
    assert counter.get_total_flops() == counted


def test_states_of_another_time_resolution_are_stretched():
    """As in a U-Net: the deeper layer has half of the frames, ceil(length / 2) of each clip."""
    objective, made, hidden, batch = case("layersync")
    hidden[2] = hidden[2][:, ::2].detach().nan_to_num()
    _, losses = alignment_loss(objective, made, hidden, batch, torch.rand(4), next_layer)
    wide = F.interpolate(hidden[2][:1, :6].mT, size=11, mode="linear", align_corners=False)[0].T
    torch.testing.assert_close(losses[0], naive_layersync(hidden[1][0], None, None, wide, 11).detach())


@pytest.mark.parametrize(("count", "length"), [(1, 5), (4, 4), (3, 11), (7, 5)])  # also fewer frames than the teacher
def test_stretched_frames_are_those_of_interpolate(count, length):
    torch.manual_seed(0)
    values = torch.randn(2, 9, 3)
    values[0, count:] = float("inf")
    found = stretch(values, torch.tensor([count, 0]), torch.tensor([length, 6]), 12)
    wanted = F.interpolate(values[:1, :count].mT, size=length, mode="linear", align_corners=False)[0].T
    torch.testing.assert_close(found[0, :length], wanted)
    assert found.isfinite().all()
    assert found.shape == (2, 12, 3)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ((), {0: 1, 9: 1, 19: 1}),
        (("align.warmup_steps=4",), {4: 0.25, 5: 0.5, 7: 1, 19: 1}),
        (("align.decay=linear",), {4: 1, 12: 0.5, 19: 1 / 16}),
        (("align.decay=cosine", "align.stop=12"), {4: 1, 8: 0.5, 10: 0.5 - 0.5**1.5}),
        (("align.decay=linear", "align.stop=14", "align.warmup_steps=2"), {4: 0.5, 5: 0.9, 9: 0.5}),
    ],
)
def test_the_weight_warms_up_and_falls_since_the_choice(settings, wanted):
    """Layers were chosen at step 4 of 20."""
    made = load_config("demo", ["train.steps=20", "align.strategy=shallow", *settings])
    assert {step: align_factor(made, step, 4) for step in wanted} == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("align.objective=poold", "align.objective='poold' is unknown: did you mean 'pooled'"),
        ("align.deeper=2", "align.objective=pooled compares with no deeper layer"),
    ],
)
def test_settings_that_are_wrong(settings, message):
    with pytest.raises(UserError, match=message):
        load_config("demo", [settings])


def test_deeper_is_refused_for_an_objective_of_the_users_that_compares_no_layers():
    class Mine(Objective):
        target = "frames"

    align = config.AlignConfig(objective="mine:Mine", deeper=2)
    with pytest.raises(UserError, match=r"align\.deeper=2: align\.objective=mine:Mine compares with no deeper layer"):
        check_layers(align, Mine(), [8] * 4)
    Mine.target = "deeper"
    check_layers(align, Mine(), [8] * 4)


def test_the_settings_know_the_objectives():
    assert tuple(OBJECTIVES) == config.OBJECTIVES
    assert tuple(name for name, kind in OBJECTIVES.items() if kind.target in OF_LAYERS) == config.OF_LAYERS
