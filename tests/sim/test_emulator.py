"""The emulated server over real sockets: time, metrics, faults, start and stop."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Awaitable
from typing import Any

import aiohttp
import pytest

from proxy.tasks import Tasks
from sim import emulator as module
from sim import tokens
from sim.emulator import Emulator, EmulatorSettings, emulators, plain_profile, serve_emulators
from sim.faults import Fault, FaultKind
from tests.sim.emulated import HELLO, Client, client, content, events, until

ENDLESS = HELLO | {"max_tokens": 700, "ignore_eos": True}
"""At ten emulated seconds a token."""


async def test_headers_go_out_before_the_first_token() -> None:
    async with client(ttft_s=10_000, speed=1) as http:
        response = await http.post("/v1/chat/completions", HELLO | {"stream": True})
        assert response.status == 200
        assert http.server.engine.figures().running == 1
        response.close()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_slot(stream: bool) -> None:
    async with client(slots=1, tpot_s=10) as http:
        figures = http.server.engine.figures
        async with asyncio.TaskGroup() as group:
            asking = [
                group.create_task(http.post("/v1/chat/completions", ENDLESS | {"stream": stream}))
                for _ in range(3)
            ]
            await until(lambda: figures()[:2] == (1, 2))
            assert await (await http.get("/load")).json() == {"server_load": 3}
            for number, left in enumerate([(1, 1), (1, 0), (0, 0)]):
                if asking[number].done():
                    asking[number].result().close()
                asking[number].cancel()
                await until(lambda left=left: figures()[:2] == left)
        await until_load(http, 0)


async def until_load(http: Client, load: int) -> None:
    while await (await http.get("/load")).json() != {"server_load": load}:
        pass


async def test_metrics_are_what_was_served() -> None:
    async with client(slots=4, max_model_len=1000) as http:
        bodies = await asyncio.gather(
            *(http.chat(max_tokens=limit, n=n) for limit, n in ((3, 1), (500, 1), (7, 1), (5, 2))),
        )
        seen = await http.metrics()
        finished = [choice["finish_reason"] for body in bodies for choice in body["choices"]]
    completion = sum(body["usage"]["completion_tokens"] for body in bodies)
    # A prompt counts once for each of its choices.
    prompt = sum(body["usage"]["prompt_tokens"] * len(body["choices"]) for body in bodies)
    assert seen["vllm:generation_tokens_total"] == seen["vllm:request_generation_tokens_sum"] == completion
    assert seen["vllm:prompt_tokens_total"] == seen["vllm:request_prompt_tokens_sum"] == prompt
    assert seen["vllm:request_success_totalstop"] == finished.count("stop") > 0
    assert seen["vllm:request_success_totallength"] == finished.count("length") > 0
    assert seen["vllm:request_success_totalabort"] == 0
    assert seen["vllm:time_to_first_token_seconds_count"] == len(finished)
    assert seen["vllm:e2e_request_latency_seconds_count"] == len(finished)
    assert seen["vllm:inter_token_latency_seconds_count"] == completion - len(finished)
    assert seen["vllm:num_requests_running"] == seen["vllm:num_requests_waiting"] == 0
    assert seen["vllm:kv_cache_usage_perc"] == 0


async def test_metrics_show_the_queue_and_the_cache() -> None:
    async with client(slots=2, tpot_s=10_000, speed=1, max_model_len=1600) as http:
        waiting = [await http.post("/v1/chat/completions", ENDLESS | {"stream": True}) for _ in range(5)]
        page = await http.get("/metrics")
        text = await page.text()
        seen = await http.metrics()
        for response in waiting:
            response.close()
    assert page.headers["Content-Type"] == "text/plain; version=1.0.0; charset=utf-8"
    # The first one's prompt is being computed; no other is admitted before the step ends.
    assert seen["vllm:num_requests_running"] == 1
    assert seen["vllm:num_requests_waiting"] == 4
    assert seen["vllm:kv_cache_usage_perc"] == pytest.approx(1 / 200)
    assert 'kv_cache_max_concurrency="2.0"' in text
    assert 'vllm:num_requests_waiting_by_reason{engine="0",model_name="demo",reason="capacity"} 4.0' in text


async def test_stopping_lets_open_streams_finish() -> None:
    ready: asyncio.Future[list[Emulator]] = asyncio.get_running_loop().create_future()
    tasks = Tasks()
    settings = EmulatorSettings(speed=20, shutdown_timeout_s=10)
    serving = tasks.spawn(serve_emulators([settings], ready.set_result), "emulator")
    [server] = await ready
    async with aiohttp.ClientSession() as session:
        url = f"{server.url}/v1/chat/completions"
        body = HELLO | {
            "stream": True,
            "max_tokens": 100,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }
        response = await session.post(url, json=body)
        serving.cancel()
        found = events(await response.read())
        assert found[-1]["usage"]["completion_tokens"] == 100
        await asyncio.gather(serving, return_exceptions=True)
        with pytest.raises(aiohttp.ClientConnectionError):
            await session.post(url, json=body)


async def test_many_backends_share_a_loop() -> None:
    many = [
        EmulatorSettings(speed=20, shutdown_timeout_s=1, models=(f"m{number}",), seed=number)
        for number in range(5)
    ]
    async with emulators(many) as servers, aiohttp.ClientSession() as session:
        clients = [Client(server, session) for server in servers]
        bodies = await asyncio.gather(
            *(http.chat(model=f"m{number}", max_tokens=20) for number, http in enumerate(clients))
        )
        counts = [(await http.metrics())["vllm:generation_tokens_total"] for http in clients]
    assert len({server.port for server in servers}) == 5
    assert [body["model"] for body in bodies] == [f"m{number}" for number in range(5)]
    assert counts == [body["usage"]["completion_tokens"] for body in bodies]


# Prefix cache


async def test_a_prompt_that_begins_like_another_is_cached() -> None:
    said = [{"role": "user", "content": "word " * 100}]
    async with client(prompt_tokens_details=True) as http:
        first = await http.chat(messages=said, max_tokens=40, ignore_eos=True)
        again = await http.chat(messages=said, max_tokens=1)
        answer = first["choices"][0]["message"]
        going_on = [*said, {"role": "assistant", "content": answer["content"]}, *said]
        [*_, streamed] = await http.events(
            messages=going_on, max_tokens=1, stream_options={"include_usage": True}
        )
        salted = await http.chat(messages=said, max_tokens=1, cache_salt="mine")
        seen = await http.metrics()
    prompt = first["usage"]["prompt_tokens"]
    usages = [body["usage"] for body in (first, again, streamed, salted)]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    created = [usage["prompt_tokens_details"]["created_cache_tokens"] for usage in usages]
    # Whole blocks of 16, of the prompt; of the answer too, where the conversation goes on. The last token's
    # keys and values were never needed.
    blocks = prompt // 16 * 16
    assert cached == [0, (prompt - 1) // 16 * 16, (prompt + 39) // 16 * 16, 0]
    assert created == [blocks, blocks - cached[1], usages[2]["prompt_tokens"] // 16 * 16 - cached[2], blocks]
    assert seen["vllm:prefix_cache_queries_total"] == sum(usage["prompt_tokens"] for usage in usages)
    assert seen["vllm:prefix_cache_hits_total"] == seen["vllm:prompt_tokens_cached_total"] == sum(cached)


async def test_details_of_the_prompt_are_left_out_unless_asked_for() -> None:
    async with client() as http:
        whole = await http.chat(max_tokens=1)
        [*_, last] = await http.events(max_tokens=1, stream_options={"include_usage": True})
    assert whole["usage"]["prompt_tokens_details"] is None
    assert "prompt_tokens_details" not in last["usage"]


async def test_preemptions_are_counted() -> None:
    """Two answers that don't fit into the KV cache together."""
    profile = plain_profile(slots=2, max_model_len=1600)
    limits = profile.limits.model_copy(update={"kv_tokens": 1600})
    async with client(profile=profile.model_copy(update={"limits": limits})) as http:
        await asyncio.gather(*(http.chat(max_tokens=1000, ignore_eos=True, seed=seed) for seed in (1, 2)))
        seen = await http.metrics()
    assert seen["vllm:num_preemptions_total"] >= 1
    assert seen["vllm:generation_tokens_total"] == 2000


