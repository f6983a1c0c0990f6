"""Official clients through the real proxy to a real vLLM with a tiny model.

What comes out is gibberish, so nothing here reads the text; that the API's shapes arrive whole, that nothing of the
meter's own questions leaks, and that every token is in the ledger, is what these tests are about.
"""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.conftest import StartTidegate, StartVllm
from tests.e2e.tidegate_process import TidegateProcess
from tests.e2e.vllm_server import Counters, VllmServer
from tests.patience import PATIENCE

pytestmark = [pytest.mark.e2e, pytest.mark.vllm, pytest.mark.timeout(400)]

MESSAGES: list[Any] = [{"role": "user", "content": "Say something long."}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CHAT = "POST /v1/chat/completions"
LONG = 2000
"""Tokens that take the tiny model three seconds: time to do something to a stream before it ends."""


@pytest.fixture
def proxy(vllm_tiny: VllmServer, tidegate: StartTidegate) -> TidegateProcess:
    """The proxy with one real vLLM behind it."""
    return tidegate({"name": "tiny", "url": vllm_tiny.url}, aliases={"gpt-4": "tiny"})


@pytest.fixture
def client(proxy: TidegateProcess) -> Iterator[openai.OpenAI]:
    with connect(proxy) as found:
        yield found


def connect(proxy: TidegateProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="none", max_retries=0)


@contextmanager
def stream(proxy: TidegateProcess, **fields: Any) -> Iterator[http.client.HTTPResponse]:
    """A streamed chat as its bytes; leaving the block closes the connection, whatever is still to come."""
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=60)
    body = {"model": "tiny", "messages": MESSAGES, "stream": True, "temperature": 0, **fields}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    try:
        yield connection.getresponse()
    finally:
        connection.close()


def next_event(response: http.client.HTTPResponse) -> str:
    """The data of the next event; empty at the end of the body."""
    while line := response.readline():
        if line.startswith(b"data: "):
            return line[6:].decode().rstrip("\n")
    return ""


def events(response: http.client.HTTPResponse) -> list[str]:
    """The data of all events until the body's end."""
    return list(iter(lambda: next_event(response), ""))


def in_flight(proxy: TidegateProcess) -> int:
    """Requests on its first backend, as the proxy counts them."""
    count: int = proxy.state()["backends"][0]["in_flight"]
    return count


def used(row: dict[str, Any]) -> tuple[int, int]:
    return row["prompt_tokens"], row["completion_tokens"]


# What the clients of our users do


def test_models_are_listed_with_aliases(client: openai.OpenAI) -> None:
    assert sorted(model.id for model in client.models.list()) == ["gpt-4", "tiny"]
    assert client.models.retrieve("tiny").model_dump()["max_model_len"] == 2048
    assert client.models.retrieve("gpt-4").id == "gpt-4"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("nope")
    assert error.value.code == "model_not_found"


def test_chat_in_one_piece(client: openai.OpenAI, proxy: TidegateProcess) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=20, temperature=0)
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 20
    assert answer.choices[0].message.content
    (row,) = proxy.rows(1)
    assert used(row) == (answer.usage.prompt_tokens, answer.usage.completion_tokens)
    assert (row["outcome"], row["usage_source"], row["backend"]) == ("ok", "reported", "tiny")


def test_an_alias_is_served_as_the_model_it_means(client: openai.OpenAI, proxy: TidegateProcess) -> None:
    assert client.chat.completions.create(model="gpt-4", messages=MESSAGES, max_tokens=4).usage
    (row,) = proxy.rows(1)
    assert (row["model"], row["served_model"]) == ("gpt-4", "tiny")


def test_a_stream_without_usage_shows_none(client: openai.OpenAI, proxy: TidegateProcess) -> None:
    with client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=30, stream=True, temperature=0
    ) as chunks:
        found = list(chunks)
    assert found
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in found)
    assert found[-1].choices[0].finish_reason in ("length", "stop")
    (row,) = proxy.rows(1)
    assert row["usage_source"] == "reported"
    assert row["prompt_tokens"] > 0
    assert 0 < row["completion_tokens"] <= 30


def test_not_even_the_word_usage_is_in_such_a_stream(proxy: TidegateProcess) -> None:
    with stream(proxy, max_tokens=30) as response:
        found = events(response)
    assert found[-1] == "[DONE]"
    assert len(found) > 5
    assert all("usage" not in json.loads(event) for event in found[:-1])


