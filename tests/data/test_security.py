"""Nothing from elsewhere runs code, writes outside its folder or reads the environment: shards, indexes, packages,
checkpoints, model folders, configurations. One test per path of an input. A payload makes a folder when it runs."""

import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from agrepa_fast.audio.waves import import_torchaudio
from agrepa_fast.checkpoints.find import find_checkpoint
from agrepa_fast.cli import main
from agrepa_fast.config import TrainConfig
from agrepa_fast.config_file import load_config
from agrepa_fast.data.index import INDEX, Shard, load_index
from agrepa_fast.data.layout import BatchLayout
from agrepa_fast.data.reading import read_shard
from agrepa_fast.errors import UserError
from agrepa_fast.evaluation.embeddings import load_embedding
from agrepa_fast.evaluation.mos import load_mos
from agrepa_fast.fetch import fetch_apt, fetch_pip
from agrepa_fast.teachers import load_teacher
from agrepa_fast.zero.ds_config import find_ds_config, resolve_ds_config

from ..ranks import run_training
from ..testing import write_small_shards
from .test_fetch import cache, no_client, put_deb, tar_member  # noqa: F401


class Payload:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path) -> Path:
    """The folder that the payload makes; it must not exist after the test."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "the payload ran"


@pytest.fixture(scope="module")
def preset(tmp_path_factory) -> Path:
    return write_small_shards(tmp_path_factory.mktemp("security") / "shards")


@pytest.fixture
def shards(preset, tmp_path) -> Path:
    folder = tmp_path / "shards"
    shutil.copytree(preset.parent, folder)
    return folder


@pytest.fixture(scope="module")
def run(preset, tmp_path_factory) -> Path:
    """A run of two steps, with its checkpoint."""
    folder = tmp_path_factory.mktemp("security-run")
    run_training(1, "--preset", str(preset), "run.dir=run", "align.strategy=none", "train.steps=2", cwd=folder)
    return folder / "run"


def pickled(marker: Path, how: str) -> bytes:
    buffer = io.BytesIO()
    if how == "pickle":
        pickle.dump(Payload(marker), buffer)
    elif how == "torch":
        torch.save({"weight": Payload(marker)}, buffer)
    else:
        np.save(buffer, np.array([Payload(marker)], object), allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize("how", ["pickle", "torch", "npy"])
def test_the_payload_runs_where_pickles_are_loaded(how, tmp_path):
    content = io.BytesIO(pickled(tmp_path / "executed", how))
    if how == "pickle":
        pickle.load(content)
    elif how == "torch":
        torch.load(content, weights_only=False)
    else:
        np.load(content, allow_pickle=True)
    assert (tmp_path / "executed").is_dir()


def add_members(tar_file: Path, members: dict[str, bytes], replace: bool = False) -> None:
    """Add files to a tar, or put them in the place of those of the same name."""
    with tarfile.open(tar_file) as tar:
        kept = [(member, tar.extractfile(member).read()) for member in tar.getmembers()]
    with tarfile.open(tar_file, "w") as tar:
        for member, content in kept:
            content = members.get(member.name, content) if replace else content
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, content in ({} if replace else members).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def as_written(shard: Shard) -> Shard:
    """The shard with the size and checksum of its file: somebody who writes a tar writes its index as well."""
    content = shard.path.read_bytes()
    return replace(shard, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


class TestShards:
    @pytest.mark.parametrize(("suffix", "how"), [("mel.npy", "npy"), ("json", "pickle")])
    def test_a_pickle_in_the_place_of_a_member_is_refused(self, how, suffix, shards, marker):
        index = load_index(shards)
        shard = index.shards("train", "speech")[0]
        add_members(shard.path, {f"speech0003.{suffix}": pickled(marker, how)}, replace=True)
        with pytest.raises(UserError, match=f"speech0003.{suffix}"):
            read_shard(as_written(shard), index)

    def test_members_that_webdataset_would_unpickle_are_not_read(self, shards, marker, monkeypatch):
        index = load_index(shards)
        shard = index.shards("train", "speech")[2]
        suffixes = ("pyd", "pickle", "pkl", "pth", "pt", "ten", "tb", "npz", "cbor", "mp")
        add_members(shard.path, {f"speech0021.{suffix}": pickled(marker, "pickle") for suffix in suffixes})
        monkeypatch.setattr(pickle, "loads", lambda *args, **kwargs: marker.mkdir())
        assert len(read_shard(as_written(shard), index)) == shard.clips

    @pytest.mark.parametrize("name", ["/tmp/evil.json", "..\\evil.json"])
    def test_a_member_with_a_path_is_refused(self, name, shards):
        index = load_index(shards)
        shard = index.shards("train", "speech")[0]
        add_members(shard.path, {name: b"{}"})
        with pytest.raises(UserError, match="has a path"):
            read_shard(as_written(shard), index)

    def test_links_are_not_followed(self, shards, tmp_path):
        """A mel that is a link to a file of this machine is a clip without a mel."""
        index = load_index(shards)
        shard = index.shards("train", "speech")[0]
        (tmp_path / "secret").write_bytes(b"secret")
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            with tarfile.open(shard.path) as tar:
                kept = [(member, tar.extractfile(member)) for member in tar.getmembers() if member.isreg()]
                kept = [(member, content.read()) for member, content in kept]
            with tarfile.open(shard.path, "w") as tar:
                for member, content in kept:
                    if member.name == "speech0003.mel.npy":
                        member = tarfile.TarInfo(member.name)
                        member.type, member.linkname = kind, str(tmp_path / "secret")
                    tar.addfile(member, io.BytesIO(content) if member.isreg() else None)
            with pytest.raises(UserError, match=r"speech0003 lacks 'mel\.npy'|is no plain file"):
                read_shard(as_written(shard), index)

    @pytest.mark.parametrize(("kind", "name"), [("shard", "../outside.tar"), ("tokens", "http://127.0.0.1:9/x.tar")])
    def test_an_index_that_names_files_elsewhere_is_refused(self, kind, name, shards):
        content = json.loads((shards / INDEX).read_text())
        entry = content["shards"][0] if kind == "shard" else content["domains"]["speech"]["tokens"]
        shutil.copyfile(shards / entry["file"], shards.parent / "outside.tar")
        entry["file"] = name
        (shards / INDEX).write_text(json.dumps(content))
        with pytest.raises(UserError, match="has a path"):
            load_index(shards)

    def test_a_data_path_is_no_command(self, preset, marker):
        """webdataset and fsspec know paths that are commands."""
        with pytest.raises(UserError):
            load_index(load_config(preset, [f"data.path=pipe:mkdir {marker}"]).data.path)


class TestDownloads:
    def test_no_member_of_a_deb_leaves_its_folder(self, cache, no_client, tmp_path):  # noqa: F811
        hard = tar_member("./hard")
        hard.type, hard.linkname, hard.size = tarfile.LNKTYPE, "../../../../evil", 0
        pipe = tar_member("./pipe")
        pipe.type, pipe.size = tarfile.FIFOTYPE, 0
        members = [
            tar_member(str(tmp_path / "evil")),
            tar_member("../../../evil"),
            tar_member("./up", "../../.."),
            tar_member("./up/evil"),  # through the link
            tar_member("./absolute", str(tmp_path)),
            tar_member("./absolute/evil"),
            hard,
            pipe,
            tar_member("./good"),
        ]
        put_deb(cache, members)
        root = fetch_apt("parcel")
        assert (root / "good").is_file()
        assert not [path for path in tmp_path.rglob("evil*") if root not in path.parents]
        assert not [path for path in root.rglob("*") if path.is_symlink() or path.is_fifo()]

    def test_no_member_of_a_wheel_leaves_its_folder(self, cache, no_client, tmp_path):  # noqa: F811
        (cache / "downloads").mkdir(parents=True)
        file = cache / "downloads" / "bad-1.0-py3-none-any.whl"
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(link, str(tmp_path))
            archive.writestr("setup.py", "raise SystemExit")
            for name in ("../../../evil", f"{tmp_path}/evil", "..\\evil"):
                archive.writestr(name, "content")
        root = fetch_pip("bad", "1.0", hashlib.sha256(file.read_bytes()).hexdigest())
        assert not [path for path in tmp_path.rglob("*evil*") if root not in path.parents]
        assert not (root / "link").is_symlink()


class TestCheckpoints:
    """agrepa probe, agrepa sample and train.start_from take anybody's checkpoint."""

    @pytest.fixture
    def planted(self, run, tmp_path) -> Path:
        shutil.copytree(run, tmp_path / "run")
        return next((tmp_path / "run" / "checkpoints").glob("step*"))

    @staticmethod
    def plant(checkpoint: Path, pattern: str, marker: Path) -> None:
        files = list(checkpoint.glob(pattern))
        assert files, pattern
        facts = json.loads((checkpoint / "checkpoint.json").read_text())
        for file in files:
            file.write_bytes(pickled(marker, "torch"))
            facts["files"][file.name] = file.stat().st_size  # whoever plants a file can make it look complete
        (checkpoint / "checkpoint.json").write_text(json.dumps(facts))

    def test_pickles_that_are_called_safetensors_are_refused(self, planted, marker, capsys):
        self.plant(planted, "*.safetensors", marker)
        with pytest.raises(SystemExit) as exit:
            main(["sample", str(planted)])
        assert exit.value.code == 2
        error = capsys.readouterr().err
        assert "ema.safetensors" in error
        assert "Traceback" not in error

    def test_heads_that_are_a_pickle_are_refused(self, planted, marker, capsys):
        self.plant(planted, "heads.safetensors", marker)
        with pytest.raises(SystemExit) as exit:
            main(["probe", str(planted), "--measures", "foga"])
        assert exit.value.code == 2
        assert "heads.safetensors" in capsys.readouterr().err

    def test_deepspeed_s_own_files_are_not_opened(self, planted, marker):
        self.plant(planted, "*.pt", marker)
        main(["sample", str(planted), "--clips", "1", "flow.steps=1", "--live"])
        assert (planted.parent.parent / f"sample-{planted.name}" / "mel.png").is_file()

    def test_a_run_does_not_start_from_a_pickle(self, planted, preset, marker, tmp_path):
        self.plant(planted, "*.safetensors", marker)
        settings = ("align.strategy=none", "train.steps=1", f"train.start_from={planted}", "run.dir=new")
        output = run_training(1, "--preset", str(preset), *settings, cwd=tmp_path, wanted=2)
        assert "ema.safetensors" in output
        assert "Traceback" not in output

    @pytest.mark.parametrize("pattern", ["state.pt", "*_states.pt"], ids=["our file", "DeepSpeed's files"])
    def test_a_resume_does_not_unpickle(self, pattern, planted, marker, tmp_path):
        """A stranger may have made the folder look like the run's own."""
        self.plant(planted, pattern, marker)
        output = run_training(1, "--resume", "latest", "run.dir=run", "train.steps=3", cwd=tmp_path, wanted=2)
        assert "was not loaded" in output
        assert "Traceback" not in output

    def test_a_resume_does_not_leave_the_run_s_folder(self, planted):
        own = planted.parents[1]
        shutil.copytree(own, own.parent / "other")
        tag = f"../../other/checkpoints/{planted.name}"
        assert (own / "checkpoints" / tag / "checkpoint.json").is_file()
        for name in (tag, str(own.parent / "other" / "checkpoints" / planted.name)):
            with pytest.raises(UserError, match="has no checkpoint"):
                find_checkpoint(own, name)
            (own / "checkpoints" / "latest").write_text(name)
            assert find_checkpoint(own, "latest") == planted


