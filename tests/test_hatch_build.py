"""What `hatch_build.py` makes of the sources before they are compiled."""

from __future__ import annotations

import ast
import inspect
import tomllib
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hatch_build import bases_in, with_constructors

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
MODULES: list[str] = SETTINGS["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"]["custom"]["modules"]
SOURCES = {path: (ROOT / path).read_text() for path in MODULES}
BASES = bases_in(SOURCES.values())


def rewritten(path: str) -> tuple[ModuleType, dict[str, Any]]:
    """A module, and the names of its rewritten self."""
    module = import_module(path.removesuffix(".py").replace("/", "."))
    names = {"__name__": module.__name__}
    exec(compile(with_constructors(SOURCES[path], BASES), path, "exec"), names)
    return module, names


@pytest.mark.parametrize("path", MODULES)
def test_written_out_constructors_take_and_set_what_those_of_the_decorator_do(path: str) -> None:
    module, names = rewritten(path)
    for name, original in vars(module).items():
        if not (
            isinstance(original, type) and is_dataclass(original) and original.__module__ == module.__name__
        ):
            continue
        copy = names[name]
        if inspect.getsourcefile(copy.__init__) != path:
            continue  # the decorator's own
        written, made = (inspect.signature(kind.__init__).parameters for kind in (copy, original))
        assert list(written) == list(made)
        required = {key: object() for key, value in made.items() if value.default is inspect.Parameter.empty}
        del required["self"]
        ours, theirs = copy(**required), original(**required)
        for field in fields(original):
            value, expected = getattr(ours, field.name), getattr(theirs, field.name)
            assert repr(value) == repr(expected), field.name


@pytest.mark.parametrize("path", MODULES)
def test_no_line_moves(path: str) -> None:
    before, after = SOURCES[path].splitlines(), with_constructors(SOURCES[path], BASES).splitlines()
    assert len(before) == len(after)
    assert all(new == old for old, new in zip(before, after, strict=True) if old)


def test_the_hot_ones_are_written_out() -> None:
    for path, names in {
        "proxy/records.py": ["Row"],
        "policies/values.py": ["RequestFacts", "Send", "Finished"],
        "policies/routing.py": ["Routing"],
        "proxy/http1.py": ["RequestHead", "ResponseHead"],
    }.items():
        for name in names:
            _, module = rewritten(path)
            assert inspect.getsourcefile(module[name].__init__) == path, name  # the decorator's has none


def test_a_field_it_does_not_know_stops_it() -> None:
    source = '@dataclass\nclass A:\n    """x"""\n\n    a: int = field(repr=False)\n'
    assert with_constructors(source, ()) == source  # without parentheses: not one of ours
    with pytest.raises(AssertionError, match="line 5"):
        with_constructors(source.replace("@dataclass\n", "@dataclass()\n"), ())


@pytest.mark.parametrize("path", MODULES)
def test_constant_tuples_of_floats_say_so(path: str) -> None:
    """What mypyc infers for them raises NameError when it is used: `Final[tuple[float, ...]]` does not."""
    for node in ast.parse(SOURCES[path]).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "Final":
            values = node.value.elts if isinstance(node.value, ast.Tuple) else []
            floats = [one for one in values if isinstance(one, ast.Constant) and type(one.value) is float]
            assert not floats, f"{path}:{node.lineno}"
