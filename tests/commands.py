"""The command line as data: every command with its options, as typer knows them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import typer

from proxy import cli


@dataclass(frozen=True, slots=True)
class Option:
    """One option or argument."""

    names: tuple[str, ...]
    """`--config`, `-c`; or `FILE` for an argument."""
    default: str
    required: bool
    help: str


@dataclass(frozen=True, slots=True)
class Command:
    """One command."""

    name: str
    """`serve`, `keys create`."""
    help: str
    options: tuple[Option, ...]

    @property
    def names(self) -> set[str]:
        """Names of its options."""
        return {name for option in self.options for name in option.names}


def commands() -> list[Command]:
    """All commands, those included that are only imported when they are called."""
    elsewhere = typer.Typer()
    elsewhere.callback()(lambda: None)
    for name in cli._ELSEWHERE:
        cli.register(elsewhere, name)
    return [*_walk(typer.main.get_command(cli.app), ""), *_walk(typer.main.get_command(elsewhere), "")]


def _walk(group: Any, prefix: str) -> Iterator[Command]:
    for name, command in group.commands.items():
        full = f"{prefix}{name}"
        if hasattr(command, "commands"):
            yield from _walk(command, f"{full} ")
        else:
            yield Command(full, command.help or "", tuple(map(_option, command.params)))


def _option(parameter: Any) -> Option:
    default = getattr(parameter.default, "value", parameter.default)  # an Enum's
    shown = (
        ""
        if default is None or default == ""
        else f"`{default:g}`"
        if isinstance(default, float)
        else f"`{default}`"
    )
    if parameter.param_type_name == "argument":
        names = (parameter.name.upper(),)
    else:
        names = (*parameter.opts, *parameter.secondary_opts)
    return Option(names, "off" if default is False else shown, parameter.required, parameter.help or "")
