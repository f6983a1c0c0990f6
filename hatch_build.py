"""Compiles the data path when a wheel is built: the same modules, type annotations and all, as C (mypyc).

It halves the CPU that a request costs and needs a C compiler and Python's headers. Where those are missing the
wheel is pure Python and does the same, and so it is where compiling fails. `TIDEGATE_COMPILE=1` makes that an
error, `TIDEGATE_COMPILE=0` asks for it. `MYPYC_OPT_LEVEL=0` compiles sooner what then runs slower.
Editable installs are never compiled.

Where mypyc is not Python, and `make test-compiled` is what finds it: a slice of bytes that ends before it begins
raises, the bounds of a slice may be evaluated twice, `Final` values can't be replaced, and attributes take nothing
but their type.
"""

from __future__ import annotations

import ast
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompileHook(BuildHookInterface[Any]):
    """Adds the compiled modules to a wheel."""

    def dependencies(self) -> list[str]:
        """What the build environment needs besides: nothing for a build in pure Python."""
        return ["mypy>=1.15", "setuptools"] if self._wanted() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile into a folder of its own and have the results put beside the sources."""
        if version == "editable" or not self._wanted():
            return
        self._folder = tempfile.TemporaryDirectory(prefix="tidegate-build-")  # as long as this object
        try:
            compiled = _compile(Path(self.root), self.config["modules"], Path(self._folder.name))
        except (Exception, SystemExit) as error:  # mypyc exits where it finds a mistake
            if os.environ.get("TIDEGATE_COMPILE") == "1":
                raise
            self.app.display_warning(f"not compiled, and so slower: {error}")
            return
        build_data["force_include"].update(compiled)
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def _wanted(self) -> bool:
        asked = os.environ.get("TIDEGATE_COMPILE", "")
        if asked not in ("", "0", "1"):
            raise SystemExit(
                f"TIDEGATE_COMPILE is 1 (compile), 0 (don't) or empty (if possible), not {asked!r}"
            )
        missing = _missing()
        if asked == "1" and missing:
            raise SystemExit(f"TIDEGATE_COMPILE=1, but this machine has no {missing}")
        return asked != "0" and not missing


def _missing() -> str:
    """What compiling needs and this machine lacks; empty: nothing."""
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        return f"C compiler ({compiler})"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return "" if header.exists() else f"Python headers ({header}; on Debian and Ubuntu: python3-dev)"


def _compile(root: Path, modules: list[str], target: Path) -> dict[str, str]:
    """-> compiled files by path, each with its place in the wheel. Raises on a module that cannot be compiled."""
    from mypyc.build import mypycify
    from setuptools import Distribution

    source = target / "source"
    for package in root.glob("*/__init__.py"):
        shutil.copytree(package.parent, source / package.parent.name)
    texts = {source / module: (source / module).read_text() for module in modules}
    for path, text in texts.items():
        path.write_text(with_constructors(text, bases_in(texts.values())))
    here = Path.cwd()
    # mypy resolves imports by the working directory; its own settings are for checking, not for this.
    os.chdir(source)
    sys.path.insert(0, str(source))
    try:
        settings = ["--config-file=", "--ignore-missing-imports", "--follow-imports=silent"]
        extensions = mypycify(
            [*settings, *modules],
            opt_level=os.environ.get("MYPYC_OPT_LEVEL", "3"),
            debug_level="0",
            multi_file=True,
            target_dir=str(target / "c"),
            group_name="tidegate",
        )
        command = Distribution({"name": "tidegate", "ext_modules": extensions}).get_command_obj("build_ext")
        command.build_lib, command.build_temp = str(target / "lib"), str(target / "temp")
        command.ensure_finalized()
        command.run()
    finally:
        os.chdir(here)
        sys.path.remove(str(source))
    built = target / "lib"
    return {str(path): str(path.relative_to(built)) for path in built.rglob("*") if path.is_file()}


def bases_in(sources: Iterable[str]) -> set[str]:
    """Names of the classes that others in these modules inherit from."""
    nodes = [
        node for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)
    ]
    return {ast.unparse(base) for node in nodes for base in node.bases}


def with_constructors(source: str, bases: Collection[str]) -> str:
    """A module whose dataclasses have the `__init__` written out that the decorator would make at run time.

    mypyc compiles what stands in the source: the decorator's is interpreted, and five times as slow. Each stands on
    one line, the empty one behind the docstring, so that line numbers in tracebacks stay true. Classes without such
    a line keep the decorator's, and so do those where it is more than assignments (frozen, with `__post_init__`) or
    has to do with inheritance (`bases`: the names of those that others inherit from).
    """
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name not in bases and _is_plain_dataclass(node):
            free = node.body[0].end_lineno or 0
            if ast.get_docstring(node) and not lines[free].strip():
                lines[free] = f"    {_constructor(node)}\n"
    return "".join(lines)


def _is_plain_dataclass(node: ast.ClassDef) -> bool:
    if node.bases or any(
        isinstance(part, ast.FunctionDef) and part.name == "__post_init__" for part in node.body
    ):
        return False
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "dataclass":
            return not {option.arg for option in decorator.keywords} & {"frozen", "init", "kw_only"}
    return False


def _constructor(node: ast.ClassDef) -> str:
    parameters, statements = ["self"], []
    for field in node.body:
        if not isinstance(field, ast.AnnAssign):
            continue
        name, kind = ast.unparse(field.target), ast.unparse(field.annotation)
        value = name
        if field.value is None:
            parameters.append(f"{name}: {kind}")
        elif isinstance(field.value, ast.Call) and ast.unparse(field.value.func) == "field":
            (option,) = field.value.keywords
            assert option.arg == "default_factory", f"line {field.lineno}: unknown here, see hatch_build.py"
            parameters.append(f"{name}: {kind} | None = None")
            value = f"{ast.unparse(option.value)}() if {name} is None else {name}"
        else:
            parameters.append(f"{name}: {kind} = {ast.unparse(field.value)}")
        statements.append(f"self.{name} = {value}")
    return f"def __init__({', '.join(parameters)}) -> None: {'; '.join(statements)}"
