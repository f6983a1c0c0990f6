"""`tidegate keys`: create, list and revoke API keys."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer

from proxy.cli_common import CONTEXT, ConfigOption, JsonOption, StateOption, fail, open_ledger

keys_app = typer.Typer(help="API keys: create, list, revoke.", no_args_is_help=True, context_settings=CONTEXT)


@keys_app.command("create")
def keys_create(
    tenant: Annotated[str, typer.Option(help="Who uses it: usage is summed and traffic shared by tenant.")],
    name: Annotated[str, typer.Option(help="A note for people.")] = "",
    data_class: Annotated[
        str, typer.Option(help="Class of its data; only sites that may see it serve it.")
    ] = "public",
    rpm: Annotated[int | None, typer.Option(help="Requests in any 60 seconds.")] = None,
    tpm: Annotated[int | None, typer.Option(help="Tokens in any 60 seconds.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Requests at once.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Money per calendar month, in the ledger's currency.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="A model it may use (repeatable). Default: all.")
    ] = None,
    priority: Annotated[int, typer.Option(help="Higher goes first when requests wait.")] = 0,
    label: Annotated[list[str] | None, typer.Option(help="KEY=VALUE for policy rules (repeatable).")] = None,
    expires: Annotated[
        str | None, typer.Option(help="Last day or time it is valid: `2027-01-31`, `90d`.")
    ] = None,
    config: ConfigOption = None,
    state: StateOption = None,
    json_output: JsonOption = False,
) -> None:
    """Make a key and print it, this once.

    Example: tidegate keys create --tenant acme --rpm 60 --tpm 100000 --budget 50 --data-class internal
    """
    from proxy.access.keys import KeyFieldError, create_key
    from proxy.access.pepper import PepperError, load_pepper

    engine, directory, _ = open_ledger(config, state, create=True)
    try:
        text, key = create_key(
            engine,
            load_pepper(directory),
            tenant=tenant,
            name=name,
            data_class=data_class,
            models=model,
            rpm=rpm,
            tpm=tpm,
            concurrency=concurrency,
            budget=budget,
            priority=priority,
            labels=_labels(label),
            expires=_expiry(expires),
        )
    except (KeyFieldError, PepperError) as error:
        fail(str(error))
    if json_output:
        typer.echo(json.dumps({"id": key.id, "key": text, "tenant": key.tenant}))
    else:
        typer.echo(f"key {key.id} of tenant {key.tenant}; it is shown this once:", err=True)
        typer.echo(text)


def _labels(pairs: list[str] | None) -> dict[str, str] | None:
    labels = {}
    for pair in pairs or ():
        name, given, value = pair.partition("=")
        if not given or not name:
            fail(f"--label takes KEY=VALUE, got '{pair}'")
        labels[name] = value
    return labels or None


def _expiry(text: str | None) -> float | None:
    if text is None:
        return None
    from proxy.reports import parse_time

    now = time.time()
    try:
        when = parse_time(text, now)
    except ValueError as error:
        fail(f"--expires: {error}")
    # `90d` means in 90 days here, where for reports it means 90 days ago.
    return 2 * now - when if text[-1:].isalpha() and when < now else when


@keys_app.command("list")
def keys_list(
    config: ConfigOption = None, state: StateOption = None, json_output: JsonOption = False
) -> None:
    """List keys: never their secrets, which are not stored.

    Example: tidegate keys list
    """
    from proxy.access.keys import list_keys

    engine, _, _ = open_ledger(config, state)
    now = time.time()
    rows: list[dict[str, Any]] = [
        {
            "id": stored.key.id,
            "tenant": stored.key.tenant,
            "name": stored.key.name,
            "status": stored.status(now),
            "data_class": stored.key.data_class,
            "rpm": stored.key.rpm,
            "tpm": stored.key.tpm,
            "concurrency": stored.key.concurrency,
            "budget": None if stored.key.budget_nano is None else stored.key.budget_nano / 1e9,
            "models": sorted(stored.key.models) if stored.key.models is not None else None,
            "priority": stored.key.priority,
            "expires": stored.key.expires,
            "created": stored.created,
        }
        for stored in list_keys(engine)
    ]
    if json_output:
        typer.echo(json.dumps(rows, indent=2))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(Column("id", no_wrap=True), "tenant", "name", "status", box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("class", "rpm", "tpm", "at once", "budget", "models"):
        table.add_column(title)
    for row in rows:
        shown = ("id", "tenant", "name", "status", "data_class", "rpm", "tpm", "concurrency", "budget")
        cells = ["" if row[column] is None else str(row[column]) for column in shown]
        table.add_row(*cells, ", ".join(row["models"]) if row["models"] else "all")
    Console().print(table)


@keys_app.command("revoke")
def keys_revoke(
    key_id: Annotated[str, typer.Argument(help="Id of the key, as in `keys list`.")],
    config: ConfigOption = None,
    state: StateOption = None,
) -> None:
    """Revoke a key; a running proxy refuses it within a second.

    Example: tidegate keys revoke 7Hq2mXw0Ab
    """
    from proxy.access.keys import KeyFieldError, UnknownKeyError, revoke_key

    engine, _, _ = open_ledger(config, state)
    if key_id.startswith("tg_"):
        key_id = key_id.split("_")[1]  # the whole key was pasted
    try:
        fresh = revoke_key(engine, key_id)
    except (KeyFieldError, UnknownKeyError) as error:
        fail(str(error))
    typer.echo(f"key {key_id} is revoked" if fresh else f"key {key_id} was revoked before")