# Faults


async def test_a_share_of_requests_fails() -> None:
    fault = Fault(kind=FaultKind.ERROR, share=0.5, status=429, retry_after=7)
    async with client(faults=(fault,), seed=3) as http:
        statuses = []
        for _ in range(20):
            response = await http.post("/v1/chat/completions", HELLO | {"max_tokens": 1})
            statuses.append(response.status)
            if response.status != 200:
                assert response.headers["Retry-After"] == "7"
                assert (await response.json())["error"]["type"] == "TooManyRequests"
    assert 4 <= statuses.count(429) <= 16
    assert set(statuses) == {200, 429}


@pytest.mark.parametrize("stream", [True, False])
async def test_cut_ends_the_connection(stream: bool) -> None:
    async with client(faults=(Fault(kind=FaultKind.CUT),)) as http:
        with pytest.raises(aiohttp.ClientError):
            await (await http.post("/v1/chat/completions", HELLO | {"stream": stream})).read()
        await until(lambda: http.server.engine.figures().running == 0)


def read_to_the_end(server: Emulator, body: dict[str, Any]) -> bytes:
    """What a plain socket reads after a chat request. Raises ConnectionResetError instead of losing it."""
    data = json.dumps(body).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data)
    seen = b""
    with socket.create_connection((server.host, server.port)) as connection:
        connection.sendall(head + data)
        while new := connection.recv(65536):
            seen += new
    return seen