def test_usage_that_was_asked_for_comes_once_at_the_end(
    client: openai.OpenAI, proxy: TidegateProcess
) -> None:
    with client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=30,
        stream=True,
        temperature=0,
        stream_options={"include_usage": True},
    ) as chunks:
        found = list(chunks)
    *others, last = found
    assert last.choices == []
    assert last.usage is not None
    assert all(chunk.usage is None and chunk.choices for chunk in others)
    (row,) = proxy.rows(1)
    assert used(row) == (last.usage.prompt_tokens, last.usage.completion_tokens)


def test_running_usage_that_was_asked_for_is_in_every_event(proxy: TidegateProcess) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    with stream(proxy, max_tokens=30, stream_options=options) as response:
        *found, done = events(response)
    assert done == "[DONE]"
    counts = [json.loads(event)["usage"]["completion_tokens"] for event in found]
    assert counts == sorted(counts)
    (row,) = proxy.rows(1)
    assert row["completion_tokens"] == counts[-1]


def test_two_choices_are_metered_together(client: openai.OpenAI, proxy: TidegateProcess) -> None:
    whole = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=20, n=2, seed=1, extra_body={"ignore_eos": True}
    )
    assert [choice.index for choice in whole.choices] == [0, 1]
    with client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=20,
        n=2,
        seed=1,
        stream=True,
        extra_body={"ignore_eos": True},
    ) as chunks:
        assert {chunk.choices[0].index for chunk in chunks} == {0, 1}
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 40
    assert [used(row) for row in proxy.rows(2)] == [(whole.usage.prompt_tokens, 40)] * 2


def test_completions(client: openai.OpenAI, proxy: TidegateProcess) -> None:
    whole = client.completions.create(model="tiny", prompt="Once upon", max_tokens=12, temperature=0)
    with client.completions.create(
        model="tiny", prompt="Once upon", max_tokens=12, temperature=0, stream=True
    ) as chunks:
        found = list(chunks)
    assert "".join(chunk.choices[0].text for chunk in found) == whole.choices[0].text
    assert all(chunk.usage is None for chunk in found)
    assert whole.usage is not None
    assert [used(row) for row in proxy.rows(2)] == [
        (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    ] * 2


def test_a_forced_tool_comes_as_the_engine_sent_it(proxy: TidegateProcess, vllm_tiny: VllmServer) -> None:
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    tools: Any = [WEATHER]
    fields: dict[str, Any] = {"model": "tiny", "max_tokens": 60, "temperature": 0}
    found = []
    for url in (vllm_tiny.url, proxy.url):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            whole = client.chat.completions.create(
                messages=MESSAGES, tools=tools, tool_choice=choice, **fields
            )
            with client.chat.completions.create(
                messages=MESSAGES, tools=tools, tool_choice=choice, stream=True, **fields
            ) as chunks:
                deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
        calls: Any = whole.choices[0].message.tool_calls
        functions = [delta.function for delta in deltas if delta.function]
        names = [function.name for function in functions if function.name]
        found.append((calls[0].function, names, "".join(part.arguments or "" for part in functions)))
    assert found[1] == found[0]
    assert found[1][0].name == "weather"
    assert found[1][1] == ["weather"]
    assert all(row["usage_source"] == "reported" for row in proxy.rows(2))


async def test_the_asynchronous_client(proxy: TidegateProcess) -> None:
    async with openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key="none", max_retries=0) as client:
        whole = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=20, temperature=0
        )
        chunks = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=20, temperature=0, stream=True
        )
        found = [chunk async for chunk in chunks]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in found)
    assert text == whole.choices[0].message.content


def test_curl(proxy: TidegateProcess) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("NOT RUN: curl is not here")
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 5, "stream": True}
    done = subprocess.run(
        [curl, "-sS", "--noproxy", "*", "--json", json.dumps(body), f"{proxy.url}/v1/chat/completions"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.endswith("data: [DONE]\n\n")


def test_tokenize_and_back(proxy: TidegateProcess) -> None:
    def ask(path: str, body: dict[str, Any]) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=30)
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        found: dict[str, Any] = json.loads(connection.getresponse().read())
        connection.close()
        return found

    tokens = ask("/tokenize", {"model": "tiny", "prompt": "Hello there"})["tokens"]
    assert ask("/detokenize", {"model": "tiny", "tokens": tokens})["prompt"] == "Hello there"


# Bad input


def test_an_unknown_model_is_404(client: openai.OpenAI, vllm_tiny: VllmServer) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="nope", messages=MESSAGES)
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize("streamed", [False, True])
def test_too_long_is_400_and_no_fault_of_the_backend(
    client: openai.OpenAI, proxy: TidegateProcess, streamed: bool
) -> None:
    for _ in range(6):  # one more than open a breaker
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "word " * 3000}], stream=streamed
            )
        assert "2048" in error.value.message
    client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=2)
    rows = proxy.rows(7)
    assert [row["outcome"] for row in rows] == ["client_error"] * 6 + ["ok"]
    assert [used(row) for row in rows[:6]] == [(0, 0)] * 6


