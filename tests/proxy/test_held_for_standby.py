"""Requests that are held for a standby: what their clients hear, and what the proxy says of them."""

from __future__ import annotations

import io
from typing import Any, cast

import orjson
import pytest
from aiohttp.test_utils import TestClient, TestServer
from rich.console import Console

from policies.base import Send
from policies.standby import State as Where
from proxy.admin.explain import explanation
from proxy.admin.http import admin_app, state, unready
from proxy.admin.whatif import Asked, Running, what_if
from proxy.config import Config
from proxy.exchange import Exchange, State
from proxy.explain import render, render_what_if
from proxy.heartbeat import HEARTBEAT
from proxy.idle import Imagined
from proxy.openai import read_body
from proxy.scaling.service import Surroundings
from proxy.status import screen
from tests.proxy.fakes import World, answer_body, client_of, read, whole
from tests.proxy.test_heartbeat import ANSWER

BODY = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}]})


class Manager:
    """Starts nothing, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def wanted(self) -> None:
        self.asked += 1

    def answered(self, name: str) -> None: ...

    def condition(self, name: str) -> str:
        return "starting for 12 s"


def asleep(*names: str, **options: Any) -> World:
    """A proxy whose backends all are standbys that sleep."""
    w = World(*(names or ("z",)), **options)
    for backend in w.runtime.fleet:
        w.runtime.fleet.put(backend.name, w.loop.now, asleep=True)
    w.runtime.scaling = Manager()
    return w


def wake(w: World, name: str = "z") -> None:
    w.runtime.fleet.put(name, w.loop.now, asleep=False)
    w.runtime.poll(w.loop.now)


def sweep(w: World, seconds: float) -> None:
    w.loop.now += seconds
    w.loop.run_due()
    w.runtime.sweep(w.loop.now)


def asked(w: World) -> int:
    return cast("Manager", w.runtime.scaling).asked


def test_a_stream_gets_heartbeats_and_then_its_answer() -> None:
    w = asleep(timeouts={"heartbeat": 3.0})
    exchange = w.start()
    assert (exchange.state, asked(w)) == (State.HELD, 1)
    for _ in range(4):
        sweep(w, 3.0)
    assert client_of(exchange).out.count(HEARTBEAT) == 4
    wake(w)
    w.connects("z").data_received(ANSWER)
    found = read(exchange)
    assert (found.status, found.text, found.done) == (200, "x", True)
    assert exchange.row.queue_s == 12.0
    assert exchange.row.reason.startswith("waited for a standby: ")
    assert asked(w) == 1


def test_one_that_is_no_stream_hears_nothing_until_its_answer() -> None:
    w = asleep(timeouts={"heartbeat": 3.0})
    exchange = w.start(stream=False)
    for _ in range(4):
        sweep(w, 3.0)
    assert client_of(exchange).out == b""
    wake(w)
    w.connects("z").data_received(whole(200, answer_body()))
    found = read(exchange)
    assert found.status == 200
    assert found.fields["x-tidegate-reason"].startswith("waited for a standby: ")


def test_what_is_held_for_room_starts_nothing_at_once() -> None:
    w = World("a", slots=1)
    w.runtime.scaling = Manager()
    w.start()
    assert w.start().state is State.HELD
    assert asked(w) == 0


def test_a_client_that_leaves_is_forgotten() -> None:
    w = asleep()
    exchange = w.start()
    exchange.client_gone()
    assert (w.runtime.held, w.runtime.valve.queued) == ({}, 0)
    wake(w)
    assert w.runtime.fleet["z"].in_flight == 0


def test_a_stop_tells_those_who_wait() -> None:
    w = asleep()
    exchange = w.start(stream=False)
    exchange.stop()
    assert (read(exchange).status, exchange.row.code) == (503, "shutting_down")
    assert w.runtime.valve.queued == 0


@pytest.mark.parametrize("beats", [False, True], ids=["nothing said", "stream promised"])
def test_a_wait_that_ends_says_that_a_standby_was_to_be_started(beats: bool) -> None:
    w = asleep(timeouts={"heartbeat": 100.0} if beats else {})
    exchange = w.start()
    for _ in range(30):
        sweep(w, 10.0)
    message = "standby z was to be started for it, and was not ready in time"
    found = read(exchange)
    if beats:
        assert (found.errors, message in found.body.decode()) == (["queue_timeout"], True)
    else:
        assert (found.status, found.error["message"]) == (503, message)
        assert int(found.fields["retry-after"]) >= 1


def test_state_and_status_tell_of_standbys() -> None:
    w = asleep("z", "y")
    w.start()
    now = state(w.runtime, w.loop.now)
    assert now["ready"]
    assert [row["asleep"] for row in now["backends"]] == [True, True]
    assert now["queue"]["for_standbys"] == [
        {"standbys": ["y", "z"], "waiting": 1, "tokens": pytest.approx(1, abs=1e4)}
    ]
    console = Console(file=io.StringIO(), width=80)
    console.print(screen(now, "here", 80))
    text = cast("io.StringIO", console.file).getvalue()
    assert "standby   z: starting for 12 s" in text
    assert "1 held for y or z" in text
    assert "! " not in text
    wake(w)
    assert not any(row["asleep"] for row in state(w.runtime, 0.0)["backends"] if row["name"] == "z")


def test_one_that_is_gone_and_cannot_be_taken_out_gets_nothing_new_wherever_it_is() -> None:
    w = World("z", "y")
    around, fleet = Surroundings(w.runtime), w.runtime.fleet
    z = fleet["z"]
    z.standby = True
    around.put("z", Where.READY)
    around.drain("z")
    for place in Where:
        around.put("z", place)
        for up in (True, False):
            z.probed(up, w.loop.now)
            fleet.refresh(w.loop.now)
            assert not z.available
            assert not z.awaited
    z.probed(True, w.loop.now)
    around.begin_anew()
    around.put("z", Where.READY)
    assert z.available


async def test_a_proxy_whose_backends_all_sleep_is_ready_and_says_so() -> None:
    w = asleep()
    async with TestClient(TestServer(admin_app(w.runtime, 0.0))) as client:
        async with client.get("/readyz") as response:
            assert response.status == 200
            assert await response.json() == {
                "status": "ready",
                "reason": "no backend runs: requests are held for standbys: z (starting for 12 s)",
            }
        wake(w)
        async with client.get("/readyz") as response:
            assert await response.json() == {"status": "ready", "reason": ""}
        w.runtime.fleet.put("z", w.loop.now, asleep=False, draining=True)
        async with client.get("/readyz") as response:
            assert response.status == 503
    assert unready(w.runtime) == "no backend is available"


def test_nobody_waits_for_a_standby_whose_budget_is_used_up() -> None:
    w = asleep("z", "y")
    for name in "zy":
        assert unready(w.runtime) == ""
        w.runtime.fleet[name].over_budget = True
    assert unready(w.runtime) == "no backend is available"
    said = {row["name"]: row["unavailable"] for row in state(w.runtime, 0.0)["backends"]}
    assert said == dict.fromkeys("zy", "its budget for this month is used up")


def test_models_of_standbys_are_listed() -> None:
    assert list(asleep().runtime.models(None)) == ["m"]


def test_explain_tells_for_whom_it_waited() -> None:
    w = asleep()
    exchange = w.start()
    wake(w)
    w.connects("z").data_received(ANSWER)
    (record,) = w.runtime.observer.recent
    shown = explanation(w.runtime, record)
    assert shown["decisions"][0]["decided_by"] == "standby"
    text = render(shown)
    assert "because: no backend runs that may serve it; waiting for standby z" in text
    assert "because: waited for a standby: " in text
    assert exchange.routings[-1].decided_by != "standby"


def test_explaining_a_request_tells_for_whom_it_would_wait() -> None:
    w = asleep()
    body = read_body("chat", BODY)
    shown = what_if(Running(w.runtime), body, Asked())
    assert shown["queue"] == {"waiting": 0, "until_s": 300.0, "standbys": {"z": "starting for 12 s"}}
    assert shown["decisions"][0]["others"] == {"z": "a standby, starting for 12 s"}
    text = render_what_if(shown)
    assert "now: held for up to 300 s; nobody waits yet" in text
    assert "no backend runs that may serve it; standby z: starting for 12 s" in text
    assert asked(w) == 0
    assert w.runtime.valve.queued == 0


def test_without_a_proxy_standbys_are_taken_to_sleep() -> None:
    command = {"command": {"command": ["/bin/true"]}}
    config = Config.model_validate(
        {"backends": [{"name": "z", "url": "http://z.test", "models": ["m"], "standby": command}]}
    )
    imagined = Imagined(config, "m")
    assert imagined.notes[-1] == "taken to sleep, being standbys: z"
    shown = what_if(imagined, read_body("chat", BODY), Asked())
    assert shown["queue"]["standbys"] == {"z": "not running"}


def test_a_backend_that_runs_is_taken_while_standbys_sleep() -> None:
    w = asleep("z", "y")
    wake(w, "y")
    exchange: Exchange = w.start()
    assert isinstance(exchange.routings[0].decision, Send)
    assert exchange.routings[0].decision.backend == "y"