@pytest.mark.parametrize("stream", [True, False])
async def test_cut_is_a_reset_and_no_orderly_end(stream: bool) -> None:
    async with client(faults=(Fault(kind=FaultKind.CUT),)) as http:
        with pytest.raises(ConnectionResetError):
            await asyncio.to_thread(read_to_the_end, http.server, HELLO | {"stream": stream})


async def test_death_is_a_reset_too() -> None:
    async with client(tpot_s=10) as http:
        async with asyncio.TaskGroup() as group:
            reading = asyncio.to_thread(read_to_the_end, http.server, ENDLESS | {"stream": True})
            task = group.create_task(raises_reset(reading))
            await until(lambda: http.server.engine.figures().running == 1)
            http.server.faults.order(Fault(kind=FaultKind.DIE))
        assert task.result()


async def raises_reset(reading: Awaitable[bytes]) -> bool:
    try:
        await reading
    except ConnectionResetError:
        return True
    return False


async def test_an_error_event_comes_half_way_under_200() -> None:
    async with client(faults=(Fault(kind=FaultKind.ERROR_EVENT),)) as http:
        asking = HELLO | {"max_tokens": 40, "ignore_eos": True, "n": 2}
        response = await http.post(
            "/v1/chat/completions", asking | {"stream": True, "stream_options": {"include_usage": True}}
        )
        found = events(await response.read())
        whole = await http.post("/v1/chat/completions", asking)
        assert http.server.engine.figures()[:2] == (0, 0)
    assert response.status == 200
    error = {"code": 500, "type": "InternalServerError", "param": None}
    assert found[-1]["error"].items() >= error.items()
    assert len(tokens.split(content(found[:-1], 0))) + len(tokens.split(content(found[:-1], 1))) == 40
    assert all("error" not in event and "usage" not in event for event in found[:-1])
    assert whole.status == 500
    assert (await whole.json())["error"] == found[-1]["error"]


async def test_no_stream_that_meets_a_fault_is_complete() -> None:
    async with client(faults=(Fault(kind=FaultKind.ERROR_EVENT),)) as http:
        response = await http.post("/v1/chat/completions", HELLO | {"stream": True, "max_tokens": 1})
        *said, _ = events(await response.read())
    assert [choice["finish_reason"] for event in said for choice in event["choices"]] == [None]


@pytest.mark.parametrize("stream", [True, False])
async def test_garbage_is_no_http(stream: bool) -> None:
    async with client(faults=(Fault(kind=FaultKind.GARBAGE),)) as http:
        with pytest.raises(aiohttp.ClientError):
            await http.post("/v1/chat/completions", HELLO | {"stream": stream})
        assert http.server.engine.figures()[:2] == (0, 0)
        assert (await http.get("/health")).status == 200


async def test_stall_leaves_the_stream_open_without_an_end() -> None:
    async with client(faults=(Fault(kind=FaultKind.STALL),)) as http:
        response = await http.post(
            "/v1/chat/completions", HELLO | {"stream": True, "max_tokens": 40, "ignore_eos": True}
        )
        data = b""
        while data.count(b"\n\n") < 2 or not data.endswith(b"\n\n"):
            data += await response.content.readany()
        # All tokens were made; those after the stall never come.
        await until(lambda: http.server.engine.figures().running == 0)
        assert b"[DONE]" not in data
        assert not response.content.at_eof()
        response.close()
        await until_load(http, 0)


async def test_faults_are_ordered_while_it_runs() -> None:
    async with client(control=True) as http:
        assert await (await http.get("/emulator/fault")).json() == []
        wrong = await http.post("/emulator/fault", {"kind": "slow", "share": 0.5})
        assert (wrong.status, "no share" in (await wrong.json())["error"]["message"]) == (400, True)
        ordered = await http.post("/emulator/fault", {"kind": "error", "status": 503})
        assert await ordered.json() == [{"kind": "error", "status": 503}]
        assert (await http.post("/v1/chat/completions", HELLO)).status == 503
        await http.post("/emulator/fault", {"kind": "unhealthy"})
        assert (await http.get("/health")).status == 503
        assert await (await http.session.delete(http.server.url + "/emulator/fault")).json() == []
        assert (await http.get("/health")).status == 200
        await http.chat(max_tokens=1)


