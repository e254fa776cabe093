"""UTMOS (Saeki et al. 2022, "UTMOS: UTokyo-SaruLab System for VoiceMOS Challenge 2022"), the predicted opinion score of
speech papers: its strong learner, wav2vec 2.0 with a recurrent layer, without the phonemes, as SpeechMOS has it.

The file is SpeechMOS's utmos22_strong_step7459_v1.pt. It takes samples within [-1, 1] at 16 kHz.
"""

import re

import torch
import torch.nn.functional as F

from ..errors import UserError
from ..files import local_path
from ..teachers.base import in_one_line
from ..torchaudio_import import import_torchaudio

RATE = 16000
_SHORTEST = 1600  # samples; the convolutions need 400
_HEAD_DIM = 64
_RENAMED = (  # fairseq's names of wav2vec 2.0, transformers' names
    (r"(conv_layers\.\d+)\.0\.", r"\1.conv."),
    (r"(conv_layers\.0)\.2\.", r"\1.layer_norm."),
    (r"^layer_norm\.", "feature_projection.layer_norm."),
    (r"^post_extract_proj\.", "feature_projection.projection."),
    (r"pos_conv\.0\.weight_g", "pos_conv_embed.conv.parametrizations.weight.original0"),
    (r"pos_conv\.0\.weight_v", "pos_conv_embed.conv.parametrizations.weight.original1"),
    (r"pos_conv\.0\.", "pos_conv_embed.conv."),
    (r"self_attn_layer_norm", "layer_norm"),
    (r"self_attn\.", "attention."),
    (r"fc1\.", "feed_forward.intermediate_dense."),
    (r"fc2\.", "feed_forward.output_dense."),
    (r"^mask_emb$", "masked_spec_embed"),
)


class Utmos(torch.nn.Module):
    """The network in the sizes of its weights, a state_dict of SpeechMOS, and with them."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        super().__init__()
        import_torchaudio()  # transformers imports it
        from transformers import Wav2Vec2Config, Wav2Vec2Model

        width, channels = weights["wav2vec2.post_extract_proj.weight"].shape
        layers = {found[1] for name in weights if (found := re.match(r"wav2vec2\.encoder\.layers\.(\d+)\.", name))}
        config = Wav2Vec2Config(
            hidden_size=width,
            conv_dim=(channels,) * 7,
            num_hidden_layers=len(layers),
            num_attention_heads=width // _HEAD_DIM,
            intermediate_size=len(weights["wav2vec2.encoder.layers.0.fc1.bias"]),
        )
        self.wav2vec2 = Wav2Vec2Model(config)
        domain, judge = weights["domain_emb"], weights["judge_emb"]
        self.domain_emb = torch.nn.Parameter(torch.empty_like(domain))
        self.judge_emb = torch.nn.Parameter(torch.empty_like(judge))
        hidden = weights["blstm.weight_hh_l0"].shape[1]
        inside = width + domain.shape[1] + judge.shape[1]
        self.blstm = torch.nn.LSTM(inside, hidden, batch_first=True, bidirectional=True)
        middle = len(weights["projection.0.bias"])
        self.projection = torch.nn.Sequential(
            torch.nn.Linear(2 * hidden, middle), torch.nn.ReLU(), torch.nn.Linear(middle, 1)
        )
        self.load_state_dict({_rename(name): value for name, value in weights.items()})

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        """Return the score, (), of a wave (samples,) at 16 kHz. Zeros fill up a very short one."""
        wave = F.pad(wave, (0, max(0, _SHORTEST - len(wave))))
        frames = self.wav2vec2(wave[None]).last_hidden_state
        embedded = torch.cat([self.domain_emb, self.judge_emb], dim=1).expand(frames.shape[1], -1)
        hidden, _ = self.blstm(torch.cat([frames, embedded[None]], dim=2))
        return 3 + 2 * self.projection(hidden).mean()


def _rename(name: str) -> str:
    prefix = "wav2vec2."
    if not name.startswith(prefix):
        return name
    name = name.removeprefix(prefix)
    for old, new in _RENAMED:
        name = re.sub(old, new, name)
    return prefix + name


def load_utmos(path: str, title: str) -> Utmos:
    """Return the network with the weights of a file, frozen. Raises UserError, which begins with `title`, if the file
    is missing or holds anything else."""
    file = local_path(path)
    give = "give SpeechMOS's utmos22_strong_step7459_v1.pt"
    if not file.is_file():
        raise UserError(f"{title}: no file {file}: {give}")
    try:
        network = Utmos(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises nearly anything for bytes that are no weights
        raise UserError(f"{title}: {file} does not hold UTMOS's weights ({in_one_line(error)}): {give}") from error
    return network.eval().requires_grad_(False)
