"""The provider `command`, with real scripts that do, fail, hang, flood and leave something running."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxy.config import load_config
from proxy.scaling import command
from proxy.scaling.command import MOST_OUTPUT_BYTES, CommandProvider
from proxy.scaling.facts import Facts
from proxy.scaling.images import Launch
from proxy.scaling.keeper import STATUS_S
from proxy.scaling.provider import Presence, ProviderError
from proxy.scaling.sections import StandbySection

FACTS = Facts("nj", "http://127.0.0.1:8000", ["m"])


def provider(folder: Path, text: str, facts: Facts = FACTS, **section: Any) -> CommandProvider:
    script = folder / "standby.sh"
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    command = {"command": [str(script), "first"], **section}
    return CommandProvider(StandbySection.model_validate({"command": command}), facts)


async def test_what_the_script_is_told(tmp_path: Path) -> None:
    text = f'echo "$1 $2 $TIDEGATE_STANDBY $TIDEGATE_RUN $TIDEGATE_URL $CARD" >> {tmp_path}/calls'
    one = provider(tmp_path, text, environment={"CARD": "h20"})
    await one.prepare("r1")
    await one.start("r1")
    await one.stop("r1")
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"first {operation} nj r1 http://127.0.0.1:8000 h20" for operation in ("prepare", "start", "stop")
    ]


async def test_the_script_is_told_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the images say at that moment, and nothing where they do not know."""
    monkeypatch.setenv("TIDEGATE_IMAGE", "of somebody else")
    launch: Launch | None = Launch(
        "vllm:v1", (), ("--model", "my model", "--port", "8000"), {"A": "1", "B": "x y"}
    )
    script = f'eval "set -- $TIDEGATE_ARGUMENTS"; printf "%s|" "$TIDEGATE_IMAGE" "$@" > {tmp_path}/told'
    script += f'; eval "set -- $TIDEGATE_ENVIRONMENT"; printf "%s|" "$@" >> {tmp_path}/told'
    one = provider(tmp_path, script, facts=replace(FACTS, launch=lambda: launch))
    await one.start("r1")
    assert (tmp_path / "told").read_text() == "vllm:v1|--model|my model|--port|8000|A=1|B=x y|"
    launch = Launch(command=("serve", "it"), arguments=("--port", "8000"))
    await one.start("r2")
    assert (tmp_path / "told").read_text() == "|serve|it|--port|8000||"
    launch = None
    await one.start("r3")
    assert (tmp_path / "told").read_text() == "||"


@pytest.mark.parametrize(
    ("said", "presence", "progress"),
    [
        ("absent", Presence.ABSENT, None),
        ("running", Presence.RUNNING, None),
        (json.dumps({"presence": "starting", "run": "r1", "progress": 0.4}), Presence.STARTING, 0.4),
    ],
)
async def test_status(tmp_path: Path, said: str, presence: Presence, progress: float | None) -> None:
    found = await provider(tmp_path, f"echo '{said}'").status()
    assert (found.presence, found.progress) == (presence, progress)


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("true", "said nothing"),
        ("echo perhaps", "'perhaps'"),
        ("""echo '{"presence": "gone"}'""", "presence: expected"),
        ("echo out of cards >&2; exit 3", "failed with exit code 3: out of cards"),
    ],
)
async def test_a_status_that_says_nothing_is_unknown(tmp_path: Path, text: str, detail: str) -> None:
    found = await provider(tmp_path, text).status()
    assert found.presence is Presence.UNKNOWN
    assert detail in found.detail


async def test_it_fails_and_recovers(tmp_path: Path) -> None:
    one = provider(tmp_path, f"test -e {tmp_path}/tunnel || {{ echo no tunnel >&2; exit 1; }}")
    with pytest.raises(ProviderError, match=r"`standby\.sh start` failed with exit code 1: no tunnel"):
        await one.start("r1")
    (tmp_path / "tunnel").touch()
    await one.start("r1")


async def test_errors_show_the_last_lines_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUD_TOKEN", "c1oudt0ken")
    text = (
        "seq 100 >&2; echo 'using c1oudt0ken' >&2; echo 'password: hunter22' >&2;"
        " echo 'API_KEY=abcdef Authorization: Bearer xyzzy' >&2; exit 1"
    )
    with pytest.raises(ProviderError) as raised:
        await provider(tmp_path, text).start("r1")
    said = str(raised.value)
    assert said.count("\n") == 4
    assert "99" in said
    assert "98\n" not in said
    assert not [secret for secret in ("c1oudt0ken", "hunter22", "abcdef", "xyzzy") if secret in said]


