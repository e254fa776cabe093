"""A choice of layers over a small model, for tests."""

from dataclasses import replace

import torch
import torch.nn as nn

from agrepa_fast.alignment.aligner import Aligner
from agrepa_fast.attribution.csv import read_csv
from agrepa_fast.config_file import load_config
from agrepa_fast.models.audio_dit.dit import AudioDiT
from agrepa_fast.probing.fixed_clips import probe_clips
from agrepa_fast.probing.schedule import LayerChoice

DIMS = {"speech": 5, "audio": 7}


def small_config(*overrides: str):
    base = ["model.dim=16", "model.depth=4", "model.heads=2", "model.token_dim=16", "align.k=1", "probe.times=[0.5]"]
    base += ["probe.start_step=2", "probe.every=2", "probe.warmup_steps=6", "probe.storage_clips=8", "probe.clips=3"]
    return load_config("demo", [*base, *overrides])


class Choice:
    """A LayerChoice over a small model that is awake, with what it said."""

    def __init__(self, index, folder, *overrides: str):
        self.config = small_config(*overrides)
        torch.manual_seed(0)
        model = AudioDiT(replace(self.config.model, n_mels=index.n_mels, vocab=index.vocab))
        for block in model.blocks:
            nn.init.normal_(block.modulation.weight, std=0.2)
        self.model, self.said = model, []
        self.aligner = Aligner(self.config, model, DIMS, torch.device("cpu"))
        clips = probe_clips(index, self.config, "cpu")
        self.choice = LayerChoice(self.config, model, self.aligner, clips, clips, self.said.append, folder)

    def run(self, steps) -> list[int]:
        """The steps after which something new is aligned."""
        changes = []
        for step in steps:
            before = self.aligner.selection
            self.choice.after_step(step)
            if self.aligner.selection is not before:
                changes.append(step)
        return changes

    def measured(self, folder) -> list[int]:
        return sorted({int(row["step"]) for row in read_csv(folder / "attribution.csv")})
