"""Whole listening tests, rated in a browser by clicks and keys."""

import json
from pathlib import Path

import pytest

from agrepa_fast.reporting.listen.results import rate

from .browser import Page, open_browser
from .listening import SCORES, make_small_test

AT = "return document.getElementById('trial').hidden ? -1 : state.at"


@pytest.fixture
def page(tmp_path):
    with open_browser(tmp_path) as opened:
        yield opened


def begin(page: Page, listener: str) -> list[str]:
    """Enter a name; returns the listener's order of trials."""
    page.type("#listener", listener)
    page.click("form button")
    return page.run("return trials.map((trial) => trial.id)")


def rate_one(page: Page, answers: dict, *, by_keys: bool) -> None:
    """Hear what is on show to its end, and answer by the scores of its systems."""
    at = page.run(AT)
    stimuli = page.run("return trials[state.at].stimuli")
    assert page.run("return [...document.querySelectorAll('.answers button')].every((button) => button.disabled)")
    for number in range(len(stimuli)):
        if by_keys:
            page.press(" " if len(stimuli) == 1 else "ab"[number])
        else:
            page.click(".players button", number)
        page.wait("return sounds[arguments[0]].heard", number)
    scores = [SCORES[answers["stimuli"][id_]["system"]] for id_ in stimuli]
    place = 5 - scores[0] if len(scores) == 1 else 0 if scores[0] > scores[1] else 2
    if by_keys:
        page.press(str(scores[0] if len(scores) == 1 else place + 1))
        page.press("\ue007")
    else:
        page.click(".answers button", place)
        page.click("#next")
    page.wait("return document.getElementById('trial').hidden || state.at === arguments[0] + 1", at)


def save(page: Page, folder: Path, name: str) -> dict:
    page.click("#save")
    path = folder / name
    page.until(path.exists)  # the browser renames it when it is whole
    return json.loads(path.read_text())


def test_a_whole_test_of_opinions(tmp_path, page):
    """Left and opened again in the middle, it goes on where it was."""
    path, answers = make_small_test(tmp_path, "mos", clips=2)
    page.open(path)
    order = begin(page, " Ann\u00a0\u200d<b> ")
    assert sorted(order) == sorted(answers["trials"])
    for number in range(len(order)):
        if number == 3:
            page.open(path)
            assert page.run(AT) == 3, "this browser keeps the answers"
            assert page.run("return trials.map((trial) => trial.id)") == order
            page.click("#back")
            assert page.run(AT) == 2
            assert page.run("return document.querySelectorAll('[aria-checked=true]').length") == 1
            page.click("#next")
        rate_one(page, answers, by_keys=number % 2 == 1)
    saved = save(page, tmp_path, "ratings-Ann-b-.json")
    assert saved["listener"] == "Ann <b>"
    assert page.run("return document.getElementById('copy').textContent").strip() == json.dumps(
        saved, indent=1, ensure_ascii=False
    )
    page.click("#another")
    other = begin(page, "Bob")
    assert other != order, "every listener has an order of his own"
    assert sorted(other) == sorted(order)
    folder = tmp_path / "ratings"
    folder.mkdir()
    (tmp_path / "ratings-Ann-b-.json").rename(folder / "ann.json")
    results = rate(folder, path.with_name("answers.json"))
    assert {one.name: one.interval.value for one in results.opinions} == SCORES
    assert page.complaints() == []
    assert page.requests() == []


@pytest.mark.drill
def test_a_whole_test_of_pairs(tmp_path, page):
    path, answers = make_small_test(tmp_path, "pairwise", clips=2)
    page.look(400, dark=True)
    page.open(path)
    order = begin(page, "Ann")
    assert page.run("return document.documentElement.scrollWidth") <= 400
    for number in range(len(order)):
        rate_one(page, answers, by_keys=number % 2 == 0)
    save(page, tmp_path, "ratings-Ann.json")
    folder = tmp_path / "ratings"
    folder.mkdir()
    (tmp_path / "ratings-Ann.json").rename(folder / "ann.json")
    results = rate(folder, path.with_name("answers.json"))
    shares = {(one.name, one.other): one.interval.value for one in results.compared}
    assert shares == {("ours", "theirs"): 1, ("ours", "truth"): 0, ("theirs", "truth"): 0, ("truth", "anchor"): 1}
    sides = [json.loads((folder / "ann.json").read_text())["ratings"][place]["stimuli"] for place in range(len(order))]
    assert {pair == sorted(pair) for pair in sides} == {True, False}, "sides are drawn, too"
    assert page.complaints() == []
    assert page.requests() == []
