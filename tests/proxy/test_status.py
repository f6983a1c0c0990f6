from __future__ import annotations

import io
from random import Random
from typing import Any

import pytest
from rich.console import Console

from policies.adaptive import AdaptiveSlots
from policies.hedging import Hedging
from proxy.admin.http import state
from proxy.prices import Prices
from proxy.status import duration, line, screen
from tests.proxy.fakes import World, answer_body, whole


def shown(state: dict[str, Any], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, legacy_windows=False)
    console.print(screen(state, "127.0.0.1:8081", width))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(text.rstrip() for text in console.file.getvalue().splitlines())


def busy(slots: int = 4) -> tuple[World, dict[str, Any]]:
    """Two backends; the second one is down, one request runs on the first and one is done."""
    world = World("appliance", "nanjing", slots=slots)
    done = world.start(stream=False)
    world.answers(done, "appliance").data_received(whole(200, answer_body()))
    world.start()
    world.runtime.probes = lambda: {
        "nanjing": {"since_s": 35.0, "reason": "GET /health: no answer within 1 s", "misconfigured": []},
        "appliance": {"since_s": 90.0, "reason": "", "misconfigured": ["does not serve model x"]},
    }
    world.backend("nanjing").probed_up = False
    world.runtime.fleet.refresh(world.loop.now)
    return world, state(world.runtime, world.loop.now - 7500)


def test_one_screen_says_it_all() -> None:
    _, now = busy()
    text = shown(now)
    assert all(len(row) <= 80 for row in text.splitlines())
    rows = {row.split()[0]: row for row in text.splitlines() if row}
    assert rows["proxy"] == "proxy at 127.0.0.1:8081: ready, running for 2 h 5 min, policy test"
    for part in ("appliance (local)", "██░░░░░░░░ 0.25", "1/4", "up", " 1 ", "5"):
        assert part in rows["appliance"]
    for part in ("nanjing (away)", "0/4", "down"):
        assert part in rows["nanjing"]
    assert "! appliance: does not serve model x" in text
    assert "! nanjing: down: GET /health: no answer within 1 s, for 35 s" in text
    assert rows["queue"] == "queue     nobody waits"
    assert rows["requests"] == "requests  1: 1 ok, 0 turned away, 0 failed,"
    assert "          0 left by their client, 0 with errors of their client" in text
    assert rows["tokens"] == "tokens    7 in (0 cached), 5 out"
    assert rows["cost"] == "cost      <0.0001 EUR"
    assert "ledger" not in rows
    assert "reload" not in text


def test_no_cost_is_not_shown_as_a_figure() -> None:
    _, now = busy()
    for row in now["backends"]:
        row["cost"] = 0.0
    assert "cost      free, at a price of 0\n" in shown(now) + "\n"
    now["unpriced_tokens"] = 5
    assert "cost      free, at a price of 0, and 5 tokens without a price" in shown(now)
    now["unpriced_tokens"] = 12
    assert "cost      unpriced\n" in shown(now) + "\n"
    now["tokens"] = {"prompt": 0, "cached": 0, "completion": 0}
    assert "cost      nothing yet" in shown(now)
    now["unpriced_tokens"] = 0
    now["backends"][0]["cost"] = 1234.56789
    assert "cost      1,234.5679 EUR" in shown(now)


def test_a_backend_whose_models_are_unknown_is_told_once() -> None:
    world = World("appliance", "nanjing")
    reason = "GET /v1/models: 401: is its key right?"
    world.runtime.probes = lambda: {"nanjing": {"since_s": 9.0, "reason": "", "misconfigured": [reason]}}
    for backend in world.runtime.fleet:
        backend.models, backend.models_unknown = frozenset(), reason
    world.backend("appliance").models, world.backend("appliance").models_unknown = frozenset({"m"}), ""
    world.runtime.fleet.refresh(world.loop.now)
    now = state(world.runtime, 0.0)
    text = shown(now)
    assert text.count(reason) == 1
    assert f"! nanjing: models unknown: {reason}" in text
    assert "no models" in text
    assert now["ready"]
    assert [row["available"] for row in now["backends"]] == [True, False]

    world.backend("appliance").models = frozenset()
    world.runtime.fleet.refresh(world.loop.now)
    assert "not ready: no backend serves any model" in shown(state(world.runtime, 0.0))


