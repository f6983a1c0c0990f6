from __future__ import annotations

import io
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from ruamel.yaml import YAML

from proxy.config import load_config
from proxy.demo_fleet import (
    FLEET,
    HOST,
    DemoError,
    DemoSettings,
    afterwards,
    choose_port,
    configuration,
    emulate_arguments,
    greeting,
    start_fleet,
)
from proxy.demo_traffic import ANSWER_TOKENS, MEAN_ANSWER_TOKENS, PROFILE, Served, Traffic, rate_at, rush_hour
from proxy.demo_view import View, percentile, sparkline
from tests.proxy.demo_with_fakes import LISTENING, python

# The fleet


def test_a_taken_port_is_named_with_the_flag_that_changes_it() -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(DemoError, match=rf"port {port} .*--admin-port"):
            choose_port(port, "--admin-port")


def test_port_zero_is_a_free_one() -> None:
    port = choose_port(0, "--port")
    assert port > 0
    assert choose_port(port, "--port") == port


def test_the_configuration_is_one_that_the_proxy_reads(tmp_path: Path) -> None:
    urls = {backend.name: f"http://127.0.0.1:{9000 + number}" for number, backend in enumerate(FLEET)}
    file = tmp_path / "tidegate.yaml"
    with file.open("w") as out:
        YAML(typ="safe").dump(configuration(18080, 18081, tmp_path / "state", urls), out)
    config = load_config(file)
    assert [(backend.name, backend.url, backend.site, backend.slots) for backend in config.backends] == [
        (backend.name, urls[backend.name], backend.site, backend.slots) for backend in FLEET
    ]
    assert {backend.site for backend in config.backends} - {"local"} == set(config.sites)
    assert config.listen == "127.0.0.1:18080"
    assert config.admin == "127.0.0.1:18081"
    assert config.ledger_currency == "CNY"


def test_the_local_backend_is_the_first_and_the_smallest() -> None:
    local, *remote = FLEET
    assert local.site == "local"
    assert all(backend.site != "local" and backend.slots > local.slots for backend in remote)
    # The rush hour exceeds what is local by far, and fits the fleet.
    peak = max(multiple for _, multiple in PROFILE) * local.capacity(MEAN_ANSWER_TOKENS)
    assert peak < sum(backend.capacity(MEAN_ANSWER_TOKENS) for backend in FLEET)


