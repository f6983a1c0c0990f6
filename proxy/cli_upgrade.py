"""The command `tidegate upgrade`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from proxy.cli_common import ConfigOption, fail, ledger_place

DrainOption = Annotated[
    str | None,
    typer.Option(
        help="How long the old process may take to end what it runs, such as `10m`. Default: `timeouts.drain`."
    ),
]
RunningStateOption = Annotated[
    Path | None, typer.Option("--state", help="State directory of the running proxy.")
]


def upgrade(drain: DrainOption = None, config: ConfigOption = None, state: RunningStateOption = None) -> None:
    """Replace the running proxy by a new process: of a new version, or started with a changed configuration.

    No connection is refused and no stream is cut. If the new process cannot start, the old one goes on.

    Example: tidegate upgrade --drain 10m
    """
    from policies.units import BadValueError, typed_duration
    from proxy.upgrade import UpgradeError, ask_for_upgrade

    try:
        drain_s = None if drain is None else typed_duration(drain)
    except BadValueError as error:
        fail(f"--drain: {error}")
    try:
        told = ask_for_upgrade(ledger_place(config, state).directory, drain_s)
    except UpgradeError as error:
        fail(str(error), 1)
    count = told["running"]
    left = f"still ends {count} request{'' if count == 1 else 's'}, for {told['drain']:g} s at most"
    typer.echo(
        f"process {told['pid']} serves; process {told['old']} {left if count else 'has no request to end'}"
    )