def test_a_reload_that_was_refused_is_told() -> None:
    world, _ = busy()
    world.runtime.observer.reload_ok = False
    assert "! the last reload was refused" in shown(state(world.runtime, 0.0))


def test_standbys_are_shown_with_where_they_are_and_why() -> None:
    _, now = busy()
    ready = {
        "run": "1",
        "since_s": 300.0,
        "pinned": False,
        "pause_s": 0.0,
        "trouble": "",
        "reason": "it answers",
    }
    now["standbys"] = [
        {**ready, "name": "a", "state": "ready"},
        {**ready, "name": "b", "state": "standby", "run": "", "reason": ""},
        {
            **ready,
            "name": "c",
            "state": "failed",
            "pause_s": 40.0,
            "reason": "it ended with exit code 1:\nkey: x",
        },
        {**ready, "name": "d", "state": "starting", "pinned": True, "trouble": "the disk is full"},
    ]
    text = shown(now)
    for said in (
        "standby   a: ready for 5 min: it answers\n",
        "standby   b: never started\n",
        "standby   c: failed for 5 min, tried again in 40 s: it ended with exit code 1:\n",
        "standby   d: starting for 5 min, by hand: the disk is full\n",
    ):
        assert said in text
    assert "key: x" not in text


def test_a_certificate_that_ends_soon_is_told() -> None:
    _, state = busy()
    said = "certificate api.pem expires in 5 days"
    assert said not in shown(state)
    state["certificates"] = [{"warning": said}, {"warning": ""}]
    assert shown(state).count("! ") == shown({**state, "certificates": []}).count("! ") + 1
    assert f"! {said}" in shown(state)


def test_who_waits_and_what_went_wrong_is_shown() -> None:
    world, _ = busy(slots=1)
    world.start()
    world.start(model="unknown")
    world.wait(2.0)
    world.runtime.ledger.failed = "disk is full"  # type: ignore[misc]
    text = shown(state(world.runtime, world.loop.now - 5))
    assert "not ready: usage cannot be recorded: disk is full" in text
    assert "queue     1 held, the first for 2.0 s (default 1)" in text
    assert "errors    model_not_found 1" in text
    assert "rows are not" not in text
    assert "ledger    FAILED: disk is full" in text


def test_a_ledger_that_falls_behind_is_shown() -> None:
    _, now = busy()

    def said(rows: int, oldest_s: float, trouble: str = "") -> str:
        ledger = {"lag_rows": rows, "oldest_s": oldest_s, "trouble": trouble, "failed": ""}
        return next(
            (row for row in shown({**now, "ledger": ledger}, 120).splitlines() if "ledger " in row), ""
        )

    assert said(5, 0.5) == ""
    assert said(0, 0.0, "refused") == "", "it comes before the next rows do"
    assert said(5000, 0.5) == "ledger    5,000 rows are not in the database yet, the oldest for 0.5 s"
    assert said(12, 25.0) == "ledger    12 rows are not in the database yet, the oldest for 25 s"
    told = "ledger    1 row is not in the database yet, the oldest for 0.1 s: connection refused"
    assert said(1, 0.1, "connection refused") == told, "as soon as one try has failed"


def test_keys_that_cannot_be_read_are_told() -> None:
    world, _ = busy()
    assert "keys" not in shown(state(world.runtime, 0.0))
    world.runtime.keys.trouble = "connection refused"
    assert "! keys cannot be read, no new or revoked one is seen: connection refused" in shown(
        state(world.runtime, 0.0), 120
    )


def test_a_restart_that_is_owed_is_told() -> None:
    world, _ = busy()
    assert "restart" not in shown(state(world.runtime, 0.0))
    world.runtime.observer.restart_for = ["listen", "database"]
    said = "! a restart is owed: what the file says of listen, database is not in force yet"
    assert said in shown(state(world.runtime, 0.0))


def test_adaptive_slots_and_hedges_are_shown_where_they_are_on() -> None:
    world, now = busy(slots=8)
    assert "adaptive " not in shown(now)
    assert "hedges " not in shown(now)
    world.backend("appliance").adaptive = AdaptiveSlots(Random(1), 6.0)
    world.runtime.hedging = Hedging()
    world.runtime.observer.hedges = {"won": 1200, "lost": 3}
    text = shown(state(world.runtime, 0.0))
    assert "adaptive  appliance: 6 of 8 slots\n" in text
    assert "hedges    1,200 won, 3 lost, 0 failed, 0 not made for want of budget" in text
    found = {"slots": 6, "minimum_ttft_s": 0.214, "measuring": True}
    now["backends"][0]["adaptive"] = found
    assert (
        "adaptive  appliance: 6 of 8 slots, first token after 0.21 s at the least, measures that now with few in "
        "flight"
    ) in shown(now, 130)


