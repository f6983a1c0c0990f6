"""`tidegate keys`: create, list and revoke API keys."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxy.cli_common import (
    CONTEXT,
    ConfigOption,
    JsonOption,
    StateOption,
    config_path,
    console,
    fail,
    ledger_place,
    load,
    open_ledger,
    readable_errors,
)

if TYPE_CHECKING:
    from proxy.access.keys import StoredKey
    from proxy.config import Config

DAY_S = 86_400

keys_app = typer.Typer(help="API keys: create, list, revoke.", no_args_is_help=True, context_settings=CONTEXT)


@keys_app.command("create")
def keys_create(
    tenant: Annotated[
        str, typer.Option(help="Who uses it, a word: usage is summed and traffic shared by tenant.")
    ],
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
    from proxy.access.keys import KeyFieldError, create_key, list_keys
    from proxy.access.pepper import PepperError, load_pepper
    from proxy.disk_room import told_if_full

    # Whatever can fail, fails before the key is made: it is shown once.
    path = config_path(config) if config or not state else None
    loaded = load(path) if path is not None else None
    labels, expiry = _labels(label), _expiry(expires)
    directory = ledger_place(config, state).directory
    is_new = not directory.exists()
    with readable_errors(), told_if_full(directory):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # the ledger may be elsewhere
        engine, _ = open_ledger(config, state, create=True)
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
                labels=labels,
                expires=expiry,
            )
        except (KeyFieldError, PepperError) as error:
            fail(str(error))
        is_first = len(list_keys(engine)) == 1
    if path is not None and loaded is not None:
        _warn_of_data_class(data_class, path, loaded)
        if budget is not None and not any(backend.price or backend.prices for backend in loaded.backends):
            typer.echo(
                f"warning: no backend in {path} has a price: nothing is ever taken from a budget", err=True
            )
    if json_output:
        typer.echo(json.dumps({"id": key.id, "key": text, "tenant": key.tenant}))
    else:
        if is_new:
            typer.echo(f"note: {directory} is new, no proxy has kept its state there yet", err=True)
        if is_first:
            typer.echo("note: this is the first key: from now on every request needs one", err=True)
        typer.echo(
            f"key {key.id} of tenant {key.tenant}, kept in {directory}; it is shown this once:", err=True
        )
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
    from proxy.reports import parse_duration, parse_time

    now = time.time()
    length = parse_duration(text)
    if length is not None:
        return now + length  # `90d` means in 90 days here, where for reports it means 90 days ago
    try:
        when = parse_time(text, now)
    except ValueError as error:
        fail(f"--expires: {error}")
    if len(text) == len("2027-01-31"):
        when += DAY_S  # the last day is a day on which it is valid
    if when <= now:
        fail(f"--expires: {text} is in the past; give a day to come, or how long from now, such as 90d")
    return when


def _warn_of_data_class(data_class: str, path: Path, config: Config) -> None:
    """Say so if a key's data class is one that no configured site names: a typo, or a key of little use."""
    from policies.yamlproblems import closest
    from proxy.build import make_backends

    named = {"public"}.union(*(site.data_classes or () for site in config.sites.values()))
    accepting = {
        backend.site
        for backend in make_backends(config)
        if backend.data_classes is None or data_class in backend.data_classes
    }
    if data_class in named and accepting:
        return
    meant = closest(data_class, named) if data_class not in named else None
    problem = (
        f"no backend accepts data class '{data_class}'"
        if data_class in named
        else f"no site in {path} names data class '{data_class}'"
    )
    hint = f" (did you mean '{meant}'?)" if meant else ""
    where = f"only site {' or '.join(sorted(accepting))} serves it" if accepting else "nobody serves this key"
    typer.echo(f"warning: {problem}{hint}: {where}", err=True)


