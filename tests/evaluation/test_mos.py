"""DistillMOS and DNSMOS against figures of their authors' own code, UTMOS against its definition, and refusals."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from agrepa_fast.audio.waves import decode
from agrepa_fast.errors import UserError
from agrepa_fast.evaluation.mos import load_mos
from agrepa_fast.fetch import fetch_apt

from .test_embeddings import chirp


@pytest.fixture(scope="module")
def scorer():
    return load_mos("package:distillmos")


@pytest.mark.parametrize(
    ("samples", "expected"),
    [(35_000, 1.6937962), (122_880, 1.7096198), (150_000, 1.7310355)],  # filled up, one window, three
)
def test_distillmos_gives_the_package_s_own_scores(scorer, samples, expected):
    """distillmos 0.9.1 with xls-r-sqa 0.1.0. Between a chirp's own frequencies is the rounding of the FFT, which the
    network's compression lifts: scores of an Intel and an AMD CPU differ by 4e-4."""
    assert scorer.score(chirp(samples, 16000), 16000) == {"mos": pytest.approx(expected, abs=1e-3)}


def test_distillmos_of_speech_and_of_silence(scorer):
    file = next(fetch_apt("asterisk-core-sounds-en-g722").rglob("vm-goodbye.g722"))
    wave, rate = decode(file, file.name)
    assert scorer.score(wave, rate)["mos"] == pytest.approx(3.3796105, abs=2e-5)
    assert scorer.score(np.zeros(9000, np.float32), 16000)["mos"] == pytest.approx(1.9690433, abs=2e-5)


def test_identity(scorer):
    assert scorer.names == ("mos",)
    assert scorer.identity == {
        "spec": "package:distillmos",
        "sha256": "57a19137782b12ad43176c25f4e1a194c499beceeb112ab8d5d5fd2512ca4f4f",
        "licence": "MIT",
        "version": "0.9.1",
    }


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (75_000, (1.1921798, 1.1285590, 1.1029325)),  # repeated
        (170_000, (1.3142869, 1.3969821, 1.2856832)),  # whole seconds of it have room for one window
        (144_000, (1.3423841, 1.4452022, 1.2686745)),  # repeated, and two of nine windows are a sample short
    ],
)
def test_dnsmos_gives_the_package_s_own_scores(samples, expected):
    """speechmos 0.0.1.1."""
    pytest.importorskip("onnxruntime", reason="pip install 'agrepa_fast[dnsmos]'")
    scorer = load_mos("package:dnsmos")
    assert scorer.names == ("dnsmos_sig", "dnsmos_bak", "dnsmos_ovrl")
    assert tuple(scorer.identity) == ("spec", "sha256", "licence", "version")
    figures = scorer.score(chirp(samples, 16000), 16000)
    assert figures == pytest.approx(dict(zip(scorer.names, expected, strict=True)), abs=1e-5)


def test_dnsmos_without_onnxruntime_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"^metrics.mos=package:dnsmos needs onnxruntime .*'agrepa_fast\[dnsmos\]'"):
        load_mos("package:dnsmos")


@pytest.fixture(scope="module")
def utmos() -> dict[str, torch.Tensor]:
    """Random weights of a small UTMOS, with SpeechMOS's names: width 128, two layers."""
    draw = torch.Generator().manual_seed(0)
    weights = {}

    def put(name: str, *shape: int, level: float = 0.0) -> None:
        scale = 1.5 * np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.2
        weights[name] = level + scale * torch.randn(shape, generator=draw)

    def linear(name: str, out: int, into: int) -> None:
        put(f"{name}.weight", out, into)
        put(f"{name}.bias", out)

    def norm(name: str, width: int) -> None:
        put(f"{name}.weight", width, level=1.0)
        put(f"{name}.bias", width)

    for number, kernel in enumerate(KERNELS):
        put(f"wav2vec2.feature_extractor.conv_layers.{number}.0.weight", 32, 32 if number else 1, kernel)
    norm("wav2vec2.feature_extractor.conv_layers.0.2", 32)
    norm("wav2vec2.layer_norm", 32)
    linear("wav2vec2.post_extract_proj", 128, 32)
    put("wav2vec2.mask_emb", 128)
    put("wav2vec2.encoder.pos_conv.0.bias", 128)
    put("wav2vec2.encoder.pos_conv.0.weight_g", 1, 1, 128)
    put("wav2vec2.encoder.pos_conv.0.weight_v", 128, 8, 128)
    norm("wav2vec2.encoder.layer_norm", 128)
    for layer in (f"wav2vec2.encoder.layers.{number}" for number in range(2)):
        for part in "qkv":
            linear(f"{layer}.self_attn.{part}_proj", 128, 128)
        linear(f"{layer}.self_attn.out_proj", 128, 128)
        linear(f"{layer}.fc1", 96, 128)
        linear(f"{layer}.fc2", 128, 96)
        norm(f"{layer}.self_attn_layer_norm", 128)
        norm(f"{layer}.final_layer_norm", 128)
    put("domain_emb", 1, 6)
    put("judge_emb", 1, 5)
    for back in ("", "_reverse"):
        put(f"blstm.weight_ih_l0{back}", 4 * 20, 139)
        put(f"blstm.weight_hh_l0{back}", 4 * 20, 20)
        put(f"blstm.bias_ih_l0{back}", 4 * 20)
        put(f"blstm.bias_hh_l0{back}", 4 * 20)
    linear("projection.0", 24, 40)
    linear("projection.2", 1, 24)
    return weights


KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)


def utmos_by_hand(weights: dict[str, torch.Tensor], wave: torch.Tensor) -> float:
    """wav2vec 2.0 base as fairseq has it, a recurrent layer, two linear ones; 3 + 2 times the mean over the frames."""
    w = {name.removeprefix("wav2vec2."): value for name, value in weights.items()}

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    x = wave[None, None]
    for number, stride in enumerate(STRIDES):
        x = F.conv1d(x, w[f"feature_extractor.conv_layers.{number}.0.weight"], stride=stride)
        if number == 0:
            name = "feature_extractor.conv_layers.0.2"
            x = F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"])
        x = F.gelu(x)
    x = linear("post_extract_proj", norm("layer_norm", x.mT))
    name = "encoder.pos_conv.0"
    direction = w[f"{name}.weight_v"]
    kernel = w[f"{name}.weight_g"] * direction / direction.norm(dim=(0, 1), keepdim=True)
    placed = F.conv1d(x.mT, kernel, w[f"{name}.bias"], padding=64, groups=16)[..., :-1]
    x = norm("encoder.layer_norm", x + F.gelu(placed).mT)
    for layer in ("encoder.layers.0", "encoder.layers.1"):
        q, k, v = (linear(f"{layer}.self_attn.{part}_proj", x).unflatten(2, (2, 64)).transpose(1, 2) for part in "qkv")
        attended = ((q @ k.mT / 8).softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
        x = norm(f"{layer}.self_attn_layer_norm", x + linear(f"{layer}.self_attn.out_proj", attended))
        x = norm(f"{layer}.final_layer_norm", x + linear(f"{layer}.fc2", F.gelu(linear(f"{layer}.fc1", x))))
    beside = torch.cat([w["domain_emb"], w["judge_emb"]], dim=1)[:, None].expand(1, x.shape[1], 11)
    lstm = torch.nn.LSTM(139, 20, batch_first=True, bidirectional=True)
    lstm.load_state_dict({name[6:]: value for name, value in w.items() if name.startswith("blstm.")})
    hidden, _ = lstm(torch.cat([x, beside], dim=2))
    return float(3 + 2 * linear("projection.2", linear("projection.0", hidden).relu()).mean())


def test_utmos_is_what_its_definition_says(utmos, tmp_path):
    torch.save(utmos, tmp_path / "utmos.pt")
    scorer = load_mos(f"utmos:{tmp_path / 'utmos.pt'}")
    scores = []
    for wave in (chirp(20_000, 16000), np.random.default_rng(0).standard_normal(9_000).astype(np.float32)):
        with torch.inference_mode():
            scores.append(utmos_by_hand(utmos, torch.from_numpy(wave)))
        assert scorer.score(wave, 16000) == {"mos": pytest.approx(scores[-1], abs=1e-5)}
    assert abs(scores[0] - scores[1]) > 0.01
    assert np.isfinite(scorer.score(wave[:50], 16000)["mos"])


def test_what_is_no_scorer_is_refused(scorer, utmos, tmp_path):
    torch.save(utmos | {"more": torch.zeros(1)}, tmp_path / "more.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    for spec, words in {
        "package:distilmos": "metrics.mos=package:distilmos: did you mean 'package:distillmos'?",
        "distillmos": "metrics.mos=distillmos: did you mean 'package:distillmos'?",
        "utmos:nowhere.pt": "metrics.mos=utmos:nowhere.pt: no file nowhere.pt",
        f"utmos:{tmp_path}/empty.pt": "does not hold UTMOS's weights",
        f"utmos:{tmp_path}/more.pt": "does not hold UTMOS's weights",
    }.items():
        with pytest.raises(UserError) as error:
            load_mos(spec)
        assert words in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="at least one sample"):
        scorer.score(np.zeros(0, np.float32), 16000)
