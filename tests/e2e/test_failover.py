"""Backends that fail, on real sockets: what the client sees of it, where its request goes, and who is blamed."""

from __future__ import annotations

import asyncio
import gzip

import pytest

from tests.e2e import backends as b
from tests.e2e.backends import Behaviour, Request, answers, dead_port, status
from tests.e2e.faults.figures import Figure
from tests.e2e.proxy_fixtures import StartBackend, StartProxy, chat, eventually

pytestmark = pytest.mark.e2e

BEFORE_DATA: dict[str, Behaviour] = {
    "reset before head": b.resets_before_head,
    "closed before head": b.closes_before_head,
    "reset after head": b.resets_after_head,
    "garbage": b.garbage,
    "error event first": b.error_event_first,
    "500": status(500),
    "502 with a page": status(502, b"<html>", b"server: nginx"),
    "503": status(503, b"", b"retry-after: 1"),
    "429": status(429),
    "401": status(401),
}


SILENT: dict[str, Behaviour] = {"silent": b.stalls, "silent after head": b.stalls_after_head}


def fast() -> dict[str, str]:
    """Short deadlines."""
    return {"first_token": "300ms", "answer": "300ms", "between_tokens": "300ms", "connect": "1s"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", BEFORE_DATA)
async def test_a_backend_that_fails_before_its_first_data_is_not_noticed(
    fault: str, stream: bool, start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    bad, good = await start_backend(BEFORE_DATA[fault]), await start_backend(answers(4))
    proxy = await start_proxy(bad, good, timeouts=fast())
    answer = await proxy.chat(stream=stream)
    assert (answer.status, answer.backend, answer.complete) == (200, "b", True)
    assert answer.text == "xxxx" if stream else answer.json["usage"]["completion_tokens"] == 4
    assert (len(bad.received), len(good.received)) == (1, 1)
    row = await proxy.row(answer)
    assert (row.outcome, row.attempts, row.backend, row.completion_tokens) == ("ok", 2, "b", 4)
    await proxy.idle()
    await eventually(lambda: not bad.running)
    blamed = proxy.backend("a").failed
    assert blamed == (0 if fault in ("503", "429", "401") else 1)


@pytest.mark.parametrize("fault", SILENT)
async def test_a_stream_that_never_begins_is_asked_for_elsewhere(
    fault: str, start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    bad, good = await start_backend(SILENT[fault]), await start_backend(answers(4))
    proxy = await start_proxy(bad, good, timeouts=fast())
    answer = await proxy.chat(stream=True)
    assert (answer.text, answer.backend) == ("xxxx", "b")
    assert proxy.backend("a").failed == 1
    await eventually(lambda: not bad.running)
    await proxy.idle()


async def test_an_answer_that_never_comes_is_504_and_not_paid_for_twice(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    bad, other = await start_backend(b.stalls), await start_backend()
    proxy = await start_proxy(bad, other, timeouts=fast())
    answer = await proxy.chat()
    assert (answer.status, answer.code) == (504, "backend_timeout")
    assert other.received == []
    await eventually(lambda: not bad.running)
    await proxy.idle()


async def test_a_dead_backend_costs_nothing_but_a_hop(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    good = await start_backend()
    proxy = await start_proxy({"url": f"http://127.0.0.1:{dead_port()}"}, good)
    for _ in range(8):
        assert (await proxy.chat()).backend == "b"
    assert proxy.backend("a").failed == 5  # then its breaker is open
    assert not proxy.backend("a").available
    await proxy.idle()


async def test_all_down_is_no_backend_at_once(start_proxy: StartProxy) -> None:
    dead = [{"url": f"http://127.0.0.1:{dead_port()}"} for _ in range(2)]
    proxy = await start_proxy(*dead)
    for _ in range(5):
        answer = await proxy.chat()
        assert (answer.status, answer.code) == (502, "backend_unreachable")
    answer = await proxy.chat()
    assert (answer.status, answer.code) == (503, "no_backend")
    assert int(answer.fields["retry-after"]) >= 1
    status_code, body = await proxy.get("/readyz")
    assert (status_code, b"no backend" in body) == (503, True)
    await proxy.idle()


MIDSTREAM: dict[str, tuple[Behaviour, str]] = {
    "reset": (b.resets_midstream, "backend_reset"),
    "close": (b.closes_midstream, "backend_reset"),
    "silence": (b.stalls_midstream, "backend_timeout"),
    "garbage": (b.garbage_midstream, "backend_protocol"),
    "until close": (b.until_close(complete=False), "backend_reset"),
}


@pytest.mark.parametrize("fault", MIDSTREAM)
async def test_a_stream_that_is_cut_says_so_once(
    fault: str, start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    behaviour, code = MIDSTREAM[fault]
    bad, other = await start_backend(behaviour), await start_backend()
    proxy = await start_proxy(bad, other, timeouts=fast())
    answer = await proxy.chat(stream=True)
    assert (answer.status, answer.text, answer.done, answer.complete) == (200, "xx", False, True)
    assert answer.errors == [code]
    assert answer.events[-1].startswith(b'{"error"')
    row = await proxy.row(answer)
    assert (row.outcome, row.code, row.completion_tokens, row.attempts) == ("cut", code, 2, 1)
    assert row.cost_nano == 7 * 1000 + 2 * 2000
    assert other.received == []
    assert proxy.backend("a").failed == 1
    await proxy.idle()
    assert (await proxy.chat()).status == 200


async def test_an_error_event_of_the_engine_is_passed_on_and_counted(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    proxy = await start_proxy(await start_backend(b.error_event_midstream))
    answer = await proxy.chat(stream=True)
    assert (answer.text, answer.errors, answer.done, answer.complete) == ("xx", [500], False, True)
    row = await proxy.row(answer)
    assert (row.outcome, row.code) == ("cut", "backend_error")
    assert proxy.backend("a").failed == 1


async def test_an_answer_that_breaks_off_is_asked_for_again(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    bad, good = await start_backend(b.closes_within_an_answer), await start_backend()
    proxy = await start_proxy(bad, good)
    answer = await proxy.chat()
    assert (answer.status, answer.backend) == (200, "b")
    # Nobody else to ask: it is an error, and nothing that looks like an answer.
    proxy = await start_proxy(await start_backend(b.closes_within_an_answer), state=proxy.state_folder / "2")
    answer = await proxy.chat()
    assert (answer.status, answer.code) == (502, "backend_reset")


async def test_the_last_backends_error_is_relayed_as_it_is(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    first = await start_backend(status(500, b'{"error":"first"}'))
    second = await start_backend(status(507, b'{"error":"second"}', b"etag: because"))
    proxy = await start_proxy(first, second)
    answer = await proxy.chat()
    assert (answer.status, answer.body, answer.backend) == (507, b'{"error":"second"}', "b")
    assert answer.fields["etag"] == "because"
    row = await proxy.row(answer)
    assert (row.outcome, row.status) == ("backend_failed", 507)


@pytest.mark.parametrize("code", [401, 403])
async def test_a_backend_that_refuses_our_key_is_backend_auth(
    code: int, start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    proxy = await start_proxy(await start_backend(status(code, b'{"detail":"bad key sk-123"}')))
    answer = await proxy.chat()
    assert (answer.status, answer.code) == (502, "backend_auth")
    assert b"sk-123" not in answer.body


async def test_full_is_not_down(start_backend: StartBackend, start_proxy: StartProxy) -> None:
    full = await start_backend(status(503, b"{}", b"retry-after: 20"))
    proxy = await start_proxy(full)
    answer = await proxy.chat()
    assert (answer.status, answer.fields["retry-after"]) == (503, "20")
    answer = await proxy.chat()
    assert (answer.status, answer.code, answer.fields["retry-after"]) == (503, "overloaded", "20")
    assert len(full.received) == 1
    assert proxy.backend("a").failed == 0


async def test_retries_stay_inside_their_budget(
    start_backend: StartBackend, start_proxy: StartProxy, figure: Figure
) -> None:
    first, second = await start_backend(then=status(500)), await start_backend(then=answers())
    # Ten retries in ten seconds, and no share of the requests: thirty at once get ten retries.
    proxy = await start_proxy(first, second, retries={"ratio": 0, "per_second": 1})
    found = await asyncio.gather(*[proxy.chat() for _ in range(30)])
    assert len(second.received) <= 10 + (30 - len(first.received))
    retried = [answer for answer in found if (await proxy.row(answer)).attempts > 1]
    assert 0 < len(retried) <= 10
    assert {answer.status for answer in found} <= {200, 500}
    await proxy.idle()
    attempts = len(first.received) + len(second.received)
    figure("F10", attempts, f"attempts for {len(found)} requests with a budget of 10 retries")


async def test_a_client_error_of_the_backend_is_the_clients_and_moves_no_breaker(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    picky, other = await start_backend(then=status(400)), await start_backend()
    proxy = await start_proxy(picky, other)
    for _ in range(8):
        answer = await proxy.chat()
        assert (answer.status, answer.backend) == (400, "a")
    assert proxy.backend("a").available
    assert other.received == []


async def test_a_pooled_connection_that_died_meanwhile_costs_nothing(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend(then=b.closes_behind)
    proxy = await start_proxy(backend)
    for _ in range(20):
        answer = await proxy.chat()
        assert (answer.status, (await proxy.row(answer)).attempts) == (200, 1)
    assert proxy.backend("a").failed == 0
    assert len(backend.received) == 20
    backend.then = answers()
    before = backend.connections
    for _ in range(5):
        await proxy.chat()
    assert backend.connections == before + 1  # one that stays open is used again


async def test_what_a_backend_says_unasked_reaches_nobody(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend(then=b.speaks_unasked)
    proxy = await start_proxy(backend)
    found = [await proxy.chat(stream=number % 2 == 0) for number in range(10)]
    assert {answer.status for answer in found} == {200}
    assert all(b"POISONED" not in answer.body for answer in found)
    assert backend.connections == 10  # none was used twice


FORMS: dict[str, Behaviour] = {
    "plain": answers(2),
    "1-byte chunks": b.one_byte_chunks,
    "1-byte writes": b.one_byte_writes,
    "heartbeats": b.heartbeats,
    "until close": b.until_close(complete=True),
    "data behind done": b.data_behind_done,
}


@pytest.mark.parametrize("form", FORMS)
async def test_a_stream_means_the_same_in_every_form(
    form: str, start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend(FORMS[form])
    proxy = await start_proxy(backend)
    answer = await proxy.chat(stream=True)
    assert (answer.text, answer.done, answer.complete) == ("xx", True, True)
    assert b'"usage"' not in answer.body
    row = await proxy.row(answer)
    assert (row.outcome, row.completion_tokens, row.prompt_tokens) == ("ok", 2, 7)
    assert row.usage_source == "reported"
    await proxy.idle()
    assert (await proxy.chat()).status == 200


async def test_a_huge_event_is_passed_on_whole(start_backend: StartBackend, start_proxy: StartProxy) -> None:
    size = 10 * 1024 * 1024
    proxy = await start_proxy(await start_backend(b.huge_event(size)))
    answer = await proxy.chat(stream=True)
    assert answer.text == "h" * size + "x"
    assert (answer.done, answer.complete) == (True, True)
    assert (await proxy.row(answer)).completion_tokens == 2


async def test_an_encoded_answer_is_passed_on_untouched(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend(b.gzipped)
    proxy = await start_proxy(backend)
    answer = await proxy.chat()
    assert answer.fields["content-encoding"] == "gzip"
    assert b'"finish_reason"' in gzip.decompress(answer.body)
    received: Request = backend.received[0]
    assert received.fields["accept-encoding"] == "identity"  # it was asked not to


async def test_backends_are_used_again_when_they_are_back(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend()
    proxy = await start_proxy(backend, probing={"interval": "100ms", "timeout": "50ms"})
    assert (await proxy.chat()).status == 200
    await backend.stop()
    await eventually(lambda: not proxy.backend("a").available)
    assert (await proxy.chat()).code == "no_backend"
    await backend.start()
    await eventually(lambda: proxy.backend("a").available)
    assert (await proxy.chat()).status == 200


async def test_a_request_that_was_kept_waiting_by_a_dead_connection_is_not_sent_twice(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    """A backend that took a request and died while working may be asked again, but never both at once."""
    first, second = await start_backend(b.resets_after_head), await start_backend()
    proxy = await start_proxy(first, second)
    client = await proxy.connect()
    await client.send(chat(stream=True, user="only-once"))
    answer = await client.answer()
    assert answer.done
    assert [len(first.received), len(second.received)] == [1, 1]
    await proxy.idle()
    assert (first.running, second.running) == (0, 0)
