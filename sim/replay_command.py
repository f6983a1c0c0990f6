"""The command `tidegate replay`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sim.command_errors import error_text, fail


def replay(
    file: Annotated[Path, typer.Argument(help="An event log, as `tidegate serve --record` writes it.")],
) -> None:
    """Let the simulator decide again over what a proxy has seen, and compare every decision.

    Example: tidegate replay events.jsonl
    """
    from rich.console import Console
    from rich.progress import Progress

    from sim.recording import BadLogError, Recording
    from sim.replay import compare

    try:
        recording = Recording(file)
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("replaying", total=recording.size or None)
            found = compare(recording, lambda _: bar.update(task, completed=recording.position))
    except BadLogError as error:
        fail(f"{file} cannot be replayed: {error}")
    except OSError as error:
        fail(error_text(error))
    typer.echo(f"{found.decisions} decisions over {found.requests} requests are equal")
    if found.difference is not None:
        typer.echo(f"record {found.difference.number} is not:\n{found.difference.text}")
        raise typer.Exit(1)
    if found.end:
        typer.echo(f"the log ends because {found.end}")
    else:
        typer.echo(f"the log breaks off in line {recording.torn}" if recording.torn else "the log breaks off")
    if not found.decisions:
        fail("nothing was compared: the log has no decision", 1)
