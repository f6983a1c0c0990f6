"""What the commands share: their common options, how they fail, and how they find configuration and ledger."""

from __future__ import annotations

import getpass
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from sqlalchemy import Engine

    from proxy.config import Config

UNBOUNDED = 10_000
"""Columns, where nobody says how many there are."""
CONTEXT = {"help_option_names": ["-h", "--help"]}
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="Configuration file. Default: tidegate.yaml, if it is there.", dir_okay=False
    ),
]
StateOption = Annotated[
    Path | None, typer.Option("--state", help="State directory. The configuration file is then not read.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
ByOption = Annotated[
    str | None, typer.Option("--by", help="Who decides. Default: the user of this terminal.")
]


def fail(message: str, status: int = 2) -> NoReturn:
    """Say what is wrong, and end."""
    typer.echo(f"tidegate: {message}", err=True)
    raise typer.Exit(status)


def person(by: str | None) -> str:
    """Who decides: whoever --by names, else the user of this terminal."""
    if by is not None:
        return by
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no such user, as in some containers
        return "admin"


@contextmanager
def readable_errors() -> Iterator[None]:
    """Report what a person can mend (a locked database, a full disk) in one line, with exit status 2."""
    from proxy.readable import READABLE_ERRORS, in_words

    try:
        yield
    except BrokenPipeError:
        raise  # whoever read our output has left, as `head` does: typer ends quietly
    except READABLE_ERRORS as error:
        fail(in_words(error))


def console() -> Console:
    """Standard output for tables: as wide as the terminal or `COLUMNS`; into a pipe or file as wide as it gets."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal or "COLUMNS" in os.environ else Console(width=UNBOUNDED)


def config_path(config: Path | None) -> Path | None:
    if config is not None:
        return config
    default = Path("tidegate.yaml")
    return default if default.is_file() else None


def load(path: Path, instead: str = "") -> Config:
    """The configuration in a file; `instead`: what to give where it cannot be read. Ends with exit status 2."""
    from policies.yamlfile import FileProblems
    from proxy.config import load_config
    from proxy.readable import in_words

    try:
        return load_config(path)
    except FileProblems as error:
        fail(f"{path} cannot be used{instead and f' ({instead} needs no file)'}:\n{error}")
    except OSError as error:
        fail(in_words(error))


class Place(NamedTuple):
    """Where a ledger is, and how its money is counted."""

    directory: Path
    """Of the state."""
    database: str | None = None
    """Its URL, if it is elsewhere."""
    currency: str = ""
    """Empty: no configuration says it."""
    budget_zone: str = "UTC"
    configured: bool = False
    """Whether a configuration without mistakes says all this."""


def ledger_place(config: Path | None, state: Path | None) -> Place:
    """From the configuration, or from `--state` alone."""
    from proxy.ask import DEFAULT_STATE

    path = config_path(config)
    if path is None or state is not None:
        return Place(state or DEFAULT_STATE)
    loaded = load(path, "--state DIRECTORY")
    return Place(loaded.state, loaded.database, loaded.ledger_currency, loaded.budget_zone, True)


def open_ledger(config: Path | None, state: Path | None, *, create: bool = False) -> tuple[Engine, Place]:
    """The ledger's database and its place, for commands that read or write it.

    A mistake in the file keeps nobody from revoking a key: of a broken one, `state` and `database` are read. Only
    who may `create` a ledger needs a whole one.
    """
    from proxy.database import open_database
    from proxy.disk_room import told_if_full
    from proxy.ledger_note import noted_database

    path = config_path(config) if state is None and not create else None
    place = (_place_in_broken(path) if path is not None else None) or ledger_place(config, state)
    directory = place.directory
    if place.database is None:
        if not place.configured and (noted := noted_database(directory)):
            fail(
                f"the proxy on {directory} has its ledger in {noted}: give its configuration instead (--config "
                "FILE, without --state); `list`, `revoke`, `usage` and `export` need only its `database: URL`, "
                "whatever else is wrong in it"
            )
        if not create and not (directory / "tidegate.db").exists():
            fail(
                f"there is no ledger in {directory}: name its configuration (--config) or its directory (--state)"
            )
    with readable_errors(), told_if_full(directory):
        return open_database(place.database or directory, check=False), place


def _place_in_broken(path: Path) -> Place | None:
    """What a file with mistakes says of the ledger's place; None: it has no mistakes, or cannot be read."""
    text = text_of_broken(path)
    if text is None:
        return None
    said = (
        f"note: {path} cannot be used as it is: only its `state` and `database` are read (`tidegate check`)"
    )
    typer.echo(said, err=True)
    return Place(state_in_broken(path, text), written_in(text, "database"))


def text_of_broken(path: Path) -> str | None:
    """The text of a configuration with mistakes; None: it has no mistakes, or cannot be read."""
    from policies.yamlfile import FileProblems
    from proxy.config import load_config

    try:
        load_config(path)
    except OSError:
        return None
    except FileProblems:
        return path.read_text(encoding="utf-8", errors="replace")
    return None


def state_in_broken(path: Path, text: str) -> Path:
    """The state directory that a configuration with mistakes means."""
    from proxy.ask import DEFAULT_STATE

    return path.parent / (written_in(text, "state") or DEFAULT_STATE)


def written_in(text: str, key: str) -> str | None:
    """The value of a key at the left margin, also of a file that is not YAML as a whole; None: it is not there."""
    plain, quoted = r"""[^\s"'#](?:[^\n#]|(?<=\S)#)*""", r""""[^"\n]*"|'[^'\n]*'"""
    found = re.search(rf"^{key}: *({quoted}|{plain})", text, re.MULTILINE)
    return found[1].strip().strip("\"'") or None if found else None
