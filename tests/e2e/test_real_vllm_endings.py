"""Streams of a real vLLM that end before their end: the client leaves, the engine is killed, stopped or aborts.

Whatever happens, the slot is free soon, the client cannot take what it has for the whole, and what was delivered
is in the ledger.
"""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.clients import (
    CHAT,
    MESSAGES,
    assert_cut,
    connect,
    errors,
    events,
    in_flight,
    next_event,
    stream,
    used,
    wait_until,
)
from tests.e2e.conftest import StartTidegate, StartVllm
from tests.e2e.tidegate_process import TidegateProcess
from tests.e2e.vllm_server import VllmServer
from tests.patience import PATIENCE

pytestmark = [pytest.mark.e2e, pytest.mark.vllm, pytest.mark.timeout(400)]

LONG = 2000
"""Tokens that take the tiny model three seconds: time to do something to a stream before it ends."""


@pytest.fixture
def proxy(vllm_tiny: VllmServer, tidegate: StartTidegate) -> TidegateProcess:
    """The proxy with one real vLLM behind it."""
    return tidegate({"name": "tiny", "url": vllm_tiny.url})


def test_a_client_that_leaves_frees_its_slot_and_pays_for_what_it_got(
    proxy: TidegateProcess, vllm_tiny: VllmServer
) -> None:
    before = vllm_tiny.counters()
    with stream(proxy, max_tokens=LONG, ignore_eos=True) as response:
        for _ in range(5):
            next_event(response)
        assert vllm_tiny.running == 1
    vllm_tiny.wait_idle(1.0 * PATIENCE)
    engine = vllm_tiny.counters() - before
    (row,) = proxy.rows(1)
    assert row["outcome"] == "client_gone"
    assert row["prompt_tokens"] == engine.prompt
    assert 4 <= row["completion_tokens"] <= engine.generated < LONG
    assert in_flight(proxy) == 0


def test_a_client_that_leaves_in_silence_frees_its_slot(
    proxy: TidegateProcess, vllm_tiny: VllmServer
) -> None:
    before, logged = vllm_tiny.counters(), len(vllm_tiny.requests_logged())
    body = json.dumps({"model": "tiny", "messages": MESSAGES, "stream": True}).encode()
    with vllm_tiny.paused():
        with socket.create_connection(("127.0.0.1", proxy.port)) as connection:
            connection.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%b" % (len(body), body)
            )
            wait_until(lambda: CHAT in vllm_tiny.requests_logged()[logged:])
        wait_until(lambda: in_flight(proxy) == 0, 1.0 * PATIENCE)
    vllm_tiny.wait_idle(1.0 * PATIENCE)
    (row,) = proxy.rows(1)
    assert (row["outcome"], used(row)) == ("client_gone", (0, 0))
    assert (vllm_tiny.counters() - before).generated <= 1


def test_sigkill_ends_streams_that_began_and_moves_those_that_did_not(
    vllm_tiny: VllmServer, tidegate: StartTidegate, start_vllm: StartVllm
) -> None:
    doomed = start_vllm("vllm-doomed").wait_ready()
    proxy = tidegate(
        {"name": "doomed", "url": doomed.url},
        {"name": "other", "url": vllm_tiny.url, "site": "elsewhere"},
        sites={"elsewhere": {}},
    )
    with stream(proxy, max_tokens=LONG, ignore_eos=True) as began, ThreadPoolExecutor(1) as pool:
        read = [next_event(began) for _ in range(5)]
        assert began.headers["x-tidegate-backend"] == "doomed"
        doomed.pause()
        with connect(proxy) as client:
            waiting = pool.submit(
                client.chat.completions.with_raw_response.create,
                model="tiny",
                messages=MESSAGES,
                max_tokens=10,
            )
            wait_until(lambda: in_flight(proxy) == 2)
            doomed.kill()
            killed = time.monotonic()
            moved = waiting.result(timeout=30)
        rest = events(began)
    assert time.monotonic() - killed < 1.0 * PATIENCE
    assert moved.headers["x-tidegate-backend"] == "other"
    assert_cut(read + rest)
    cut, ok = proxy.rows(2)
    assert (cut["outcome"], cut["backend"], cut["attempts"]) == ("cut", "doomed", 1)
    assert 4 <= cut["completion_tokens"] < LONG
    assert (ok["outcome"], ok["backend"], ok["attempts"]) == ("ok", "other", 2)


