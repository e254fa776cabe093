"""`agrepa probe --model`: factories that work, and one line with the place for those that do not."""

import csv
import re
import subprocess
import sys

import pytest

from agrepa_fast.cli import main

MODELS = """
import sys
from dataclasses import dataclass

import torch
import torch.nn as nn

D = 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Model(nn.Module):
    def __init__(self, make=Block, get=lambda out: out, wrap=lambda out: out, loops=1):
        super().__init__()
        self.blocks = nn.ModuleList(make() for _ in range(3))
        self.get, self.wrap, self.loops = get, wrap, loops

    def forward(self, x, t=None):
        x = x if t is None else x + t.view(-1, 1, 1)
        for block in list(self.blocks) * self.loops:
            x = self.get(block(x))
        return self.wrap(x)


def inputs():
    return {"x": torch.randn(3, 10, D)}


def plain():
    return Model(), inputs()


def one_time():
    return Model(), {"t": torch.tensor([0.5]), **inputs()}


def dict_output():
    return Model(wrap=lambda v: {"aux": v[0], "sample": v}), inputs()


def several():
    return Model(wrap=lambda v: {"left": v, "right": -v}), inputs()


def looped():
    return Model(loops=2), inputs()


class DictBlock(Block):
    def forward(self, x):
        return {"hidden": super().forward(x), "note": "text"}


def dict_block():
    return Model(DictBlock, get=lambda out: out["hidden"]), inputs()


class Cross(Block):
    def forward(self, context, x):
        return super().forward(x) + context


def crossed():
    class M(Model):
        def forward(self, x):
            for number, block in enumerate(self.blocks):
                x = block(x.roll(number, 1), x)
            return x

    return M(Cross), inputs()


def nested():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, 32, batch_first=True), 3)
            self.blocks = self.encoder.layers

        def forward(self, x, mask):
            return self.encoder(x, src_key_padding_mask=mask)

    mask = torch.arange(10) >= torch.tensor([[10], [7], [9]])
    return M(), {**inputs(), "mask": mask}


def meta():
    with torch.device("meta"):
        return Model(), inputs()


class Streams(Block):
    def forward(self, context, x):
        return context + x, super().forward(x)


def two_streams():
    class M(Model):
        def forward(self, x):
            context = x.roll(1, 1)
            for block in self.blocks:
                context, x = block(context, x)
            return x

    return M(Streams), inputs()


def inner():
    model = Model()
    model.blocks.append(nn.Sequential(model.blocks[0]))
    return model, inputs()


class Counting(Block):
    def forward(self, x, rows):
        return super().forward(x)


def row_count():
    class M(Model):
        def forward(self, x):
            for block in self.blocks:
                x = block(x, torch.tensor([len(x)]))
            return x

    return M(Counting), inputs()


def writes_into_its_input():
    class M(Model):
        def forward(self, x):
            x += 1
            return super().forward(x)

    return M(), inputs()


class Growing(Block):
    def forward(self, x, store, n):
        store[n] = x if store[n] is None else torch.cat((store[n], x), 1)
        return super().forward(x) + store[n].mean(1, keepdim=True)


def cache():
    class M(Model):
        def forward(self, x):
            store = []
            for n, block in enumerate(self.blocks):
                store.append(None)
                x = block(x, store, n)
            return x

    return M(Growing), inputs()


class Broken(Block):
    def forward(self, x):
        assert x.ndim == 2
        return x


def broken_block():
    return Model(Broken), inputs()


class ByRows(Block):
    def forward(self, x):
        return super().forward(x) * torch.ones(3, 1, 1)


def fixed_rows():
    return Model(ByRows), inputs()


def missing_file():
    return torch.load("/nonexistent/weights.pt"), {}


def broken_config():
    return {}["width"], {}


def mismatch():
    model = Model()
    model.load_state_dict({"blocks.0.linear.weight": torch.zeros(1)})
    return model, inputs()


def exits():
    sys.exit("no weights here")


def no_pair():
    return Model()


def no_dictionary():
    return Model(), (1, 2)


def no_rows():
    return Model(), {"x": 3}
"""


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """Runs `agrepa probe --model` on a factory of MODELS, as a user types it in the folder of that file."""
    (tmp_path / "their_models.py").write_text(MODELS)
    (tmp_path / "no_syntax.py").write_text("def make(:\n    pass\n")
    monkeypatch.chdir(tmp_path)

    def run(factory: str, *options: str) -> None:
        factory = factory if ":" in factory else f"their_models:{factory}"
        main(["probe", "--model", factory, "--blocks", "blocks", "--out", "out", *options])

    return run


@pytest.fixture
def refusal(probe, capsys):
    """Like probe, and returns the one line of the refusal."""

    def run(factory: str, *options: str) -> str:
        with pytest.raises(SystemExit) as stop:
            probe(factory, *options)
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert "Traceback" not in err or "--traceback" in options
        assert "--traceback" in options or err.count("\n") == 1
        return err

    return run


def layers_in(path) -> list[str]:
    with path.open() as file:
        return [row["layer"] for row in csv.DictReader(file) if row["t"] == "mean"]


