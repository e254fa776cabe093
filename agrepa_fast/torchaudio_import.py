"""torchaudio, also beside a CPU build of torch."""

import sys
import types

import torch


def make_torchaudio_importable() -> None:
    """Let torchaudio be imported beside a CPU build of torch, by whoever does it next. Does nothing elsewhere.

    Call it before a library that imports torchaudio is imported: transformers, speechbrain, s3tokenizer, vocos, f5_tts.
    """
    if torch.version.cuda is None and "torchaudio" not in sys.modules:
        # The wheel is a CUDA build, whose native part fails to load without libc10_cuda. The parts in use are pure
        # Python, so a stub takes its place.
        stub = types.ModuleType("torchaudio._extension")
        stub._IS_TORCHAUDIO_EXT_AVAILABLE = False
        stub._IS_ALIGN_AVAILABLE = False
        stub.fail_if_no_align = lambda function: function
        sys.modules["torchaudio._extension"] = stub


def import_torchaudio():
    """Return torchaudio, also beside a CPU build of torch. Raises ImportError if it is not installed."""
    make_torchaudio_importable()
    import torchaudio

    return torchaudio
