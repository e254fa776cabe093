"""A model of a user's: blocks without attention, a frozen embedding, a buffer, and no token condition."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from agrepa_fast import Backbone, Layer


class Block(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.mix, self.out = nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x, time):
        return x + self.out(F.gelu(self.mix(self.norm(x) + time)))


class Mine(Backbone):
    def __init__(self, n_mels, vocab, dim=16, depth=3):
        super().__init__()
        self.ids = nn.Embedding(vocab, dim).requires_grad_(False)
        self.register_buffer("scale", torch.tensor(4.0))
        self.time, self.enter, self.leave = nn.Linear(1, dim), nn.Linear(2 * n_mels, dim), nn.Linear(dim, n_mels)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))

    @property
    def layers(self):
        return [Layer((block,), width=self.time.out_features) for block in self.blocks]

    def velocity(self, x_t, t, condition):
        time = self.time(self.scale * t[:, None, None]) + self.said(condition)
        x = self.enter(torch.cat((x_t, condition.reference), -1))
        for block in self.blocks:
            x = block(x, time=time)
        return self.leave(x)

    def said(self, condition):
        said = self.ids(condition.tokens[:, :1])
        return said if condition.keep_tokens is None else said * condition.keep_tokens[:, None, None]


class Broken(Mine):
    def velocity(self, x_t, t, condition):
        return super().velocity(x_t, t, condition)[..., :-1]


class Narrow(Mine):
    @property
    def layers(self):
        return [Layer((block,), width=5) for block in self.blocks]


class Prefixed(Mine):
    """A token stands before the frames, and the tap sees it."""

    def velocity(self, x_t, t, condition):
        time = self.time(self.scale * t[:, None, None]) + self.said(condition)
        x = self.enter(torch.cat((x_t, condition.reference), -1))
        x = torch.cat((time, x), dim=1)
        for block in self.blocks:
            x = block(x, time=time)
        return self.leave(x[:, 1:])


class Raises(Mine):
    def velocity(self, x_t, t, condition):
        return self.speaker(condition)


class Mixes(Mine):
    """Its padding and its clips look at each other."""

    def velocity(self, x_t, t, condition):
        return super().velocity(x_t - x_t.mean(1, keepdim=True), t, condition)


class Insists(Mine):
    """It leaves no tokens out."""

    def said(self, condition):
        return self.ids(condition.tokens[:, :1])


class Reads(Mine):
    """It takes text and the speaker's vector."""

    needs = frozenset({"text", "speaker"})

    def __init__(self, n_mels, vocab, text_vocab, speaker_dim, dim=16, depth=3):
        super().__init__(n_mels, vocab, dim, depth)
        self.letters = nn.Embedding(text_vocab + 1, n_mels, padding_idx=0)
        self.voice = nn.Linear(speaker_dim, n_mels)

    def velocity(self, x_t, t, condition):
        given = self.letters(condition.text + 1).sum(1, keepdim=True) + self.voice(condition.speaker).unsqueeze(1)
        if condition.keep_tokens is not None:
            given = given * condition.keep_tokens[:, None, None]
        return super().velocity(x_t + given, t, condition)
