"""The command `tidegate replay`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def replay(
    file: Annotated[Path, typer.Argument(help="An event log, as `tidegate serve --record` writes it.")],
) -> None:
    """Let the simulator decide again over what a proxy has seen, and compare every decision.

    Example: tidegate replay events.jsonl
    """
    from rich.console import Console
    from rich.progress import Progress

    from policies.yamlfile import FileProblems
    from sim.replay import BadLogError, compare, read_log

    try:
        records = read_log(file)
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("replaying", total=len(records))
            found = compare(records, lambda done: bar.update(task, completed=done))
    except (BadLogError, FileProblems) as error:
        typer.echo(f"{file} cannot be replayed: {error}", err=True)
        raise typer.Exit(2) from error
    except OSError as error:
        typer.echo(f"{file}: {(error.strerror or str(error)).lower()}", err=True)
        raise typer.Exit(2) from error
    typer.echo(f"{found.decisions} decisions over {found.requests} requests are equal")
    if found.difference is not None:
        typer.echo(f"record {found.difference.number} is not:\n{found.difference.text}")
        raise typer.Exit(1)
    typer.echo(f"the log ends because {found.end}" if found.end else "the log breaks off")
