"""What the tests of real servers do as clients: the official one, a stream's raw bytes, and waiting."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import openai

from tests.e2e.tidegate_process import TidegateProcess

MESSAGES: list[Any] = [{"role": "user", "content": "Say something long."}]
CHAT = "POST /v1/chat/completions"
"""As an engine's access log has it."""


def connect(proxy: TidegateProcess) -> openai.OpenAI:
    """The official client; it does not try again by itself."""
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
    """Prompt and completion tokens of a ledger row."""
    return row["prompt_tokens"], row["completion_tokens"]


def errors(found: list[str]) -> list[str]:
    """Those events that say that something went wrong."""
    return [event for event in found if event != "[DONE]" and "error" in json.loads(event)]


def assert_cut(found: list[str]) -> None:
    """One error event, ours or the last words of a dying engine (500), at the very end, and no `[DONE]`."""
    assert errors(found) == found[-1:]
    error = json.loads(found[-1])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] in ("backend_reset", "backend_timeout", "backend_error", 500)
    assert "[DONE]" not in found


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Look until it is so; AssertionError if that takes too long."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.02)
