"""Speech recognition, for word error rates: the words heard in a recording, and how sure the recogniser is of them.

recogniser = load_recogniser("package:whisper-base", "en", "cpu")
recogniser.transcribe(wave, 22050)                    # Heard(text="Goodbye.", logprob=-0.31)

Whisper decodes greedily, without timestamps, after its usual prompt (Radford et al. 2022, "Robust Speech Recognition
via Large-Scale Weak Supervision"), on 30 s windows filled with silence, as in its training. If it does not understand,
it invents words, or repeats itself without end. So a clip gets at most 10 tokens per second of English, 25 of another
language, and 12 more, and the mean log-probability of the tokens is returned with the text.
"""

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from ..errors import UserError, nearest
from ..teachers.base import cannot_load, load_weights, model_source, weights_sha256
from ..teachers.packages import RECOGNISERS
from ..torchaudio_import import import_torchaudio
from .metric_model import HUB, identity, unknown_package, wave_at

_MORE_TOKENS = 12
_ENGLISH, _OTHERS = 10, 25  # tokens per second: fast English has 5, Hindi and Thai have one per character
_SEARCHED = 5.0  # seconds at the end of a window in which a longer recording is cut
_SHORTEST = 0.1  # seconds; the convolutions of a CTC model need 25 ms
_LANGUAGE = re.compile(r"<\|([a-z]{2,3})\|>")
_MULTILINGUAL_VOCAB = 51865  # of the first Whisper; those of English alone have fewer tokens


class Heard(NamedTuple):
    """The text that was heard, and the mean log-probability of its tokens: about -0.2 for clear speech, below -1 for
    inventions."""

    text: str
    logprob: float


class Recogniser(ABC):
    """A frozen recogniser in fp32.

    identity  spec, sha256, licence and version, and the encoder_sha256 that a teacher with the same encoder has as its
              sha256
    spelling  British spellings with their American ones, for transformers' EnglishTextNormalizer; empty if the model
              has none
    """

    identity: dict[str, str | None]
    spelling: dict[str, str]

    @abstractmethod
    def transcribe(self, wave: np.ndarray, rate: int) -> Heard:
        """Return the words of a wave (samples,) float32 at `rate` Hz. Equal waves give equal results. Raises ValueError
        for a wave that is empty or not finite."""


class WhisperRecogniser(Recogniser):
    """A Whisper of transformers. prompt: the tokens that decoding starts from. pace: most tokens per second."""

    def __init__(self, model, tokenizer, prompt: list[int], pace: int, device: str | torch.device):
        from transformers import WhisperFeatureExtractor

        self._pace = pace
        config, settings = model.config, model.generation_config
        self._extractor = WhisperFeatureExtractor(feature_size=config.num_mel_bins)  # its arithmetic is fixed
        self._model, self._tokenizer, self._device = model.to(device), tokenizer, torch.device(device)
        self._prompt = torch.tensor([prompt], device=device)
        self._end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
        parameters = inspect.signature(model.model.decoder.forward).parameters
        self._cache = "cache" if "cache" in parameters else "past_key_values"  # the name in older releases
        self._room = config.max_target_positions - self._prompt.shape[1]
        always, first = settings.suppress_tokens or [], settings.begin_suppress_tokens or []
        self._never, self._never_first = (
            torch.tensor(ids, dtype=torch.long, device=device)
            for ids in (always, [*always, *first])  # a Whisper may suppress no token
        )
        self.spelling = getattr(tokenizer, "english_spelling_normalizer", None) or {}

    @torch.inference_mode()
    def transcribe(self, wave: np.ndarray, rate: int) -> Heard:
        wave = wave_at(wave, rate, self._extractor.sampling_rate)
        texts, logprobs = [], []
        for window in _windows(wave, self._extractor.n_samples, self._extractor.sampling_rate):
            tokens, of_tokens = self._decode(window)
            texts.append(self._tokenizer.decode([token for token in tokens if token < self._end]).strip())
            logprobs += of_tokens
        return Heard(" ".join(text for text in texts if text), float(np.mean(logprobs)))

    def _decode(self, window: np.ndarray) -> tuple[list[int], list[float]]:
        """Return a window's tokens without the end, and the log-probabilities of all, that of the end among them."""
        rate = self._extractor.sampling_rate
        features = self._extractor(window, sampling_rate=rate, return_tensors="pt").input_features
        hidden = self._model.model.encoder(features.to(self._device)).last_hidden_state
        bound = min(self._room, int(self._pace * len(window) / rate) + _MORE_TOKENS)
        ids, cache, tokens, logprobs = self._prompt, None, [], []
        while len(tokens) < bound:
            output = self._model.model.decoder(
                input_ids=ids, encoder_hidden_states=hidden, use_cache=True, **{self._cache: cache}
            )
            logits = self._model.proj_out(output.last_hidden_state[0, -1]).float()
            logits[self._never if tokens else self._never_first] = -torch.inf
            best = logits.argmax()
            logprobs.append(logits.log_softmax(dim=0)[best].item())
            if best == self._end:
                break
            tokens.append(best.item())
            ids, cache = best.view(1, 1), output[self._cache]
        return tokens, logprobs


