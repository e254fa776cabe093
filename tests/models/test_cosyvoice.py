"""CosyVoice 1 and 2 against the package's flows: loss, gradients, samples, padding, layers, weight files."""

import logging
import sys
import warnings
from collections import deque
from dataclasses import replace

import pytest
import torch

from agrepa_fast import flow
from agrepa_fast.attribution.foga import foga
from agrepa_fast.attribution.points import ProbeBatch, ProbePoints
from agrepa_fast.config_file import load_config
from agrepa_fast.errors import UserError
from agrepa_fast.kernels import philox_normal
from agrepa_fast.models.cosyvoice import stretch
from agrepa_fast.models.cosyvoice_package import import_part

from ..training.waits import waits
from .cosyvoice import CODES, alone, clips, ours, relative, theirs

VERSIONS = pytest.mark.parametrize("version", [1, 2])
LAYERS = pytest.mark.parametrize("layers", ["stages", "blocks"])


def upstream(model) -> dict[str, torch.Tensor]:
    return model.to_upstream(dict(model.state_dict()))


def draws_of_a_step(lengths: torch.Tensor, settings) -> flow.Draws:
    """Draws in which a clip has everything, one no reference, and one nothing."""
    for seed in range(100):
        draws = flow.training_draws(settings, lengths, torch.arange(len(lengths)) + 10 * seed)
        kept = set(zip(draws.keep_tokens.tolist(), draws.keep_reference.tolist(), strict=True))
        if kept == {(True, True), (True, False), (False, False)}:
            return draws
    raise AssertionError("no such draws")


