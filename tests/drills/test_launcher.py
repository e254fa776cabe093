"""Training through the real `deepspeed` launcher, with two ranks."""

import json
from pathlib import Path

import pytest

from ..testing import write_small_shards
from .harness import start


def launch(cwd: Path, *arguments: str) -> tuple[list[int | None], str]:
    """Return the launcher's exit code and output."""
    job = start(2, *arguments, cwd=cwd, launched=True)
    try:
        return job.wait(300), job.outputs()[0]
    finally:
        job.kill()


@pytest.mark.drill
def test_two_ranks_train_and_a_refusal_keeps_its_exit_code(tmp_path):
    preset = write_small_shards(tmp_path / "shards")
    arguments = ("--ds_config", "zero2.json", "--preset", str(preset), "run.dir=run")
    codes, output = launch(tmp_path, *arguments)
    assert codes == [0], output[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["ranks"] == 2
    assert summary["zero_stage"] == 2
    assert summary["selection"]

    codes, output = launch(tmp_path, *arguments)
    assert codes == [2], output[-3000:]
    assert "already holds a run" in output
