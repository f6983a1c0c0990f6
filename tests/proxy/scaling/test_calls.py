"""Calls over real sockets: repeated with one id until there is an answer, and never elsewhere."""

from __future__ import annotations

from email.utils import formatdate
from random import Random
from typing import Any

import pytest

from proxy.scaling.calls import MOST_ANSWER_BYTES, Caller, RefusedError
from proxy.scaling.provider import ProviderError
from proxy.scaling.signing import ID, SIGNATURE, TIMESTAMP, verify
from tests.proxy.scaling.endpoint import Endpoint, Pauses, endpoint

SECRET = b"a-secret-of-16-b"
WALL = 1_700_000_000.0


def caller(pauses: Pauses, **settings: Any) -> Caller:
    return Caller([SECRET], wall=lambda: WALL, clock=pauses.clock, sleep=pauses, random=Random(1), **settings)


async def call(to: Caller, url: str, **more: Any) -> Any:
    settings: dict[str, Any] = {"id": "msg_1", "within_s": 300.0, **more}
    try:
        return await to.call("POST", url, {"operation": "start"}, **settings)
    finally:
        await to.close()


async def test_each_attempt_is_signed_and_has_the_same_id() -> None:
    pauses = Pauses()
    async with endpoint(
        (500, {}), (503, {}), "drop", (429, {}), (409, {}), (408, {}), (200, {"a": 1})
    ) as server:
        answer = await call(caller(pauses), server.url + "/hook")
    assert answer.json() == {"a": 1}
    assert len(server.asked) == 7
    for asked in server.asked:
        assert verify([SECRET], asked.headers, asked.raw, WALL) == "msg_1"
        assert asked.headers["content-type"] == "application/json"
    assert len({asked.raw for asked in server.asked}) == 1


async def test_pauses_double_with_jitter_up_to_a_limit() -> None:
    pauses = Pauses()
    async with endpoint(*[(500, {})] * 9, (200, {})) as server:
        await call(caller(pauses), server.url)
    full = [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert all(most / 2 <= pause <= most for pause, most in zip(pauses, full, strict=True))
    assert len({pause / most for pause, most in zip(pauses, full, strict=True)}) == len(full)


@pytest.mark.parametrize(
    ("value", "seconds"), [("7", 7.0), (formatdate(WALL + 7, usegmt=True), 7.0), ("soon", 0.0), ("-4", 0.0)]
)
async def test_retry_after_is_honoured(value: str, seconds: float) -> None:
    pauses = Pauses()
    async with endpoint((503, {}, {"Retry-After": value}), (200, {})) as server:
        await call(caller(pauses), server.url)
    assert max(seconds, 0.25) <= pauses[0] <= max(seconds, 0.5)


async def test_a_pause_longer_than_the_time_ends_it_at_once() -> None:
    pauses = Pauses()
    async with endpoint((429, {}, {"Retry-After": "1000"})) as server:
        with pytest.raises(ProviderError, match="asked once: it answers 429"):
            await call(caller(pauses), server.url)
    assert pauses == []
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 422])
async def test_a_refusal_is_final(status: int) -> None:
    async with endpoint((status, {"error": "no such standby"})) as server:
        with pytest.raises(RefusedError, match="no such standby") as raised:
            await call(caller(Pauses()), server.url)
    assert raised.value.status == status
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_not_followed(status: int) -> None:
    async with endpoint() as other, endpoint((status, None, {"Location": other.url})) as server:
        with pytest.raises(RefusedError, match="redirect"):
            await call(caller(Pauses()), server.url)
    assert other.asked == []


async def test_what_hangs_is_asked_again() -> None:
    pauses = Pauses()
    async with endpoint("hang", (200, {"a": 1})) as server:
        answer = await call(caller(pauses, timeout_s=0.05), server.url)
    assert answer.json() == {"a": 1}
    assert len(server.asked) == 2


async def test_what_always_hangs_ends_with_the_time() -> None:
    async with endpoint(otherwise="hang") as server:
        with pytest.raises(ProviderError, match="no answer within"):
            await call(caller(Pauses(), timeout_s=0.05), server.url, within_s=0.2)


async def test_nobody_there() -> None:
    async with endpoint() as server:
        url = server.url
    with pytest.raises(ProviderError, match="cannot be reached"):
        await call(caller(Pauses()), url, within_s=20)


async def test_an_answer_is_bounded() -> None:
    async with endpoint((200, b"x" * (MOST_ANSWER_BYTES + 1))) as server:
        with pytest.raises(RefusedError, match="more than"):
            await call(caller(Pauses()), server.url)


@pytest.mark.parametrize("body", [b"[]", b"{", b"1"])
async def test_an_answer_that_is_no_object(body: bytes) -> None:
    async with endpoint((200, body)) as server:
        answer = await call(caller(Pauses()), server.url)
    with pytest.raises(ProviderError, match="its answer is not"):
        answer.json()


async def test_a_metadata_service_behind_a_name_is_never_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("probes.resolver._look_up", lambda host: ["169.254.169.254"])
    with pytest.raises(ProviderError, match="cannot be reached"):
        await call(caller(Pauses()), "http://platform.example/x", within_s=20)


async def test_the_path_of_a_url_is_not_shown() -> None:
    async with endpoint((404, {})) as server:
        with pytest.raises(RefusedError) as raised:
            await call(caller(Pauses()), server.url + "/hooks/T0P5ECRET")
    assert "T0P5ECRET" not in str(raised.value)


async def test_without_a_secret_nothing_is_signed() -> None:
    server: Endpoint
    async with endpoint() as server:
        await call(Caller(), server.url)
    assert not {ID, TIMESTAMP, SIGNATURE} & server.asked[0].headers.keys()


async def test_a_request_without_body_signs_its_route() -> None:
    to = caller(Pauses())
    async with endpoint() as server:
        await to.call("DELETE", server.url + "/v1/x", id="msg_1", within_s=5.0)
        await to.close()
    assert verify([SECRET], server.asked[0].headers, b"DELETE /v1/x", WALL) == "msg_1"


async def test_a_name_that_has_moved_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = ["127.0.0.2", "127.0.0.1"]  # nobody listens at the first

    def look_up(host: str) -> list[str]:
        return [addresses.pop(0) if len(addresses) > 1 else addresses[0]]

    monkeypatch.setattr("probes.resolver._look_up", look_up)
    async with endpoint((200, {"a": 1})) as server:
        url = server.url.replace("127.0.0.1", "platform.example")
        answer = await call(caller(Pauses()), url)
    assert answer.json() == {"a": 1}
