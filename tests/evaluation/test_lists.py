"""The lists of published benchmarks: what is read, what is refused, and agrepa evaluate on them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file

from agrepa_fast.audio.mel import LogMel
from agrepa_fast.audio.vocoder import Vocoder
from agrepa_fast.audio.waves import decode
from agrepa_fast.cli import main
from agrepa_fast.config import Config
from agrepa_fast.config_file import load_config, save_config
from agrepa_fast.data.matching import matching_index
from agrepa_fast.errors import UserError
from agrepa_fast.evaluation import evaluate, prompted
from agrepa_fast.evaluation.lists import Utterance, read_list
from agrepa_fast.evaluation.prompted import count_frames, spoken
from agrepa_fast.evaluation.recogniser import Heard
from agrepa_fast.evaluation.selftest import SelfTest
from agrepa_fast.models.registry import make_model
from agrepa_fast.reporting import evaluation_list

from ..testing import CODES, write_small_shards
from .conftest import Model, clips

F5 = "1-2-0001\t2.5\tA prompt.\t3-4-0005\t4.1\tIt's late, isn't it?\n1-2-0001\t2.5\tA prompt.\t3-4-0006\t4\tFifty.\n"
SEED = "a|A prompt.|prompts/p.wav|Say it.\nb|A prompt.|prompts/p.wav|And that.|true/b.wav\n"


def write_wave(path: Path, level: float = 0.1, rate: int = 16000) -> Path:
    """Write half a second of one value, by which the fake models know the wave."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(rate // 2, level), rate)
    return path


def write_list(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture
def librispeech(tmp_path) -> Path:
    """A subset of LibriSpeech with three utterances and their transcripts."""
    subset = tmp_path / "LibriSpeech" / "test-clean"
    for name, level in (("1-2-0001", 0.3), ("3-4-0005", 0.1), ("3-4-0006", 0.1)):
        folder = write_wave(subset.joinpath(*name.split("-")[:2], f"{name}.flac"), level).parent
        with (folder / f"{'-'.join(name.split('-')[:2])}.trans.txt").open("a") as file:
            file.write(f"{name} SAY {name[-1]}\n")
    return subset


@pytest.mark.parametrize(
    "change", [str.encode, lambda s: b"\xef\xbb\xbf" + s.replace("\n", "\r\n").encode()], ids=["plain", "crlf, bom"]
)
def test_f5_s_list_of_librispeech_pc(tmp_path, librispeech, change):
    prompt = librispeech / "1/2/1-2-0001.flac"
    assert read_list(write_list(tmp_path / "x.lst", change(F5 + "\n")), librispeech) == [
        Utterance("3-4-0005", "It's late, isn't it?", prompt, "A prompt.", librispeech / "3/4/3-4-0005.flac", " "),
        Utterance("3-4-0006", "Fifty.", prompt, "A prompt.", librispeech / "3/4/3-4-0006.flac", " "),
    ]


@pytest.mark.parametrize(
    "change", [str.encode, lambda s: b"\xef\xbb\xbf" + s.replace("\n", "\r\n").encode()], ids=["plain", "crlf, bom"]
)
def test_seed_tts_s_list(tmp_path, change):
    prompt, true = write_wave(tmp_path / "prompts/p.wav"), write_wave(tmp_path / "true/b.wav")
    file = write_list(tmp_path / "meta.lst", change(SEED))
    expected = [
        Utterance("a", "Say it.", prompt, "A prompt.", None),
        Utterance("b", "And that.", prompt, "A prompt.", true),
    ]
    assert read_list(file, None) == expected
    beside = write_wave(tmp_path / "wavs/a.wav")  # where F5-TTS looks for what a fifth column does not name
    assert read_list(file, None) == [expected[0]._replace(truth=beside), expected[1]]
    elsewhere = write_list(tmp_path.parent / f"{tmp_path.name}.lst", SEED)
    assert read_list(elsewhere, tmp_path) == read_list(file, None)


def test_librispeech_itself(librispeech):
    names = [(u.key, u.text, u.prompt, u.truth.name) for u in read_list(librispeech, None)]
    assert names[1:] == [
        ("3-4-0005", "SAY 5", None, "3-4-0005.flac"),
        ("3-4-0006", "SAY 6", None, "3-4-0006.flac"),
    ]
    with pytest.raises(UserError, match="are beside its transcripts"):
        read_list(librispeech, librispeech)
    (librispeech / "3/4/3-4.trans.txt").write_text("3-4-0005 SAY 5\n")
    with pytest.raises(UserError, match=r"3-4-0006.flac: no transcript in 3-4.trans.txt"):
        read_list(librispeech, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\r\n \n", "is empty"),
        ("just a text\n", "is no list that is known"),
        ("a|b\n", "is no list that is known"),
        (F5.encode("utf-16"), "is not UTF-8"),
        (F5 + "1-2-0001\t2.5\tA prompt.\t3-4-0001\tNo seconds.\n", "line 3: 5 columns, not 6"),
        (F5 + "\n\n1-2-0001\t2\tA\tprompt\t3-4-0001\t4\tText.\n", "line 5: 7 columns, not 6"),
        (F5 + F5, "line 3: 3-4-0005 is in line 1 already"),
        (F5.replace("3-4-0006", "0006"), "line 2: '0006' is no utterance of LibriSpeech"),
        (F5.replace("3-4-0006", "3-4-0007"), "line 2: the true recording "),
        (F5.replace("2.5\tA prompt.", "2.5\t ", 1), "line 1: 3-4-0005 has no text of the prompt"),
        (SEED, "line 1: the prompt "),
        ("a|p|p.wav|x\nb|p|p.wav\n", "line 1: the prompt "),
        ("a|p|1/2/1-2-0001.flac|x\nb|p|p.wav\n", "line 2: 3 columns, not 4 or 5"),
        ("a|p|1/2/1-2-0001.flac|x|y|z\n", "is no list that is known"),
        ("a|p|1/2/1-2-0001.flac|x|1/2/1-2-0001.flac\na|p|1/2/1-2-0001.flac|x\n", "line 2: a is in line 1 already"),
        ("a|p|1/2/1-2-0001.flac|x|y.wav\n", "line 1: the true recording "),
        ("a|p|1/2/1-2-0001.flac| \n", "line 1: a has no text"),
        ("a|p||x\n", "line 1: the prompt "),
        ("../a|p|1/2/1-2-0001.flac|x\n", "line 1: '../a' names no utterance"),
        ("|p|1/2/1-2-0001.flac|x\n", "line 1: '' names no utterance"),
    ],
)
def test_a_list_that_is_not_right_is_refused_with_the_line(tmp_path, librispeech, content, message):
    file = write_list(tmp_path / "x.lst", content)
    with pytest.raises(UserError) as error:
        read_list(file, librispeech)
    assert str(error.value).startswith(str(file))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


