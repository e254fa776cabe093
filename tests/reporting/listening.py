"""Recordings, tests and ratings that tests of listening share."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import soundfile

from agrepa_fast.reporting.listen.build import make_test

RATE = 16000
SCORES = {"ours": 4, "theirs": 2, "truth": 5, "anchor": 1}


def write_recordings(folder: Path, clips: list[str], level: float = 0.1, seconds: float = 0.45) -> Path:
    """Noise, another in each folder and clip."""
    folder.mkdir(parents=True)
    for clip in clips:
        noise = np.random.default_rng([*f"{folder.name} {clip}".encode()]).normal(0, level, int(RATE * seconds))
        soundfile.write(folder / f"{clip}.wav", noise.astype(np.float32), RATE, subtype="FLOAT")
    return folder


def write_evaluation(folder: Path, name: str, clips: list[str]) -> Path:
    """A run with what a listening test reads of an evaluation. Truths are the same in all of them."""
    evaluated = folder / name / ("evaluate" if name == "bb" else "evaluate-step00000005")
    write_recordings(evaluated / "wavs" / "truth", clips)
    write_recordings(evaluated / "wavs" / "sample", [*clips, f"{clips[0]}~2"], level=0.01 * len(name))
    (folder / name / "config.yaml").touch()
    (evaluated / "results.json").write_text("{}")
    rows = [f"sample,{'speech' if number % 2 else 'audio'},{clip},0" for number, clip in enumerate(clips)]
    (evaluated / "clips.csv").write_text("\n".join(["row,domain,key,draw", *rows]))
    return folder / name


def make_small_test(folder: Path, kind: str = "mos", clips: int = 3, seed: int = 0) -> tuple[Path, dict]:
    """A page of the systems ours and theirs, and the content of answers.json."""
    names = [f"clip{number}" for number in range(clips)]
    systems = [write_recordings(folder / name, names) for name in ("ours", "theirs", "truth")]
    make_test(systems[:2], folder / "page", kind, seed, clips, truth=systems[2])
    return folder / "page" / "listen.html", json.loads((folder / "page" / "answers.json").read_text())


def write_ratings(
    path: Path,
    answers: dict,
    listener: str,
    score: Callable[[str, str], float],
    changes: Mapping = MappingProxyType({}),
) -> Path:
    """The file of a listener who gives score(clip, system) to a clip, or prefers what has the higher one."""
    ratings = []
    for trial, stimuli in answers["trials"].items():
        given = [score(one["clip"], one["system"]) for one in (answers["stimuli"][id_] for id_ in stimuli)]
        if answers["kind"] == "mos":
            answer = int(given[0])
        else:
            answer = "same" if given[0] == given[1] else stimuli[int(given[1] > given[0])]
        ratings.append({"trial": trial, "answer": answer})
    content = {"format": "agrepa ratings 1", "test": answers["test"], "listener": listener, "ratings": ratings}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content | {**changes}))
    return path


def by_system(clip: str, system: str) -> float:
    return SCORES[system]