def test_arguments_of_an_emulated_backend() -> None:
    arguments = emulate_arguments(FLEET[1], seed=7)
    assert arguments[:2] == ["--port", "0"]
    assert arguments[arguments.index("--rtt") + 1] == str(FLEET[1].rtt_s)
    assert arguments[-2:] == ["--seed", "7"]


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"emulate": LISTENING, "serve": python("raise SystemExit('no')")}, "proxy ended with code 1:\n  no"),
        ({"emulate": python("raise SystemExit('broken')")}, "appliance ended with code 1:\n  broken"),
    ],
)
async def test_a_process_that_ends_at_the_start_is_quoted(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    async with AsyncExitStack() as stack:
        with pytest.raises(DemoError, match=words):
            await start_fleet(DemoSettings(port=0, admin_port=0, **settings), stack, tmp_path)


@pytest.mark.e2e
async def test_what_is_kept_can_be_simulated(tmp_path: Path) -> None:
    ends = {"emulate": LISTENING, "serve": python("raise SystemExit('no')")}
    async with AsyncExitStack() as stack:
        with pytest.raises(DemoError, match="proxy ended"):
            await start_fleet(DemoSettings(0, 0, tmp_path / "kept", **ends), stack, tmp_path)
        kept = tmp_path / "kept" / "demo.yaml"
        assert load_config(kept).state == tmp_path / "kept"
        assert f"simulate --from-ledger 1h --config {kept} --policy" in afterwards(kept)
        with pytest.raises(DemoError, match=r"demo\.yaml cannot be written \(.*; choose another --state"):
            await start_fleet(DemoSettings(0, 0, kept, **ends), stack, tmp_path)


def test_the_greeting_names_everything_one_needs() -> None:
    text = greeting("http://127.0.0.1:1", "http://127.0.0.1:2", Path("/tmp/x/tidegate.yaml"))
    assert "curl -N http://127.0.0.1:1/v1/chat/completions" in text
    assert 'base_url="http://127.0.0.1:1/v1"' in text
    assert "curl -s http://127.0.0.1:2/state" in text
    assert "usage --by backend --config /tmp/x/tidegate.yaml" in text
    assert all(backend.name in text for backend in FLEET)


# The rush hour


def test_the_rate_climbs_and_comes_back() -> None:
    assert rate_at(0.0) == rate_at(0.1) == rate_at(0.9) == rate_at(1.0) == 0.5
    assert rate_at(0.5) == 4.0
    assert 0.5 < rate_at(0.3) < rate_at(0.34) < 4.0
    assert 0.5 < rate_at(0.75) < rate_at(0.7) < 4.0


def test_one_seed_is_one_rush_hour() -> None:
    assert rush_hour(60, 2.0, seed=1) == rush_hour(60, 2.0, seed=1)
    assert rush_hour(60, 2.0, seed=1) != rush_hour(60, 2.0, seed=2)


def test_arrivals_follow_the_rate() -> None:
    arrivals = [arrival for seed in range(40) for arrival in rush_hour(60, 2.0, seed)]
    area = sum((right - left) * (low + high) / 2 for (left, low), (right, high) in pairwise(PROFILE))
    expected = 40 * 60 * 2.0 * area
    assert abs(len(arrivals) - expected) < 4 * expected**0.5
    at_peak = sum(0.35 <= arrival.at_s / 60 < 0.65 for arrival in arrivals)
    assert abs(at_peak - 40 * 18 * 8.0) < 4 * (40 * 18 * 8.0) ** 0.5
    assert all(ANSWER_TOKENS[0] <= arrival.max_tokens <= ANSWER_TOKENS[1] for arrival in arrivals)
    assert abs(sum(arrival.max_tokens for arrival in arrivals) / len(arrivals) - MEAN_ANSWER_TOKENS) < 2


@given(st.floats(1, 100), st.floats(0.1, 20), st.integers(0, 1000))
def test_arrivals_come_in_order_and_in_time(duration: float, capacity: float, seed: int) -> None:
    times = [arrival.at_s for arrival in rush_hour(duration, capacity, seed)]
    assert times == sorted(times)
    assert all(0 < at < duration for at in times)


ENDINGS: dict[str, tuple[int, bytes]] = {
    "good": (200, b'data: {"choices":[]}\n\ndata: [DONE]\n\n'),
    "cut": (200, b'data: {"choices":[]}\n\n'),
    "error": (200, b'data: {"choices":[]}\n\ndata: {"error":{"code":"upstream"}}\n\n'),
    "full": (503, b'{"error":{}}'),
    "limited": (429, b'{"error":{}}'),
    "broken": (502, b'{"error":{}}'),
}


@asynccontextmanager
async def scripted() -> AsyncIterator[str]:
    """A server that ends request number i in the way number i of ENDINGS; further ones are cut off."""
    ways = list(ENDINGS.items())

    async def answer(request: web.Request) -> web.StreamResponse:
        if not ways:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        name, (status, body) = ways.pop(0)
        return web.Response(status=status, body=body, headers={"x-tidegate-backend": name})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, HOST, 0).start()
    try:
        yield f"http://{HOST}:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_each_request_is_served_turned_away_or_failed() -> None:
    arrivals = rush_hour(0.3, 40.0, seed=0)[: len(ENDINGS) + 1]
    assert len(arrivals) == len(ENDINGS) + 1
    async with scripted() as url:
        traffic = Traffic(url, "demo", arrivals)
        await traffic.run()
    by_way = {record.backend: record for record in traffic.served}
    assert [name for name, record in by_way.items() if record.complete] == ["good"]
    assert {name for name, record in by_way.items() if record.turned_away} == {"full", "limited"}
    assert {name for name, record in by_way.items() if record.failed} == {"cut", "error", "broken", ""}
    assert {name for name, record in by_way.items() if record.ttft_s is not None} == {"good", "cut", "error"}
    assert by_way[""].status == 0
    assert all(record.done for record in traffic.served)


# The view


def test_percentiles() -> None:
    assert percentile([], 0.5) is None
    assert percentile([3.0], 0.95) == 3.0
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.0
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.95) == 4.0


def test_sparklines() -> None:
    assert sparkline([], 10) == ""
    assert sparkline([0.0, 0.5, 1.0], 10) == "▁▅█"
    assert sparkline([0.0] * 50 + [1.0] * 50, 10) == "▁▁▁▁▁█████"


@given(st.lists(st.floats(0, 1), max_size=300), st.integers(1, 100))
def test_a_sparkline_fits_its_cells(shares: list[float], cells: int) -> None:
    assert len(sparkline(shares, cells)) == min(len(shares), cells)