TEXTS = {0.1: "Its late, isnt it", 0.2: "50", 0.3: "a prompt"}  # by the level of a wave


class Listener(Model):
    """Hears a text, and a voice, by the level of a wave."""

    def transcribe(self, wave, rate):
        return Heard(TEXTS[round(float(np.abs(wave).mean()), 1)], -0.1)

    def embed(self, wave, rate):
        angle = 2 * float(np.abs(wave).mean())
        return np.array([np.cos(angle), np.sin(angle)])


@pytest.fixture
def listeners(calls, monkeypatch):
    for name in ("load_recogniser", "load_speaker"):
        monkeypatch.setattr(evaluate, name, lambda *_, **__: Listener(calls))


# errors of "It's late, isn't it?" heard as "Its late, isnt it", "Fifty." as "50", and "Go on now!", which is missing
@pytest.mark.parametrize(("text", "errors"), [("f5", (0, 1, 3)), ("seedtts", (2, 1, 3))])
def test_samples_of_f5_s_list(tmp_path, librispeech, listeners, capsys, text, errors):
    write_wave(librispeech / "3/4/3-4-0007.flac")
    file = write_list(tmp_path / "x.lst", F5 + "1-2-0001\t2.5\tA prompt.\t3-4-0007\t4\tGo on now!\n")
    mine = tmp_path / "mine"
    for name, level in (("3-4-0005", 0.1), ("3-4-0006", 0.2), ("other", 0.1)):
        write_wave(mine / f"{name}.wav", level, rate=24000)
    out = tmp_path / "out"
    command = ["evaluate", str(mine), "--list", str(file), "--reference", str(librispeech), "--out", str(out)]
    main([*command, f"metrics.text={text}"])
    printed = " ".join(capsys.readouterr().out.split())
    results = json.loads((out / "results.json").read_text())
    sample, truth = results["rows"]["sample"]["speech"], results["rows"]["truth"]["speech"]
    assert sample["wer"]["value"] == sum(errors) / 8
    assert sample["wer_utterance"]["value"] == pytest.approx(np.mean(np.divide(errors, (4, 1, 3))))
    assert (sample["wer"]["n"], sample["mos"]["n"]) == (3, 2)
    assert sample["similarity_prompt"]["value"] == pytest.approx((np.cos(0.4) + np.cos(0.2)) / 2, abs=1e-4)
    assert sample["similarity"]["value"] == pytest.approx((1 + np.cos(0.2)) / 2, abs=1e-4)
    assert truth["similarity_prompt"]["value"] == pytest.approx(np.cos(0.4), abs=1e-4)
    assert "similarity" not in truth
    assert (results["missing"], results["unlisted"], results["failed"]) == (["sample/3-4-0007.wav"], ["other.wav"], {})
    assert "1 wavs of the list are missing, and count as nothing heard (sample/3-4-0007.wav)" in printed
    assert "1 wavs are not in the list, and were not measured (other.wav)" in printed
    row = next(row for row in clips(out) if (row["row"], row["key"]) == ("sample", "3-4-0007"))
    assert (row["del"], row["words"], row["heard"], row["seconds"], row["sha256"]) == ("3", "3", "", "", "")
    assert (out / "report.html").read_text().count("<audio") == 5
    for old, new in (("A prompt.", "My prompt."), ("1-2-0001", "3-4-0005")):  # another text of the prompt, and another
        with pytest.raises(SystemExit):
            main([*command[:3], str(write_list(file, file.read_text().replace(old, new))), *command[4:]])
        assert "holds an evaluation of other clips" in capsys.readouterr().err


