"""Files, tests and modules that the rooms' docstrings, comments and READMEs name exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pages import ROOT

ROOMS = ("policies", "probes", "proxy", "sim", "benchmarks")
FOLDERS = "|".join((*ROOMS, "tests", "docs", "examples", "deploy"))
_ENDING = r"\.(?:py|md|yaml|toml)"

_FILE = re.compile(
    rf"`(?P<code>[\w/-]+{_ENDING})(?=`|::)"  # `sim/engine.py`, `engine.py`, `test_engine.py::test_it`
    rf"|\b[Ss]ee (?P<seen>[\w/-]+{_ENDING})"
    rf"|(?<![\w./-])(?P<path>(?:{FOLDERS})/(?:[\w.-]+/)*(?:[\w.-]*\w)?)"  # wherever it stands
)
_TEST = re.compile(r"`(?P<file>[\w/]+\.py|…)::(?P<test>\w+)`")
_MODULE = re.compile(rf"python -m (?P<module>(?:{FOLDERS})(?:\.\w+)*)")

OTHERS = {"`proxy.py`": "a package on PyPI"}
"""Named like files of ours, and what they are."""


def texts() -> list[Path]:
    """What is searched."""
    found = [path for room in ROOMS for path in (ROOT / room).rglob("*") if path.suffix in (".py", ".md")]
    return sorted(path for path in found if "__pycache__" not in path.parts)


def places(path: Path) -> list[Path]:
    """Where a name in a file may count from: the root, its folder and those above it, the folders of its tests."""
    folders = [folder for folder in path.parents if folder.is_relative_to(ROOT)]
    mirrored = [ROOT / "tests" / folder.relative_to(ROOT) for folder in folders]
    return [*folders, *mirrored]


def dangling(text: str, path: Path) -> Iterator[str]:
    """What a file's text names that does not exist."""
    for named in _FILE.finditer(text):
        name = named["code"] or named["seen"] or named["path"]
        if not any((place / name).exists() for place in places(path)) and f"`{name}`" not in OTHERS:
            yield name
    file = ""
    for named in _TEST.finditer(text):
        file = file if named["file"] == "…" else named["file"]
        sources = [place / file for place in places(path) if (place / file).is_file()]
        if not any(f"def {named['test']}(" in one.read_text(encoding="utf-8") for one in sources):
            yield f"{file}::{named['test']}"
    for named in _MODULE.finditer(text):
        module = ROOT.joinpath(*named["module"].split("."))
        if not (module.with_suffix(".py").is_file() or (module / "__main__.py").is_file()):
            yield f"python -m {named['module']}"


def test_what_is_named_exists() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in texts()
        for name in dangling(path.read_text(encoding="utf-8"), path)
    ]
    assert not found


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("as of `sim/engine.py` and `engine.py`, see cluster.py, in `sim/traces/`", []),
        ("readers are in `sim/traces.py`", ["sim/traces.py"]),
        ("readers are in sim/traces.py.", ["sim/traces.py"]),
        ("see traces.py", ["traces.py"]),
        ("`nowhere.py`", ["nowhere.py"]),
        ("`test_engine.py::test_nothing`", ["test_engine.py::test_nothing"]),
        ("`test_nothing.py::test_it`", ["test_nothing.py", "test_nothing.py::test_it"]),
        ("python -m benchmarks.nothing", ["python -m benchmarks.nothing"]),
        ("python -m benchmarks.case_4_1 and python -m sim.derive", []),
        ("https://prometheus.io/docs/instrumenting/ and `tidegate.yml` of yours", []),
    ],
)
def test_what_does_not_exist_is_found(text: str, missing: list[str]) -> None:
    assert list(dangling(text, ROOT / "sim" / "workload.py")) == missing
