"""The commands that ask a running proxy: `tidegate explain` and `tidegate status`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxy.cli_common import (
    ConfigOption,
    JsonOption,
    config_path,
    console,
    fail,
    load,
    state_in_broken,
    text_of_broken,
)

if TYPE_CHECKING:
    from proxy.ask import AdminPort

AdminOption = Annotated[str | None, typer.Option("--admin", help="HOST:PORT of the admin port.")]
WATCH_S = 1.0
"""Between two looks of `status --watch`."""
RunningStateOption = Annotated[
    Path | None, typer.Option("--state", help="State directory of the running proxy: its port is read there.")
]


def explain(
    request_id: Annotated[str, typer.Argument(help="The `x-request-id` of an answer.")],
    admin: AdminOption = None,
    config: ConfigOption = None,
    state: RunningStateOption = None,
    json_output: JsonOption = False,
) -> None:
    """Say why a recent request went where it went.

    Example: tidegate explain 019ab7c2d1e3f0a4b5c6d7e8f
    """
    from proxy.ask import AskError
    from proxy.explain import fetch, render

    try:
        record = fetch(request_id, _port(admin, config, state))
    except AskError as error:
        fail(str(error), 1)
    typer.echo(json.dumps(record, indent=2) if json_output else render(record))


def status(
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Look again every second, until Ctrl-C.")
    ] = False,
    admin: AdminOption = None,
    config: ConfigOption = None,
    state: RunningStateOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show how full every backend is, who waits, and what has been served.

    Example: tidegate status --watch
    """
    from proxy.ask import AskError, ask
    from proxy.status import screen

    if watch and json_output:
        fail("give --watch or --json, not both")
    try:
        port = _port(admin, config, state)
        shown = ask(port, "/state")
    except AskError as error:
        fail(str(error), 1)
    if json_output:
        typer.echo(json.dumps(shown, indent=2))
    elif watch:
        try:
            _watch(port)
        except KeyboardInterrupt:
            raise typer.Exit from None
    else:
        output = console()
        output.print(screen(shown, str(port), output.width))


def _watch(port: AdminPort | str) -> None:
    """Show the state again and again: in place on a terminal, else as a line each time."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    from proxy.ask import AskError, ask
    from proxy.status import line, screen

    output = Console()
    if not output.is_terminal:
        while True:
            try:
                typer.echo(line(ask(port, "/state")))
            except AskError as error:
                typer.echo(str(error))
            time.sleep(WATCH_S)
    last = Group()
    with Live(console=output, auto_refresh=False, screen=True) as live:
        while True:
            try:
                last = Group(screen(ask(port, "/state"), str(port), output.width))
                live.update(last, refresh=True)
            except AskError as error:  # perhaps it is being restarted
                live.update(Group(Text(str(error), "red"), last), refresh=True)
            time.sleep(WATCH_S)


def _port(admin: str | None, config: Path | None, state: Path | None) -> AdminPort | str:
    """Where the admin port is. Raises AskError."""
    from proxy.ask import DEFAULT_STATE, AdminPort, admin_address

    if admin is not None or state is not None:
        address = admin_address(admin, state, None)
        return address if state is None else AdminPort(address, state)
    path = config_path(config)
    if path is None:
        return AdminPort(admin_address(None, None, None), DEFAULT_STATE)
    beside = _beside_broken(path)
    if beside is not None:
        return beside
    loaded = load(path, "--admin HOST:PORT")
    files = tuple(section.certificate for section in loaded.tls)
    return AdminPort(admin_address(None, None, loaded), loaded.state, files)


def _beside_broken(path: Path) -> AdminPort | None:
    """The admin port of the proxy that runs on although its file was broken since; None: the file is right, or
    where the state is cannot be told from it."""
    from proxy.ask import AdminPort, written_admin

    text = text_of_broken(path)
    if text is None:
        return None
    state = state_in_broken(path, text)
    address = written_admin(state)
    if address is None:
        return None
    typer.echo(f"note: {path} cannot be used as it is: this is the proxy that runs on {state}", err=True)
    return AdminPort(address, state)
