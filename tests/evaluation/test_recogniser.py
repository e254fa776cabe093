"""Recognisers: small random Whisper and CTC models against transformers itself, what is refused, and the packaged
Whisper on real sentences."""

import json
import shutil
import string
from dataclasses import replace

import numpy as np
import pytest
import torch

from agrepa_fast.audio.waves import decode, resample
from agrepa_fast.errors import UserError
from agrepa_fast.evaluation.recogniser import load_recogniser
from agrepa_fast.fetch import fetch_apt
from agrepa_fast.teachers import load_teacher
from agrepa_fast.torchaudio_import import import_torchaudio

from ..data.audio_families import FAMILIES

import_torchaudio()  # before transformers

RATE = 16000
TOKENS = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|haw|>", "<|transcribe|>", "<|notimestamps|>"]
LETTERS = string.ascii_lowercase + "Ġ"  # a word's first letter follows a Ġ


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(int(seconds * RATE)).astype(np.float32) * 0.1


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """A folder with a random Whisper that says letters, and ends now and then."""
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration, WhisperTokenizer

    folder = tmp_path_factory.mktemp("models") / "whisper"
    vocabulary = {token: number for number, token in enumerate([*LETTERS, *TOKENS])}
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    ids = {
        name: vocabulary[token] for token, name in zip(TOKENS, ("eos_token_id", "decoder_start_token_id"), strict=False)
    }
    ids |= dict.fromkeys(("bos_token_id", "pad_token_id"), vocabulary["<|endoftext|>"])
    sizes = {f"{side}_{size}": 2 for side in ("encoder", "decoder") for size in ("layers", "attention_heads")}
    sizes |= {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": len(vocabulary)}
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **ids, max_target_positions=200))
    for parameter in model.parameters():  # large enough for letters that follow the sound
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=2 * parameter[0].numel() ** -0.5)
    model.generation_config = GenerationConfig(
        **ids,
        is_multilingual=True,
        suppress_tokens=[0, 1, 2, *(vocabulary[token] for token in TOKENS[1:])],
        begin_suppress_tokens=[3, vocabulary["<|endoftext|>"]],
        lang_to_id={f"<|{name}|>": vocabulary[f"<|{name}|>"] for name in ("en", "de", "haw")},
        task_to_id={"transcribe": vocabulary["<|transcribe|>"]},
        no_timestamps_token_id=vocabulary["<|notimestamps|>"],
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "normalizer.json").write_text('{"colour": "color"}')
    return folder


@pytest.mark.parametrize("language", ["en", "de"])
def test_whisper_hears_what_transformers_generates(whisper, language):
    """The clips differ in their text, some end by themselves and some at the bound; transformers decodes without a
    bound of ours, and the log-probabilities come from one forward pass over the whole text."""
    from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

    recogniser = load_recogniser(str(whisper), language)
    assert recogniser.spelling == {"colour": "color"}
    model = WhisperForConditionalGeneration.from_pretrained(whisper).eval()
    tokenizer, extractor = AutoTokenizer.from_pretrained(whisper), WhisperFeatureExtractor()
    texts, ended = set(), []
    for seed in range(10):
        wave = noise(1 + seed / 2, seed) * (seed + 1)
        bound = int((10 if language == "en" else 25) * (1 + seed / 2)) + 12
        features = extractor(wave, sampling_rate=RATE, return_tensors="pt").input_features
        ids = model.generate(features, language=language, task="transcribe", max_new_tokens=bound)[0]
        heard = recogniser.transcribe(wave, RATE)
        assert heard.text == tokenizer.decode(ids, skip_special_tokens=True).strip()
        ended.append(len(heard.text) < bound)
        prompt = tokenizer.convert_tokens_to_ids([*TOKENS[1:2], f"<|{language}|>", *TOKENS[-2:]])
        said = tokenizer.convert_tokens_to_ids(list(heard.text)) + [prompt[0] - 1] * ended[-1]
        with torch.inference_mode():
            logits = model(features, decoder_input_ids=torch.tensor([prompt + said])).logits[0, 3:-1].numpy()
        logits = torch.from_numpy(logits)
        settings = model.generation_config
        logits[:, settings.suppress_tokens] = -torch.inf
        logits[0, settings.begin_suppress_tokens] = -torch.inf
        expected = logits.log_softmax(dim=-1)[range(len(said)), said].mean()
        assert heard.logprob == pytest.approx(float(expected), abs=1e-5)
        texts.add(heard.text)
    assert len(texts) >= 5
    assert set(ended) == {True, False}


