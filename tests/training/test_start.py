"""train.start_from: what a resume makes of it."""

import pytest

from agrepa_fast.config_file import load_config, save_config
from agrepa_fast.training import start

RUN = "runs/warm/checkpoints/step00000003"  # as stored: of a command that said runs/warm


@pytest.mark.parametrize(
    ("stored", "given", "same"),
    [
        (RUN, "runs/warm", True),
        (RUN, "runs/warm/", True),
        (RUN, "{here}/runs/../runs/warm", True),
        ("{here}/" + RUN, "runs/warm", True),
        ("{here}/" + RUN, "~/runs/warm", True),
        (RUN, "link", True),  # to runs/warm
        (RUN, "runs/warm/checkpoints/latest", True),
        (RUN, RUN + "/", True),
        (RUN, "runs/warm/checkpoints/step00000006", False),
        (RUN, "runs", False),
        (RUN, "runs/other", False),
        (RUN, "null", False),
        ("null", "runs/warm", False),
        ("checkpoints/step00000003", ".", True),
        ("theirs.pt", "{here}/theirs.pt", True),
        ("theirs.pt", "ours.pt", False),
        ("theirs.pt", "latest", False),
        ("1e5/checkpoints/step00000003", "1e5", True),  # names, not numbers
        ("1e5/checkpoints/step00000003", "100000", False),
        ("exported", "./exported", True),
    ],
)
def test_a_resume_takes_the_start_that_its_run_was_begun_with(stored, given, same, tmp_path, monkeypatch):
    monkeypatch.setattr(start, "from_rank_0", lambda find: find())
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("runs/warm")  # nothing is there any more
    stored, given = (f"train.start_from={text.format(here=tmp_path)}" for text in (stored, given))
    save_config(load_config("demo", [stored]), tmp_path / "config.yaml")
    config = load_config("demo", [given, "train.steps=7000"])
    wanted = load_config("demo", [stored, "train.steps=7000"]) if same else config
    assert start.keep_start(config, tmp_path) == wanted
