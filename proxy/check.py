"""`tidegate check`: is a file right, and what does it do?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from policies.explain import explain_policy
from policies.filechecks import KnownNames
from policies.files import read_policy
from policies.units import BadValueError
from policies.yamlfile import FileProblems, Problem, parse_yaml
from proxy.build import load_policy, make_backends
from proxy.config import Config, backend_key, load_config


@dataclass(slots=True)
class Report:
    """What a check found."""

    file: str
    kind: str
    """`policy` or `configuration`."""
    ok: bool
    text: str
    """For people: the file in plain words, or what is wrong with it."""
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "kind": self.kind,
            "ok": self.ok,
            "problems": [problem._asdict() for problem in self.problems],
            "warnings": [problem._asdict() for problem in self.warnings],
        }


def check_file(file: Path, config_path: Path | None) -> Report:
    """Check a policy file or a configuration, told apart by their keys."""
    kind = "policy"
    try:
        text = file.read_text(encoding="utf-8")
        if _is_configuration(text, str(file)):
            kind = "configuration"
            return _check_configuration(file)
        known = None
        if config_path is not None and config_path.resolve() != file.resolve():
            config = load_config(config_path)
            known = KnownNames(make_backends(config), frozenset(config.sites))
        compiled = read_policy(text, str(file), known)
    except FileProblems as error:
        return Report(str(file), kind, False, str(error), error.problems)
    except (OSError, ValueError) as error:  # not readable, not UTF-8, or no such policy in the library
        return Report(str(file), kind, False, f"{file}: {error}")
    warnings = "".join(f"warning: {file}:{w.line}:{w.column}: {w.message}\n" for w in compiled.warnings)
    return Report(str(file), kind, True, warnings + explain_policy(compiled).rstrip(), [], compiled.warnings)


def _is_configuration(text: str, name: str) -> bool:
    """A configuration has backends or addresses, a policy file has rules."""
    tops = set(parse_yaml(text, name).value)
    return "rules" not in tops and bool(tops & set(Config.model_fields))


def _check_configuration(file: Path) -> Report:
    config = load_config(file)
    lines = [f"{file}: {len(config.backends)} backends; API on {config.listen}, admin on {config.admin}."]
    warnings: list[Problem] = []
    for section in config.backends:
        try:
            backend_key(section)
        except BadValueError as error:
            lines.append(f"warning: {error.message}")
    for backend in make_backends(config):
        classes = (
            "all data classes" if backend.data_classes is None else ", ".join(sorted(backend.data_classes))
        )
        priced = (
            "no price" if backend.price_input is None else f"{backend.price_input:g}/{backend.price_output:g}"
        )
        lines.append(f"  {backend.name} at {backend.site}: may see {classes or 'nothing'}; {priced}")
    compiled = load_policy(config, make_backends(config), 0)
    warnings = compiled.warnings
    lines += [f"warning: {compiled.name}:{w.line}:{w.column}: {w.message}" for w in warnings]
    return Report(
        str(file),
        "configuration",
        True,
        "\n".join([*lines, "", explain_policy(compiled).rstrip()]),
        [],
        warnings,
    )
