"""Spread the clips of a global batch over ranks and micro-batches."""

from dataclasses import dataclass

from ..errors import UserError


def ceil_div(number: int, divisor: int) -> int:
    """Return number / divisor, rounded up."""
    return -(-number // divisor)


@dataclass(frozen=True)
class BatchLayout:
    """One rank's part of the global batches, which are spread over ranks and micro-batches as evenly as they can be.

    batch_clips: clips of every global batch; None: train.batch_frames decides, bucket by bucket.
    """

    batch_clips: int | None
    accumulation: int
    rank: int
    world: int

    def __post_init__(self) -> None:
        if self.batch_clips is not None and self.batch_clips < self.parts:
            raise UserError(
                f"train.batch_clips={self.batch_clips} cannot be split over {self.world} ranks x "
                f"train.accumulation={self.accumulation}: at least {self.parts} are needed"
            )

    @property
    def parts(self) -> int:
        """Micro-batches of a global batch, over all ranks."""
        return self.world * self.accumulation

    @property
    def micro_batch(self) -> int:
        """The size that DeepSpeed is told: clips of the largest micro-batch, or 1 if they differ from step to step."""
        return 1 if self.batch_clips is None else ceil_div(self.batch_clips, self.parts)

    def places(self, micro: int, clips: int | None = None) -> range:
        """Return the places that this rank's micro-batch takes in a global batch of so many clips."""
        clips = self.batch_clips if clips is None else clips
        part = micro * self.world + self.rank
        return range(part * clips // self.parts, (part + 1) * clips // self.parts)

    def weight(self, micro: int, clips: int) -> float:
        """Return the factor of the micro-batch's mean loss. With it, the mean over ranks and micro-batches, which
        DeepSpeed takes, is the mean over the global batch's clips."""
        return len(self.places(micro, clips)) * self.parts / clips
