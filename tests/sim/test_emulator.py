"""The emulated server over real sockets: time, metrics, faults, start and stop."""

from __future__ import annotations

import asyncio
import inspect
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from proxy.demo import demo
from proxy.tasks import Tasks
from sim.emulator import EmulatorSettings, Fault, emulate, serve_emulator
from tests.sim.emulated import HELLO, Client, client, events, until


async def test_headers_go_out_before_the_first_token() -> None:
    async with client(ttft_s=10_000, speed=1) as http:
        response = await http.post("/v1/chat/completions", HELLO | {"stream": True})
        assert response.status == 200
        assert http.server.engine.figures().running == 1
        response.close()
        await until(lambda: http.server.engine.figures().running == 0)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_slot(stream: bool) -> None:
    async with client(slots=1, ttft_s=10_000, speed=1) as http:
        figures = http.server.engine.figures
        async with asyncio.TaskGroup() as group:
            asking = [
                group.create_task(http.post("/v1/chat/completions", HELLO | {"stream": stream}))
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
    async with client(slots=2, ttft_s=10_000, speed=1, max_model_len=1600) as http:
        waiting = [
            await http.post("/v1/chat/completions", HELLO | {"stream": True, "max_tokens": 1})
            for _ in range(5)
        ]
        page = await http.get("/metrics")
        text = await page.text()
        seen = await http.metrics()
        for response in waiting:
            response.close()
    assert page.headers["Content-Type"] == "text/plain; version=1.0.0; charset=utf-8"
    assert seen["vllm:num_requests_running"] == 2
    assert seen["vllm:num_requests_waiting"] == 3
    assert seen["vllm:kv_cache_usage_perc"] == 2 / 200
    assert 'kv_cache_max_concurrency="2.0"' in text
    assert 'vllm:num_requests_waiting_by_reason{engine="0",model_name="demo",reason="capacity"} 3.0' in text


async def test_stopping_lets_open_streams_finish() -> None:
    ready: asyncio.Future[tuple[str, int]] = asyncio.get_running_loop().create_future()
    tasks = Tasks()
    settings = EmulatorSettings(speed=20, shutdown_timeout_s=10)
    serving = tasks.spawn(serve_emulator(settings, lambda *where: ready.set_result(where)), "emulator")
    host, port = await ready
    async with aiohttp.ClientSession() as session:
        url = f"http://{host}:{port}/v1/chat/completions"
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


# Faults


async def test_a_share_of_requests_fails() -> None:
    async with client(fail_rate=0.5, seed=3) as http:
        statuses = []
        for _ in range(20):
            response = await http.post("/v1/chat/completions", HELLO | {"max_tokens": 1})
            statuses.append(response.status)
            if response.status != 200:
                assert (await response.json())["error"]["type"] == "InternalServerError"
    assert 4 <= statuses.count(500) <= 16
    assert set(statuses) == {200, 500}


@pytest.mark.parametrize("stream", [True, False])
async def test_reset_cuts_the_connection(stream: bool) -> None:
    async with client(fail_rate=1, fault=Fault.RESET) as http:
        with pytest.raises(aiohttp.ClientError):
            await (await http.post("/v1/chat/completions", HELLO | {"stream": stream})).read()
        await until(lambda: http.server.engine.figures().running == 0)


async def test_stall_leaves_the_stream_open_without_an_end() -> None:
    async with client(fail_rate=1, fault=Fault.STALL) as http:
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


# The process


@pytest.mark.parametrize(
    "wrong",
    [
        {"slots": 0},
        {"models": ()},
        {"models": ("",)},
        {"speed": 0},
        {"ttft_s": -1},
        {"tpot_s": float("nan")},
        {"fail_rate": 1.5},
        {"max_model_len": 0},
    ],
)
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).rstrip("s")):
        EmulatorSettings(**wrong)


async def start(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sim.emulator"),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


@pytest.mark.e2e
async def test_the_process_says_where_it_listens_and_stops_on_request() -> None:
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
        assert b"choose another with --port" in complaint
    process.send_signal(signal.SIGTERM)
    _, complaint = await process.communicate()
    assert (process.returncode, complaint) == (0, b"")


# The page about it


@pytest.mark.parametrize("command", [emulate, demo])
def test_every_option_is_documented(command: Callable[..., None]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "emulator.md").read_text()
    for name in inspect.signature(command).parameters:
        assert f"`--{name.replace('_', '-')}`" in page