class TestModels:
    """Folders of teachers. test_vocoder has those of vocoders, test_beats and test_tokens files of other encoders."""

    @pytest.mark.parametrize("model_type", ["evil", "hubert"])
    def test_code_beside_a_teacher_is_not_run(self, model_type, marker, tmp_path, monkeypatch):
        monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask
        folder = tmp_path / "teacher"
        folder.mkdir()
        classes = ("AutoConfig", "AutoModel", "AutoFeatureExtractor", "AutoProcessor")
        config = {"model_type": model_type, "auto_map": {name: f"evil.{name}" for name in classes}}
        for name in ("config.json", "preprocessor_config.json"):
            (folder / name).write_text(json.dumps(config))
        (folder / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
        with pytest.raises(UserError):
            load_teacher(str(folder))

    def test_weights_of_a_teacher_that_are_a_pickle_are_refused(self, marker, tmp_path):
        import_torchaudio()
        from transformers import HubertConfig, Wav2Vec2FeatureExtractor

        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        layers = {"conv_dim": [8], "conv_kernel": [10], "conv_stride": [5], "num_conv_pos_embeddings": 2}
        HubertConfig(**sizes, **layers, num_conv_pos_embedding_groups=1).save_pretrained(tmp_path)
        Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
        (tmp_path / "pytorch_model.bin").write_bytes(pickled(marker, "torch"))
        with pytest.raises(UserError):
            load_teacher(str(tmp_path))

    @pytest.mark.parametrize(("load", "kind"), [(load_embedding, "vggish"), (load_mos, "utmos")])
    def test_weights_of_a_metric_model_that_are_a_pickle_are_refused(self, load, kind, marker, tmp_path):
        (tmp_path / "weights.pt").write_bytes(pickled(marker, "torch"))
        with pytest.raises(UserError, match="a pickle that is cut off or holds more than tensors"):
            load(f"{kind}:{tmp_path}/weights.pt")


class TestConfigurations:
    def test_a_yaml_file_makes_no_objects(self, marker, tmp_path):
        file, tag = tmp_path / "preset.yaml", f"!!python/object/apply:os.mkdir ['{marker}']"
        file.write_text(f"run: {{dir: {tag}}}\n")
        with pytest.raises(UserError):
            load_config(file)
        assert load_config("demo", [f"run.dir={tag}"]).run.dir == tag  # a name, if an odd one
        with pytest.raises(UserError):
            load_config("demo", [f"eval.times={tag}"])

    def test_a_value_is_no_expression(self, tmp_path, monkeypatch):
        """Other programs put a variable of the environment in its place."""
        monkeypatch.setenv("AGREPA_SECRET", "secret")
        file, value = tmp_path / "preset.yaml", "${oc.env:AGREPA_SECRET}"
        file.write_text(f"eval: {{times: ['{value}']}}\n")
        with pytest.raises(UserError, match=r"\$\{"):
            load_config(file)
        with pytest.raises(UserError, match=r"\$\{"):
            load_config("demo", [f"run.dir=a/{value}"])

    @pytest.mark.parametrize(
        "section",
        [
            {"optimizer": {"type": "os.mkdir"}},
            {"torch_autocast": {"enabled": True, "lower_precision_safe_modules": ["planted_module.Linear"]}},
            {"checkpoint": {"load_universal": True}},
            {"tensorboard": {"enabled": True, "output_path": "/tmp"}},
        ],
        ids=lambda section: next(iter(section)),
    )
    def test_a_ds_config_imports_and_writes_nothing(self, section, tmp_path):
        """DeepSpeed imports modules that its configuration names, and writes where it says."""
        file = tmp_path / "ds.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": 2}} | section))
        layout = BatchLayout(8, 1, 0, 1)
        with pytest.raises(UserError, match=next(iter(section))):
            resolve_ds_config(find_ds_config(str(file)), TrainConfig(batch_clips=8), layout, torch.device("cpu"))

    def test_a_preset_is_a_yaml_file(self, preset, marker, tmp_path):
        module = tmp_path / "preset.py"
        module.write_text(f"import os\nos.mkdir({str(marker)!r})\n")
        for name in (str(module), "preset:config", "../demo", "http://127.0.0.1:9/x.yaml"):
            with pytest.raises(UserError, match="unknown"):
                load_config(name)
        assert asdict(load_config(preset).train)["steps"] == 5
