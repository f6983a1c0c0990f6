"""The command `tidegate`. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import json
import logging
import sys
import time
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from proxy.config import Config

_CONTEXT = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    name="tidegate",
    help="An intelligent reverse proxy for OpenAI-compatible LLM traffic: local first, remote when it must.",
    no_args_is_help=True,
    context_settings=_CONTEXT,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
keys_app = typer.Typer(
    help="API keys: create, list, revoke.", no_args_is_help=True, context_settings=_CONTEXT
)
app.add_typer(keys_app, name="keys")

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="Configuration file. Default: tidegate.yaml, if it is there.", dir_okay=False
    ),
]
StateOption = Annotated[Path | None, typer.Option("--state", help="State directory, when there is no file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
SinceOption = Annotated[str | None, typer.Option(help="From: `7d`, `24h`, `2026-11-01`.")]
UntilOption = Annotated[str | None, typer.Option(help="Until, in the same forms.")]


def fail(message: str, status: int = 2) -> NoReturn:
    """Say what is wrong, and end."""
    typer.echo(f"tidegate: {message}", err=True)
    raise typer.Exit(status)


@app.command()
def serve(
    config: ConfigOption = None,
    local: Annotated[list[str] | None, typer.Option(help="URL of a local backend (repeatable).")] = None,
    remote: Annotated[
        list[str] | None, typer.Option(help="NAME=URL of a backend at a remote site (repeatable).")
    ] = None,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT of the API. Port 0: any free one.")] = None,
    admin: Annotated[str | None, typer.Option(help="HOST:PORT of health, metrics and state.")] = None,
    state: StateOption = None,
    policy: Annotated[str | None, typer.Option(help="Policy of the library, or a policy file.")] = None,
    log: Annotated[str | None, typer.Option(help="Request log: `-`, `off` or a file.")] = None,
) -> None:
    """Run the proxy.

    Example: tidegate serve --local http://127.0.0.1:8000 --remote nj=https://nj.example:8443
    """
    from pydantic import ValidationError

    from policies.units import BadValueError
    from proxy.config import config_from_flags
    from proxy.serve import serve as run

    _logging()
    given = {"listen": listen, "admin": admin, "state": state, "policy": policy, "log": log}
    settings = {name: value for name, value in given.items() if value is not None}
    if local or remote:
        if config is not None:
            fail("give a configuration file, or --local and --remote, not both")
        try:
            loaded, path = config_from_flags(local or [], remote or [], **settings), None
        except ValidationError as error:
            first = error.errors()[0]
            fail(f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}")
        except BadValueError as error:
            fail(error.message)
    else:
        path = _config_path(config)
        if path is None:
            fail(
                "name the backends: --local URL and --remote NAME=URL, or --config FILE; or try `tidegate demo`"
            )
        loaded = _overridden(_load(path), settings)
    _run(lambda: run(loaded, path))


def _run(action: Any) -> None:
    """Run something that may fail in ways that a person can mend."""
    from proxy.build import ConfigError
    from proxy.readable import READABLE_ERRORS

    try:
        action()
    except ConfigError as error:
        fail(str(error))
    except READABLE_ERRORS as error:
        fail(str(error) or type(error).__name__)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _config_path(config: Path | None) -> Path | None:
    if config is not None:
        return config
    default = Path("tidegate.yaml")
    return default if default.is_file() else None


def _load(path: Path) -> Config:
    from policies.yamlfile import FileProblems
    from proxy.config import load_config

    try:
        return load_config(path)
    except FileProblems as error:
        fail(f"{path} cannot be used:\n{error}")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path}: {error}")


def _overridden(config: Config, settings: dict[str, Any]) -> Config:
    from pydantic import ValidationError

    try:
        checked = type(config).model_validate({**config.model_dump(exclude_unset=True), **settings})
    except ValidationError as error:
        fail(error.errors()[0]["msg"])
    return config.model_copy(update={name: getattr(checked, name) for name in settings})


def _engine(config: Path | None, state: Path | None) -> tuple[Engine, Path, str]:
    """The ledger's database, its state directory and currency, for commands that read or write it."""
    from proxy.database import open_database
    from proxy.readable import READABLE_ERRORS

    path = _config_path(config)
    directory, database, currency = state or Path("tidegate-data"), None, ""
    if path is not None and state is None:
        loaded = _load(path)
        directory, database, currency = loaded.state, loaded.database, loaded.ledger_currency
    try:
        return open_database(database or directory), directory, currency
    except READABLE_ERRORS as error:
        fail(str(error))


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="A policy file or a configuration file.", dir_okay=False)],
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Check a file and say in plain words what it does.

    Names of sites and backends in a policy file are checked against the configuration, if there is one.

    Example: tidegate check night.yaml
    """
    from proxy.check import check_file

    report = check_file(file, _config_path(config))
    if json_output:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        typer.echo(report.text, err=not report.ok)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def schema(
    which: Annotated[str, typer.Argument(help="`config` or `policy`.")] = "config",
) -> None:
    """Print the JSON Schema of a file, for editors.

    Example: tidegate schema policy > policy.schema.json
    """
    from policies.files import PolicyFile
    from proxy.config import Config

    models: dict[str, Any] = {"config": Config, "policy": PolicyFile}
    if which not in models:
        fail(f"there is no schema '{which}': config or policy")
    typer.echo(json.dumps(models[which].model_json_schema(), indent=2))


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

    engine, directory, _ = _engine(config, state)
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

    engine, _, _ = _engine(config, state)
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
    from rich.console import Console
    from rich.table import Table

    table = Table("id", "tenant", "name", "status", "class", "rpm", "tpm", "at once", "budget", "models")
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
    from proxy.access.keys import UnknownKeyError, revoke_key

    engine, _, _ = _engine(config, state)
    try:
        fresh = revoke_key(engine, key_id)
    except UnknownKeyError as error:
        fail(str(error))
    typer.echo(f"key {key_id} is revoked" if fresh else f"key {key_id} was revoked before")


@app.command()
def usage(
    by: Annotated[str, typer.Option(help="tenant, model, backend, key, site or day.")] = "tenant",
    since: SinceOption = None,
    until: UntilOption = None,
    config: ConfigOption = None,
    state: StateOption = None,
    json_output: JsonOption = False,
    csv_output: Annotated[bool, typer.Option("--csv", help="Comma-separated values.")] = False,
) -> None:
    """Show what was used and what it cost.

    Example: tidegate usage --by tenant --since 7d
    """
    from proxy import reports

    engine, _, currency = _engine(config, state)
    now = time.time()
    try:
        begin = reports.parse_time(since, now) if since else None
        end = reports.parse_time(until, now) if until else None
        lines = reports.usage(engine, by, begin, end, currency)
    except ValueError as error:
        fail(str(error))
    if json_output:
        sys.stdout.buffer.write(reports.usage_json(lines))
    elif csv_output:
        sys.stdout.buffer.write(reports.usage_csv(lines))
    else:
        from rich.console import Console

        Console().print(reports.usage_table(lines))


@app.command()
def export(
    since: SinceOption = None,
    until: UntilOption = None,
    form: Annotated[str, typer.Option("--format", help="jsonl or csv.")] = "jsonl",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File. Default: standard output.")
    ] = None,
    config: ConfigOption = None,
    state: StateOption = None,
) -> None:
    """Write one row per request, with everything that a replay needs.

    Example: tidegate export --since 24h -o yesterday.jsonl
    """
    from proxy import reports

    if form not in ("jsonl", "csv"):
        fail(f"--format is jsonl or csv, not '{form}'")
    engine, _, _ = _engine(config, state)
    now = time.time()
    try:
        begin = reports.parse_time(since, now) if since else None
        end = reports.parse_time(until, now) if until else None
    except ValueError as error:
        fail(str(error))
    if output is None:
        reports.export(engine, sys.stdout.buffer, begin, end, form=form)  # type: ignore[arg-type]
        return
    from rich.console import Console
    from rich.progress import Progress

    with output.open("wb") as file, Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("exporting", total=None)
        rows = reports.export(
            engine,
            file,
            begin,
            end,
            form=form,  # type: ignore[arg-type]
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    typer.echo(f"{rows} rows written to {output}", err=True)


@app.command()
def explain(
    request_id: Annotated[str, typer.Argument(help="The `x-request-id` of an answer.")],
    admin: Annotated[str | None, typer.Option(help="HOST:PORT of the admin port.")] = None,
    config: ConfigOption = None,
    state: StateOption = None,
    json_output: JsonOption = False,
) -> None:
    """Say why a recent request went where it went.

    Example: tidegate explain 019ab7c2d1e3f0a4b5c6d7e8f
    """
    from proxy.explain import ExplainError, fetch, render

    path = _config_path(config)
    if admin is None and path is not None:
        admin = _load(path).admin
    try:
        record = fetch(request_id, admin or "127.0.0.1:8081", state)
    except ExplainError as error:
        fail(str(error), 1)
    typer.echo(json.dumps(record, indent=2) if json_output else render(record))


def _version(value: bool) -> None:
    if value:
        typer.echo(metadata.version("tidegate"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _logging() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname).1s %(message)s", stream=sys.stderr)
    logging.getLogger("alembic").setLevel(logging.WARNING)


_ELSEWHERE = {"emulate": "sim.emulator:emulate", "demo": "proxy.demo:demo"}
"""Commands that live beside what they start; imported when they are called or help is asked for."""


def main() -> None:
    """Entry point of the command."""
    _refuse_foreign_proxy_package()
    wanted = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    for name, where in _ELSEWHERE.items():
        if wanted in (None, name):
            module, function = where.split(":")
            app.command(name)(getattr(import_module(module), function))
    app()


def _refuse_foreign_proxy_package() -> None:
    """PyPI's `proxy.py` installs a package called `proxy` too; in one environment they collide."""
    import proxy

    ours = Path(__file__).resolve().parent
    found = Path(proxy.__file__ or "").resolve().parent
    if found != ours:
        fail(
            f"another package called 'proxy' is installed at {found}: give tidegate an environment of its own"
        )


if __name__ == "__main__":
    main()
