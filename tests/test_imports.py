"""The tree of docs/architecture.md: imports run one way, and files stay small."""

import ast
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from .ranks import ROOT

PACKAGE = "agrepa_fast"
FLOORS = (  # from top to bottom: a room imports from those below it; every other module stands on the ground floor
    *("cli", "train", "reporting", "evaluation", "training", "checkpoints", "zero", "probing", "alignment"),
    *("attribution", "prepare", "corpora", "tokenizers", "teachers", "audio", "data", "flow", "models"),
)


def modules() -> dict[str, Path]:
    """Every module of the package by its name; kernels/ stands beside the package and is imported as its part."""
    found = {}
    for folder, name in ((ROOT / PACKAGE, PACKAGE), (ROOT / "kernels", f"{PACKAGE}.kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((name, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imported(name: str) -> Iterator[tuple[str, int]]:
    """The package's modules that a module imports, anywhere in its file, with the line."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            wanted = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in wanted:
            while target and target not in MODULES:
                target = target.rpartition(".")[0]
            if target and target != name:
                yield target, node.lineno


def room(name: str) -> str:
    """The first part of a module's name below the package."""
    return name.split(".")[1] if "." in name else ""


def floor(name: str) -> int:
    """How high a module stands: kernels at the bottom, then the ground floor, then the rooms."""
    if room(name) == "kernels":
        return -1
    return len(FLOORS) - FLOORS.index(room(name)) if room(name) in FLOORS else 0


def test_every_room_has_a_floor_and_is_in_the_picture():
    folders = {path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py")}
    assert folders - set(FLOORS) == set()
    rooms = runpy.run_path(str(ROOT / "docs/figures.py"))["ROOMS"]
    assert list(rooms) == [*FLOORS, "ground floor", "kernels"]


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {PACKAGE}))
def test_imports_go_down(name):
    upward = [f"line {line}: {target}" for target, line in imported(name) if floor(target) > floor(name)]
    whole = [f"line {line}: {target}" for target, line in imported(name) if target == PACKAGE]
    assert upward + whole == []


def test_kernels_import_nothing_of_the_package():
    names = [name for name in MODULES if room(name) == "kernels"]
    assert len(names) > 8
    assert [(name, target) for name in names for target, _ in imported(name) if room(target) != "kernels"] == []


def test_zero_alone_knows_deepspeed_s_insides():
    """Elsewhere nothing imports deepspeed, or reads a private attribute of an engine or of a partitioned parameter."""
    found = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())) if room(name) != "zero" else ():
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            inside = any(name.split(".")[0] == "deepspeed" for name in names)
            if isinstance(node, ast.Attribute):
                owner = ast.unparse(node.value).rpartition(".")[2]
                private = node.attr[0] == "_" and owner in ("engine", "optimizer")
                inside = private or (node.attr.startswith("ds_") and node.attr != "ds_config")
            if inside:
                found.append(f"{name}, line {node.lineno}: {ast.unparse(node)}")
    assert found == []


def test_no_module_imports_itself_through_others():
    graph = {name: {target for target, _ in imported(name)} for name in MODULES}
    while leaves := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert graph == {}, "a circle is among these"


def test_files_stay_small():
    """Tests and benchmarks, too. Half of the package's files are below 200 lines."""
    folders = (PACKAGE, "kernels", "benchmarks", "tests", "examples")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    assert {path: count for path, count in lines.items() if count > 400} == {}
    ours = sorted(count for path, count in lines.items() if path.startswith(PACKAGE))
    assert ours[len(ours) // 2] < 200
    assert lines[f"{PACKAGE}/train.py"] < 130