def test_a_proxy_of_the_version_before_is_understood() -> None:
    """Between the installation and the restart."""
    _, now = busy()
    for name in ("restart_for", "keys", "hedging"):
        del now[name]
    for row in now["backends"]:
        del row["adaptive"]
    now["ledger"] = {"lag_rows": 5000, "failed": ""}
    assert "5,000 rows are not in the database yet" in shown(now)


def test_spill_is_told_by_tier() -> None:
    _, now = busy()
    entry = {
        "rule": "local first",
        "tier": 0,
        "backends": ["appliance"],
        "open": True,
        "openings": 1,
        "saturation": 1.0,
        "moved_s_ago": 12.0,
    }
    text = shown({**now, "spill": [entry, {**entry, "open": False, "moved_s_ago": None, "openings": 0}]})
    assert "spill     OPEN for 12 s, opened 1 time: appliance (tier 1 of 'local first')" in text
    assert "spill     closed, opened 0 times: appliance (tier 1 of 'local first')" in text
    assert "spill     no request has met a tier with thresholds yet" in shown(now)


def test_plans_that_wait_and_budgets_are_told() -> None:
    _, now = busy()
    assert "plans" not in shown(now)
    budget = {
        "scope": "site",
        "name": "nanjing",
        "budget": 100.0,
        "used": 91.5,
        "ratio": 0.915,
        "currency": "CNY",
    }
    month = budget | {"scope": "month", "name": ""}
    now["plans"] = {"waiting": 2, "budgets": [budget, month], "trouble": "it cannot be written\nfor long"}
    text = shown(now)
    assert "! plans: it cannot be written\n" in text
    assert "plans     2 wait: tidegate plans list\n" in text
    assert "budget    site nanjing: 91.50 of 100.00 CNY used, 92%\n" in text
    assert "budget    month: 91.50 of" in text
    now["plans"] |= {"waiting": 1}
    assert "plans     1 waits:" in shown(now)


def test_hosts_are_told_with_their_age_and_what_is_wrong() -> None:
    _, now = busy()
    assert "host " not in shown(now)
    figures = {"gpu_utilisation": 0.874, "gpu_temperature": 71.0, "gpu_power": 300.4, "cpu": 0.3}
    fresh = {**figures, "age_s": 2.0, "reasons": {"node": "GET /metrics: 503"}}
    text = shown({**now, "hosts": {"home": fresh, "away": {"age_s": None, "reasons": {}}}})
    assert "host      home: GPU 87%, 71 °C, 300 W, CPU 30%\n          ! node: GET /metrics: 503" in text
    assert "host      away: nothing yet" in text
    assert "CPU 30% (40 s ago, ignored)" in shown({**now, "hosts": {"home": {**fresh, "age_s": 40.0}}})


def test_names_of_people_are_no_markup() -> None:
    _, now = busy()
    now["backends"][0]["unavailable"] = "down: [red]x[/red]"
    assert "! appliance: down: [red]x[/red]" in shown(now)


def test_a_wide_terminal_has_longer_bars() -> None:
    _, now = busy()
    assert "████████" in shown(now, 120)


def test_the_line_for_a_log() -> None:
    _, now = busy()
    assert line(now) == (
        "appliance 0.25 (1/4)  nanjing 0.00 (0/4)  spill closed  0 held  1 requests, 0 turned away, 0 failed"
    )


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.26, "0.3 s"),
        (35.4, "35 s"),
        (119.0, "119 s"),
        (120.0, "2 min"),
        (3 * 3600 + 5 * 60, "3 h 5 min"),
        (98 * 3600 + 59, "4 d 2 h"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_tokens_without_a_price_are_counted() -> None:
    world = World("appliance")
    world.runtime.prices = Prices({}, "EUR")
    world.answers(world.start(stream=False), "appliance").data_received(whole(200, answer_body()))
    found = state(world.runtime, world.loop.now)
    assert found["unpriced_tokens"] == 12
    assert "cost      unpriced" in shown(found)
