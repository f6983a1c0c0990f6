"""The client's side of HTTP, on real sockets: what is answered, in what order, and what is not."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from proxy.openai import is_slow_to_read
from proxy.tasks import Tasks
from tests.e2e.backends import Request, answers, stalls, stalls_after_head, waits
from tests.e2e.proxy_fixtures import (
    Client,
    MakeKey,
    StartBackend,
    StartProxy,
    bound,
    chat,
    chat_body,
    eventually,
)

pytestmark = pytest.mark.e2e


def request(method: str, path: str, *lines: str, body: bytes = b"", version: str = "1.1") -> bytes:
    fields = ["host: proxy", *lines]
    if body:
        fields.append(f"content-length: {len(body)}")
    return "\r\n".join([f"{method} {path} HTTP/{version}", *fields, "", ""]).encode() + body


async def test_head_is_answered_without_a_body(start_backend: StartBackend, start_proxy: StartProxy) -> None:
    proxy = await start_proxy(await start_backend())
    client = await proxy.connect()
    for method in ("GET", "HEAD", "HEAD", "GET"):
        path = "/v1/models/nobody" if method == "HEAD" else "/v1/models"
        await client.send(request(method, path))
    first, second, third, fourth = [await client.answer(m) for m in ("GET", "HEAD", "HEAD", "GET")]
    assert first.json["data"][0]["id"] == "m"
    assert (second.status, second.body, int(second.fields["content-length"]) > 0) == (404, b"", True)
    assert third.status == 404
    assert fourth.body == first.body


async def test_expect_gets_its_100_only_after_the_checks(
    start_backend: StartBackend, start_proxy: StartProxy, make_key: MakeKey
) -> None:
    key = make_key()
    backend = await start_backend()
    proxy = await start_proxy(backend)
    body = chat_body()
    client = await proxy.connect()
    await client.send(chat(body, key, "expect: 100-continue")[: -len(body)])
    assert (await client.answer()).status == 100
    assert backend.received == []
    await client.send(body)
    assert (await client.answer()).status == 200

    for lines, status in (
        (["expect: 100-continue"], 401),
        ([key, "expect: 100-continue", "content-length: 99999999"], 413),
    ):
        client = await proxy.connect()
        head = ["POST /v1/chat/completions HTTP/1.1", "host: proxy", *lines]
        if status == 401:
            head.append("content-length: 10")
        await client.send("\r\n".join([*head, "", ""]).encode())
        answer = await client.answer()  # the body never comes
        assert (answer.status, answer.fields["connection"]) == (status, "close")
        await client.closed()
    assert len(backend.received) == 1


async def test_pipelined_requests_are_answered_in_their_order(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    gate = asyncio.Event()
    backend = await start_backend(waits(gate, 4), then=answers(2))
    proxy = await start_proxy(backend)
    client = await proxy.connect()
    await client.send(
        chat(stream=True) + chat(b"{") + chat() + request("GET", "/nowhere") + chat(stream=True)
    )
    await eventually(lambda: backend.received)
    gate.set()
    found = [await client.answer() for _ in range(5)]
    assert [answer.status for answer in found] == [200, 400, 200, 404, 200]
    assert [found[0].text, found[4].text] == ["xxxx", "xx"]
    assert len(backend.received) == 3
    await proxy.idle()


async def test_a_client_of_http_1_0_is_served_in_its_own_way(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    proxy = await start_proxy(await start_backend())
    client = await proxy.connect()
    body = chat_body(stream=True)
    await client.send(request("POST", "/v1/chat/completions", body=body, version="1.0"))
    raw = await client.closed()
    assert b"transfer-encoding" not in raw.lower()
    assert b"connection: close" in raw
    assert raw.endswith(b"data: [DONE]\n\n")

    client = await proxy.connect()
    for _ in range(2):
        lines = ("connection: keep-alive",)
        await client.send(request("POST", "/v1/chat/completions", *lines, body=chat_body(), version="1.0"))
        answer = await client.answer()
        assert (answer.status, answer.fields["connection"]) == (200, "keep-alive")


async def test_a_chunked_request_goes_on_whole_and_its_trailers_do_not(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend()
    proxy = await start_proxy(backend)
    body = chat_body(user="u")
    client = await proxy.connect()
    head = request("POST", "/v1/chat/completions", "transfer-encoding: chunked", "trailer: x-secret")
    await client.send(head)
    for byte in body:
        await client.send(b"1;ext=1\r\n%c\r\n" % byte)
    await client.send(b"0\r\nx-secret: trailer\r\n\r\n")
    assert (await client.answer()).status == 200
    received: Request = backend.received[0]
    assert received.body == body
    assert received.fields["content-length"] == str(len(body))
    assert b"trailer" not in backend.raw
    await client.send(chat())  # the connection is in order
    assert (await client.answer()).status == 200


@pytest.mark.parametrize(
    ("raw", "status", "code"),
    [
        (b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", 400, "bad_host"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "bad_host"),
        (b"GET  / HTTP/1.1\r\nhost: a\r\n\r\n", 400, "malformed_request"),
        (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n", 400, ""),
        (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: +5\r\n\r\n", 400, "ambiguous_framing"),
        (b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n\r\n", 400, "ambiguous_framing"),
        (b"GET / HTTP/2.0\r\nhost: a\r\n\r\n", 505, "unsupported_version"),
        (b"FROB / HTTP/1.1\r\nhost: a\r\n\r\n", 501, "unsupported_method"),
        (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nhost: a\r\n\r\n", 414, "target_too_long"),
        (b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"x" * 70_000, 431, "header_too_large"),
        (b"GET / HTTP/1.1\r\nhost: a\r\n" + b"x: 1\r\n" * 200 + b"\r\n", 431, "header_too_large"),
        (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 999999999\r\n\r\n", 413, "body_too_large"),
        (b"\x16\x03\x01\x02\x00\x01", 400, "malformed_request"),
    ],
)
async def test_what_is_refused_is_answered_and_the_connection_ends(
    raw: bytes, status: int, code: str, start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend()
    proxy = await start_proxy(backend)
    client = await proxy.connect()
    await client.send(raw)
    answer = await client.answer("GET")
    assert answer.status == status
    assert code in ("", answer.code)
    assert answer.fields["connection"] == "close"
    await client.send(chat()) if not client.writer.transport.is_closing() else None
    assert await client.closed() == b""  # what stands behind it is never served
    assert backend.raw == b""
    assert proxy.runtime.observer.refusals == {answer.code: 1}


async def test_slow_heads_and_bodies_meet_their_deadlines(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend()
    timeouts = {"head": "300ms", "body": "300ms", "idle": "300ms"}
    proxy = await start_proxy(backend, timeouts=timeouts)
    begun = time.monotonic()
    head, body, idle = [await proxy.connect() for _ in range(3)]
    await body.send(chat()[:-3])

    tasks = Tasks()
    tasks.spawn(_drip(head, b"POST /v1/chat/completions HTTP/1.1\r\nx-slow: " + b"x" * 1000), "drip")
    assert (await head.closed()).startswith(b"HTTP/1.1 408 ")
    await tasks.cancel_all()
    answer = await body.answer()
    assert (answer.status, answer.code) == (408, "request_timeout")
    assert await idle.closed() == b""
    assert time.monotonic() - begun < bound(1.5)
    assert proxy.runtime.observer.refusals == {"request_timeout": 2}
    assert backend.raw == b""


async def _drip(client: Client, data: bytes) -> None:
    for byte in data:
        if client.writer.transport.is_closing():
            break
        await client.send(bytes([byte]))
        await asyncio.sleep(0.05)


async def test_a_body_over_the_limit_is_refused_before_it_is_read(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend()
    proxy = await start_proxy(backend, limits={"body": "100KB"})
    client = await proxy.connect()
    await client.send(chat(b"x" * 200_000)[:500])
    answer = await client.answer()
    assert (answer.status, answer.code) == (413, "body_too_large")
    client = await proxy.connect()
    await client.send(request("POST", "/v1/chat/completions", "transfer-encoding: chunked"))
    sending = asyncio.gather(_send_chunks(client.writer), return_exceptions=True)
    answer = await client.answer()
    assert (answer.status, answer.code) == (413, "body_too_large")
    client.reset()
    await sending
    assert (await proxy.chat(user="x" * 90_000)).status == 200
    assert len(backend.received) == 1


async def _send_chunks(writer: asyncio.StreamWriter) -> None:
    for _ in range(150):
        writer.write(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
        await writer.drain()


async def test_a_half_close_after_the_request_ends_it(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend(then=stalls)
    proxy = await start_proxy(backend)
    client = await proxy.connect()
    await client.send(chat(stream=True))
    await eventually(lambda: backend.running)
    client.writer.write_eof()
    await eventually(lambda: not backend.running, bound(1.0))
    assert await client.closed() == b""
    await proxy.idle()


async def test_control_endpoints_of_an_engine_are_out_of_reach(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend()
    proxy = await start_proxy(backend)
    paths = ["/metrics", "/health", "/version", "/v1/load_lora_adapter", "/reset_prefix_cache", "/sleep"]
    paths += ["/v1/chat/completions/../../pause", "//v1/chat/completions", "/v1/chat%2fcompletions", "/ping"]
    for path in paths:
        for method in ("GET", "POST"):
            answer = await proxy.ask(request(method, path, body=b"{}" if method == "POST" else b""))
            assert (answer.status, answer.code) == (404, "not_found"), path
    answer = await proxy.ask(request("GET", "/v1/chat/completions"))
    assert (answer.status, answer.code) == (405, "method_not_allowed")
    answer = await proxy.ask(request("POST", "http://proxy/v1/chat/completions?x=1", body=chat_body()))
    assert answer.status == 200
    assert [received.target for received in backend.received] == ["/v1/chat/completions"]


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"", "invalid_json", None),
        (b"{'model': 'm'}", "invalid_json", None),
        (b'"m"', "invalid_json", None),
        (b'{"messages":[]}', "missing_field", "model"),
        (b'{"model":7,"messages":[]}', "invalid_value", "model"),
        (b'{"model":"m","model":"n","messages":[]}', "duplicate_key", "model"),
        (b'{"model":"m"}', "missing_field", "messages"),
        (b'{"model":"m","messages":"hi"}', "invalid_value", "messages"),
        (b'{"model":"m","messages":[1]}', "invalid_value", "messages[0]"),
        (b'{"model":"m","messages":[],"stream":"yes"}', "invalid_value", "stream"),
        (b'{"model":"m","messages":[],"n":0}', "invalid_value", "n"),
        (b'{"model":"m","messages":[],"stream_options":{}}', "invalid_value", "stream_options"),
    ],
)
async def test_a_bad_body_is_told_which_field_is_wrong(
    body: bytes, code: str, param: str | None, start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend()
    proxy = await start_proxy(backend)
    client = await proxy.connect()
    for _ in range(2):  # the connection stays in order
        await client.send(chat(body))
        answer = await client.answer()
        assert (answer.status, answer.code, answer.json["error"]["param"]) == (400, code, param)
        assert answer.json["error"]["type"] == "invalid_request_error"
    assert backend.raw == b""
    row = await proxy.row(answer)
    assert (row.outcome, row.status, row.code) == ("client_error", 400, code)


async def test_models_of_all_backends_and_their_aliases_are_merged(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    first, second = await start_backend(), await start_backend()
    proxy = await start_proxy(
        {"url": first.url, "models": ["m", "org/big"]},
        {"url": second.url, "models": ["m", "other"]},
        aliases={"gpt-4": "m"},
    )
    answer = await proxy.ask(request("GET", "/v1/models"))
    assert [row["id"] for row in answer.json["data"]] == ["gpt-4", "m", "org/big", "other"]
    assert answer.json["object"] == "list"
    for name in ("gpt-4", "org/big", "org%2Fbig"):
        row = (await proxy.ask(request("GET", f"/v1/models/{name}"))).json
        assert (row["object"], row["id"]) == ("model", name.replace("%2F", "/"))
    assert row["root"] == "org/big"
    answer = await proxy.ask(request("GET", "/v1/models/none"))
    assert (answer.status, answer.code, answer.json["error"]["param"]) == (404, "model_not_found", "model")
    answer = await proxy.chat(model="gpt-4")
    assert answer.status == 200
    assert [json.loads(r.body)["model"] for r in first.received + second.received] == ["m"]
    row = await proxy.row(answer)
    assert (row.model, row.served_model) == ("gpt-4", "m")
    answer = await proxy.chat(model="none")
    assert (answer.status, answer.code) == (404, "model_not_found")


async def test_a_client_may_bring_its_own_request_id_but_not_anything(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend()
    proxy = await start_proxy(backend)
    assert (await proxy.chat("x-request-id: mine-1")).id == "mine-1"
    # Engines take the id for their own: two requests must not have the same, whatever clients say.
    assert (await proxy.chat("x-request-id: mine-1")).id == "mine-1"
    given = [received.fields["x-request-id"] for received in backend.received]
    assert "mine-1" not in given
    assert len(set(given)) == 2
    for bad in ("a b", "x" * 200, "<script>"):
        assert (await proxy.chat(f"x-request-id: {bad}")).id != bad


async def test_a_large_body_is_read_beside_the_loop(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend()
    proxy = await start_proxy(backend)
    client = await proxy.connect()
    large = [{"type": "text", "text": "x" * 60} for _ in range(6_000)]
    good = json.dumps({"model": "m", "messages": [{"role": "user", "content": large}]}).encode()
    assert is_slow_to_read(good)
    twice = good[:-1] + b', "model": "m"}'
    # One after the other on one connection, and in order: a small one does not overtake.
    for large_one, status in ((good, 200), (twice, 400)):
        await client.send(chat(large_one) + chat(chat_body()))
        first, second = await client.answer(), await client.answer()
        assert (first.status, second.status) == (status, 200)
    assert first.json["error"]["code"] == "duplicate_key"
    assert backend.received[0].body == good
    assert len(backend.received) == 3
    # And a client that leaves meanwhile is no concern.
    await client.send(chat(good))
    client.writer.transport.abort()
    await eventually(lambda: not proxy.runtime.clients)
    assert proxy.runtime.body_bytes == 0


async def test_bodies_that_are_announced_and_not_sent_are_in_nobodys_way(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    proxy = await start_proxy(await start_backend())
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 33554432\r\n\r\n"
    for _ in range(40):
        await (await proxy.connect()).send(head)
    await eventually(lambda: sum(client.receiving for client in proxy.runtime.clients) == 40)
    assert (await proxy.chat()).status == 200


async def test_a_client_that_sends_far_ahead_and_leaves_is_noticed(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend(stalls_after_head)
    proxy = await start_proxy(backend)
    client = await proxy.connect()
    await client.send(chat(stream=True))
    await eventually(lambda: backend.running == 1)
    await client.send(chat(chat_body(stream=True, x="y" * 400_000)))
    client.reset()
    await eventually(lambda: not backend.running)
    await proxy.idle()
