"""How the commands of this room fail: one line on standard error, then the exit status."""

from __future__ import annotations

from typing import NoReturn

import typer


def fail(message: str, status: int = 2) -> NoReturn:
    """Say what is wrong, and end."""
    typer.echo(f"tidegate: {message}", err=True)
    raise typer.Exit(status)


def error_text(error: Exception) -> str:
    """What is wrong, as in `plan.yaml: no such file or directory`."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror[:1].lower()}{error.strerror[1:]}"
    if isinstance(error, UnicodeDecodeError):
        return "the file is not UTF-8 text"
    return str(error)