def row(name: str, site: str, **values: Any) -> dict[str, Any]:
    return {
        "name": name,
        "site": site,
        "available": True,
        "probed_up": True,
        "breaker": "closed",
        "in_spite": False,
        "slow_start": False,
        "draining": False,
        "models": ["demo"],
        "in_flight": 0,
        "slots": 4,
        "saturation": 0.0,
        "waiting": 0,
        "completion_tokens": 0,
        "cost": 0.0,
        **values,
    }


class FixedTraffic(Traffic):
    """A rush hour at one moment of it."""

    at_s = 0.0

    def now_s(self) -> float:
        return self.at_s


def make_view() -> tuple[View, FixedTraffic]:
    traffic = FixedTraffic("http://unused", "demo", rush_hour(60, 2.0, seed=0))
    return View(traffic, "CNY"), traffic


def state(**values: Any) -> dict[str, Any]:
    return {
        "backends": [
            row("appliance", "local", in_flight=4, saturation=1.25, waiting=1, completion_tokens=900),
            row(
                "nanjing",
                "nanjing",
                in_flight=12,
                slots=12,
                completion_tokens=400,
                cost=0.0032,
                probed_up=False,
            ),
        ],
        "queue": {"waiting": 3, "oldest_s": 0.25},
        "hosts": {},
        "spill": [{"rule": "all", "tier": 0, "open": True, "openings": 2}],
        "tokens": {"prompt": 10, "cached": 0, "completion": 1300},
        **values,
    }


def shown(view: View, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, legacy_windows=False)
    console.print(view.table(width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_live_view_fits_eighty_columns() -> None:
    view, traffic = make_view()
    traffic.served = [
        Served(1.0, "appliance", 0.2, 200, complete=True, done=True),
        Served(1.0, "nanjing", 0.4, 200, complete=True, done=True),
        Served(2.0, "appliance", 0.3, 200),
    ]
    traffic.at_s = 1.0
    view.sample(state() | {"backends": [row("appliance", "local"), row("nanjing", "nanjing")]})
    traffic.at_s = 6.0
    view.sample(state())
    text = shown(view, 80)
    assert all(len(line) <= 80 for line in text.splitlines())
    appliance, nanjing = (
        next(line for line in text.splitlines() if name in line) for name in ("appliance", "nanjing")
    )
    for part in ("appliance (local)", "██████ 1.25", "4/4", "50 %", "up", "0.20/0.30", "180"):
        assert part in appliance
    for part in ("12/12", "down", "0.40/0.40", "80", "0.0032"):
        assert part in nanjing
    assert "spill OPEN, 3 held, the oldest for 0.2 s" in text
    assert "spilled ▁▇" in text
    assert "3 sent, 2 done, 0 turned away, 0 failed; 6 of" in text


def test_the_live_view_before_the_first_sample() -> None:
    view, _ = make_view()
    assert "0 sent" in shown(view, 80)
    assert "0 sent" in view.line()
    assert "of 0 requests" in view.summary()


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"draining": True}, "draining"),
        ({"probed_up": False}, "down"),
        ({"breaker": "open", "available": False}, "breaker open"),
        ({"breaker": "open", "available": False, "in_spite": True}, "used in spite"),
        ({"slow_start": True}, "slow start"),
        ({"available": False}, "away"),
        ({"models": [], "available": False}, "no models"),
    ],
)
def test_the_state_of_a_backend(values: dict[str, Any], word: str) -> None:
    view, _ = make_view()
    view.sample(state() | {"backends": [row("appliance", "local", **values)]})
    assert word in shown(view, 120)


def test_the_line_for_a_log() -> None:
    view, traffic = make_view()
    traffic.at_s = 6.0
    view.sample(state())
    assert view.line() == (
        "  6.0 s  appliance 1.25 (4/4)  nanjing 0.00 (12/12)  spill OPEN  0 sent, 0 done, 0 turned away, 0 failed"
    )


def test_the_summary_adds_up() -> None:
    view, traffic = make_view()
    view.sample(state())
    good = {"status": 200, "complete": True, "done": True}
    traffic.served = [
        *(Served(0.0, "appliance", 0.2, **good) for _ in range(6)),
        *(Served(0.0, "nanjing", 0.5, **good) for _ in range(2)),
        Served(0.0, status=503, done=True),
        Served(0.0, "nanjing", 0.5, status=200, done=True),
    ]
    assert view.summary().splitlines() == [
        "of 10 requests 60 % local, 20 % spilled (nanjing 20 %), 1 turned away, 1 failed",
        "TTFT p50/p95 s: appliance 0.20/0.20, nanjing 0.50/0.50",
        "1300 tokens for 0.0032 CNY; spill opened 2 times",
    ]
