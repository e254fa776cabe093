"""How a global batch is spread over ranks and micro-batches."""

from dataclasses import dataclass

from ..errors import UserError


@dataclass(frozen=True)
class BatchLayout:
    """How the clips of a global batch are spread over ranks and accumulated micro-batches, as evenly as they can be.

    batch_clips: of every global batch; None: train.batch_frames decides, bucket by bucket.
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
        """What DeepSpeed is told: the clips of the largest micro-batch, or 1 where they differ from step to step."""
        return 1 if self.batch_clips is None else -(-self.batch_clips // self.parts)

    def places(self, micro: int, clips: int | None = None) -> range:
        """The places of this rank's micro-batch in a global batch of so many clips."""
        clips = self.batch_clips if clips is None else clips
        part = micro * self.world + self.rank
        return range(part * clips // self.parts, (part + 1) * clips // self.parts)

    def weight(self, micro: int, clips: int) -> float:
        """What the micro-batch's mean loss is multiplied by, so that the mean over ranks and micro-batches, which
        DeepSpeed takes, is that over the global batch's clips."""
        return len(self.places(micro, clips)) * self.parts / clips
