"""What gpu_suite.py measures: the real sizes, or tiny ones on a CPU."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from _training import Sizes

KERNEL_TESTS = (
    "ada_norm",
    "gated_residual",
    "qk_norm_rope",
    "linear_gelu",
    "align_loss",
    "frame_loss",
    "velocity_change",
    "flow_mix",
)


@dataclass(frozen=True)
class Plan:
    """Sizes of all parts, and where their files are."""

    out: Path  # folder of traces
    shards: str = "data/demo"
    preset: str = "demo"  # of part `demo`; a resume starts from step `resume`
    overrides: tuple[str, ...] = ("eval.vocoder=griffin-lim", "train.graphs=2", "train.save_every=200")
    resume: int = 200
    sizes: Sizes = field(default_factory=Sizes)
    compiler: str = "inductor"
    large_batch: int = 64  # 60k tokens
    copy_bytes: int = 2**30
    gemm: int = 8192
    frame_counts: tuple[int, ...] = (938, 960, 1024, 704, 832)
    wide: tuple[int, int] = (1664, 30)  # width and depth of 1.5B parameters
    accuracy: tuple[str, ...] = (*(f"kernels/test_{name}" for name in KERNEL_TESTS), "training/test_block")
    accuracy_cases: str = "triton"  # what pytest -k takes

    @property
    def cuda(self) -> bool:
        return self.sizes.device == "cuda"

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.sizes.dim, self.sizes.frames, self.sizes.batch


def dry_plan(out: Path, **given) -> Plan:
    """Return tiny sizes, for a CPU."""
    return Plan(
        out,
        overrides=("train.steps=4", "train.save_every=2", "eval.vocoder=griffin-lim"),
        resume=2,
        sizes=Sizes(64, 3, 12, 2, 1, 8, 30, 16, 12, "cpu", torch.float32, 2),
        compiler="aot_eager",
        large_batch=3,
        copy_bytes=2**16,
        gemm=32,
        frame_counts=(12,),
        wide=(128, 3),
        accuracy=("kernels/test_ada_norm",),
        accuracy_cases="triton and test_repeatable",
        **given,
    )
