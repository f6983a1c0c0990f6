"""Asking over HTTP: alive, and serving what?"""

from __future__ import annotations

import json
import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from probes.active import HEALTH_LIMIT, Health, Models, new_session, parse_models
from probes.base import ModelsSeen, ProbeError, ProbeResult, Target, ask
from tests.probes.fake import FakeBackend, RawServer, model_list


async def health(
    url: str, tls: ssl.SSLContext | None = None, server_name: str | None = None
) -> tuple[bool, str]:
    async with new_session() as session:
        result = await ask(Health(session), Target("a", url, tls=tls, server_name=server_name), 30.0)
    return result.ok, result.reason


async def models(target: Target) -> ProbeResult[ModelsSeen]:
    async with new_session() as session:
        return await ask(Models(session), target, 30.0)


@pytest.mark.parametrize("status", [200, 204, 299])
async def test_any_2xx_is_alive(status: int) -> None:
    async with FakeBackend(health=status) as backend:
        assert await health(backend.url) == (True, "")


@pytest.mark.parametrize("status", [301, 404, 429, 500, 503])
async def test_nothing_else_is(status: int) -> None:
    async with FakeBackend(health=status) as backend:
        assert await health(backend.url) == (False, f"GET /health: {status}")


@pytest.mark.parametrize(("status", "said"), [(400, True), (403, True), (404, False), (503, False)])
async def test_a_refusal_may_be_of_our_certificate(status: int, said: bool) -> None:
    async with FakeBackend(health=status) as backend, new_session() as session:
        for ends, hint in ((0.0, ": our certificate has expired" if said else ""), (2.0**40, "")):
            target = Target("a", backend.url, certificate_ends=ends)
            result = await ask(Health(session), target, 30.0)
            assert result.reason == f"GET /health: {status}{hint}"
            assert result.status == status


async def test_a_connection_that_is_closed_may_be_so_for_our_certificate() -> None:
    async with RawServer(b"") as url, new_session() as session:
        result = await ask(Health(session), Target("a", url, certificate_ends=0.0), 30.0)
    assert result.reason == "GET /health: closed without an answer: our certificate has expired"


async def test_a_redirect_is_not_followed() -> None:
    async with FakeBackend() as elsewhere:
        reply = f"HTTP/1.1 307 X\r\nLocation: {elsewhere.url}/health\r\nContent-Length: 0\r\n\r\n".encode()
        async with RawServer(reply) as url:
            assert await health(url) == (False, "GET /health: 307")
        assert elsewhere.requests == []


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (b"", "closed without an answer"),
        (b"SSH-2.0-x\r\n\r\n", "malformed answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab", "answer cut short"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (HEALTH_LIMIT + 1), f"answer longer than {HEALTH_LIMIT} bytes"),
    ],
)
async def test_garbage_is_a_failure_with_a_reason(reply: bytes, reason: str) -> None:
    async with RawServer(reply) as url:
        assert await health(url) == (False, f"GET /health: {reason}")


async def test_a_path_before_the_api_is_kept() -> None:
    async with FakeBackend() as backend:
        await health(backend.url + "/llm/")
        assert [path for path, _ in backend.requests] == ["/llm/health"]


async def test_tls_is_verified_with_the_targets_own_context() -> None:
    authority, here, name = trustme.CA(), "127.0.0.1", "nj.example"
    serving = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(name).configure_cert(serving)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    application = web.Application()

    async def answer(request: web.Request) -> web.Response:
        return web.Response()

    application.router.add_get("/health", answer)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, here, 0, ssl_context=serving)
        await site.start()
        url = f"https://{here}:{runner.addresses[0][1]}"
        assert await health(url, trusting, name) == (True, "")
        for tls, server_name in [(None, name), (trusting, None)]:
            ok, reason = await health(url, tls, server_name)
            assert not ok
            wrong = "nobody we trust has signed it" if tls is None else "it is for another address"
            assert reason == f"GET /health: certificate refused: {wrong}"
    finally:
        await runner.cleanup()


async def test_the_list_of_models_is_asked_for_with_the_key() -> None:
    async with FakeBackend(models=model_list("m", "n")) as backend:
        target = Target("a", backend.url, headers={"Authorization": "Bearer geheim"})
        result = await models(target)
    assert result.value == ModelsSeen(frozenset({"m", "n"}), {"m": 2048, "n": 2048}, {})
    assert backend.requests[0][1]["authorization"] == "Bearer geheim"


def test_a_lora_adapter_has_its_base_models_limit() -> None:
    rows = [
        {"id": "base", "max_model_len": 4096, "parent": None},
        {"id": "adapter", "max_model_len": None, "parent": "base"},
        {"id": "orphan", "max_model_len": None, "parent": "gone"},
    ]
    seen = parse_models(json.dumps({"data": rows}).encode())
    assert seen.context_tokens == {"base": 4096, "adapter": 4096}
    assert seen.parents == {"adapter": "base", "orphan": "gone"}


@pytest.mark.parametrize(
    "row", [None, 7, "m", {}, {"id": None}, {"id": ""}, {"id": 3}, {"id": "x" * 513}, ["id", "m"]]
)
def test_rows_that_make_no_sense_are_left_out(row: object) -> None:
    body = json.dumps({"data": [row, {"id": "good"}]}).encode()
    assert parse_models(body).names == {"good"}


@pytest.mark.parametrize("length", [None, 0, -1, "4096", 1.5, True])
def test_a_limit_that_makes_no_sense_is_unknown(length: object) -> None:
    body = json.dumps({"data": [{"id": "m", "max_model_len": length}]}).encode()
    assert parse_models(body).context_tokens == {}


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b"null", b'{"data": {}}', b'{"error": "Unauthorized"}']
)
def test_what_is_no_list_of_models_is_refused(body: bytes) -> None:
    with pytest.raises(ProbeError, match="not"):
        parse_models(body)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["id", "parent"]), inner),
    max_leaves=20,
)


@given(st.one_of(st.binary(), json_values.map(lambda rows: json.dumps({"data": rows}).encode())))
def test_law_any_answer_is_a_list_or_a_refusal(body: bytes) -> None:
    try:
        seen = parse_models(body)
    except ProbeError:
        return
    assert seen.context_tokens.keys() | seen.parents.keys() <= seen.names


CAPTURES = Path(__file__).parents[3] / "shared" / "vllm" / "captures"


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "limits"),
    [
        ("smollm2/models", {"smollm2": 2048}),
        ("tiny_dev/lora_models", {"tiny": 2048, "tiny-alias": 2048, "l1": 2048}),
    ],
)
async def test_answers_of_a_real_vllm(name: str, limits: dict[str, Any]) -> None:
    path = CAPTURES / f"{name}.response.http"
    if not path.exists():
        pytest.skip(f"{name}: no captures of a real vLLM beside this checkout")
    async with RawServer(path.read_bytes()) as url:
        result = await models(Target("a", url))
    assert result.value is not None
    assert result.value.context_tokens == limits
    async with RawServer((CAPTURES / "smollm2" / "health.response.http").read_bytes()) as url:
        assert await health(url) == (True, "")
