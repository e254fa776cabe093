"""Figures of single wavs, kept by content: the hash of the wav and the identity of the model that judged it.

So a wav that was made again is judged again, and an interrupted evaluation goes on to the same numbers.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..audio.waves import decode
from ..errors import UserError
from ..files import write_atomically

FAILED = "failed"  # the only entry of a wav that a model raised for, with the reason
Judge = Callable[[np.ndarray, int], dict[str, object]]  # wave (samples,) float32 and its rate -> figures, JSON values


class ScoreCache:
    """The figures of one model. folder: of all models; identity: of this one, with the settings that matter to it."""

    def __init__(self, folder: Path, kind: str, identity: dict[str, object]):
        content = json.dumps(identity, sort_keys=True, default=str)
        self.folder = folder / f"{kind}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def file(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.json"

    def read(self, sha256: str) -> dict[str, object]:
        """Return the figures of a wav that was judged."""
        return json.loads(self.file(sha256).read_text())

    def judge(self, path: Path, sha256: str, judge: Judge) -> bool:
        """Let a model judge a wav, unless it has, and keep the figures, or the reason why it raised. Return whether it
        was judged now. Want of memory is no fault of a wav and is raised."""
        if (file := self.file(sha256)).is_file():
            return False
        try:
            figures = judge(*decode(path, path.name))
        except UserError as error:  # no recording that can be read
            figures = {FAILED: str(error)}
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of a model that is not ours
            figures = {FAILED: f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        write_atomically(file, json.dumps(figures), durable=False)
        return True
