"""`tidegate standby`: see standbys, start and stop one by hand, and read what has become of it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlencode

import typer

from proxy.cli_ask import AdminOption, RunningStateOption, admin_port
from proxy.cli_common import CONTEXT, ByOption, ConfigOption, JsonOption, console, fail, person

standby_app = typer.Typer(
    help="Backends that run only when they are needed: list, start, stop.",
    no_args_is_help=True,
    context_settings=CONTEXT,
)
NameArgument = Annotated[str, typer.Argument(help="Its name in the configuration.")]


@standby_app.command("list")
def standby_list(
    admin: AdminOption = None,
    config: ConfigOption = None,
    state: RunningStateOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show where each standby is, and why.

    Example: tidegate standby list
    """
    rows = _ask("/standbys", None, admin, config, state)["standbys"]
    if json_output:
        typer.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        typer.echo("the configuration has no standbys")
        return
    from rich.table import Table
    from rich.text import Text

    from proxy.status import duration

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("standby", "site", "state", "for", "cost", "why"):
        table.add_column(name, overflow="fold")
    for row in rows:
        why = row["trouble"] or row["reason"]
        cells = [
            row["name"],
            row["site"],
            row["state"],
            duration(row["since_s"]) if row["run"] else "-",
            "-" if row["cost_per_hour"] is None else f"{row['cost_per_hour']:g}/h",
            f"{why} (by hand, stays)" if row["pinned"] else why,
        ]
        table.add_row(*map(Text, cells))
    console().print(table)


@standby_app.command("start")
def standby_start(
    name: NameArgument,
    for_: Annotated[
        str | None, typer.Option("--for", help="How long it stays on: `2h`. Default: until it is stopped.")
    ] = None,
    by: ByOption = None,
    admin: AdminOption = None,
    config: ConfigOption = None,
    state: RunningStateOption = None,
    json_output: JsonOption = False,
) -> None:
    """Start a standby and keep it on, whether or not traffic needs it.

    Example: tidegate standby start nanjing --for 2h
    """
    query = urlencode({"by": person(by)} | ({} if for_ is None else {"for": for_}))
    row = _ask(f"/standbys/{quote(name, safe='')}/start?{query}", b"", admin, config, state)["standby"]
    _tell(row, "start", json_output)


@standby_app.command("stop")
def standby_stop(
    name: NameArgument,
    admin: AdminOption = None,
    config: ConfigOption = None,
    state: RunningStateOption = None,
    json_output: JsonOption = False,
) -> None:
    """Stop a standby once what runs on it has ended. Traffic may start it again.

    Example: tidegate standby stop nanjing
    """
    row = _ask(f"/standbys/{quote(name, safe='')}/stop", b"", admin, config, state)["standby"]
    _tell(row, "stop", json_output)


@standby_app.command("history")
def standby_history(
    name: NameArgument,
    admin: AdminOption = None,
    config: ConfigOption = None,
    state: RunningStateOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show the last moves of a standby, each with its reason.

    Example: tidegate standby history nanjing
    """
    moves = _ask(f"/standbys/{quote(name, safe='')}/moves", None, admin, config, state)["moves"]
    if json_output:
        typer.echo(json.dumps(moves, indent=2))
        return
    if not moves:
        typer.echo(f"{name} has never been started")
    for move in moves:
        when = datetime.fromtimestamp(move["wall"], UTC)
        typer.echo(f"{when:%Y-%m-%d %H:%M:%S} UTC  {move['before']} -> {move['after']}: {move['reason']}")


def _tell(row: dict[str, Any], told: str, json_output: bool) -> None:
    words = f"{row['name']} is told to {told}: now it is {row['state']}"
    typer.echo(json.dumps(row, indent=2) if json_output else words)


def _ask(
    path: str, body: bytes | None, admin: str | None, config: Path | None, state: Path | None
) -> dict[str, Any]:
    from proxy.ask import AskError, ask

    try:
        return ask(admin_port(admin, config, state), path, body)
    except AskError as error:
        fail(str(error), 1)
