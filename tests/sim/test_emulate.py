"""`tidegate emulate`: what it is told, what it says, how it ends."""

from __future__ import annotations

import asyncio
import inspect
import json
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import typer
from typer.testing import CliRunner

from proxy.demo import demo
from sim import emulate as module
from sim.emulate import emulate
from sim.emulator import EmulatorSettings, plain_profile
from sim.faults import Fault, FaultKind
from sim.fleet import read_fleet
from sim.profile import dump_profile
from tests.pages import page


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[EmulatorSettings]:
    """What would have been served."""
    found: list[EmulatorSettings] = []
    monkeypatch.setattr(module, "run", lambda many, _: found.extend(many))
    return found


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(emulate)
    return CliRunner().invoke(app, arguments)


def test_four_figures_stand_for_a_profile(served: list[EmulatorSettings]) -> None:
    done = invoke("--slots", "4", "--ttft", "0.3", "--slowdown", "0.1", "--max-model-len", "2048")
    assert done.exit_code == 0, done.output
    [settings] = served
    assert settings.port == 8000
    assert settings.profile == plain_profile(slots=4, ttft_s=0.3, slowdown=0.1, max_model_len=2048)


def test_a_profile_by_file(served: list[EmulatorSettings], tmp_path: Path) -> None:
    profile = plain_profile(slots=3)
    (tmp_path / "mine.yaml").write_text(dump_profile(profile))
    done = invoke("--profile", str(tmp_path / "mine.yaml"), "--port", "8001", "--port", "8003")
    assert done.exit_code == 0, done.output
    assert [(settings.port, settings.profile) for settings in served] == [(8001, profile), (8003, profile)]


def test_a_port_given_twice_is_told(served: list[EmulatorSettings]) -> None:
    done = invoke("--port", "8001", "--port", "8001")
    assert done.exit_code == 2
    assert "--port 8001 is given twice" in " ".join(done.output.replace("│", " ").split())
    assert served == []
    assert invoke("--port", "0", "--port", "0").exit_code == 0


@pytest.mark.parametrize("option", ["--profile", "--fleet"])
def test_a_file_that_is_not_there_is_named(option: str, tmp_path: Path) -> None:
    done = invoke(option, str(tmp_path / "no.yaml"))
    assert done.exit_code == 1
    assert done.stderr == f"tidegate: {tmp_path}/no.yaml: no such file or directory\n"


@pytest.mark.parametrize(("port", "ports"), [("8001", [8001, 8002, 8003]), ("0", [0, 0, 0])])
def test_so_many_backends(served: list[EmulatorSettings], port: str, ports: list[int]) -> None:
    assert invoke("--port", port, "--backends", "3", "--fault", "cut,share=0.1").exit_code == 0
    assert [settings.port for settings in served] == ports
    assert {settings.faults for settings in served} == {(Fault(kind=FaultKind.CUT, share=0.1),)}


def test_the_fleet_of_the_page_is_right(tmp_path: Path) -> None:
    [example] = [block for block in page("emulator").blocks if "fleet" in block.marks]
    (tmp_path / "fleet.yaml").write_text(example.text)
    (tmp_path / "appliance.yaml").write_text(dump_profile(plain_profile()))
    many = read_fleet(tmp_path / "fleet.yaml", EmulatorSettings())
    assert [settings.port for settings in many] == [8001, 8002]


def test_a_fleet_by_file(served: list[EmulatorSettings], tmp_path: Path) -> None:
    profile = plain_profile(slots=3)
    (tmp_path / "mine.yaml").write_text(dump_profile(profile))
    (tmp_path / "fleet.yaml").write_text(
        "backends:\n"
        "  - {port: 8001, profile: mine.yaml}\n"
        "  - {port: 8002, profile: mine.yaml, models: [a, b], rtt_s: 0.5, faults: [{kind: die, seconds: 3}]}\n"
    )
    done = invoke("--fleet", str(tmp_path / "fleet.yaml"), "--speed", "2", "--model", "m")
    assert done.exit_code == 0, done.output
    one, other = served
    assert (one.port, one.models, one.rtt_s, one.faults) == (8001, ("m",), 0.0, ())
    assert (other.port, other.models, other.rtt_s) == (8002, ("a", "b"), 0.5)
    assert other.faults == (Fault(kind=FaultKind.DIE, seconds=3),)
    assert all((settings.speed, settings.profile) == (2.0, profile) for settings in served)