def their_loss(package, mel, condition, draws, monkeypatch, streaming: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The package's loss, in which it draws what ours drew, and the noise (C, T, M) of it."""
    import cosyvoice.flow.flow as their_flow

    coins = deque([0.0 if streaming else 1.0] if hasattr(package, "token_mel_ratio") else [])
    coins += [1.0 if kept else 0.0 for kept in draws.keep_reference.tolist()]
    prefixes = deque(draws.hidden.start[draws.keep_reference].tolist())
    uniforms = deque([draws.t.view(-1, 1, 1), draws.keep_tokens.float()])
    noise = torch.randn(mel.transpose(1, 2).shape, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(their_flow.random, "random", coins.popleft)
    monkeypatch.setattr(their_flow.random, "randint", lambda _low, _high: prefixes.popleft())
    monkeypatch.setattr(torch, "rand", lambda *_sizes, **_options: uniforms.popleft())
    monkeypatch.setattr(torch, "randn_like", lambda _x: noise)
    batch = {
        "speech_token": condition.tokens,
        "speech_token_len": condition.token_lengths,
        "speech_feat": mel,
        "speech_feat_len": condition.lengths,
        "embedding": condition.speaker,
    }
    loss = package(batch, torch.device("cpu"))["loss"]
    monkeypatch.undo()
    assert not [*coins, *prefixes, *uniforms]
    return loss, noise.transpose(1, 2)


@pytest.mark.parametrize("padding", ["strict", "upstream"])
@pytest.mark.parametrize(("version", "streaming"), [(1, False), (2, False), (2, True)])
def test_loss_and_gradients_are_theirs(version, padding, streaming, monkeypatch):
    # The package of 2025 also bends the times of training, which its authors call a bug: "linear" leaves them alone.
    model = ours(version, padding=padding, **({"streaming": 1.0} if streaming else {}))
    package = theirs(model, upstream(model), t_scheduler="linear")
    mel, condition = clips((38,) * 4 if padding == "strict" else (38, 30, 38, 22))
    settings = load_config(f"cosyvoice{version}").flow
    draws = draws_of_a_step(condition.lengths, settings)
    want, noise = their_loss(package, mel, condition, draws, monkeypatch, streaming)
    condition = replace(
        condition,
        reference=flow.reference_around(mel, draws.hidden),
        keep_tokens=draws.keep_tokens,
        keep_reference=draws.keep_reference,
    )
    t = draws.t.view(-1, 1, 1)
    v = model.train(streaming)((1 - t) * noise + t * mel, draws.t, condition).v
    counted = flow.counted_frames(settings, draws.hidden, condition.lengths)
    loss = flow.flow_loss(v, mel - noise, counted)
    loss = (loss * condition.lengths).sum() / condition.lengths.sum()
    assert float(loss.detach()) == pytest.approx(float(want.detach()), rel=3e-6)  # their sigma_min is 1e-6
    loss.backward()
    want.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    gradients["input_embedding.weight"] = gradients["input_embedding.weight"][:CODES]
    for name, parameter in package.named_parameters():
        if parameter.grad.norm() > 1e-6:
            assert relative(gradients[name], parameter.grad) < 2e-5, name


@VERSIONS
def test_samples_are_theirs(version):
    model = ours(version)
    package = theirs(model, upstream(model))
    mel, condition = clips((22,))
    settings, keys = load_config(f"cosyvoice{version}").flow, torch.tensor([7])
    found = flow.sample(model, condition, keys, settings)
    times = 1 - torch.cos(torch.linspace(0, 1, 11) * 0.5 * torch.pi)
    noise = philox_normal(keys, mel[0].numel()).view(mel.shape).transpose(1, 2)
    voice = torch.nn.functional.normalize(condition.speaker, dim=1)
    with torch.inference_mode():
        embedded = package.input_embedding(condition.tokens)
        mu = package.encoder_proj(package.encoder(embedded, condition.token_lengths)[0])
        if version == 1:
            mu = package.length_regulator(mu, condition.lengths)[0]
        want = package.decoder.solve_euler(
            noise, times, mu.transpose(1, 2), torch.ones(1, 1, 22), package.spk_embed_affine_layer(voice),
            condition.reference.transpose(1, 2),
        )  # fmt: skip
    assert relative(found, want.transpose(1, 2)) < 1e-5


def change_by_padding(model, condition, x, t) -> list[float]:
    together, changes = model(x, t, condition, capture=(1, 2), pooled=True), []
    for clip, length in enumerate(condition.lengths.tolist()):
        row = slice(clip, clip + 1)
        single = model(x[row, :length], t[row], alone(condition, clip), capture=(1, 2), pooled=True)
        changes.append(relative(together.v[clip, :length], single.v[0]))
        changes += (relative(together.hidden[layer][clip], single.hidden[layer][0]) for layer in (1, 2))
    return changes


@VERSIONS
def test_padding_changes_no_clip(version):
    x, condition = clips((38, 21, 30), frames=45)
    keep = torch.tensor([True, False, True])
    condition = replace(condition, keep_tokens=keep, keep_reference=~keep)
    t = torch.tensor([0.2, 0.5, 0.9])
    with torch.no_grad():
        assert max(change_by_padding(ours(version), condition, x, t)) < 1e-5
        condition = replace(condition, keep_tokens=None)
        assert max(change_by_padding(ours(version, padding="upstream"), condition, x, t)) > 1e-3


@VERSIONS
def test_the_encoder_runs_once_for_all_rows_of_a_condition(version):
    """As those of a probe's variants, which are many."""
    model, (mel, condition) = ours(version), clips((38, 21, 30), frames=45)
    t, seen = torch.linspace(0.2, 0.8, len(mel)), []
    handle = model.encoder.after_norm.register_forward_hook(lambda _module, args, _out: seen.append(len(args[0])))
    with torch.no_grad():
        together = model(torch.cat((mel, 2 * mel)), t, condition, capture=(0, 1))
        apart = [model(x, t, condition, capture=(0, 1)) for x in (mel, 2 * mel)]
    handle.remove()
    assert seen == [len(mel)] * 3
    torch.testing.assert_close(together.v, torch.cat([one.v for one in apart]), rtol=1e-5, atol=1e-5)
    for layer in (0, 1):
        wanted = torch.cat([one.hidden[layer] for one in apart])
        torch.testing.assert_close(together.hidden[layer], wanted, rtol=1e-5, atol=1e-5)


def test_streaming_is_drawn_for_each_clip_in_training_alone():
    whole, chunked, mixed = (ours(2, streaming=share) for share in (0.0, 1.0, 0.5))
    mel, condition = clips((38, 38))
    t = torch.tensor([0.3, 0.6])
    want = [model.train()(mel, t, condition).v.detach() for model in (whole, chunked)]
    assert relative(want[0], want[1]) > 1e-3
    assert relative(mixed(mel, t, condition).v, want[0]) < 1e-6
    torch.manual_seed(0)
    seen = set()
    for _ in range(30):
        v = mixed.train()(mel, t, condition).v.detach()
        near = [[relative(v[clip], kind[clip]) < 1e-5 for kind in want] for clip in range(2)]
        assert all(sum(kinds) == 1 for kinds in near)
        seen.add(tuple(kinds[1] for kinds in near))
    assert len(seen) == 4


@VERSIONS
@LAYERS
@pytest.mark.parametrize("frames", [22, 21])
def test_foga_equals_leaving_out_one_layer_at_a_time(version, layers, frames):
    model = ours(version, layers=layers)
    mel, condition = clips((frames, 14, 17), frames=frames)
    batch = ProbeBatch(mel, condition, torch.tensor([0, 0, 0]), (0, 1, 2))
    scores = foga(model, batch, times=(0.5,), sigma=1.0).values[..., 0, 0]
    x_t, t = ProbePoints((0.5,), sigma=1.0).x_t(batch, 0.5, 0), torch.full((3,), 0.5)

    def without(_module, _args, kwargs, out):
        return kwargs["hidden_states"] if layers == "blocks" else torch.zeros_like(out)

    with torch.no_grad():
        base = model(x_t, t, condition).v
        assert len(model.layers) == (10 if layers == "blocks" else 5) - (4 if layers == "blocks" else 2) * (
            version == 2
        )
        for number, layer in enumerate(model.layers):
            handles = [part.register_forward_hook(without, with_kwargs=True) for part in layer.parts]
            v = model(x_t, t, condition).v
            for handle in handles:
                handle.remove()
            change = (v - base).flatten(1).norm(dim=1) / base.flatten(1).norm(dim=1)
            torch.testing.assert_close(scores[number], change, rtol=1e-5, atol=1e-5)


@VERSIONS
def test_a_stage_without_its_parts_is_its_shortcut(version):
    model, (mel, condition) = ours(version), clips((22, 14))
    unet = model.decoder.estimator
    for resnet, layer in (
        (unet.down_blocks[0][0], model.layers[0]),
        (unet.up_blocks[0][0], model.layers[-1 - (version == 1)]),
    ):
        entered = []
        handles = [part.register_forward_hook(lambda _m, _a, out: torch.zeros_like(out)) for part in layer.parts]
        handles.append(resnet.res_conv.register_forward_hook(lambda _m, _a, out, entered=entered: entered.append(out)))
        handles.append(layer.tap.register_forward_hook(lambda _m, _a, out, entered=entered: entered.append(out)))
        with torch.no_grad():
            model(mel, torch.tensor([0.2, 0.7]), condition)
        for handle in handles:
            handle.remove()
        assert torch.equal(entered[0].transpose(1, 2), entered[1])


def test_states_have_the_time_of_their_stage_and_are_those_after_it():
    x, condition = clips((21, 14), frames=21)
    hidden = {}
    for layers in ("stages", "blocks"):
        model = ours(1, layers=layers)
        numbers = tuple(range(1, len(model.layers) + 1))
        with torch.no_grad():
            hidden[layers] = model(x, torch.tensor([0.2, 0.7]), condition, capture=(0, *numbers)).hidden
        assert [layer.width for layer in model.layers] == [hidden[layers][n].shape[2] for n in numbers]
    assert hidden["stages"][0].shape == x.shape
    for number, shape in enumerate([(21, 16), (11, 24), (11, 24), (11, 16), (21, 16)], 1):
        assert hidden["stages"][number].shape == (2, *shape)
        assert torch.equal(hidden["stages"][number], hidden["blocks"][2 * number])


@VERSIONS
def test_weights_of_a_file_come_in_and_those_of_the_other_version_are_refused_by_name(version):
    model, other = ours(version), ours(3 - version)
    state = theirs(model, upstream(model)).state_dict()
    loaded = model.from_upstream(state)
    assert all(torch.equal(loaded[name][: len(state[name])], state[name]) for name in state)
    assert not loaded["input_embedding.weight"][CODES:].any()
    model.load_state_dict(loaded)
    message = rf"block1\.block\.{version}\.weight is a weight of CosyVoice {version}, and the model is CosyVoice"
    with pytest.raises(UserError, match=message):
        other.from_upstream(state)


def test_what_the_class_does_not_take_is_refused():
    with pytest.raises(ValueError, match=r"model\.options\.layers=stage: stages or blocks"):
        ours(1, layers="stage")
    model, (mel, condition) = ours(1), clips((8,))
    with pytest.raises(ValueError, match=r"set data\.speaker"):
        model(mel, torch.tensor([0.5]), replace(condition, speaker=None))


@VERSIONS
def test_nothing_waits_for_a_gpu_unless_padding_is_theirs(version):
    mel, condition = clips((38, 21))
    t = torch.tensor([0.3, 0.8])
    found = {}
    for padding in ("strict", "upstream"):
        model = ours(version, padding=padding, **({"streaming": 0.5} if version == 2 else {})).train()
        with waits() as found[padding]:
            model(mel, t, condition, capture=(0, 1), pooled=True).v.square().mean().backward()
        assert model.replayable == (padding == "strict")
    assert not found["strict"]
    assert found["upstream"]


def test_nothing_but_the_parts_is_imported(monkeypatch):
    whole_systems = ("cosyvoice.llm.llm", "cosyvoice.cli.model", "cosyvoice.utils.class_utils")
    ours(1)
    for name in ("cosyvoice.transformer.encoder", *whole_systems):
        monkeypatch.delitem(sys.modules, name, raising=False)
    level = logging.getLogger().level
    assert import_part("transformer.encoder", "ConformerEncoder").__name__ == "ConformerEncoder"
    assert not [name for name in whole_systems if name in sys.modules]
    assert logging.getLogger().level == level


def test_its_construction_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(2)


def test_an_absent_cosyvoice_is_said_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cosyvoice.flow", None)
    monkeypatch.delitem(sys.modules, "cosyvoice.flow.decoder", raising=False)
    with pytest.raises(
        UserError, match="put a CosyVoice checkout and its third_party/Matcha-TTS on PYTHONPATH, or pip"
    ):
        import_part("flow.decoder", "ConditionalDecoder")


def test_tokens_of_another_rate_are_stretched_to_the_nearest():
    rows = torch.arange(6.0).view(1, 6, 1).repeat(3, 1, 1)
    found = stretch(rows, torch.tensor([6, 6, 3]), torch.tensor([6, 8, 6]), 8, 1)[..., 0]
    assert found[0, :6].tolist() == [0, 1, 2, 3, 4, 5]
    assert found[1].tolist() == [0, 1, 1, 2, 3, 4, 4, 5]
    assert found[2, :6].tolist() == [0, 0, 1, 1, 2, 2]


def test_whole_tokens_and_whole_frames_of_one_clip_go_by_index():
    """3.37 s: 85 tokens of 25 per second, rounded up, and 168 frames of 50, rounded down."""
    rows = torch.arange(170.0).view(1, 170, 1).repeat(2, 1, 1)
    found = stretch(rows, torch.tensor([170, 168]), torch.tensor([168, 170]), 170, 2)[..., 0]
    assert found[0, :168].tolist() == list(range(168))
    assert found[1].tolist() == [*range(168), 167, 167]  # theirs would be cut to 168


@VERSIONS
@torch.no_grad()
def test_bf16_weights(version):
    """Lengths are whole numbers there, too: bf16 counts to 256."""
    model, (mel, condition) = ours(version), clips((602, 401))
    t = torch.tensor([0.3, 0.8])
    want = model(mel, t, condition).v
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    attended, unet = [], model.decoder.estimator
    for stage in (unet.down_blocks[0], unet.mid_blocks[0]):
        attention = stage[1][0].attn1
        attention.register_forward_pre_hook(
            lambda _module, _args, kwargs: attended.append(kwargs["attention_mask"].tolist()), with_kwargs=True
        )
    assert relative(model(mel, t, condition).v.float(), want) < 0.03
    assert attended == [[602, 401], [301, 201] if version == 1 else [602, 401]]