def test_samples_of_a_list_without_truths(tmp_path, listeners, monkeypatch):
    write_wave(tmp_path / "prompts/p.wav", 0.3)
    file = write_list(tmp_path / "meta.lst", SEED.replace("|true/b.wav", ""))
    write_wave(tmp_path / "mine/a.wav", 0.1)
    write_wave(tmp_path / "mine/b.wav", 0.2)
    tested = []

    def self_test(gauge, sounds):
        tested.extend(round(float(np.abs(wave).mean()), 1) for wave, _ in sounds)
        return SelfTest(3.0, 2.0, 1.0, True)

    monkeypatch.setattr(evaluate, "self_test", self_test)
    out = tmp_path / "out"
    main(["evaluate", str(tmp_path / "mine"), "--list", str(file), "--out", str(out)])
    results = json.loads((out / "results.json").read_text())
    assert results["rows"].keys() == {"sample"}
    assert results["rows"]["sample"]["speech"].keys() >= {"wer", "wer_utterance", "mos", "similarity_prompt"}
    assert {row["row"] for row in clips(out)} == {"sample"}
    assert set(tested) == {0.3}  # of true recordings, which only prompts are


def test_what_does_not_fit_a_list_is_refused(tmp_path, librispeech, listeners, capsys):
    mine, file = write_wave(tmp_path / "mine/a.wav").parent, write_list(tmp_path / "x.lst", F5)
    for arguments, message in (
        ([mine, "--list", file], "give its test-clean with --reference FOLDER"),
        ([mine, "--list", file, "--domain", "audio"], "is a list of speech"),
        ([mine, "--list", file, "--reference", librispeech], "the first would be 3-4-0005.wav, and a.wav is there"),
        ([mine, "--list", tmp_path / "none"], "cannot be read"),
        ([tmp_path / "none", "--list", file], "is no checkpoint"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", *map(str, arguments)])
        error = capsys.readouterr().err
        assert ended.value.code == 2, arguments
        assert message in error
        assert error.count("\n") == 1


def test_frames_are_the_prompts_by_bytes_of_text():
    said = Utterance("a", "Go on", None, "Hi.", None)
    assert spoken(said) == ("Hi. ", "Go on")
    assert count_frames(said, 100, 9) == 100 + 125  # 5 bytes after 4
    assert count_frames(said._replace(lead=" "), 100, 10) == 100 + 150
    assert spoken(said._replace(prompt_text="\u4f60\u597d\u3002")) == ("\u4f60\u597d\u3002", "Go on")
    assert count_frames(said._replace(prompt_text="\u4f60\u597d\u3002"), 100, 8) == 100 + 55  # 5 after 9
    assert count_frames(said, 3, 9) == 10  # as many as ids, and one more


@pytest.fixture
def export(tmp_path) -> Path:
    """An export of F5-TTS with random weights, which reads bytes."""
    preset = write_small_shards(tmp_path / "shards", texts=True)
    options = "{dim: 16, depth: 1, heads: 1, dim_head: 16, text_dim: 8, conv_layers: 1}"
    model = ("model.backbone=f5", f"model.options={options}", f"model.vocab={2 * CODES}", "model.text_vocab=256")
    others = ("model.n_mels=8", "data.text=bytes", "data.speaker=campplus:none", "flow.steps=2", "flow.sigma=1")
    config = load_config(preset, (*model, *others, "eval.vocoder=griffin-lim"))
    folder = tmp_path / "export"
    folder.mkdir()
    save_file(make_model(config.model).state_dict(), folder / "model.safetensors")
    save_config(config, folder / "config.yaml")
    (folder / "export.json").write_text(json.dumps({"step": 0, "weights": "averaged"}))
    return folder


def mel_of(path: Path, config: Config, gain: float) -> torch.Tensor:
    return torch.from_numpy(LogMel(config.data)(decode(path, path.name)[0] * np.float32(gain)))


def test_a_run_says_the_utterances_of_a_list_after_their_prompts(tmp_path, export, librispeech, calls, monkeypatch):
    file, out, config = write_list(tmp_path / "x.lst", F5), tmp_path / "out", load_config(export / "config.yaml")
    quiet = librispeech / "1/2/1-2-0001.flac"
    soundfile.write(quiet, 0.05 * np.sin(np.arange(8000) / 5), 16000)
    gain = 0.1 / (0.05 / np.sqrt(2))
    conditions = []

    def sample(model, condition, keys, flow):
        conditions.append(condition)
        return sampled(model, condition, keys, flow)

    def hum(mel):
        """A vocoder that begins with the mel, and goes on at full level."""
        wave = torch.ones(1, mel.shape[2] * config.data.hop_length)
        wave[0, : mel.numel()] = mel.flatten() / 50
        return wave

    sampled, index = prompted.sample, matching_index(config.data)
    monkeypatch.setattr(prompted, "sample", sample)
    monkeypatch.setattr(evaluation_list, "load_vocoder", lambda *_: Vocoder("hum", config.data, hum))
    command = ["evaluate", str(export), "--list", str(file), "--reference", str(librispeech), "--out", str(out)]
    main(command)
    prompt = mel_of(quiet, config, gain)
    assert len(conditions) == 2
    for condition, text in zip(conditions, ("It's late, isn't it?", "Fifty."), strict=True):
        frames = len(prompt) + int(len(prompt) / len("A prompt. ") * len(f" {text}"))
        assert condition.lengths.tolist() == [frames]
        assert bytes(condition.text[0].tolist()).decode() == f"A prompt.  {text}"
        assert condition.reference.shape == (1, frames, 8)
        assert not condition.reference[0, len(prompt) :].any()
        given, stored = condition.reference[0, : len(prompt)], conditions[0].reference[0, : len(prompt)]
        assert torch.equal(given, stored)
        np.testing.assert_allclose(given * index.mel_std + index.mel_mean, prompt, atol=1e-2)
        key = "3-4-0005" if "late" in text else "3-4-0006"
        wave, _ = soundfile.read(out / "wavs" / "sample" / f"{key}.wav")
        assert len(wave) == (frames - len(prompt)) * config.data.hop_length
        assert wave[-1] == pytest.approx(1 / gain, abs=1e-3)  # as quiet again as the prompt
    results = json.loads((out / "results.json").read_text())
    assert results["rows"].keys() == {"truth", "sample"}
    assert results["rows"]["sample"]["speech"].keys() >= {"wer", "mos", "similarity", "similarity_prompt"}
    assert (results["step"], results["missing"]) == (0, [])
    assert (out / "report.html").read_text().count("<audio") == 4
    content = {path: path.read_bytes() for path in (out / "wavs" / "sample").iterdir()}
    next(iter(content)).unlink()
    main(command)
    assert len(conditions) == 3
    assert {path: path.read_bytes() for path in content} == content
    shutil.rmtree(out)
    main([*command, "metrics.clips=1", "metrics.draws=2", "metrics.only=[wer]"])
    assert len({path.read_bytes() for path in (out / "wavs" / "sample").iterdir()}) == 2


def test_what_a_run_cannot_say_is_refused(tmp_path, export, librispeech, calls, capsys):
    file = write_list(tmp_path / "x.lst", F5)
    long = write_list(tmp_path / "long.lst", f"1-2-0001\t2.5\tA\t3-4-0006\t4\t{'So ' * 99}.\n")
    silent = tmp_path / "silent"
    shutil.copytree(librispeech, silent)
    soundfile.write(silent / "1/2/1-2-0001.flac", np.zeros(8000), 16000)
    cases = (
        (["--list", long, "--reference", librispeech], "its prompt and as many frames for its text take"),
        (["--list", librispeech], "has no prompts to sample from"),
        (["--list", file, "--reference", silent], "1-2-0001.flac is silent"),
        (["--list", file, "--reference", librispeech, "model.backbone=audio_dit"], "cannot be overridden"),
        (["--list", file, "--reference", librispeech, "metrics.only=[mmd,mel]"], "is measured by mos, similarity, wer"),
    )
    for number, (arguments, message) in enumerate(cases):
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", str(export), "--out", str(tmp_path / f"out{number}"), *map(str, arguments)])
        assert ended.value.code == 2, arguments
        assert message in capsys.readouterr().err.splitlines()[-1]  # below the bar
    assert not (tmp_path / f"out{len(cases) - 1}").exists()
