"""Samples of a list's utterances in the voices of their prompts, as eval_infer_batch.py of F5-TTS (2ae2c9b) makes them.

A prompt and the new words are one clip for the model: the prompt's mel is given, its text goes before the new one, and
the words get as many frames as the prompt has for as many bytes of text. The prompt's frames are cut off again.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..audio.mel import LogMel
from ..audio.vocoder import Vocoder
from ..audio.waves import decode, resample
from ..config import Config
from ..data.index import Index
from ..errors import UserError
from ..files import write_atomically
from ..flow import sample
from ..models.backbone import Backbone
from ..models.condition import Condition
from ..ranks import Ranks
from .lists import Utterance
from .manifest import Clip
from .synthesis import has_content, wav_content

LONGEST = 40  # seconds of a prompt and its sample (eval/utils_eval.py, get_inference_prompt)
LEVEL = 0.1  # root of the mean square that quiet prompts are raised to, and their samples lowered from


class PromptedSynthesis:
    """Writes `<clip>.wav` of each utterance into `folder`. model: it takes text and a reference, and no tokens."""

    def __init__(self, model: Backbone, index: Index, config: Config, vocoder: Vocoder, folder: Path, device):
        self.model, self.index, self.flow, self.vocoder = model, index, config.flow, vocoder
        self.folder, self.device, self.mel = folder, device, LogMel(config.data)
        self.rate, self.hop = config.data.sample_rate, config.data.hop_length

    def path(self, clip: Clip) -> Path:
        return self.folder / f"{clip.name}.wav"

    def run(self, clips: Sequence[tuple[Clip, Utterance]], ranks: Ranks, progress: Callable[[int], object]) -> None:
        """Write the wavs that are missing; progress(1) is called after each clip. Every rank must call it. Raises
        UserError for a prompt that cannot be read or is silent, or that would make a sample too long."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for clip, utterance in ranks.part_of(clips):
            if not has_content(self.path(clip)):
                content = wav_content(self.say(utterance, clip.noise_key), self.vocoder.sample_rate)
                write_atomically(self.path(clip), content, durable=False)
            ranks.check_others()
            progress(1)

    def say(self, utterance: Utterance, noise_key: int) -> np.ndarray:
        """Return the wave (samples,) of an utterance at the vocoder's rate."""
        wave, rate = decode(utterance.prompt, str(utterance.prompt))
        level = float(np.sqrt(np.mean(np.square(wave, dtype=np.float64)))) if len(wave) else 0.0
        if level == 0:
            raise UserError(f"{utterance.prompt} is silent: a prompt has the voice of {utterance.key}")
        gain = max(1.0, LEVEL / level)
        wave = resample((wave * gain).astype(np.float32), rate, self.rate)
        if len(wave) < self.mel.min_samples:
            raise UserError(f"{utterance.prompt} is too short for a prompt: {len(wave)} samples at {self.rate} Hz")
        prompt = torch.from_numpy(self.mel(wave))
        ids = torch.from_numpy(self.index.text.encode("".join(spoken(utterance))))
        frames = count_frames(utterance, len(prompt), len(ids))
        if (seconds := frames * self.hop / self.rate) > LONGEST:
            raise UserError(
                f"{utterance.key}: its prompt and as many frames for its text take {seconds:.0f} s, above {LONGEST} s: "
                "name a shorter prompt, all of whose words are in its text"
            )
        given = F.pad((prompt - self.index.mel_mean) / self.index.mel_std, (0, 0, 0, frames - len(prompt)))
        tokens = torch.zeros(1, 1, dtype=torch.int64)
        condition = Condition(tokens, tokens[0] + 1, given[None], torch.tensor([frames]), text=ids[None])
        keys = torch.tensor([noise_key], dtype=torch.int64, device=self.device)
        mel = sample(self.model, condition.to(self.device), keys, self.flow)[0, len(prompt) :].float().cpu()
        return self.vocoder(mel * self.index.mel_std + self.index.mel_mean).numpy() / np.float32(gain)


def spoken(utterance: Utterance) -> tuple[str, str]:
    """Return the text of the prompt, with a space after a character of one byte, and the text that follows it."""
    text = utterance.prompt_text
    return text + " " * (len(text[-1].encode()) == 1), utterance.lead + utterance.text


def count_frames(utterance: Utterance, prompt: int, ids: int) -> int:
    """Return the frames of prompt and sample. prompt: frames of the prompt; ids: of both texts, which fit into them."""
    before, after = (len(text.encode()) for text in spoken(utterance))
    return max(prompt + int(prompt / before * after), prompt + 1, ids + 1)
