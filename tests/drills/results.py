"""Write tests/drills/results.md: one short section per drill."""

import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import date
from pathlib import Path

import torch

from ..ranks import ROOT

FILE = Path(__file__).with_name("results.md")
RECORD = "AGREPA_RECORD_DRILLS"  # a variable of the environment: if it is set, tests write their summaries, too


def record(title: str, command: str, lines: Iterable[str], file: Path = FILE) -> None:
    """Replace the section `title` by `lines`, or append it, below its command, machine, commit and date."""
    facts = f"`{command}` · {_machine()} · torch {torch.__version__} · commit {_commit()} · {date.today()}"
    section = "\n".join([f"## {title}\n", facts, "", *lines]) + "\n"
    head, *sections = file.read_text().split("\n## ") if file.is_file() else ["# Results of the drills\n"]
    by_title = {text.partition("\n")[0]: f"## {text.rstrip()}\n" for text in sections}
    by_title[title] = section
    file.write_text("\n".join([head.rstrip() + "\n", *by_title.values()]))


def _machine() -> str:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    model = models[0].partition(":")[2].strip() if models else platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def _commit() -> str:
    """The commit, marked if code, not results, differs from it."""
    head, changed = (
        subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "agrepa_fast", "kernels", "csrc"])
    )
    return head + "-dirty" * bool(changed)
