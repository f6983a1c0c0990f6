"""The provider `webhook`, against an endpoint that does, begins, refuses, fails and recovers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from policies.units import BadValueError
from proxy.scaling.calls import Caller
from proxy.scaling.facts import Facts
from proxy.scaling.images import Launch
from proxy.scaling.keeper import STATUS_S
from proxy.scaling.provider import Presence, ProviderError
from proxy.scaling.sections import StandbySection
from proxy.scaling.webhook import WebhookProvider
from tests.proxy.scaling.endpoint import Endpoint, Pauses, endpoint

FACTS = Facts("nj", "http://10.0.0.7:8000", ["m"], "nanjing")


def provider(server: Endpoint, **section: Any) -> WebhookProvider:
    pauses = Pauses()
    given = StandbySection.model_validate({"webhook": {"url": server.url}, **section})
    return WebhookProvider(
        given, FACTS, Caller(clock=pauses.clock, sleep=pauses), clock=pauses.clock, sleep=pauses
    )


async def test_what_is_asked() -> None:
    async with endpoint() as server:
        one = provider(server)
        await one.start("r1")
        await one.close()
    assert server.asked[0].body == {
        "operation": "start",
        "standby": "nj",
        "run": "r1",
        "url": "http://10.0.0.7:8000",
        "models": ["m"],
        "site": "nanjing",
    }


async def test_a_start_is_one_message_however_often_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK", "a-secret-of-16-b")
    async with endpoint() as server:
        section = StandbySection.model_validate({"webhook": {"url": server.url, "secret_env": "HOOK"}})
        for run in ("r1", "r1", "r2"):  # a new process each time
            one = WebhookProvider(section, FACTS)
            await one.start(run)
            await one.stop(run)
            await one.close()
    ids = [asked.headers["webhook-id"] for asked in server.asked]
    starts, stops = ids[::2], ids[1::2]
    assert starts[0] == starts[1] != starts[2]
    assert len(set(stops)) == 3


async def test_accepted_is_asked_after_until_it_has_ended() -> None:
    steps = [
        (202, {}),
        (200, {"presence": "absent", "pending": "start", "progress": 0.1}),
        (200, {"presence": "starting", "pending": "start", "progress": 0.6}),
        (200, {"presence": "starting"}),
    ]
    async with endpoint(*steps) as server:
        one = provider(server)
        await one.start("r1")
        await one.close()
    assert [asked.body["operation"] for asked in server.asked] == ["start", "status", "status", "status"]


@pytest.mark.parametrize(
    ("operation", "last"),
    [
        ("prepare", {"presence": "absent"}),
        ("start", {"presence": "running"}),
        ("stop", {"presence": "absent"}),
    ],
)
async def test_each_operation_ends_as_it_should(operation: str, last: dict[str, Any]) -> None:
    between = {"presence": "absent" if operation == "start" else "running", "pending": operation}
    async with endpoint((202, {}), (200, between), (200, last)) as server:
        one = provider(server)
        await getattr(one, operation)("r1")
        await one.close()
    assert len(server.asked) == 3


async def test_what_was_accepted_and_failed_says_why() -> None:
    async with endpoint((202, {}), (200, {"presence": "absent", "error": "no card is free"})) as server:
        one = provider(server)
        with pytest.raises(ProviderError, match="start failed: no card is free"):
            await one.start("r1")
        await one.start("r1")  # and recovers
        await one.close()


async def test_what_never_ends_ends_with_the_time() -> None:
    async with endpoint((202, {}), otherwise=(200, {"presence": "running"})) as server:
        one = provider(server, stop_timeout=3)
        with pytest.raises(ProviderError, match="has not ended after 3 s"):
            await one.stop("r1")
        await one.close()


@pytest.mark.parametrize(
    ("answer", "status", "detail"),
    [
        ({"presence": "running", "run": "r1"}, Presence.RUNNING, ""),
        ({"presence": "starting", "progress": 0.4, "detail": "weights"}, Presence.STARTING, "weights"),
        ({"presence": "absent", "error": "died"}, Presence.ABSENT, "died"),
        ({"presence": "there"}, Presence.UNKNOWN, "presence: expected 'absent', 'starting' or 'running'"),
        ({"presense": "absent"}, Presence.UNKNOWN, "presense: unknown key"),
        ({"presence": "absent", "progress": 3}, Presence.UNKNOWN, "progress: must be at most 1"),
        ([], Presence.UNKNOWN, "not a JSON object"),
    ],
)
async def test_status(answer: Any, status: Presence, detail: str) -> None:
    async with endpoint((200, answer)) as server:
        one = provider(server)
        found = await one.status()
        await one.close()
    assert found.presence is status
    assert detail in found.detail


async def test_status_of_a_dead_endpoint_is_unknown() -> None:
    async with endpoint() as server:
        one = provider(server)
    found = await one.status()
    await one.close()
    assert (found.presence, found.run) == (Presence.UNKNOWN, "")
    assert found.detail


async def test_a_secret_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOOK", raising=False)
    section = StandbySection.model_validate({"webhook": {"url": "http://h", "secret_env": "HOOK"}})
    with pytest.raises(BadValueError, match="HOOK is not set") as raised:
        WebhookProvider(section, FACTS)
    assert raised.value.at == ("webhook", "secret_env")
    assert [problem.at for problem in WebhookProvider.check(section, FACTS)] == [("webhook", "secret_env")]


def test_a_socket_is_no_webhook() -> None:
    with pytest.raises(ValueError, match="over HTTP"):
        StandbySection.model_validate({"webhook": {"url": "unix:/run/x.sock"}})


async def test_what_is_wrong_is_known_before_nobody_waits_any_more() -> None:
    async with endpoint(otherwise=(503, {"error": "maintenance until 9"})) as server:
        pauses = Pauses()
        section = StandbySection.model_validate({"webhook": {"url": server.url, "timeout": "60s"}})
        one = WebhookProvider(section, FACTS, Caller(clock=pauses.clock, sleep=pauses))
        found = await one.status()
        await one.close()
    assert (found.presence, pauses.clock() < STATUS_S) == (Presence.UNKNOWN, True)
    assert "maintenance until 9" in found.detail


async def test_what_is_to_run_is_told_with_what_starts_it() -> None:
    launch = Launch("vllm:v1", (), ("--port", "8000"), {"A": "1"}, "a source")
    async with endpoint(otherwise=(200, {"presence": "absent"})) as server:
        section = StandbySection.model_validate({"webhook": {"url": server.url}})
        one = WebhookProvider(section, replace(FACTS, launch=lambda: launch), Caller())
        await one.prepare("r1")
        await one.start("r1")
        await one.stop("r1")
        await one.status()
        await one.close()
    told = [asked.body.get("launch") for asked in server.asked]
    what = {"image": "vllm:v1", "command": [], "arguments": ["--port", "8000"], "environment": {"A": "1"}}
    assert told == [what, what, None, None]