@keys_app.command("list")
def keys_list(
    config: ConfigOption = None, state: StateOption = None, json_output: JsonOption = False
) -> None:
    """List keys: never their secrets, which are not stored.

    Example: tidegate keys list
    """
    from policies.yamlproblems import listed
    from proxy.access.keys import list_keys
    from proxy.access.limits import month_bounds
    from proxy.config_values import time_zone
    from proxy.masking import database_shown
    from proxy.reports import latest_currency, spent_by_key

    engine, place = open_ledger(config, state)
    now = time.time()
    with readable_errors():
        stored = list_keys(engine)
        currency = place.currency or latest_currency(engine)
        begin, _ = month_bounds(now, time_zone(place.budget_zone))
        spent, others = spent_by_key(engine, begin, currency)
    if others and any(one.key.budget_nano is not None for one in stored):
        text = (
            f"note: budgets count {currency} only; this month there are costs in {listed(others, 'and')} too"
        )
        typer.echo(text, err=True)
    rows = [_row(one, now, spent) for one in stored]
    if json_output:
        typer.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        where = database_shown(place.database or place.directory)
        typer.echo(f"no keys in {where}: requests need none, and the proxy serves this machine only")
        return
    from rich import box
    from rich.table import Column, Table
    from rich.text import Text

    table = Table(
        Column("id", no_wrap=True),
        Column("tenant", overflow="fold"),
        Column("status", no_wrap=True),
        Column("data class", overflow="fold"),
        Column("what else it says", overflow="fold", ratio=1),
        box=box.SIMPLE_HEAD,
        padding=(0, 2, 0, 0),
        pad_edge=False,
    )
    for row in rows:
        cells = (row["id"], row["tenant"], row["status"], row["data_class"], _in_words(row, currency))
        table.add_row(*map(Text, cells))
    console().print(table)


def _row(stored: StoredKey, now: float, spent: Mapping[str, int]) -> dict[str, Any]:
    """A key as `keys list --json` shows it."""
    key = stored.key
    budget = key.budget_nano
    return {
        "id": key.id,
        "tenant": key.tenant,
        "name": key.name,
        "status": stored.status(now),
        "data_class": key.data_class,
        "rpm": key.rpm,
        "tpm": key.tpm,
        "concurrency": key.concurrency,
        "budget": None if budget is None else budget / 1e9,
        "spent": None if budget is None else spent.get(key.id, 0) / 1e9,
        "models": sorted(key.models) if key.models is not None else None,
        "priority": key.priority,
        "labels": dict(key.labels),
        "expires": key.expires,
        "created": stored.created,
        "revoked": stored.revoked,
    }


def _in_words(row: dict[str, Any], currency: str) -> str:
    """What a key says beyond the columns of the list, as far as it says anything."""
    words = [f'"{row["name"]}"'] if row["name"] else []
    limits = (("rpm", "requests/min"), ("tpm", "tokens/min"), ("concurrency", "at once"))
    words += [f"{row[name]:,} {unit}" for name, unit in limits if row[name] is not None]
    if row["budget"] is not None:
        budget = f"{_money(row['spent'])} of {_money(row['budget'])} {currency}".rstrip()
        words.append(f"{budget} spent this month")
    if row["models"]:
        words.append(f"only {', '.join(row['models'])}")
    if row["priority"]:
        words.append(f"priority {row['priority']}")
    words += [f"{name}={value}" for name, value in sorted(row["labels"].items())]
    if row["expires"] is not None:
        until = datetime.fromtimestamp(row["expires"], UTC)
        words.append(f"until {until:%Y-%m-%d %H:%M} UTC")
    return "; ".join(words)


def _money(units: float) -> str:
    """With two decimals, or up to four where small change counts."""
    from proxy.prices import amount

    text = amount(round(units * 1e9))
    return text if text.startswith("<") else text[:-2] + text[-2:].rstrip("0")


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

    engine, _ = open_ledger(config, state)
    if key_id.startswith("tg_"):
        key_id = key_id.split("_")[1]  # the whole key was pasted
    try:
        with readable_errors():
            fresh = revoke_key(engine, key_id)
    except (KeyFieldError, UnknownKeyError) as error:
        fail(str(error))
    typer.echo(f"key {key_id} is revoked" if fresh else f"key {key_id} was revoked before")
