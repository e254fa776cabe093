"""Figures of single wavs, kept by content: the hash of the wav and the identity of the model that judged it.

So a wav that was made again is judged again, and an interrupted evaluation goes on to the same numbers.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from ..files import write_atomically
from .synthesis import Wav

FAILED = "failed"  # the only entry of a wav that a model raised for, with the reason
Figures = dict[Wav, dict[str, Any]]  # of each wav that was judged
Judge = Callable[[np.ndarray, int], dict[str, object]]  # wave (samples,) float32 and its rate -> figures, JSON values


class ScoreCache:
    """The figures of one model. folder: of all models; identity: of this one, with the settings that matter to it."""

    def __init__(self, folder: Path, kind: str, identity: dict[str, object]):
        content = json.dumps(identity, sort_keys=True, default=str)
        self.folder = folder / f"{kind}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def file(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def read(self, key: str) -> dict[str, Any] | None:
        """Return what is kept under a key; None if there is nothing, or a crash of the machine has cut it."""
        try:
            return json.loads(self.file(key).read_bytes())
        except (FileNotFoundError, ValueError):
            return None

    def judge(self, key: str, read: Callable[[], tuple[np.ndarray, int]], judge: Judge) -> dict[str, object]:
        """Let a model judge a wave, unless it has, and keep the figures. Return them, or the reason why it raised.

        key: the hash of what `read` returns. Want of memory is no fault of a wave and is raised."""
        if (before := self.read(key)) is not None:
            return before
        try:
            figures = judge(*read())
            if not all(np.isfinite(value).all() for value in figures.values() if isinstance(value, float | list)):
                raise ValueError("what it says is not finite")
        except UserError as error:  # no recording that can be read
            figures = {FAILED: str(error)}
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of a model that is not ours
            figures = {FAILED: f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        if FAILED not in figures:  # the reason may be of this process, such as a device that failed
            write_atomically(self.file(key), json.dumps(figures), durable=False)
        return figures
