"""Run all drills as tests and write their summary: python -m tests.drills. The full grids have their own commands."""

import os
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from xml.etree import ElementTree

from ..ranks import ROOT
from .results import RECORD, record


def summary(report: Path) -> list[str]:
    """Return one line per test file of a JUnit report."""
    seconds, outcomes = defaultdict(float), defaultdict(Counter)
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.get("classname").removeprefix("tests.").split(".Test")[0].replace(".", "/")
        seconds[file] += float(case.get("time"))
        ended = {child.tag for child in case} & {"failure", "error", "skipped"}
        outcomes[file][ended.pop() if ended else "passed"] += 1
    lines = [
        f"- {file}: {', '.join(f'{count} {how}' for how, count in outcomes[file].items())}, {seconds[file]:.0f} s"
        for file in sorted(outcomes)
    ]
    return [f"{sum(c.total() for c in outcomes.values())} tests in {sum(seconds.values()) / 60:.1f} minutes\n", *lines]


with tempfile.TemporaryDirectory() as folder:
    report = Path(folder, "report.xml")
    command = [sys.executable, "-m", "pytest", "-m", "drill", f"--junitxml={report}"]
    code = subprocess.run(command, cwd=ROOT, env=os.environ | {RECORD: "1"}).returncode
    record("pytest", "pytest -m drill", summary(report))
sys.exit(code)
