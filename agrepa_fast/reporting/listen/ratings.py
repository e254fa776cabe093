"""Listeners' answers, read and checked against answers.json."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import UserError
from ...files import read_json
from .build import FORMAT, KINDS, rated_pairs
from .material import ANCHOR, TRUTH

RATINGS_FORMAT = "agrepa ratings 1"  # as listen.js writes it
_SAME = "same"


class Test(NamedTuple):
    """The systems behind the clips of a page. trials: id -> its stimuli; stimuli: id -> (clip, system, truth or
    anchor); clips: clip -> domain."""

    id: str
    kind: str
    systems: list[str]
    clips: dict[str, str]
    stimuli: dict[str, tuple[str, str]]
    trials: dict[str, list[str]]

    @property
    def conditions(self) -> list[str]:
        return [*self.systems, TRUTH, ANCHOR]


class Listener(NamedTuple):
    """answers: trial -> a score of 1 to 5, or the id of the better stimulus, or "same"."""

    name: str
    answers: dict[str, int | str]


def read_answers(path: Path) -> Test:
    """Return the test of an answers.json. Raises UserError for any other file."""
    values = _read_object(path)
    try:
        if values["format"] != FORMAT or values["kind"] not in KINDS:
            raise ValueError(f"format {values['format']!r}")
        stimuli = {id_: (one["clip"], one["system"]) for id_, one in values["stimuli"].items()}
        known = {(clip, name) for clip in values["clips"] for name in (*values["systems"], TRUTH, ANCHOR)}
        rated = [tuple(sorted(trial)) for trial in values["trials"].values()]
        if (
            set(stimuli.values()) != known
            or any(not isinstance(domain, str) for domain in values["clips"].values())
            or sorted(rated) != sorted(_expected(values["kind"], stimuli, [*values["systems"]]))
        ):
            raise ValueError("its clips and trials do not belong together")
        return Test(values["test"], values["kind"], [*values["systems"]], values["clips"], stimuli, values["trials"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is no answers.json of agrepa listen ({type(error).__name__}: {error})") from error


def _expected(kind: str, stimuli: dict[str, tuple[str, str]], systems: list[str]) -> list[tuple[str, ...]]:
    """Return the ids of each trial that a test has, as build.py makes them."""
    if kind == "mos":
        return [(id_,) for id_ in stimuli]
    ids = {stimulus: id_ for id_, stimulus in stimuli.items()}
    clips = {clip for clip, _ in stimuli.values()}
    return [tuple(sorted((ids[clip, one], ids[clip, other]))) for clip in clips for one, other in rated_pairs(systems)]


def read_ratings(folder: Path, test: Test) -> list[Listener]:
    """Return the listeners whose files lie in a folder, by name. Raises UserError if a file is damaged or incomplete or
    of another test, or if two are of one listener."""
    if not folder.is_dir():
        raise UserError(f"--ratings {folder} is no folder")
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise UserError(f"--ratings {folder} holds no ratings (.json)")
    found: dict[str, Path] = {}
    listeners = []
    for path in paths:
        listener = _read_listener(path, test)
        if (first := found.setdefault(listener.name.casefold(), path)) != path:
            raise UserError(f"{first} and {path} are both of the listener {listener.name!r}: keep one of them")
        listeners.append(listener)
    return sorted(listeners)


def _read_object(path: Path) -> dict:
    values = read_json(path, "ask for it again")
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it holds no object")
    return values


def _read_listener(path: Path, test: Test) -> Listener:
    values = _read_object(path)
    if values.get("format") != RATINGS_FORMAT:
        raise UserError(f"{path} holds no ratings of a listening test")
    if values.get("test") != test.id:
        raise UserError(f"{path} rates another test ({values.get('test')!r}, not {test.id!r}): move it away")
    try:
        name = values["listener"].strip()
        answers = {rating["trial"]: rating["answer"] for rating in values["ratings"]}
        twice = len(answers) < len(values["ratings"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if twice or not name or not name.isprintable():  # names go to the terminal
        raise UserError(f"{path} is damaged: {'a trial is rated twice' if twice else f'{name!r} is no name'}")
    if answers.keys() != test.trials.keys():
        rated = len(answers.keys() & test.trials.keys())
        raise UserError(f"{path} rates {rated} of {len(test.trials)} trials: let the listener end the test")
    for trial, answer in answers.items():
        allowed: Sequence = range(1, 6) if test.kind == "mos" else (*test.trials[trial], _SAME)
        if isinstance(answer, bool) or answer not in allowed:
            raise UserError(f"{path} is damaged: {answer!r} is no answer to trial {trial}")
    return Listener(name, answers)


def scores(test: Test, listeners: Sequence[Listener]) -> dict[str, np.ndarray]:
    """Return condition -> scores of 1 to 5, (listeners, clips), of a mos test."""
    trial_of = {test.stimuli[stimuli[0]]: trial for trial, stimuli in test.trials.items()}
    return {
        name: np.array([[one.answers[trial_of[clip, name]] for clip in test.clips] for one in listeners], float)
        for name in test.conditions
    }


def preferences(test: Test, listeners: Sequence[Listener]) -> dict[tuple[str, str], np.ndarray]:
    """Return (one, other) -> 1 where one is preferred, 0 where the other is, 0.5 for no difference, (listeners, clips),
    of a pairwise test. Each pair stands once, in the order of the conditions."""
    tables: dict[tuple[str, str], np.ndarray] = {}
    column = {clip: place for place, clip in enumerate(test.clips)}
    for trial, pair in test.trials.items():
        one, other = sorted(pair, key=lambda id_: test.conditions.index(test.stimuli[id_][1]))
        clip, names = test.stimuli[one][0], (test.stimuli[one][1], test.stimuli[other][1])
        table = tables.setdefault(names, np.full((len(listeners), len(column)), np.nan))
        value = {one: 1.0, other: 0.0, _SAME: 0.5}
        table[:, column[clip]] = [value[listener.answers[trial]] for listener in listeners]
    return tables
