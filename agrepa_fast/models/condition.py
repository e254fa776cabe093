"""The conditions of the velocity, as loader processes make them: imports neither kernels nor models."""

from dataclasses import dataclass, fields, replace

import torch


@dataclass(frozen=True)
class Condition:
    """C conditions. Frames beyond `lengths` and tokens beyond `token_lengths` are padding."""

    tokens: torch.Tensor  # (C, S) int64 ids
    token_lengths: torch.Tensor  # (C,) int64
    reference: torch.Tensor  # (C, T, n_mels) normalised mel, zero beyond the prefix
    lengths: torch.Tensor  # (C,) int64, frames
    keep_tokens: torch.Tensor | None = None  # (C,) bool; False drops the tokens of that clip (guidance); None keeps all
    keep_reference: torch.Tensor | None = None  # (C,) bool, likewise
    extra_tokens: torch.Tensor | None = None  # (C, S) int64, topology B: the second id of every token
    text: torch.Tensor | None = None  # (C, N) int64 ids of the transcript, -1 in the padding; keep_tokens drops it, too
    speaker: torch.Tensor | None = None  # (C, E) fp32, a vector of the speaker's voice; keep_tokens drops it, too
    copies: int = 1  # the conditions stand here so many times, one after the other: a row for each variant of a probe
    padded: bool | None = None  # whether some length is below T; None: looked up, True on a GPU, where that would wait

    def __post_init__(self) -> None:
        if self.padded is None:
            frames = self.reference.shape[1]
            object.__setattr__(self, "padded", self.lengths.is_cuda or bool((self.lengths < frames).any()))

    @property
    def mask_lengths(self) -> torch.Tensor | None:
        """Return the lengths (C,) to mask by, or None if no frame is padding."""
        return self.lengths if self.padded else None

    @property
    def once(self) -> "Condition":
        """Return the conditions without their copies, for computations that are the same for every copy."""
        return self if self.copies == 1 else replace(self[: self.lengths.shape[0] // self.copies], copies=1)

    @property
    def layout(self) -> tuple:
        """The shape of every tensor, None for absent ones, and `padded`: a computation on conditions of one layout is
        one program."""
        return tuple(getattr(value, "shape", value) for value in (getattr(self, f.name) for f in fields(self)))

    def to(self, device: torch.device | str) -> "Condition":
        return self.map(lambda tensor: tensor.to(device))

    def __getitem__(self, clips) -> "Condition":
        """Return the conditions of some clips, by slice or index tensor."""
        return self.map(lambda tensor: tensor[clips])

    def map(self, function) -> "Condition":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: function(x) for name, x in values.items() if isinstance(x, torch.Tensor)})
