"""What the commands share: their common options, how they fail, and how they find configuration and ledger."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, NoReturn

import typer

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from proxy.config import Config

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


def fail(message: str, status: int = 2) -> NoReturn:
    """Say what is wrong, and end."""
    typer.echo(f"tidegate: {message}", err=True)
    raise typer.Exit(status)


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


def ledger_place(config: Path | None, state: Path | None) -> Place:
    """From the configuration, or from `--state` alone."""
    path = config_path(config)
    if path is None or state is not None:
        return Place(state or Path("tidegate-data"))
    loaded = load(path, "--state DIRECTORY")
    return Place(loaded.state, loaded.database, loaded.ledger_currency, loaded.budget_zone)


def open_ledger(config: Path | None, state: Path | None, *, create: bool = False) -> tuple[Engine, Place]:
    """The ledger's database and its place, for commands that read or write it."""
    from proxy.database import open_database

    place = ledger_place(config, state)
    directory = place.directory
    if not create and place.database is None and not (directory / "tidegate.db").exists():
        fail(
            f"there is no ledger in {directory}: name its configuration (--config) or its directory (--state)"
        )
    with readable_errors():
        return open_database(place.database or directory, check=False), place
