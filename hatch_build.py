"""Compiles the data path when a wheel is built: the same modules, type annotations and all, as C (mypyc).

It halves the CPU that a request costs and needs a C compiler and Python's headers. Where those are missing the
wheel is pure Python and does the same, and so it is where compiling fails. `TIDEGATE_COMPILE=1` makes that an
error, `TIDEGATE_COMPILE=0` asks for it. Editable installs are never compiled.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import tempfile
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

    here = Path.cwd()
    # mypy resolves imports by the working directory; its own settings are for checking, not for this.
    os.chdir(root)
    sys.path.insert(0, str(root))
    try:
        settings = ["--config-file=", "--ignore-missing-imports", "--follow-imports=silent"]
        extensions = mypycify(
            [*settings, *modules],
            opt_level="3",
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
        sys.path.remove(str(root))
    built = target / "lib"
    return {str(path): str(path.relative_to(built)) for path in built.rglob("*") if path.is_file()}