def test_a_longest_sequence_is_that_of_the_whole_fleet(
    served: list[EmulatorSettings], tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(dump_profile(plain_profile(slots=3)))
    (tmp_path / "fleet.yaml").write_text(
        "backends:\n  - {port: 0, profile: mine.yaml}\n  - {port: 0, profile: mine.yaml}\n"
    )
    done = invoke("--fleet", str(tmp_path / "fleet.yaml"), "--max-model-len", "512")
    assert done.exit_code == 0, done.output
    assert [settings.profile for settings in served] == [
        plain_profile(slots=3).model_copy(
            update={"limits": plain_profile(slots=3).limits.model_copy(update={"max_model_len": 512})}
        )
    ] * 2


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--port", "8001"), ("--backends", "1"), ("--profile", "mine.yaml"), ("--slots", "8")),
        *(("--ttft", "0.2"), ("--tpot", "0.02"), ("--slowdown", "0")),
    ],
)
def test_a_fleet_takes_no_option_that_its_file_decides(
    option: str, value: str, served: list[EmulatorSettings], tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(dump_profile(plain_profile()))
    (tmp_path / "fleet.yaml").write_text("backends:\n  - {port: 0, profile: mine.yaml}\n")
    done = invoke("--fleet", str(tmp_path / "fleet.yaml"), option, value)
    assert done.exit_code == 2
    words = " ".join(done.output.replace("│", " ").split())
    assert f"a fleet's file says what its backends are: no {option}" in words
    assert served == []


@pytest.mark.parametrize(
    ("second", "arguments", "place", "words"),
    [
        ("port: 8001", [], "fleet.yaml:4:12", "port 8001 is that of backends[0] already"),
        (
            "port: 8003",
            ["--max-model-len", "20000"],
            "fleet.yaml:4:5",
            "20000 tokens does not fit into a KV cache",
        ),
    ],
)
def test_what_backends_of_a_fleet_cannot_be_is_told_with_its_place(
    second: str,
    arguments: list[str],
    place: str,
    words: str,
    served: list[EmulatorSettings],
    tmp_path: Path,
) -> None:
    profile = plain_profile()
    limits = profile.limits.model_copy(update={"kv_tokens": 9600})
    (tmp_path / "small.yaml").write_text(dump_profile(profile.model_copy(update={"limits": limits})))
    (tmp_path / "mine.yaml").write_text(dump_profile(profile))
    (tmp_path / "fleet.yaml").write_text(
        "backends:\n"
        "  - {port: 8001, profile: mine.yaml}\n"
        "  - {port: 8002, profile: mine.yaml}\n"
        f"  - {{{second}, profile: small.yaml}}\n"
    )
    done = invoke("--fleet", str(tmp_path / "fleet.yaml"), *arguments)
    assert done.exit_code == 1
    assert place in done.output
    assert words in done.output
    assert served == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--slots", "0"], 2, "slots must be at least 1"),
        (["--tpot", "0"], 2, "no step is free"),
        (["--speed", "0"], 2, "speed must be above zero"),
        (["--profile", "mine.yaml", "--slots", "3"], 2, "no --slots"),
        (["--profile", "no-such-profile.yaml"], 1, "no-such-profile.yaml"),
        (["--fault", "explode"], 2, "'explode': kind"),
        (["--port", "1", "--port", "2", "--backends", "2"], 2, "either --port"),
        (["--port", "65535", "--backends", "2"], 2, "between 0 and 65535"),
        (["--fleet", "no-such-file.yaml"], 1, "no-such-file.yaml"),
    ],
)
def test_what_is_wrong_is_told(
    arguments: list[str], code: int, words: str, served: list[EmulatorSettings]
) -> None:
    done = invoke(*arguments)
    assert done.exit_code == code
    assert words in " ".join(done.output.replace("│", " ").split())
    assert served == []


