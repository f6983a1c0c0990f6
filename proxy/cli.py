"""The command `tidegate`. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxy.cli_ask import explain, status
from proxy.cli_common import (
    CONTEXT,
    ConfigOption,
    JsonOption,
    StateOption,
    config_path,
    console,
    fail,
    load,
    open_ledger,
    readable_errors,
)
from proxy.cli_keys import keys_app
from proxy.cli_upgrade import upgrade

if TYPE_CHECKING:
    from pydantic import ValidationError
    from sqlalchemy import Engine

    from proxy.config import Config

app = typer.Typer(
    name="tidegate",
    help="An intelligent reverse proxy for OpenAI-compatible LLM traffic: local first, remote when it must.",
    no_args_is_help=True,
    context_settings=CONTEXT,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(keys_app, name="keys")

SinceOption = Annotated[str | None, typer.Option(help="From: `7d`, `24h`, `2026-11-01`.")]
UntilOption = Annotated[str | None, typer.Option(help="Until, in the same forms.")]


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
    record: Annotated[
        Path | None,
        typer.Option(help="Write an event log for `tidegate replay` to this new file.", dir_okay=False),
    ] = None,
    take_over: Annotated[
        bool,
        typer.Option(
            "--take-over", help="Replace the process that serves on the state directory, if there is one."
        ),
    ] = False,
) -> None:
    """Run the proxy.

    Example: tidegate serve --local http://127.0.0.1:8000 --remote nj=https://nj.example:8443
    """
    from pydantic import ValidationError

    from policies.units import BadValueError
    from proxy.config import config_from_flags
    from proxy.process import serve as run
    from proxy.watched import WatchedFiles

    _logging()
    watched = WatchedFiles()
    given = {"listen": listen, "admin": admin, "state": state, "policy": policy, "log": log}
    settings = {name: value for name, value in given.items() if value is not None}
    if local or remote:
        if config is not None:
            fail("give a configuration file, or --local and --remote, not both")
        if state is None:
            _refuse_second_state()
        try:
            loaded, path = config_from_flags(local or [], remote or [], **settings), None
        except ValidationError as error:
            fail(_first_problem(error, [*["--local"] * len(local or []), *["--remote"] * len(remote or [])]))
        except BadValueError as error:
            fail(error.message)
    else:
        path = config_path(config)
        if path is None:
            fail(
                "name the backends: --local URL and --remote NAME=URL, or --config FILE; or try `tidegate demo`"
            )
        watched.watch([path])
        loaded = _overridden(load(path), settings)
    _run(lambda: run(loaded, path, settings, record, take_over=take_over, watched=watched))


def _refuse_second_state() -> None:
    """A tidegate.yaml says where the other commands, typed here, find keys and ledger: a proxy beside it that
    keeps others would be open although there are keys."""
    from policies.yamlfile import FileProblems
    from proxy.ask import DEFAULT_STATE
    from proxy.config import load_config

    path = config_path(None)
    if path is None:
        return
    try:
        loaded = load_config(path)
    except (FileProblems, OSError):
        problem = "cannot be used as it is, but says"
    else:
        if loaded.database is None and loaded.state.resolve() == DEFAULT_STATE.resolve():
            return
        problem = "says"
    fail(
        f"{path} in this folder {problem} where keys and ledger are, and --local and --remote do not read it: "
        f"give --config {path} instead, or say where they are with --state DIRECTORY"
    )


def _run(action: Any) -> None:
    """Run something that may fail in ways that a person can mend."""
    from proxy.build import ConfigError
    from proxy.readable import READABLE_ERRORS, in_words

    try:
        action()
    except (ConfigError, *READABLE_ERRORS) as error:
        fail(in_words(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _overridden(config: Config, settings: dict[str, Any]) -> Config:
    from pydantic import ValidationError

    from proxy.config import override

    try:
        return override(config, settings)
    except ValidationError as error:
        fail(_first_problem(error))


def _first_problem(error: ValidationError, backends: Sequence[str] = ()) -> str:
    """In words; `backends`: the flags that the backends were given with."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if backends and first["loc"][0:1] == ("backends",) and isinstance(first["loc"][1], int):
        where = backends[first["loc"][1]]
    message = first["msg"].removeprefix("Value error, ")
    suggestion = getattr(first.get("ctx", {}).get("error"), "suggestion", None)
    hint = f" (did you mean {suggestion}?)" if suggestion else ""
    return f"{where}: {message}{hint}" if where else f"{message}{hint}"


