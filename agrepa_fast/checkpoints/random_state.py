"""The random state of a rank. Only dropout and CosyVoice's streaming draw from it: everything else is drawn by keys
(seeds.py)."""

from pathlib import Path

import torch

from ..tensor_files import open_tensors


def rank_file(rank: int) -> str:
    """Return the name of a rank's file in a checkpoint. Every rank writes one."""
    return f"rank{rank}.safetensors"


def random_state() -> dict[str, torch.Tensor]:
    """Return the state of torch's generators on this rank."""
    state = {"cpu_rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(file: Path, seed: int) -> None:
    """Restore the state that this rank saved to `file`; start from `seed` if the save had no such rank."""
    torch.manual_seed(seed)
    if file.is_file():
        with open_tensors(file, "take another checkpoint") as stored:
            state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        torch.set_rng_state(state["cpu_rng"])
        if torch.cuda.is_available() and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"])
