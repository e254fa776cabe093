"""CosyVoice's flow, versions 1 to 3: speech tokens and a speaker's vector to a mel. Here is all that they share.

Weights have the names of the flow classes in cosyvoice/flow/flow.py (FunAudioLLM/CosyVoice at ace7c47): mu of the
tokens, the speaker's vector and the reference go into an estimator of the velocity.
"""

from itertools import product
from types import MappingProxyType

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..errors import UserError
from .audio_dit.conditioning import keep_clips, zero_padding
from .backbone import Backbone
from .condition import Condition

# Part of a weight's name that one version alone has: its U-Net's norm over groups, over channels, and a DiT.
_VERSIONS = {"CosyVoice 1": ".block1.block.1.", "CosyVoice 2": ".block1.block.2.", "CosyVoice 3": ".attn_norm."}


class CosyVoice(Backbone):
    """A flow of CosyVoice; a subclass writes `layers`, `encode` and `estimate`.

    vocab: ids of both domains in the shards. Speech's come first and are CosyVoice's; audio's get rows of their own in
    the embedding, which CosyVoice's files lack. width: of a token's embedding. streaming: share of the clips that see
    no later chunk in training (versions 2 and 3), as upstream's coin for each batch.

    A clip without tokens has zeros in place of mu and of the projected speaker; one without a reference has zeros.
    """

    needs = frozenset({"speaker"})
    upstream_suffix = ".pt"
    upstream_settings = MappingProxyType({"data.normalize": False, "flow.sigma": 1.0})
    neutral_options = frozenset({"streaming", "layers"})
    version: str

    def __init__(self, n_mels: int, vocab: int, speaker_dim: int, width: int, streaming: float = 0.0):
        super().__init__()
        self.codes, self.streaming = vocab // 2, streaming
        self.input_embedding = nn.Embedding(vocab, width)
        self.spk_embed_affine_layer = nn.Linear(speaker_dim, n_mels)
        self.condition_width, self.condition_tap = n_mels, nn.Identity()

    def encode(self, embedded: torch.Tensor, condition: Condition, chunked: torch.Tensor | None) -> torch.Tensor:
        """Return mu (C, T, n_mels) from token embeddings (C, S, width) that are zero in the padding; padded frames mean
        nothing. chunked (C,) bool: clips that see no later chunk; None: no such clip."""
        raise NotImplementedError

    def estimate(self, x_t, t, mu, speaker, reference, lengths, chunked) -> torch.Tensor:
        """Return the velocity (C, T, n_mels). speaker (C, n_mels); lengths (C,), or None if no frame is padding."""
        raise NotImplementedError

    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        if condition.speaker is None:
            raise ValueError("CosyVoice reads condition.speaker, which is missing: set data.speaker")
        once, chunked = condition.once, None
        if self.training and self.streaming:
            chunked = torch.rand(once.lengths.shape[0], device=x_t.device) < self.streaming
        embedded = zero_padding(self.input_embedding(once.tokens), once.token_lengths)
        mu = keep_clips(self.encode(embedded, once, chunked), once.keep_tokens)
        voice = F.normalize(once.speaker, dim=1).to(self.spk_embed_affine_layer.weight.dtype)
        speaker = keep_clips(self.spk_embed_affine_layer(voice), once.keep_tokens)
        reference = once.reference
        if (copies := condition.copies) > 1:  # the encoder may cost as much as the estimator
            mu, speaker, reference = mu.repeat(copies, 1, 1), speaker.repeat(copies, 1), reference.repeat(copies, 1, 1)
            chunked = None if chunked is None else chunked.repeat(copies)
        mu = self.condition_tap(mu)
        return self.estimate(x_t, t, mu, speaker, reference, condition.mask_lengths, chunked)

    def from_upstream(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Take the weights of a flow.pt, with zeros for the ids of audio. Raises UserError for another version's, and
        if the shards have another number of speech ids."""
        for name, version in product(state, _VERSIONS):
            if _VERSIONS[version] in name and version != self.version:
                raise UserError(f"{name} is a weight of {version}, and the model is {self.version}")
        table = state.get("input_embedding.weight")
        if table is None or table.ndim != 2:
            raise UserError(f"no weights of {self.version}: input_embedding.weight is missing, or no matrix")
        if len(table) != self.codes:
            raise UserError(
                f"input_embedding.weight has {len(table)} token ids, and the shards data.codebook={self.codes}: "
                "prepare them with CosyVoice's tokens (data.speech_tokens=s3:…)"
            )
        more = table.new_zeros(self.input_embedding.num_embeddings - self.codes, table.shape[1])
        return state | {"input_embedding.weight": torch.cat((table, more))}

    def to_upstream(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return a flow.pt's weights, without the ids of audio."""
        return state | {"input_embedding.weight": state["input_embedding.weight"][: self.codes].clone()}


def stretch(
    frames_of_tokens: torch.Tensor, given: torch.Tensor, lengths: torch.Tensor, frames: int, ratio: int
) -> torch.Tensor:
    """Return (C, frames, D) from (C, G, D): each frame of a clip of lengths (C,) takes the nearest of its `given` (C,)
    rows. Padded frames repeat the last. It is a product, as in interpolate_tokens.

    ratio: rows per token. Whole tokens and whole frames end up to so many rows apart: there frame i takes row i, as
    upstream, which cuts both to one length (cosyvoice/dataset/processor.py, compute_fbank).
    """
    step = torch.where((given - lengths).abs() <= ratio, 1.0, given / lengths).unsqueeze(1)
    place = ((torch.arange(frames, device=lengths.device) + 0.5) * step).long()
    place = torch.minimum(place, (given - 1).unsqueeze(1))
    rows = torch.arange(frames_of_tokens.shape[1], device=lengths.device)
    return torch.bmm((place.unsqueeze(-1) == rows).to(frames_of_tokens.dtype), frames_of_tokens)