def test_a_long_recording_is_cut_where_it_is_quiet(whisper, monkeypatch):
    recogniser = load_recogniser(str(whisper), "en")
    wave = noise(50, 1)
    wave[27 * RATE : 28 * RATE] = 0.0
    windows = []
    decode_window = recogniser._decode
    monkeypatch.setattr(recogniser, "_decode", lambda window: windows.append(window) or decode_window(window))
    heard = recogniser.transcribe(wave, RATE)
    assert 27 * RATE < len(windows[0]) < 28 * RATE
    assert np.array_equal(np.concatenate(windows), wave)
    parts = [recogniser.transcribe(window, RATE) for window in windows[:2]]
    assert heard.text == " ".join(part.text for part in parts)
    assert min(part.logprob for part in parts) <= heard.logprob <= max(part.logprob for part in parts)


def test_whisper_of_english_alone_takes_no_language(whisper, tmp_path):
    shutil.copytree(whisper, tmp_path / "english")
    file = tmp_path / "english" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"is_multilingual": False}))
    assert load_recogniser(str(tmp_path / "english"), "en")._prompt.shape == (1, 2)
    with pytest.raises(UserError, match=r"metrics.language=de: .* lacks this language; .*known: en"):
        load_recogniser(str(tmp_path / "english"), "de")


@pytest.fixture(scope="module")
def ctc(tmp_path_factory):
    """A folder with a random wav2vec 2.0 that spells letters."""
    from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2ForCTC

    folder = tmp_path_factory.mktemp("models") / "ctc"
    config = FAMILIES["wav2vec2"].config | {"vocab_size": 7, "pad_token_id": 0}
    replace(FAMILIES["wav2vec2"], model="Wav2Vec2ForCTC", config=config).save(folder)
    model = Wav2Vec2ForCTC.from_pretrained(folder)
    with torch.no_grad():  # so that no letter is the best of nearly all frames
        model.lm_head.bias -= model(torch.from_numpy(noise(1, 9))[None]).logits[0].mean(dim=0)
    model.save_pretrained(folder)
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps({name: n for n, name in enumerate(["<pad>", "<unk>", "|", *"ABCD"])}))
    Wav2Vec2CTCTokenizer(str(vocabulary), bos_token=None, eos_token=None).save_pretrained(folder)
    return folder


def test_ctc_spells_its_best_path(ctc):
    """Equal letters in a row are one unless a blank is between them, and | parts words."""
    from transformers import AutoFeatureExtractor, AutoModelForCTC

    recogniser, wave = load_recogniser(str(ctc), "en"), noise(2)
    heard = recogniser.transcribe(wave, RATE)
    features = AutoFeatureExtractor.from_pretrained(ctc)(wave, sampling_rate=RATE, return_tensors="pt")
    with torch.inference_mode():
        logprobs = AutoModelForCTC.from_pretrained(ctc).eval()(**features).logits[0].log_softmax(dim=-1)
    best, before, text = logprobs.argmax(dim=-1).tolist(), None, ""
    for number in best:
        text += ["", "<unk>", " ", *"ABCD"][number] if number != before else ""
        before = number
    assert heard.text == text.strip()
    assert len(set(heard.text)) > 3
    spelled = [float(row.max()) for row, number in zip(logprobs, best, strict=True) if number]
    assert 0 < len(spelled) < len(best)
    assert heard.logprob == pytest.approx(np.mean(spelled), abs=1e-6)
    assert recogniser.identity["encoder_sha256"] == load_teacher(str(ctc)).identity["sha256"]