@app.command()
def check(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="A policy file, a policy of the library, a configuration, or a file of templates. Default: the "
            "configuration.",
            dir_okay=False,
        ),
    ] = None,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Check a file and say in plain words what it does.

    Names in policies and templates are checked against the configuration, if there is one.

    Example: tidegate check night.yaml
    """
    from proxy.check import check_file

    path = config_path(config)
    if file is None:
        file = path
    if file is None:
        fail("there is no tidegate.yaml here: name a file, as in `tidegate check FILE`")
    report = check_file(file, path)
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


@app.command()
def usage(
    by: Annotated[
        str | None,
        typer.Option(
            help="tenant, model, backend, key, site, day or code; with --capacity standby, site, model, plan, "
            "template, run or day. Default: the first of these."
        ),
    ] = None,
    capacity: Annotated[
        bool, typer.Option("--capacity", help="Hours that standbys ran, instead of requests.")
    ] = False,
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

    if json_output and csv_output:
        fail("give --json or --csv, not both")
    begin, end = _span(since, until)
    engine, place = open_ledger(config, state)
    if capacity:
        if csv_output:
            fail("--csv is for requests: with --capacity give --json")
        _capacity(engine, by or "standby", begin, end, json_output=json_output)
        return
    try:
        with readable_errors():
            lines = reports.usage(engine, by or "tenant", begin, end, place.currency)
    except ValueError as error:
        fail(f"--by: {error}")
    if json_output:
        sys.stdout.buffer.write(reports.usage_json(lines))
    elif csv_output:
        sys.stdout.buffer.write(reports.usage_csv(lines))
    elif not lines:
        typer.echo(f"no requests {reports.span_in_words(begin, end)}")
    else:
        shown = console()
        shown.print(reports.usage_table(lines, shown.width))


def _capacity(engine: Engine, by: str, begin: float | None, end: float | None, *, json_output: bool) -> None:
    from proxy import capacity_report
    from proxy.reports import span_in_words

    try:
        with readable_errors():
            lines = capacity_report.capacity(engine, by, begin, end)
    except ValueError as error:
        fail(f"--by: {error}")
    if json_output:
        sys.stdout.buffer.write(capacity_report.capacity_json(lines))
    elif not lines:
        typer.echo(f"no standby ran {span_in_words(begin, end)}")
    else:
        console().print(capacity_report.capacity_table(lines))


def _span(since: str | None, until: str | None) -> tuple[float | None, float | None]:
    """Unix times of --since and --until; None: open."""
    from proxy.reports import parse_time, span_in_words

    now = time.time()
    found: list[float | None] = []
    for option, text in (("--since", since), ("--until", until)):
        try:
            found.append(parse_time(text, now) if text is not None else None)
        except ValueError as error:
            fail(f"{option}: {error}")
    begin, end = found
    if begin is not None and end is not None and begin >= end:
        fail(f"--since {since} is not before --until {until}: nothing lies {span_in_words(begin, end)}")
    return begin, end


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
    begin, end = _span(since, until)
    engine, _ = open_ledger(config, state)
    if output is None:
        with readable_errors():
            reports.export(engine, sys.stdout.buffer, begin, end, form=form)  # type: ignore[arg-type]
            sys.stdout.buffer.flush()
        return
    from rich.console import Console
    from rich.progress import Progress

    with readable_errors():
        try:
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
        except OSError as error:
            error.filename = str(output)  # a full disk does not say which file
            raise
    typer.echo(f"{rows} rows written to {output}", err=True)


app.command()(explain)
app.command()(status)
app.command()(upgrade)


def _version(value: bool) -> None:
    if value:
        typer.echo(metadata.version("tidegate"))
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    context.obj = _past


def _past() -> Any:
    """What a command of the simulator may ask of this room."""
    from proxy import past

    return past


def _logging() -> None:
    """Messages to standard error: `I 2026-11-26T22:50:01.123Z stopped`, in UTC as the ledger is."""
    formatter = logging.Formatter("%(levelname).1s %(asctime)s %(message)s")
    formatter.converter = time.gmtime
    formatter.default_time_format = "%Y-%m-%dT%H:%M:%S"
    formatter.default_msec_format = "%s.%03dZ"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("alembic").setLevel(logging.WARNING)


_ELSEWHERE = {
    "bench": "sim.measure.command:bench",
    "calibrate": "sim.calibrate_command:calibrate",
    "demo": "proxy.demo:demo",
    "emulate": "sim.emulate:emulate",
    "images": "proxy.cli_plans:images",
    "leaderboard": "sim.leaderboard_command:leaderboard",
    "plan": "sim.plan_command:plan",
    "plans": "proxy.cli_plans:plans_app",
    "policies": "proxy.cli_policies:policies",
    "replay": "sim.replay_command:replay",
    "standby": "proxy.cli_standby:standby_app",
    "simulate": "sim.simulate_command:simulate",
    "templates": "proxy.cli_plans:templates_app",
    "tune": "sim.tune_command:tune",
    "workload": "sim.workload_command:workload_app",
}
"""Commands, and groups of them, that live beside what they start; imported when they are called or help is
asked for."""


def register(onto: typer.Typer, name: str) -> None:
    """Import one of those and add it."""
    module, attribute = _ELSEWHERE[name].split(":")
    found = getattr(import_module(module), attribute)
    if isinstance(found, typer.Typer):
        onto.add_typer(found, name=name)
    else:
        onto.command(name)(found)


def main() -> None:
    """Entry point of the command."""
    _refuse_foreign_proxy_package()
    wanted = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    for name in _ELSEWHERE:
        if wanted in (None, name):
            register(app, name)
    try:
        app()
    except Exception as error:
        from proxy.readable import READABLE_ERRORS, in_words

        if not isinstance(error, READABLE_ERRORS):
            raise
        print(f"tidegate: {in_words(error)}", file=sys.stderr)  # such as a full disk behind standard output
        sys.exit(2)


def _refuse_foreign_proxy_package() -> None:
    """PyPI's `proxy.py` installs a package called `proxy` too; in one environment it overwrites ours."""
    import proxy

    if getattr(proxy, "DISTRIBUTION", None) != "tidegate":
        where = Path(__file__).resolve().parent
        text = (
            f"tidegate: another package called 'proxy' is installed at {where}: give it its own environment"
        )
        print(text, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