ALLOWED = {
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
}
DISGUISES = (
    *("//metrics", "/./metrics", "/v1/../metrics", "/%6detrics", "/metrics?x=1", "/metrics/", "/METRICS"),
    *("/v1/chat/completions/../../sleep", "/v1/chat/completions/", "/v1/chat/completions%2f..%2f..%2fsleep"),
    *("/v1/models/../../sleep", "/v1/models/..%2f..%2fsleep", "/tokenize/../sleep", "/sleep;x", "/sleep%00"),
)


@pytest.mark.shared
def test_an_engines_control_endpoints_are_out_of_reach(
    vllm_tiny: VllmServer, tidegate: StartTidegate, shared: Path
) -> None:
    proxy = tidegate({"name": "tiny", "url": vllm_tiny.url, "models": ["tiny"]}, probing={"enabled": False})
    captured = json.loads((shared / "vllm" / "captures" / "vllm_routes.json").read_text())
    known = {
        (method, path.replace("{", "").replace("}", ""))
        for paths in captured.values()
        if isinstance(paths, dict)
        for path, methods in paths.items()
        for method in methods
    }
    routes = known - ALLOWED | {(method, path) for path in DISGUISES for method in ("GET", "POST")}
    assert len(routes) > 70
    before = len(vllm_tiny.requests_logged())
    found = {}
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=30)
    for method, path in sorted(routes):
        connection.request(method, path, b'{"model":"tiny"}' if method == "POST" else None)
        response = connection.getresponse()
        response.read()
        found[method, path] = response.status
    connection.close()
    assert {route: status for route, status in found.items() if status != 404} == {
        route: 405 for route in found if route[1].startswith("/v1/models/") and route[0] == "POST"
    }
    with connect(proxy) as client:
        client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=2)
    assert vllm_tiny.requests_logged()[before:] == [CHAT]


# Ends before the end


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
    leaving = start_vllm("vllm-leaving", drain_s=20).wait_ready()
    proxy = tidegate(
        {"name": "leaving", "url": leaving.url},
        {"name": "other", "url": vllm_tiny.url, "site": "elsewhere"},
        sites={"elsewhere": {}},
    )
    with (
        stream(proxy, max_tokens=LONG, ignore_eos=True, n=8, temperature=1) as began,
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
    assert rows[0]["completion_tokens"] == 8 * LONG


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


def errors(found: list[str]) -> list[str]:
    """Those events that say that something went wrong."""
    return [event for event in found if event != "[DONE]" and "error" in json.loads(event)]


def assert_cut(found: list[str]) -> None:
    """One error event, at the very end, and no `[DONE]`."""
    assert errors(found) == found[-1:]
    error = json.loads(found[-1])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] in ("backend_reset", "backend_timeout", "backend_error")
    assert "[DONE]" not in found


def wait_until(condition: Any, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.02)


# Every token


def test_the_ledger_counts_what_the_engine_counts(proxy: TidegateProcess, vllm_tiny: VllmServer) -> None:
    before = vllm_tiny.counters()

    def one(number: int) -> None:
        with connect(proxy) as client:
            fields: dict[str, Any] = {"model": "tiny", "max_tokens": 5 + 7 * number}
            if number % 2:
                fields["stream"] = True
                if number % 4 == 1:
                    fields["stream_options"] = {"include_usage": True}
            if number % 3 == 0:
                answer: Any = client.completions.create(prompt="a " * number, **fields)
            else:
                words: Any = [{"role": "user", "content": f"{number} " * (1 + 20 * number)}]
                answer = client.chat.completions.create(messages=words, **fields)
            if number % 2:
                for _ in answer:
                    pass

    threads = [threading.Thread(target=one, args=(number,)) for number in range(1, 25)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = proxy.rows(len(threads))
    engine = vllm_tiny.counters() - before
    assert {row["outcome"] for row in rows} == {"ok"}
    assert {row["usage_source"] for row in rows} == {"reported"}
    in_rows = Counters(
        sum(row["prompt_tokens"] for row in rows), sum(row["completion_tokens"] for row in rows)
    )
    assert in_rows == engine
    (line,) = proxy.usage("backend")
    assert Counters(line["prompt_tokens"], line["completion_tokens"]) == engine
    assert (line["backend"], line["requests"], line["errors"]) == ("tiny", len(threads), 0)