class CtcRecogniser(Recogniser):
    """A CTC model of transformers: wav2vec 2.0, HuBERT, WavLM and their like. It spells what it hears, so it neither
    invents words nor repeats them."""

    spelling: dict[str, str] = {}  # noqa: RUF012 - never changed

    def __init__(self, model, extractor, tokenizer, device: str | torch.device):
        self._model, self._device = model.to(device), torch.device(device)
        self._extractor, self._tokenizer = extractor, tokenizer

    @torch.inference_mode()
    def transcribe(self, wave: np.ndarray, rate: int) -> Heard:
        """The log-probability is that of the frames with a character, of all frames if there is no character."""
        wanted = self._extractor.sampling_rate
        wave = wave_at(wave, rate, wanted)
        wave = np.pad(wave, (0, max(0, int(_SHORTEST * wanted) - len(wave))))
        features = self._extractor(wave, sampling_rate=wanted, return_tensors="pt").to(self._device)
        logprobs, best = self._model(**features).logits[0].float().log_softmax(dim=-1).max(dim=-1)
        spelled = best != self._model.config.pad_token_id  # CTC's blank
        return Heard(
            self._tokenizer.decode(best.tolist()).strip(),
            (logprobs[spelled] if spelled.any() else logprobs).mean().item(),
        )


def load_recogniser(spec: str, language: str, device: str | torch.device = "cpu") -> Recogniser:
    """Return the recogniser of `package:whisper-base`, of a folder saved with save_pretrained, or of a name on the
    model hub: any Whisper or CTC model of transformers.

    language: of the speech, as Whisper names it (en); a CTC model has one of its own. Raises UserError, in one line
    with the remedy, for an unknown model or language, without a network, and for a model that recognises no speech.
    """
    import_torchaudio()  # transformers imports it
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CTC_MAPPING_NAMES

    title, ways = f"metrics.asr={spec}", f"package:whisper-base, {HUB}"
    facts = {}
    if spec.startswith("package:"):
        name = spec.removeprefix("package:")
        if name not in RECOGNISERS:
            raise unknown_package(title, spec, RECOGNISERS)
        source, facts = str(RECOGNISERS[name].folder(f"{name}-with-decoder")), RECOGNISERS[name].facts
    else:
        source = model_source(spec, title, ways)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if config.model_type == "whisper":
            load = _load_whisper
        elif config.model_type in MODEL_FOR_CTC_MAPPING_NAMES:
            load = _load_ctc
        else:
            raise UserError(
                f"{title} is a {config.model_type!r} model: a Whisper, or one of type "
                f"{', '.join(sorted(MODEL_FOR_CTC_MAPPING_NAMES))} with a CTC head, recognises speech"
            )
        model, recogniser = load(source, title, language, device)
    except (OSError, ValueError) as error:  # transformers' for a missing file and an unknown model type
        raise cannot_load(title, error, ways) from error
    version = facts.get("version") or getattr(config, "_commit_hash", None)  # of a model from the hub
    recogniser.identity = identity(spec, model, facts.get("licence"), version)
    # A Whisper's encoder can be a teacher, and so can another model without its CTC head.
    encoder = model.base_model.encoder if config.model_type == "whisper" else model.base_model
    recogniser.identity["encoder_sha256"] = weights_sha256(encoder)
    return recogniser


def _load_whisper(source: str, title: str, language: str, device: str | torch.device):
    from transformers import WhisperForConditionalGeneration

    tokenizer = _load_tokenizer(source, title)
    model = load_weights(WhisperForConditionalGeneration, source, title)
    prompt = _prompt(model, tokenizer, language, title)
    return model, WhisperRecogniser(model, tokenizer, prompt, _ENGLISH if language == "en" else _OTHERS, device)


def _load_ctc(source: str, title: str, language: str, device: str | torch.device):
    from transformers import AutoFeatureExtractor, AutoModelForCTC

    extractor = AutoFeatureExtractor.from_pretrained(source, trust_remote_code=False)
    tokenizer = _load_tokenizer(source, title)
    model = load_weights(AutoModelForCTC, source, title)
    return model, CtcRecogniser(model, extractor, tokenizer, device)


def _load_tokenizer(source: str, title: str):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except TypeError as error:  # without its files
        raise UserError(f"{title} has no tokenizer: save the model's own beside it") from error


def _prompt(model, tokenizer, language: str, title: str) -> list[int]:
    """Return the tokens that tell a Whisper to transcribe a language without timestamps; one of English alone takes no
    language."""
    vocabulary = tokenizer.get_vocab()
    for token in ("<|startoftranscript|>", "<|transcribe|>", "<|notimestamps|>", "<|endoftext|>"):
        if token not in vocabulary:  # transformers makes an empty tokenizer if there are no files of one
            raise UserError(f"{title}: its tokenizer has no {token}: save Whisper's tokenizer beside the model")
    multilingual = getattr(model.generation_config, "is_multilingual", None)
    if multilingual is None:
        multilingual = model.config.vocab_size >= _MULTILINGUAL_VOCAB
    languages = [found[1] for found in map(_LANGUAGE.fullmatch, vocabulary) if found] if multilingual else ["en"]
    if language not in languages:
        raise UserError(f"metrics.language={language}: {title} lacks this language; {nearest(language, languages)}")
    words = ["startoftranscript", *([language, "transcribe"] if multilingual else []), "notimestamps"]
    return [vocabulary[f"<|{word}|>"] for word in words]


def _windows(wave: np.ndarray, longest: int, rate: int) -> Iterator[np.ndarray]:
    """Yield the parts of a wave of at most `longest` samples each. A longer wave is cut at the quietest tenth of a
    second of a window's end."""
    step = rate // 10
    searched = int(_SEARCHED * 10)
    while len(wave) > longest:
        energy = np.square(wave[longest - searched * step : longest]).reshape(searched, step).sum(axis=1)
        end = longest - searched * step + int(energy.argmin()) * step + step // 2
        yield wave[:end]
        wave = wave[end:]
    yield wave
