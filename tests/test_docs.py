"""README.md and docs/: settings and files that they name exist, and README.md is short."""

import dataclasses
import re
from pathlib import Path

import pytest

from agrepa_fast.config import Config
from agrepa_fast.config_file import _REMOVED
from agrepa_fast.settings import setting_names

from .ranks import ROOT

PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
SECTIONS = {field.name: setting_names(field.default_factory) for field in dataclasses.fields(Config)}
FILES = ("html", "json", "jsonl", "md", "pt", "py", "safetensors", "slurm", "yaml")  # train.py is no setting


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_settings_and_files_that_exist(page):
    text = page.read_text()
    links = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert [target for target in links if target and not (page.parent / target).exists()] == []
    named = re.findall(rf"(?<![\w./-])({'|'.join(SECTIONS)})\.([a-z][a-z0-9_]*)", text)
    assert [
        f"{section}.{name}"
        for section, name in named
        if name not in (*SECTIONS[section], *FILES) and f"{section}.{name}" not in _REMOVED
    ] == []


def test_readme_is_short_and_has_the_three_uses():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 140
    assert "deepspeed agrepa_fast/train.py --ds_config zero2.json\n" in text
    assert "`python benchmarks/probe_throughput.py`" in text
    assert "from agrepa_fast import GatedDiTBlock" in text


def test_every_page_is_linked_from_readme_or_another_page():
    linked = {Path(target).name for page in PAGES for target in re.findall(r"\]\(([^)\s#]+\.md)", page.read_text())}
    assert {page.name for page in ROOT.glob("docs/*.md")} - linked == set()
