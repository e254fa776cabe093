"""Tokenizers of waves: S3, against the package called directly, from every kind of file."""

import numpy as np
import pytest
import torch

from agrepa_fast.audio.waves import import_torchaudio
from agrepa_fast.errors import UserError
from agrepa_fast.tokenizers.s3 import load_s3

import_torchaudio()
s3tokenizer = pytest.importorskip("s3tokenizer", reason="pip install 'agrepa_fast[s3]'")

CODES = 40


def s3_model(name: str):
    """The package's own class, small and random; codes are near what it encodes, so that many of them occur."""
    torch.manual_seed(0)
    sizes = {"n_mels": 80, "n_audio_state": 64, "n_audio_head": 1, "n_audio_layer": 2}
    if "v2" in name:
        return s3tokenizer.S3TokenizerV2(name, s3tokenizer.model_v2.ModelConfig(**sizes)).eval()
    if "v3" in name:
        return s3tokenizer.S3TokenizerV3(name, s3tokenizer.model_v3.ModelConfigV3(**sizes)).eval()
    config = s3tokenizer.model.ModelConfig(**sizes, n_audio_ctx=1500, n_codebook_size=CODES)
    model = s3tokenizer.S3Tokenizer(name, config).eval()
    mel = s3tokenizer.log_mel_spectrogram(torch.from_numpy(waves((8.0,))[0]), 80)
    hidden, _ = model.encoder(mel[None], torch.tensor([mel.shape[1]]))
    rows = torch.nn.functional.normalize(hidden[0].detach(), dim=-1)
    model.quantizer._codebook.embed.copy_(rows[torch.linspace(0, len(rows) - 1, CODES).long()])
    return model


def waves(seconds: tuple[float, ...] = (2.0, 0.7, 1.31)) -> list[np.ndarray]:
    """Gliding tones in noise, 16 kHz."""
    draw = np.random.default_rng(0)
    made = []
    for number, length in enumerate(seconds):
        t = np.arange(round(length * 16000)) / 16000
        tone = np.sin(2 * np.pi * (200 + 300 * number + 150 * np.sin(5 * t)) * t) * (0.3 + 0.2 * np.sin(9 * t))
        made.append((tone + 0.05 * draw.normal(size=len(t))).astype(np.float32))
    return made


def direct(model, wave: np.ndarray) -> list[int]:
    """As the package's README does it, one clip."""
    mels, lengths = s3tokenizer.padding([s3tokenizer.log_mel_spectrogram(torch.from_numpy(wave), n_mels=80)])
    codes, counts = model.quantize(mels, lengths)
    return codes[0, : counts[0]].tolist()


def save(model, path) -> None:
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if path.suffix == ".pt":
        torch.save(state, path)
    elif path.suffix == ".onnx":
        write_onnx(model, path)
    else:
        from safetensors.torch import save_file

        save_file(state, path)


def write_onnx(model, path) -> None:
    """The weights in a graph with the names of CosyVoice's speech_tokenizer_v1.onnx and speech_tokenizer_v3.onnx."""
    from onnx import helper, numpy_helper
    from onnx import save as save_onnx

    special = {
        "encoder.conv1.weight": "onnx::Conv_1519",
        "encoder.conv1.bias": "onnx::Conv_1520",
        "encoder.conv2.weight": "onnx::Conv_1521",
        "encoder.conv2.bias": "onnx::Conv_1522",
        "encoder.positional_embedding": "encoders.positional_embedding",
        "quantizer._codebook.project_down.bias": "quantizer.project_in.bias",
    }
    strides = {"encoder.conv1.weight": model.encoder.conv1.stride[0], "encoder.conv2.weight": 2}
    nodes, tensors = [], []
    for key, tensor in model.state_dict().items():
        node, operation = "", "Conv" if "conv" in key else "Add"
        inputs = ["x", special.get(key, f"w{len(tensors)}")]
        if key in strides:
            node, inputs = f"/{key.split('.')[1]}/Conv", [*inputs, special[key.replace("weight", "bias")]]
        elif key == "quantizer._codebook.embed":
            node = "/quantizer/rq/model/layers.0/_codebook/Pow_1"
        elif key == "quantizer._codebook.project_down.weight":
            node, operation = "/quantizer/project_in/MatMul", "MatMul"
        elif "fsmn" in key:
            inputs, operation = ["x", key.removeprefix("encoder.")], "Conv"
        elif "blocks" in key:
            inside, leaf = key.removeprefix("encoder.").rsplit(".", 1)
            norm = inside.endswith("_ln")
            operation = {"weight": "Mul" if norm else "MatMul", "bias": "Add_1" if norm else "Add"}[leaf]
            node = "/" + inside.replace(".mlp.", ".mlp/mlp.").replace(".attn", "/attn", 1).replace(".mlp", "/mlp", 1)
            node = node.replace("attn.", "attn/") + "/" + operation
        value = tensor.numpy() if tensor.ndim > 2 or key in special else tensor.numpy().T
        tensors.append(numpy_helper.from_array(np.ascontiguousarray(value), inputs[1]))
        extra = {"strides": [strides[key]]} if key in strides else {}
        nodes.append(helper.make_node(operation.partition("_")[0], inputs, [f"y{len(nodes)}"], name=node, **extra))
    save_onnx(helper.make_model(helper.make_graph(nodes, "s3", [], [], tensors)), path)