async def test_control_is_off_unless_it_is_wanted() -> None:
    async with client() as http:
        assert (await http.post("/emulator/fault", {"kind": "die"})).status == 404


async def refuses(http: Client) -> bool:
    """Whether nobody listens; raises what else goes wrong."""
    try:
        await http.get("/health")
    except aiohttp.ClientConnectorError:
        return True
    return False


async def test_a_cold_start_refuses_until_it_is_over() -> None:
    async with client(faults=(Fault(kind=FaultKind.DIE),)) as http:
        assert await refuses(http)
        http.server.faults.take_back()
        while await refuses(http):
            pass
        await http.chat(max_tokens=1)


async def test_what_dies_cuts_its_streams_and_forgets_them() -> None:
    async with client(tpot_s=10) as http:
        response = await http.post("/v1/chat/completions", ENDLESS | {"stream": True})
        http.server.faults.order(Fault(kind=FaultKind.DIE))
        with pytest.raises(aiohttp.ClientError):
            await response.read()
        assert await refuses(http)
        assert http.server.engine.figures()[:2] == (0, 0)
        http.server.faults.take_back()
        while await refuses(http):
            pass
        assert await (await http.get("/load")).json() == {"server_load": 0}


async def test_who_comes_back_from_the_dead_counts_anew() -> None:
    async with client() as http:
        await http.chat(max_tokens=5)
        before = await http.metrics()
        http.server.faults.order(Fault(kind=FaultKind.DIE))
        assert await refuses(http)
        http.server.faults.take_back()
        while await refuses(http):
            pass
        after = await http.metrics()
        await http.chat(max_tokens=3, ignore_eos=True)
        later = await http.metrics()
    name = "vllm:generation_tokens_total"
    assert (before[name] > 0, after[name], later[name]) == (True, 0, 3)
    assert later["vllm:prefix_cache_hits_total"] == 0
    assert later["vllm:e2e_request_latency_seconds_count"] == 1


async def test_a_port_that_is_taken_meanwhile_is_listened_on_once_it_is_free(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "REBIND_S", 0.01)
    async with client(faults=(Fault(kind=FaultKind.DIE),)) as http:
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind((http.server.host, http.server.port))
            other.listen()
            http.server.faults.take_back()
            await until(lambda: len(caplog.records) > 1)
        while await refuses(http):
            pass
        await http.chat(max_tokens=1)
    assert f"cannot listen on {http.server.url} again" in caplog.text


async def test_slow_is_slow() -> None:
    """Frozen, in fact: its next step ends in ages."""
    async with client() as http:
        http.server.faults.order(Fault(kind=FaultKind.SLOW, factor=1e9))
        response = await http.post("/v1/chat/completions", HELLO | {"stream": True})
        assert http.server.engine.figures().running == 1
        assert http.server.engine.wake_at > time.monotonic() + 1000
        http.server.faults.take_back()
        assert content(events(await response.read()))


# Settings


@pytest.mark.parametrize(
    "wrong",
    [
        *({"models": ()}, {"models": ("",)}, {"speed": 0}, {"rtt_s": -1}),
        *({"shutdown_timeout_s": float("nan")}, {"max_num_queued_reqs": 0}),
    ],
)
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).rstrip("s")):
        EmulatorSettings(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"slots": 0}, {"max_model_len": 0}, {"ttft_s": 0}, {"tpot_s": float("nan")}, {"slowdown": 1}],
)
def test_wrong_figures(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).removesuffix("_s")):
        plain_profile(**wrong)


def test_a_sequence_has_to_fit_into_the_cache() -> None:
    profile = plain_profile(slots=2, max_model_len=1600)
    limits = profile.limits.model_copy(update={"kv_tokens": 1599})
    with pytest.raises(ValueError, match="does not fit into a KV cache of 1584"):
        EmulatorSettings(profile=profile.model_copy(update={"limits": limits}))


@pytest.mark.parametrize(("slots", "slowdown"), [(1, 0.0), (4, 0.02), (32, 0.5)])
def test_four_figures_give_an_engine(slots: int, slowdown: float) -> None:
    engine = EmulatorSettings(
        profile=plain_profile(slots=slots, ttft_s=0.3, tpot_s=0.02, slowdown=slowdown)
    ).engine()
    assert engine.cost.of(decodes=0, context=0, prefill=1000) == pytest.approx(300_000)
    assert engine.cost.of(decodes=1, context=5000, prefill=0) == pytest.approx(20_000)
    assert engine.cost.of(decodes=slots, context=0, prefill=0) == pytest.approx(
        20_000 * (1 + slowdown * (slots - 1))
    )
    assert (engine.max_num_seqs, engine.kv_tokens) == (slots, slots * 8192)