@pytest.mark.parametrize(
    "factory", ["plain", "one_time", "dict_output", "dict_block", "looped", "writes_into_its_input"]
)
def test_models_of_many_forms_are_measured(factory, probe, tmp_path, capsys):
    probe(factory)
    assert layers_in(tmp_path / "out" / "attribution.csv") == ["1", "2", "3"]
    assert "L1 ... L3 are blocks.0, blocks.1, blocks.2" in capsys.readouterr().out


def test_a_layer_per_call(probe, tmp_path):
    probe("looped", "--per-call", "--verify")
    wanted = [f"{block}.call{call}" for call in (1, 2) for block in (1, 2, 3)]
    assert layers_in(tmp_path / "out" / "attribution.csv") == wanted


def test_the_velocity_and_the_state_are_named(probe, refusal):
    assert "the model returns dict of left, right: name its velocity (--velocity NAME" in refusal("several")
    assert "no tensor 'middle', but left, right" in refusal("several", "--velocity", "middle")
    probe("several", "--velocity", "right")
    assert "block 1 (Cross): its state could be 'context' or 'x'; name it: --state NAME" in refusal("crossed")
    probe("crossed", "--state", "x")


def test_row_arguments_are_the_way_out(probe, refusal):
    err = refusal("row_count")
    assert "block 1 (Counting): its argument 'rows' changes with the number of rows" in err
    assert "name the arguments that have a row per clip: --row-arguments" in err
    probe("row_count", "--row-arguments", "x")


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("nested", "block 1 (TransformerEncoderLayer) gets nested tensors as 'src', which have no rows"),
        ("two_streams", "block 1 (Streams) returns an updated argument 'x' beside its state"),
        ("inner", "block 1 (Block) runs inside block 4 (Sequential)"),
        ("meta", "the model's weights have no values (blocks.0.linear.weight is on the meta device)"),
        ("cache", "block 1 (Growing) keeps state in its argument 'store[0]' (a cache?)"),
        ("broken_block", "their_models.py:N, in forward: AssertionError\n"),
        ("fixed_rows", "block 2 (ByRows) runs alone, but not with the rows of several variants (RuntimeError: "),
        ("fixed_rows", "row_arguments=... in Python (their_models.py:N, in forward)"),
        ("missing_file", "their_models.py:N, in missing_file: FileNotFoundError"),
        ("broken_config", "their_models.py:N, in broken_config: KeyError: 'width'"),
        (
            "mismatch",
            "their_models.py:N, in mismatch: RuntimeError: Error(s) in loading state_dict for Model: Missing key",
        ),
        ("exits", "their_models.py:N, in exits: SystemExit: no weights here"),
        ("no_pair", "no_pair() returned Model, not (model, inputs)"),
        ("no_dictionary", "no_dictionary() returned (Model, tuple), not a module and a dictionary"),
        ("no_rows", "the inputs hold no tensor with a row for every clip"),
        ("no_such", "AttributeError: module 'their_models' has no attribute 'no_such'"),
        ("no_syntax:make", "no_syntax.py:N: SyntaxError: invalid syntax"),
        (":plain", "write MODULE:FACTORY"),
    ],
)
def test_one_line_with_the_place_in_their_code(factory, message, refusal):
    assert message in re.sub(r"py:\d+", "py:N", refusal(factory))


def test_a_place_in_an_installed_package_where_no_file_is_the_users(refusal):
    err = refusal("transformers:AutoModel")
    assert re.search(r"site-packages/transformers/.*\.py:\d+, in \w+: \w+: ", err)


def test_a_traceback_on_request(refusal):
    err = refusal("broken_config", "--traceback")
    assert "Traceback" in err
    assert err.splitlines()[-1].endswith("in broken_config: KeyError: 'width'")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["probe.clips=64", "--live"], "probe.clips=64, --live: without effect with --model"),
        (["runs/mine", "probe.clips=64"], "runs/mine, probe.clips=64: without effect with --model"),
        (["--measures", "cka"], "only foga"),
        (["--recipe", "official"], "only foga"),
    ],
)
def test_options_without_effect_are_refused(options, message, refusal):
    assert message in refusal("plain", *options)


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path, refusal):
    (tmp_path / "out").write_text("a file")
    assert "--out out cannot be written" in refusal("no_such")


def test_options_of_any_model_are_refused_with_a_checkpoint(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["probe", "runs/mine", "--blocks", "layers", "--state", "x", "--per-call"])
    assert stop.value.code == 2
    assert "--blocks, --state, --per-call: without effect but with --model" in capsys.readouterr().err


HUGGING_FACE = """
def make():
    import torch, transformers
    config = transformers.DistilBertConfig(vocab_size=60, dim=32, hidden_dim=64, n_layers=3, n_heads=2)
    return transformers.DistilBertModel(config), {"input_ids": torch.randint(0, 50, (3, 11))}
"""


def test_a_hugging_face_model_beside_the_torchaudio_that_pip_installs(tmp_path):
    """In a process of its own, where nothing has imported torchaudio yet."""
    (tmp_path / "theirs.py").write_text(HUGGING_FACE)
    command = "from agrepa_fast.cli import main; main()"
    options = ["probe", "--model", "theirs:make", "--blocks", "transformer.layer", "--out", "out"]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", command, *options], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert layers_in(tmp_path / "out" / "attribution.csv") == ["1", "2", "3"]
