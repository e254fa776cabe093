"""Log-mel back to sound: by HiFi-GAN, by Vocos, or by Griffin-Lim if neither fits the mel."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import torch

from ..config import DataConfig
from ..errors import UserError, nearest
from ..fetch import check_home_cache
from ..files import file_sha256, local_path
from . import hifigan
from .mel import LogMel
from .waves import import_torchaudio

VOCOS_HUB = "charactr/vocos-mel-24khz"
_VOCOS_FILES = ("config.yaml", "pytorch_model.bin")
_GRIFFIN_LIM_ITERATIONS = 60
_INVERSE_MEL_ITERATIONS = 30


class Vocoder:
    """Turns a natural-log magnitude mel (T, n_mels), not normalised, into (samples,) float32 in [-1, 1] on the CPU.

    name: of the vocoder; for Griffin-Lim in place of a better one, with the reason.
    """

    def __init__(
        self, name: str, data: DataConfig, synthesize: Callable[[torch.Tensor], torch.Tensor], device: str = "cpu"
    ) -> None:
        self.name, self.sample_rate, self.n_mels = name, data.sample_rate, data.n_mels
        self._synthesize, self._device = synthesize, torch.device(device)

    @torch.inference_mode()
    def __call__(self, log_mel: torch.Tensor) -> torch.Tensor:
        if log_mel.ndim != 2 or log_mel.shape[1] != self.n_mels or len(log_mel) == 0:
            raise ValueError(f"log-mel of shape {tuple(log_mel.shape)}: (frames, {self.n_mels}) is wanted")
        wave = self._synthesize(log_mel.to(self._device, torch.float32).T[None])[0]
        return wave.clamp(-1.0, 1.0).cpu()


def load_vocoder(name: str, data: DataConfig, device: str = "cpu") -> Vocoder:
    """Return the vocoder `auto`, `package:hifigan`, `griffin-lim`, or that of a Vocos model's folder or hub name.

    `auto` takes HiFi-GAN or Vocos if the mel is theirs and the weights can be loaded, else Griffin-Lim. Raises
    UserError for an unknown name, and for a named vocoder that cannot be loaded or was trained on another mel.
    """
    if name == "auto":
        return _auto(data, device)
    if name == "griffin-lim":
        return _griffin_lim(data, device)
    if name == "package:hifigan":
        return _hifigan(data, device)
    if local_path(name).is_dir() or re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return _vocos(name, data, device)
    known = ("auto", "griffin-lim", "package:hifigan", VOCOS_HUB)
    raise UserError(f"eval.vocoder={name!r} is no vocoder and no folder: {nearest(name, known)}")


def _auto(data: DataConfig, device: str) -> Vocoder:
    reasons = []
    for load in (lambda: _hifigan(data, device), lambda: _vocos(VOCOS_HUB, data, device, offline=True)):
        try:
            return load()
        except UserError as error:
            reasons.append(str(error).partition(": ")[0])  # without the remedy
    return _griffin_lim(data, device, because="; ".join(reasons))


def _hifigan(data: DataConfig, device: str) -> Vocoder:
    _check_mel("package:hifigan", hifigan.MEL, data)
    generator = hifigan.load_generator().to(device)
    name = f"HiFi-GAN universal ({hifigan.PACKAGE} {hifigan.VERSION})"
    return Vocoder(name, data, lambda log_mel: generator(log_mel.mT), device)


def _check_mel(vocoder: str, wanted: dict, data: DataConfig) -> None:
    differing = [f"data.{field}={value}" for field, value in wanted.items() if getattr(data, field) != value]
    if differing:
        raise UserError(
            f"vocoder {vocoder} wants {', '.join(differing)}: prepare the data so, or set another eval.vocoder"
        )


def _vocos(name: str, data: DataConfig, device: str, offline: bool = False) -> Vocoder:
    if importlib.util.find_spec("vocos") is None:
        raise UserError(f"vocoder {name} needs the package vocos: pip install vocos, or set another eval.vocoder")
    config, weights = _vocos_files(name, offline)
    _check_mel(name, _vocos_mel(name, config), data)
    import_torchaudio()  # vocos imports it
    from vocos import Vocos

    model = Vocos.from_hparams(str(config))
    state = torch.load(weights, map_location="cpu", weights_only=True)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"vocoder {name}: {weights} does not fit {config}: download both again") from error
    model = model.eval().requires_grad_(False).to(device)
    # Wavs are kept by the name, and a folder may get other weights.
    return Vocoder(f"Vocos ({name}, {file_sha256(weights)[:12]})", data, model.decode, device)


def _vocos_files(name: str, offline: bool) -> tuple[Path, Path]:
    folder = local_path(name)
    if folder.is_dir():
        missing = [file for file in _VOCOS_FILES if not (folder / file).is_file()]
        if missing:
            raise UserError(
                f"vocoder {name}: the folder has no {missing[0]}; a Vocos model is {' and '.join(_VOCOS_FILES)}"
            )
        return folder / _VOCOS_FILES[0], folder / _VOCOS_FILES[1]
    from huggingface_hub import hf_hub_download

    check_home_cache()
    try:
        config, weights = (hf_hub_download(name, file, local_files_only=offline) for file in _VOCOS_FILES)
    except OSError as error:  # all of the hub's errors, and those of the network
        raise UserError(
            f"vocoder {name} is not in the hub's cache{'' if offline else ' and was not downloaded'}: put "
            f"{' and '.join(_VOCOS_FILES)} into a folder and set eval.vocoder to it"
        ) from error
    return Path(config), Path(weights)


def _vocos_mel(name: str, config: Path) -> dict:
    """Return the fields of DataConfig that the model was trained with."""
    import yaml

    content = yaml.safe_load(config.read_text())
    try:
        paths = [content[part]["class_path"] for part in ("feature_extractor", "backbone", "head")]
        mel = content["feature_extractor"].get("init_args", {})
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"vocoder {name}: {config} is not the configuration of a Vocos model") from error
    # Vocos imports and calls the names in this file.
    if paths[0] != "vocos.feature_extractors.MelSpectrogramFeatures" or any(not p.startswith("vocos.") for p in paths):
        raise UserError(f"vocoder {name}: {config} names {', '.join(paths)}; only Vocos models of mels can be used")
    sample_rate, n_fft = mel.get("sample_rate", 24000), mel.get("n_fft", 1024)
    return {
        "sample_rate": sample_rate,
        "n_fft": n_fft,
        "hop_length": mel.get("hop_length", 256),
        "n_mels": mel.get("n_mels", 100),
        "f_max": sample_rate / 2,
        "mel_scale": "htk",
        "mel_norm": None,
        "center": mel.get("padding", "center") == "center",
    }


def _griffin_lim(data: DataConfig, device: str, because: str = "") -> Vocoder:
    """Return the vocoder of Griffin & Lim 1984 with Perraudin's momentum. It starts from the non-negative spectrum that
    fits the mel best."""
    torchaudio = import_torchaudio()
    filters = LogMel(data).mel.mel_scale.fb.to(device)  # (bins, n_mels)
    inverse = torch.linalg.pinv(filters)
    window = torch.hann_window(data.n_fft, device=device)

    def synthesize(log_mel: torch.Tensor) -> torch.Tensor:
        magnitude = inverse_mel(log_mel.exp(), filters, inverse)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the first guess of the phase
            wave = torchaudio.functional.griffinlim(
                magnitude,
                window,
                data.n_fft,
                data.hop_length,
                data.n_fft,
                power=1.0,
                n_iter=_GRIFFIN_LIM_ITERATIONS,
                momentum=0.99,
                length=None,
                rand_init=True,
            )
        # Its frames are centred on multiples of the hop; HiFi-GAN's (center=False) are centred half a hop later.
        edge = 0 if data.center else data.hop_length // 2
        return torch.nn.functional.pad(wave, (edge, edge))

    return Vocoder(f"Griffin-Lim ({because})" if because else "Griffin-Lim", data, synthesize, device)


def inverse_mel(mel: torch.Tensor, filters: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Return non-negative magnitudes (1, bins, T) of a mel (1, n_mels, T). filters: (bins, n_mels). inverse: their
    pseudo-inverse (n_mels, bins).

    Non-negative least squares by Lee & Seung's multiplicative updates, from the pseudo-inverse's solution. The log-mel
    of the result is within 0.003 of the given one for speech; by the pseudo-inverse alone it is 0.03 off.
    """
    magnitude = (inverse.T @ mel).clamp(min=1e-8)
    wanted, product = filters @ mel, filters @ filters.T
    for _ in range(_INVERSE_MEL_ITERATIONS):
        magnitude = magnitude * wanted / (product @ magnitude).clamp(min=1e-8)
    return magnitude
