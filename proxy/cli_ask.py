"""The commands that ask a running proxy: `tidegate explain`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from proxy.cli_common import ConfigOption, JsonOption, config_path, fail, load

AdminOption = Annotated[str | None, typer.Option("--admin", help="HOST:PORT of the admin port.")]
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
        record = fetch(request_id, _address(admin, config, state))
    except AskError as error:
        fail(str(error), 1)
    typer.echo(json.dumps(record, indent=2) if json_output else render(record))


def _address(admin: str | None, config: Path | None, state: Path | None) -> str:
    """Where the admin port is. Raises AskError."""
    from proxy.ask import admin_address

    path = config_path(config) if admin is None and state is None else None
    return admin_address(admin, state, load(path) if path is not None else None)