def test_very_short_clips_and_other_rates(whisper, ctc):
    for folder in (whisper, ctc):
        recogniser = load_recogniser(str(folder), "en")
        assert np.isfinite(recogniser.transcribe(noise(0.001), RATE).logprob)
        wave = resample(noise(1), RATE, 22050)
        assert recogniser.transcribe(wave, 22050) == recogniser.transcribe(resample(wave, 22050, RATE), RATE)
        for bad in (wave[:0], wave[None], np.where(np.arange(len(wave)) == 7, np.nan, wave)):
            with pytest.raises(ValueError, match="wave"):
                recogniser.transcribe(bad, 22050)


def user_error(spec: str, language: str = "en") -> str:
    with pytest.raises(UserError) as error:
        load_recogniser(spec, language)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_no_recogniser_is_refused(whisper, ctc, tmp_path, monkeypatch):
    from huggingface_hub import constants
    from transformers import BertConfig, Wav2Vec2Model

    assert user_error("package:whisper-bas") == "metrics.asr=package:whisper-bas: did you mean 'package:whisper-base'?"
    assert "metrics.language=english: " in user_error(str(whisper), "english")
    assert "known: de, en, haw" in user_error(str(whisper), "english")
    assert "did you mean 'haw'" in user_error(str(whisper), "hawi")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    message = user_error("openai/whisper-large-v3")
    assert "metrics.asr=openai/whisper-large-v3 cannot be loaded" in message
    assert "package:whisper-base, a folder" in message
    assert "no such folder" in user_error(f"{tmp_path}/nothing/here")
    BertConfig(hidden_size=8).save_pretrained(tmp_path / "bert")
    assert "is a 'bert' model" in user_error(str(tmp_path / "bert"))
    for folder in (whisper, ctc):
        shutil.copytree(folder, tmp_path / f"mute-{folder.name}")
        for file in [
            *(tmp_path / f"mute-{folder.name}").glob("tokenizer*"),
            tmp_path / f"mute-{folder.name}/vocab.json",
        ]:
            file.unlink(missing_ok=True)
    assert "its tokenizer has no <|startoftranscript|>" in user_error(f"{tmp_path}/mute-whisper")
    assert "mute-ctc has no tokenizer" in user_error(f"{tmp_path}/mute-ctc")
    shutil.copytree(ctc, tmp_path / "headless")
    Wav2Vec2Model.from_pretrained(ctc).save_pretrained(tmp_path / "headless")
    assert "its weights lack lm_head" in user_error(str(tmp_path / "headless"))


SENTENCES = {  # of Asterisk, and what is said in them
    "vm-goodbye": "goodbye",
    "vm-star-cancel": "press star to cancel",
    "conf-getpin": "please enter the conference pin number",
    "conf-onlyperson": "you are currently the only person in this conference",
    "vm-nobodyavail": "nobody is available to take your call at the moment",
}


def test_packaged_whisper_understands_sentences():
    """And says of noise that it does not, in few words."""
    recogniser = load_recogniser("package:whisper-base", "en")
    assert recogniser.identity == {
        "spec": "package:whisper-base",
        "sha256": "c647c8948665b53a8cceb99df37a5892017538171100943f83fac380aab51a00",
        "licence": "MIT",
        "version": "1.0.0",
        "encoder_sha256": load_teacher("package:whisper-base").identity["sha256"],
    }
    recordings = {file.stem: file for file in fetch_apt("asterisk-core-sounds-en-g722").rglob("*.g722")}
    for name, text in SENTENCES.items():
        heard = recogniser.transcribe(*decode(recordings[name], recordings[name].name))
        assert "".join(letter for letter in heard.text.lower() if letter.isalpha() or letter == " ") == text
        assert heard.logprob > -0.6, name
    heard = recogniser.transcribe(noise(2), RATE)
    assert heard.logprob < -1
    assert len(heard.text.split()) <= 32
