"""Which implementation of the operations runs: the only place that decides it."""

import os

BACKENDS = ("reference",)  # what this version has


def active_backend() -> str:
    """The backend that AGREPA_BACKEND names, else the best one there is. Raises ValueError for one this version does
    not have."""
    name = os.environ.get("AGREPA_BACKEND", BACKENDS[0])
    if name not in BACKENDS:
        raise ValueError(f"AGREPA_BACKEND={name!r}: this version has {', '.join(BACKENDS)}")
    return name
