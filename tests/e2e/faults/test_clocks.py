"""A clock that is set, an hour forth and two back, while the proxy runs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.emulator_process import EmulatorProcess
from tests.e2e.faults.conftest import Serve
from tests.e2e.faults.figures import Figure
from tests.e2e.faults.streams import Clients, Heard, ask, until
from tests.e2e.proxy_fixtures import eventually

pytestmark = pytest.mark.e2e

FOUND_AT = ("/usr/lib/*/faketime/libfaketimeMT.so.1", "/usr/lib/faketime/libfaketimeMT.so.1")
JUMPS = ("+3600", "-3600")


@pytest.fixture
def library() -> Path:
    """The library that stands between a program and the clock."""
    found = [path for pattern in FOUND_AT for path in Path("/").glob(pattern[1:])]
    if not found:
        pytest.skip("NOT RUN: there is no libfaketime here; `apt-get install faketime` installs it")
    return found[0]


def set_clock(file: Path, offset: str) -> None:
    """Seconds from the true time; in one step, as the file is read all the time."""
    fresh = file.with_suffix(".new")
    fresh.write_text(offset + "\n")
    fresh.replace(file)


async def test_f26_a_clock_that_jumps_harms_nobody(
    library: Path, engine: EmulatorProcess, serve: Serve, tmp_path: Path, figure: Figure
) -> None:
    clock = tmp_path / "clock"
    set_clock(clock, "+0")
    environment = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    probing = {"interval": "100ms", "timeout": "90ms"}
    proxy = await serve(*engine.sections(slots=16), environment=environment, probing=probing)
    key = (
        await asyncio.to_thread(
            proxy.run,
            "keys",
            "create",
            "--tenant",
            "t",
            "--expires",
            "2h",
            "--rpm",
            "1000",
            "--tpm",
            "1000000",
        )
    ).strip()
    lines = (f"authorization: Bearer {key}",)

    async def key_is_wanted() -> bool:
        return (await ask(proxy.port)).status == 401

    await until(key_is_wanted)  # it looks for new keys twice a second
    heard: list[Heard] = []
    for jump in JUMPS:
        clients = Clients(proxy.port)
        for _ in range(4):
            clients.stream(50, *lines)
        await eventually(lambda clients=clients: all(one.tokens for one in clients.heard))
        set_clock(clock, jump)
        for _ in range(10):
            clients.start(*lines, max_tokens=3, ignore_eos=True)
        heard += await clients.ended()
    assert [one.status for one in heard] == [200] * len(heard)
    streams = [one for one in heard if "text/event-stream" in one.fields["content-type"]]
    assert [(one.done, one.tokens) for one in streams] == [(True, 50)] * 4 * len(JUMPS)
    assert (await asyncio.to_thread(proxy.state))["backends"][0]["available"]
    rows: list[dict[str, Any]] = []
    async with asyncio.timeout(10):
        while len(rows) < len(heard):
            rows = [row for row in await asyncio.to_thread(proxy.export) if row["tenant"] == "t"]
    assert {row["op"] for row in rows} == {one.id for one in heard}
    arrived = [row["arrived"] for row in rows]
    assert max(arrived) - min(arrived) > 7000, "the clock has jumped"
    for row in rows:
        assert row["outcome"] == "ok"
        assert 0 <= row["queue_s"] <= row["total_s"] < 60
        assert 0 <= (row["ttft_s"] or 0.0) <= row["total_s"]
        assert row["overhead_s"] >= 0
    figure("F26", 0, f"of {len(heard)} requests refused, cut or of negative duration, in {len(JUMPS)} jumps")
