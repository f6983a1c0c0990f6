"""The commands that ask a running proxy: `tidegate explain` and `tidegate status`."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxy.cli_common import (
    ConfigOption,
    JsonOption,
    config_path,
    console,
    fail,
    load,
    readable_errors,
    state_in_broken,
    text_of_broken,
)

if TYPE_CHECKING:
    from proxy.ask import AdminPort

AdminOption = Annotated[str | None, typer.Option("--admin", help="HOST:PORT of the admin port.")]
_KEY = re.compile(r"tg_([0-9A-Za-z]{10})_[0-9A-Za-z]{43}_[0-9A-Za-z]{6}")
WATCH_S = 1.0
"""Between two looks of `status --watch`."""
RunningStateOption = Annotated[
    Path | None, typer.Option("--state", help="State directory of the running proxy: its port is read there.")
]


def explain(
    request_id: Annotated[str | None, typer.Argument(help="The `x-request-id` of an answer.")] = None,
    request: Annotated[
        Path | None,
        typer.Option(
            "--request",
            "-r",
            help="Body of a request, JSON (`-`: standard input): what would happen to it now.",
        ),
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="Where it would come in, as policies name it. Default: chat.")
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(help="Id of the API key it would come with, or the key: only its id is sent."),
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="In place of a key: its tenant.")] = None,
    data_class: Annotated[str | None, typer.Option(help="In place of a key: its data class.")] = None,
    priority: Annotated[int | None, typer.Option(help="In place of a key: its priority.")] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="In place of a key: NAME=VALUE among its labels; repeat.")
    ] = None,
    session: Annotated[str | None, typer.Option(help="The `x-session-id` it would have.")] = None,
    at: Annotated[
        str | None,
        typer.Option(help="Another time of day, in the policy's offset: 23:00, or 2026-01-31T23:00."),
    ] = None,
    admin: AdminOption = None,
    config: ConfigOption = None,
    state: RunningStateOption = None,
    json_output: JsonOption = False,
) -> None:
    """Say why a recent request went where it went; with --request, what would happen to one now. It is not sent.

    Where no proxy runs, --request says what the configuration would do while every backend is idle.

    Example: tidegate explain 019ab7c2d1e3f0a4b5c6d7e8f

    Example: tidegate explain --request r.json --tenant acme --at 23:00
    """
    from proxy.ask import AskError
    from proxy.explain import fetch, render

    given = {
        "endpoint": endpoint,
        "key": None if key is None else _key_id(key),
        "tenant": tenant,
        "data_class": data_class,
        "priority": None if priority is None else str(priority),
        "session": session,
        "at": at,
    }
    asked = [(name, value) for name, value in given.items() if value is not None]
    asked += [("label", text) for text in label or ()]
    for name, value in asked:
        if any("\ud800" <= letter <= "\udfff" for letter in value):  # how Python has bytes that are no text
            fail(f"--{name.replace('_', '-')}: this is not UTF-8")
    if request is not None and request_id is not None:
        fail("give the id of a request that was, or --request with one that might be, not both")
    if request is not None:
        _explain_what_if(request, asked, admin, config, state, json_output=json_output)
        return
    if request_id is None:
        fail("name the id of a request, as in `tidegate explain ID`, or give --request FILE")
    if asked:
        fail(f"--{asked[0][0].replace('_', '-')} is for --request: what was, is known")
    try:
        record = fetch(request_id, admin_port(admin, config, state))
    except AskError as error:
        fail(str(error), 1)
    typer.echo(json.dumps(record, indent=2) if json_output else render(record))


def _key_id(key: str) -> str:
    """The id of a key, given by itself or inside the key."""
    whole = _KEY.fullmatch(key)
    if whole is None and key.startswith("tg_"):
        fail("--key: this is no whole API key: give it, or its id from `tidegate keys list`")
    return whole[1] if whole else key


def _explain_what_if(
    request: Path,
    asked: list[tuple[str, str]],
    admin: str | None,
    config: Path | None,
    state: Path | None,
    *,
    json_output: bool,
) -> None:
    from proxy.ask import AskError, ClientsError, NobodyError
    from proxy.explain import fetch_what_if, render_what_if

    with readable_errors():
        raw = sys.stdin.buffer.read() if str(request) == "-" else request.read_bytes()
    path = None if admin is not None or state is not None else config_path(config)
    try:
        try:
            record = fetch_what_if(asked, raw, admin_port(admin, config, state))
        except NobodyError:
            if path is None:
                raise
            record = _imagined(path, asked, raw)
    except ClientsError as error:
        if json_output:
            typer.echo(json.dumps(error.body, indent=2))
        fail(str(error), 1)
    except AskError as error:
        fail(str(error), 1)
    typer.echo(json.dumps(record, indent=2) if json_output else render_what_if(record))


def _imagined(path: Path, asked: list[tuple[str, str]], raw: bytes) -> dict[str, Any]:
    """What the file would do. Raises AskError."""
    from policies.yamlfile import FileProblems
    from proxy.admin.whatif import AskedError
    from proxy.ask import AskError, ClientsError
    from proxy.database import OpenError
    from proxy.dialects import body_in, status_in
    from proxy.endpoints import BY_NAME
    from proxy.errors import RequestError
    from proxy.idle import explanation
    from proxy.readable import in_words

    config = load(path)
    try:
        return explanation(config, asked, raw)
    except AskedError as error:
        raise AskError(str(error)) from None
    except RequestError as error:
        dialect = BY_NAME[dict(asked).get("endpoint", "chat")].dialect
        body = json.loads(body_in(dialect, error.code, error.message, error.param))
        raise ClientsError(status_in(dialect, error.code), body) from None
    except OpenError as error:
        fail(str(error))
    except (FileProblems, ValueError, OSError) as error:  # of the policy or a profile
        fail(in_words(error) if isinstance(error, OSError) else str(error))


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
        port = admin_port(admin, config, state)
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


def admin_port(admin: str | None, config: Path | None, state: Path | None) -> AdminPort | str:
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