def test_sigterm_with_drain_lets_streams_end_and_others_go_elsewhere(
    vllm_tiny: VllmServer, tidegate: StartTidegate, start_vllm: StartVllm
) -> None:
    leaving = start_vllm("vllm-leaving", drain_s=200).wait_ready()
    proxy = tidegate(
        {"name": "leaving", "url": leaving.url},
        {"name": "other", "url": vllm_tiny.url, "site": "elsewhere"},
        sites={"elsewhere": {}},
    )
    with (
        stream(proxy, max_tokens=LONG, ignore_eos=True, n=4, temperature=1) as began,
        connect(proxy) as client,
    ):
        first = next_event(began)
        assert began.headers["x-tidegate-backend"] == "leaving"
        leaving.terminate()
        wait_until(lambda: "draining in-flight requests" in leaving.service.log.read_text())
        answers = [
            client.chat.completions.with_raw_response.create(model="tiny", messages=MESSAGES, max_tokens=2)
            for _ in range(20)
        ]
        rest = events(began)
    assert first
    assert rest[-1] == "[DONE]"
    assert errors(rest) == []
    assert {answer.http_response.status_code for answer in answers} == {200}
    assert answers[-1].headers["x-tidegate-backend"] == "other"
    rows = proxy.rows(21)
    assert {row["outcome"] for row in rows} == {"ok"}
    assert rows[0]["completion_tokens"] == 4 * LONG


def test_sigterm_without_drain_leaves_a_silent_stream_that_ends_in_an_error(
    tidegate: StartTidegate, start_vllm: StartVllm
) -> None:
    """vLLM's default: its engine is gone, the connection stays open and says nothing more."""
    hanging = start_vllm("vllm-hanging", drain_s=None).wait_ready()
    proxy = tidegate({"name": "hanging", "url": hanging.url}, timeouts={"between_tokens": "1s"})
    with stream(proxy, max_tokens=LONG, ignore_eos=True) as response:
        read = [next_event(response) for _ in range(5)]
        hanging.pause()
        hanging.terminate()
        stopped = time.monotonic()
        rest = events(response)
    assert time.monotonic() - stopped < 2.0 * PATIENCE
    assert_cut(read + rest)
    (row,) = proxy.rows(1)
    assert row["outcome"] == "cut"
    assert 4 <= row["completion_tokens"] < LONG


def test_an_engine_that_aborts_a_stream_did_not_finish_it(
    proxy: TidegateProcess, vllm_tiny: VllmServer
) -> None:
    """On SIGTERM an engine may have time to say `"finish_reason":"abort"` before it is killed, then `[DONE]`."""
    with stream(proxy, max_tokens=LONG, ignore_eos=True) as response:
        read = [next_event(response) for _ in range(5)]
        with vllm_tiny.paused(abort=True):
            rest = events(response)
    assert_cut(read + rest)
    (row,) = proxy.rows(1)
    assert row["outcome"] == "cut"
    assert 4 <= row["completion_tokens"] < LONG


def test_an_answer_that_an_engine_aborts_comes_from_another(
    vllm_tiny: VllmServer, vllm_tiny_second: VllmServer, tidegate: StartTidegate
) -> None:
    proxy = tidegate(
        {"name": "aborts", "url": vllm_tiny.url},
        {"name": "other", "url": vllm_tiny_second.url, "site": "elsewhere"},
        sites={"elsewhere": {}},
    )
    before = vllm_tiny.counters()
    with connect(proxy) as client, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(
            client.chat.completions.create,
            model="tiny",
            messages=MESSAGES,
            max_tokens=LONG,
            extra_body={"ignore_eos": True},
        )
        wait_until(lambda: vllm_tiny.counters().generated - before.generated > 100)
        with vllm_tiny.paused(abort=True):
            found = answer.result(timeout=60)
    assert found.choices[0].finish_reason == "length"
    (row,) = proxy.rows(1)
    assert (row["backend"], row["attempts"], row["completion_tokens"]) == ("other", 2, LONG)
    assert 100 < row["overhead_completion_tokens"] < LONG
