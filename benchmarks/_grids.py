"""Runs the accuracy grids of tests/test_<name>.py where pytest may be missing: every test that takes a `backend`, over
all of its parameters. On a GPU, Triton as compiled; elsewhere its interpreter.

python benchmarks/_grids.py ada_norm [--limit N] [--share I N]
prints one JSON line: {"passed": n, "failed": {case: error}}
"""

import argparse
import importlib
import inspect
import itertools
import json
import os
import re
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from _bench import ROOT

sys.path.insert(0, str(ROOT))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported


def stand_in() -> types.ModuleType:
    """As much of pytest as importing the tests takes. parametrize notes its grid on the function."""

    def parametrize(names, values, **_ids):
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        rows = [tuple(value) if len(names) > 1 else (value,) for value in values]

        def note(test):
            test.grid = [[dict(zip(names, row, strict=True)) for row in rows], *getattr(test, "grid", [])]
            return test

        return note

    def unmarked(*_args, **_options):
        return lambda test: test

    def fixture(function=None, **_options):
        return function or unmarked()

    @contextmanager
    def raises(expected, match=""):
        message = None
        try:
            yield
        except expected as error:
            message = str(error)
        if message is None or not re.search(match, message):
            raise AssertionError(f"wanted {expected.__name__} with {match!r}, got {message!r}")

    pytest = types.ModuleType("pytest")
    pytest.mark = types.SimpleNamespace(parametrize=parametrize, skipif=unmarked, filterwarnings=unmarked)
    pytest.fixture, pytest.raises = fixture, raises
    return pytest


def cases(module: types.ModuleType) -> Iterator[tuple[str, Callable, dict]]:
    """(name, test, arguments) of every case whose arguments are all on its grid, `backend` among them."""
    for name, test in vars(module).items():
        grid = getattr(test, "grid", None)
        if grid is None or not name.startswith("test_"):
            continue
        for row in itertools.product(*grid):
            arguments = {key: value for part in row for key, value in part.items()}
            if "backend" in arguments and arguments.keys() == inspect.signature(test).parameters.keys():
                yield f"{name}[{', '.join(map(str, arguments.values()))}]", test, arguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--limit", type=int, help="only the first N cases of the file, for a dry run")
    parser.add_argument(
        "--share", type=int, nargs=2, default=[0, 1], metavar=("I", "N"), help="every N-th case from I on"
    )
    args = parser.parse_args()
    sys.modules["pytest"] = stand_in()
    module = importlib.import_module(f"tests.kernels.test_{args.name}")
    passed, failed = 0, {}
    first, step = args.share
    for name, test, arguments in itertools.islice(cases(module), first, args.limit, step):
        try:
            with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # where the tests name no device
                test(**arguments)
            passed += 1
        except Exception as error:  # whatever a case raises is its result; the other cases still run
            failed[name] = f"{type(error).__name__}: {str(error).strip()}"[:300]
    print(json.dumps({"passed": passed, "failed": failed}))


if __name__ == "__main__":
    main()
