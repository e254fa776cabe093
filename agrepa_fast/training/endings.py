"""How a run ends that nobody asked to end: one process a folder, a bound on waiting for a rank that is gone, and a line
that says what happened."""

import torch.distributed as dist


def explain(error: Exception) -> str:
    """One line for an error that is nobody's input: which process is gone, where the error says so."""
    text = " ".join(str(error).split())
    if text.startswith("DataLoader worker"):
        return (
            f"a loader process ended ({text}): memory that ran out is the usual reason, lower data.workers; "
            "--resume latest goes on from the last checkpoint"
        )
    if "gloo" in text or isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return (
            "another rank ended, or does not answer; its own output says why. --resume latest goes on from the last "
            "checkpoint"
        )
    return f"{type(error).__name__}: {text[:300]}"
