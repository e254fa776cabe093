"""multi_gate on other people's models, installed from PyPI (peers.txt), with random weights, against a naive loop that
ablates one block at a time."""

import csv
import importlib
import importlib.machinery
import sys
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
import torch._dynamo.guards  # before the stand-ins: half imported among them, it would stay so
import torch.nn as nn

from agrepa_fast import count_block_forwards, multi_gate
from agrepa_fast.attribution.blocks import find_blocks
from agrepa_fast.attribution.gate_plan import single_ablations
from agrepa_fast.audio.waves import import_torchaudio
from agrepa_fast.cli import main

import_torchaudio()  # the peers import it; beside a CPU build of torch that needs a stand-in first
CLIPS, FRAMES, MELS = 2, 11, 20
INSTALL = "pip install --no-deps -r tests/peers.txt"


class StandIn(ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> type:
        return type(name, (), {})


def import_alone(name: str, *absent: str) -> ModuleType:
    """A module of a package whose __init__ files pull in what a test does not need: they are not run, and the `absent`
    packages are empty stand-ins while it is imported."""
    parents = [name.rsplit(".", depth)[0] for depth in range(name.count("."), 0, -1)]
    finder = importlib.machinery.PathFinder()
    path, others = None, {package: sys.modules.get(package) for package in absent}
    for parent in parents:
        if (spec := finder.find_spec(parent, path)) is None:
            pytest.skip(f"{parent}: {INSTALL}")
        path = list(spec.submodule_search_locations)
        module = ModuleType(parent)
        module.__path__ = path
        sys.modules[parent] = module
    sys.modules.update({stand_in: StandIn(stand_in) for stand_in in absent})
    try:
        return importlib.import_module(name)
    finally:
        for package, module in others.items():  # what another test has imported comes back
            if module is None:
                del sys.modules[package]
            else:
                sys.modules[package] = module


def awake(model: nn.Module) -> nn.Module:
    """In evaluation mode, with zero-initialised weights drawn, so that every block does something."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def f5_inputs():
    torch.manual_seed(1)
    x, cond = torch.randn(2, CLIPS, FRAMES, MELS)
    mask = torch.arange(FRAMES) < torch.tensor([[FRAMES], [7]])
    return {"x": x, "cond": cond, "text": torch.randint(0, 30, (CLIPS, 5)), "time": torch.rand(CLIPS), "mask": mask}


def f5_dit(**options):
    absent = ("librosa", "librosa.filters")
    dit = import_alone("f5_tts.model.backbones.dit", *absent)
    model = dit.DiT(dim=32, depth=6, heads=2, dim_head=16, mel_dim=MELS, text_num_embeds=30, **options)
    return model, list(model.transformer_blocks), f5_inputs()


def f5_unett():
    absent = ("librosa", "librosa.filters")
    unett = import_alone("f5_tts.model.backbones.unett", *absent)
    model = unett.UNetT(dim=32, depth=6, heads=2, dim_head=16, mel_dim=MELS, text_num_embeds=30)
    return model, [branch for _, _, attn, _, ff in model.layers for branch in (attn, ff)], f5_inputs()


def voicebox_package() -> ModuleType:
    absent = ("torchode", "torchdiffeq", "naturalspeech2_pytorch", "naturalspeech2_pytorch.aligner", "vocos")
    absent += ("naturalspeech2_pytorch.utils", "naturalspeech2_pytorch.utils.tokenizer", "gateloop_transformer")
    absent += ("naturalspeech2_pytorch.naturalspeech2_pytorch", "audiolm_pytorch", "spear_tts_pytorch")
    return import_alone("voicebox_pytorch.voicebox_pytorch", *absent)


def voicebox():
    module = voicebox_package()
    model = module.Transformer(dim=32, depth=6, dim_head=16, heads=2, use_unet_skip_connection=True, attn_qk_norm=True)
    torch.manual_seed(1)
    mask = torch.arange(FRAMES) < torch.tensor([[FRAMES], [7]])
    branches = [branch for _, _, _, attn, _, ff in model.layers for branch in (attn, ff)]
    return model, branches, {"x": torch.randn(CLIPS, FRAMES, 32), "mask": mask}


def image_dit():
    diffusers = pytest.importorskip("diffusers", reason=INSTALL)
    model = diffusers.DiTTransformer2DModel(
        2, 16, in_channels=4, out_channels=4, num_layers=5, sample_size=8, patch_size=2
    )
    torch.manual_seed(1)
    inputs = {"hidden_states": torch.randn(CLIPS, 4, 8, 8), "timestep": torch.randint(0, 999, (CLIPS,))}
    return model, list(model.transformer_blocks), inputs | {"class_labels": torch.tensor([3, 999])}


def audio_dit():
    diffusers = pytest.importorskip("diffusers", reason=INSTALL)
    model = diffusers.StableAudioDiTModel(
        sample_size=FRAMES, in_channels=8, num_layers=4, attention_head_dim=16, num_attention_heads=2,
        num_key_value_attention_heads=1, out_channels=8, cross_attention_dim=24, time_proj_dim=16,
        global_states_input_dim=24, cross_attention_input_dim=24,
    )  # fmt: skip
    torch.manual_seed(1)
    inputs = {"hidden_states": torch.randn(CLIPS, 8, FRAMES), "timestep": torch.rand(CLIPS)}
    inputs |= {"encoder_hidden_states": torch.randn(CLIPS, 6, 24), "global_hidden_states": torch.randn(CLIPS, 1, 24)}
    return model, list(model.transformer_blocks), inputs


def tensor_of(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


@contextmanager
def without(modules: list[nn.Module], kind: str):
    """These modules hand on their input, or give nothing to the residual outside of them."""

    def identity(*args, **kwargs):
        state = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        return state if kind == "block" else torch.zeros_like(state)

    for module in modules:
        module.forward = identity
    try:
        yield
    finally:
        for module in modules:
            del module.forward


PEERS = {
    "f5-tts DiT": (f5_dit, "block"),
    "f5-tts DiT, long skip, activation checkpointing": (
        lambda: f5_dit(long_skip_connection=True, checkpoint_activations=True, qk_norm="rms_norm"),
        "block",
    ),
    "f5-tts UNetT, concat skips": (f5_unett, "branch"),
    "voicebox-pytorch, U-Net skips": (voicebox, "branch"),
    "diffusers DiTTransformer2DModel": (image_dit, "block"),
    "diffusers StableAudioDiTModel": (audio_dit, "block"),
}


@pytest.mark.parametrize("max_rows", [None, 3 * CLIPS])
@pytest.mark.parametrize("peer", PEERS)
@torch.no_grad()
def test_equals_ablating_one_block_at_a_time(peer, max_rows):
    make, kind = PEERS[peer]
    model, blocks, inputs = make()
    awake(model)
    gates = single_ablations(len(blocks))
    wanted = [tensor_of(model(**inputs))]
    for block in blocks:
        with without([block], kind):
            wanted.append(tensor_of(model(**inputs)))
    rows = {name: value.repeat(len(gates), *[1] * (value.ndim - 1)) for name, value in inputs.items()}
    with multi_gate(blocks, gates, kind=kind, max_rows=max_rows) as ran:
        got = tensor_of(model(**rows)).unflatten(0, (len(gates), CLIPS))
    torch.testing.assert_close(got, torch.stack(wanted), atol=1e-5, rtol=1e-5)
    assert sum(ran) == count_block_forwards(gates) == len(blocks) * (len(blocks) + 1) // 2
    changes = [(v - wanted[0]).norm() / wanted[0].norm() for v in wanted[1:]]
    assert min(changes) > 1e-3, f"a block that does nothing shows nothing: {changes}"


@torch.no_grad()
def test_whole_layers_of_a_unet_whose_residual_stands_outside():
    """Both branches of a layer at once, with a matrix of twice the columns."""
    model, branches, inputs = f5_unett()
    awake(model)
    layers = single_ablations(len(branches) // 2)
    wanted = [tensor_of(model(**inputs))]
    for attn, ff in zip(branches[::2], branches[1::2], strict=True):
        with without([attn, ff], "branch"):
            wanted.append(tensor_of(model(**inputs)))
    rows = {name: value.repeat(len(layers), *[1] * (value.ndim - 1)) for name, value in inputs.items()}
    with multi_gate(branches, layers.repeat_interleave(2, dim=1), kind="branch"):
        got = tensor_of(model(**rows)).unflatten(0, (len(layers), CLIPS))
    torch.testing.assert_close(got, torch.stack(wanted), atol=1e-5, rtol=1e-5)


FACTORIES = """
import torch
from tests.attribution.test_peers import audio_dit, awake, voicebox

def factory(make):
    torch.manual_seed(5)
    model, _, inputs = make()
    return awake(model), inputs

def audio():
    return factory(audio_dit)

def layers():
    return factory(voicebox)
"""


def test_agrepa_probe_of_any_model(tmp_path, monkeypatch, capsys):
    """As a user types it, with factories in the current folder, against leaving out one block after the other."""
    (tmp_path / "mine.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    main(["probe", "--model", "mine:audio", "--blocks", "transformer_blocks", "--out", "audio"])
    assert "transformer_blocks.0" in capsys.readouterr().out
    torch.manual_seed(5)
    model, blocks, inputs = audio_dit()
    awake(model)
    wanted = []
    with torch.no_grad():
        base = tensor_of(model(**inputs)).flatten(1)
        for block in blocks:
            with without([block], "block"):
                change = (tensor_of(model(**inputs)).flatten(1) - base).norm(dim=1)
            wanted.append(float((change / base.norm(dim=1)).mean()))
    with (tmp_path / "audio" / "attribution.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["t"] == "mean"]
    assert [float(row["score"]) for row in rows] == pytest.approx(wanted, rel=1e-4)
    assert (tmp_path / "audio" / "attribution.png").stat().st_size > 1000
    main(["probe", "--model", "mine:layers", "--blocks", "layers.*.3,layers.*.5", "--kind", "branch", "--out", "v"])
    assert "layers.0.3, layers.0.5, layers.1.3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "mine", "--blocks", "x"], "write MODULE:FACTORY"),
        (["--model", "no_such_module:f", "--blocks", "x"], "No module named 'no_such_module'"),
        (
            ["--model", "tests.attribution.test_peers:f5_inputs", "--blocks", "x"],
            "f5_inputs() returned dict, not (model, inputs)",
        ),
        ([], "name a checkpoint, or --model"),
        (["--model", "mine:f", "--blocks", "x", "--measures", "cka"], "only foga"),
    ],
)
def test_probe_refusals(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["probe", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_find_blocks():
    model = nn.ModuleDict({"a": nn.ModuleList(nn.Sequential(nn.Identity(), nn.ReLU()) for _ in range(2))})
    model["lists"] = nn.ModuleList([model["a"]])
    assert list(find_blocks(model, "a")) == ["a.0", "a.1"]
    assert list(find_blocks(model, "a.*.0,a.*.1")) == ["a.0.0", "a.0.1", "a.1.0", "a.1.1"]
    for path, message in (
        ("b", "b"),
        ("a.*.2", "2"),
        ("a.0.0", "no list of modules"),
        ("lists", "name it, as in --blocks lists.0"),
    ):
        with pytest.raises(ValueError, match=message):
            find_blocks(model, path)