def test_what_is_wrong_in_a_fleet_is_told_with_its_line(
    tmp_path: Path, served: list[EmulatorSettings]
) -> None:
    (tmp_path / "fleet.yaml").write_text("backends:\n  - {port: 8001, profil: a}\n")
    done = invoke("--fleet", str(tmp_path / "fleet.yaml"))
    assert done.exit_code == 1
    assert "fleet.yaml:2:" in done.output
    assert "profil" in done.output
    assert served == []


async def start(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sim.emulate"),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


@pytest.mark.e2e
async def test_the_process_says_where_it_listens_and_stops_on_request(tmp_path: Path) -> None:
    process = await start("--port", "0", "--model", "one", "--model", "two", "--speed", "100")
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode()
    url = line.removeprefix("listening on ").removesuffix(" as one, two\n")
    assert line != url
    async with aiohttp.ClientSession() as session:
        response = await session.get(f"{url}/v1/models")
        assert [row["id"] for row in (await response.json())["data"]] == ["one", "two"]
        taken = await start("--port", url.rpartition(":")[2])
        _, complaint = await taken.communicate()
        assert taken.returncode == 1
        port = url.rpartition(":")[2]
        said = f"tidegate: cannot listen on 127.0.0.1 port {port}: address already in use"
        assert complaint.decode() == f"{said}; choose another with --port\n"
        taken = await start("--port", "0", "--port", port, "--speed", "100")
        _, complaint = await taken.communicate()
        assert complaint.decode() == f"{said}; choose another with --port\n"
        (tmp_path / "mine.yaml").write_text(dump_profile(plain_profile()))
        fleet = tmp_path / "fleet.yaml"
        fleet.write_text(f"backends:\n  - {{port: {port}, profile: mine.yaml}}\n")
        taken = await start("--fleet", str(fleet))
        _, complaint = await taken.communicate()
        assert complaint.decode() == f"{said}; choose another in {fleet}\n"
    process.send_signal(signal.SIGTERM)
    _, complaint = await process.communicate()
    assert (process.returncode, complaint) == (0, b"")


@pytest.mark.e2e
async def test_a_signal_brings_back_who_died_for_good() -> None:
    process = await start("--port", "0", "--control")
    assert process.stdout is not None
    url = (await process.stdout.readline()).decode().split()[2]
    async with aiohttp.ClientSession() as session:

        async def listens() -> bool:
            try:
                await session.get(f"{url}/health")
            except aiohttp.ClientConnectionError:
                return False
            return True

        assert await listens()
        # It may be dead before it has answered.
        with suppress(aiohttp.ClientConnectionError):
            await session.post(f"{url}/emulator/fault", json={"kind": "die"})
        while await listens():
            pass
        process.send_signal(signal.SIGUSR1)
        while not await listens():
            pass
        assert await (await session.get(f"{url}/emulator/fault")).json() == []
    process.send_signal(signal.SIGTERM)
    _, complaint = await process.communicate()
    assert (process.returncode, complaint) == (0, b"")


@pytest.mark.e2e
@pytest.mark.parametrize("stream", [True, False])
async def test_the_process_resets_connections_that_it_cuts(stream: bool) -> None:
    """With its own event loop, which is not that of the other tests."""
    process = await start("--port", "0", "--speed", "100", "--fault", "cut")
    assert process.stdout is not None
    url = (await process.stdout.readline()).decode().split()[2]
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "stream": stream}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
    writer.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()
    process.send_signal(signal.SIGTERM)
    await process.communicate()


# The page about it


@pytest.mark.parametrize("command", [emulate, demo])
def test_every_option_is_documented(command: Callable[..., None]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "emulator.md").read_text()
    for name in inspect.signature(command).parameters:
        assert f"`--{name.replace('_', '-')}`" in page