async def test_all_of_what_takes_too_long_is_killed(tmp_path: Path) -> None:
    """The script, and what it waits for: the pipe that both hold ends."""
    fifo = tmp_path / "alive"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    one = provider(tmp_path, f"exec 9> {fifo}; echo stuck >&2; sleep 1000 & sleep 1000", timeout=0.5)
    with pytest.raises(ProviderError, match=r"took longer than 0\.5 s and was ended: stuck"):
        await one.start("r1")
    os.set_blocking(reader, True)
    assert await asyncio.to_thread(os.read, reader, 1) == b""  # nobody holds its other end
    os.close(reader)


async def test_who_stops_waiting_ends_the_script(tmp_path: Path) -> None:
    fifo = tmp_path / "alive"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    one = provider(tmp_path, f"exec 9> {fifo}; echo up >&9; sleep 1000")
    task = asyncio.ensure_future(one.start("r1"))  # noqa: TID251
    keeps_open = os.open(fifo, os.O_WRONLY)
    assert await asyncio.to_thread(os.read, reader, 3) == b"up\n"
    os.close(keeps_open)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(os.read, reader, 1) == b""
    os.close(reader)


@pytest.mark.parametrize("stream", ["", ">&2"])
async def test_a_flood_ends(tmp_path: Path, stream: str) -> None:
    one = provider(tmp_path, f"while :; do echo {'x' * 1000} {stream}; done", timeout=50)
    with pytest.raises(ProviderError, match="wrote too much and was ended") as raised:
        await one.start("r1")
    assert len(str(raised.value)) < 3000


async def test_much_is_not_too_much(tmp_path: Path) -> None:
    await provider(tmp_path, f"head -c {MOST_OUTPUT_BYTES} /dev/zero").start("r1")


async def test_what_it_leaves_running_goes_on(tmp_path: Path) -> None:
    """Also when that still holds the script's own output."""
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    one = provider(tmp_path, f"(read word < {fifo}; echo $word > {tmp_path}/engine) & echo started")
    await one.start("r1")
    done = tmp_path / "engine"
    assert not done.exists()
    fifo.write_text("served\n")
    while not done.exists() or not done.read_text():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert done.read_text() == "served\n"


async def test_a_script_that_is_not_there(tmp_path: Path) -> None:
    section = StandbySection.model_validate({"command": {"command": [str(tmp_path / "none")]}})
    with pytest.raises(ProviderError, match="none cannot be run: no such file"):
        await CommandProvider(section, FACTS).start("r1")


@pytest.mark.parametrize(
    ("mode", "said"), [(None, "is not there"), (0o600, "may not be executed"), (0o700, "")]
)
def test_a_script_is_looked_at_before(tmp_path: Path, mode: int | None, said: str) -> None:
    script = tmp_path / "standby.sh"
    if mode is not None:
        script.touch()
        script.chmod(mode)
    section = StandbySection.model_validate({"command": {"command": [str(script)]}})
    problems = list(CommandProvider.check(section, FACTS))
    assert [problem.at for problem in problems] == ([("command", "command")] if said else [])
    assert all(said in problem.message for problem in problems)


def test_a_path_is_relative_to_the_configuration(tmp_path: Path) -> None:
    backend = {"name": "a", "url": "http://127.0.0.1:1", "models": ["m"]}
    sections = [
        backend | {"name": name, "standby": {"command": {"command": [command, "x"]}}}
        for name, command in (("a", "./on.sh"), ("b", "on.sh"))
    ]
    file = tmp_path / "tidegate.yaml"
    file.write_text(json.dumps({"backends": sections}))
    found = [backend.standby.command.command for backend in load_config(file).backends]  # type: ignore[union-attr]
    assert found == [[str(tmp_path / "on.sh"), "x"], ["on.sh", "x"]]


async def test_a_status_that_hangs_says_so_before_nobody_waits_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command.STATUS_WITHIN_S < STATUS_S
    monkeypatch.setattr(command, "STATUS_WITHIN_S", 0.5)
    found = await provider(tmp_path, "echo asking the cloud >&2; sleep 1000").status()
    assert found.presence is Presence.UNKNOWN
    assert found.detail == "`standby.sh status` took longer than 0.5 s and was ended: asking the cloud"


@pytest.mark.parametrize("operation", ["prepare", "start", "stop"])
async def test_each_operation_has_its_own_time(tmp_path: Path, operation: str) -> None:
    """An image may take half an hour to come, where nothing else does."""
    section = provider(tmp_path, "sleep 1000")._section
    limits = {"prepare_timeout": 500, "start_timeout": 500, "stop_timeout": 500, f"{operation}_timeout": 0.25}
    one = CommandProvider(StandbySection.model_validate({"command": section, **limits}), FACTS)
    with pytest.raises(ProviderError, match=r"took longer than 0\.25 s"):
        await getattr(one, operation)("r1")
