"""Set how long OpenMP's threads spin before they sleep. Imported before torch: libgomp reads its environment when torch
loads it, and never again."""

import os
import sys

SPIN_COUNT = 1000  # measured by benchmarks/contention.py


def limit_spinning() -> None:
    """Set GOMP_SPINCOUNT for this process and those it starts, unless torch is loaded or the user has set it or
    OMP_WAIT_POLICY. By default, threads spin for milliseconds at every barrier; one busy process on the same cores
    then slows training by far more than its share of them (benchmarks/contention.py)."""
    if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


limit_spinning()