@pytest.mark.parametrize(
    ("name", "file", "codes", "rate"),
    [
        ("speech_tokenizer_v1", "any.safetensors", CODES, 50),
        ("speech_tokenizer_v1", "any.pt", CODES, 50),
        ("speech_tokenizer_v1", "speech_tokenizer_v1.onnx", CODES, 50),
        ("speech_tokenizer_v1_25hz", "my_v1_25hz.safetensors", CODES, 25),
        ("speech_tokenizer_v1_25hz", "speech_tokenizer_v1.onnx", CODES, 25),  # told by its stride
        ("speech_tokenizer_v2_25hz", "any.safetensors", 6561, 25),
        ("speech_tokenizer_v3_25hz", "my_v3.safetensors", 6561, 25),
        ("speech_tokenizer_v3_25hz", "speech_tokenizer_v3.onnx", 6561, 25),
    ],
)
def test_s3_gives_the_packages_ids_whatever_else_is_in_the_batch(tmp_path, name, file, codes, rate):
    model = s3_model(name)
    save(model, tmp_path / file)
    tokenizer = load_s3(str(tmp_path / file))
    assert (tokenizer.codes, tokenizer.rate, tokenizer.identity["name"]) == (codes, rate, name)
    ids = tokenizer.encode(waves(), [""] * 3)
    for wave, of_wave in zip(waves(), ids, strict=True):
        assert of_wave.dtype == np.int32
        assert of_wave.tolist() == direct(model, wave)
        assert abs(len(of_wave) - len(wave) / 16000 * rate) <= 1
    assert len(set(np.concatenate(ids).tolist())) >= 8, "the model tells nothing apart: the test would pass for any"
    tokenizer.room = 100_000  # one batch of all, as on a GPU: padding is masked
    for alone, together in zip(ids, tokenizer.encode(waves(), [""] * 3), strict=True):
        assert (alone != together).mean() <= 0.02


def test_s3_takes_clips_shorter_than_a_window_and_longer_than_its_30_s(tmp_path):
    model = s3_model("speech_tokenizer_v1")
    save(model, tmp_path / "s3.safetensors")
    tokenizer = load_s3(str(tmp_path / "s3.safetensors"))
    short, long = tokenizer.encode([np.ones(100, np.float32) * 0.1, waves((33.0,))[0]], ["", ""])
    assert len(short) == 1
    assert abs(len(long) - 33 * 50) <= 2
    assert long[:1000].tolist() == direct(model, waves((33.0,))[0])[:1000]


def test_s3_identity_is_that_of_the_weights(tmp_path):
    model = s3_model("speech_tokenizer_v1")
    save(model, tmp_path / "a.safetensors")
    save(model, tmp_path / "a.pt")
    model.encoder.conv1.bias.data[0] += 1
    save(model, tmp_path / "b.pt")
    one, same, other = (load_s3(str(tmp_path / f)).identity["sha256"] for f in ("a.safetensors", "a.pt", "b.pt"))
    assert one == same != other


def test_s3_refusals_name_the_thing_and_the_remedy(tmp_path):
    with pytest.raises(UserError, match=r"s3:speech_tokenizer_v4: no such file.*speech_tokenizer_v1"):
        load_s3("speech_tokenizer_v4")
    (tmp_path / "broken.onnx").write_bytes(b"no onnx")
    with pytest.raises(UserError, match=r"broken\.onnx cannot be loaded"):
        load_s3(str(tmp_path / "broken.onnx"))
    model = s3_model("speech_tokenizer_v1")
    model.encoder.blocks[1].mlp[0] = torch.nn.Linear(64, 8)
    save(model, tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match=r"cut\.safetensors cannot be loaded"):
        load_s3(str(tmp_path / "cut.safetensors"))


def test_s3_weights_cannot_run_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"quantizer._codebook.embed": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_s3(str(tmp_path / "trap.pt"))
    assert not (tmp_path / "ran").exists()
