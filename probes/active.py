"""Questions over HTTP: is it alive, and what does it serve?

A probe must cost an engine nothing, so none is a completion, but for `Generate`, which is asked only where the
configuration wants it. Each question has its own connection, so that a
probe finds out whether new connections work and never meets a pooled one that is about to close.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from typing import Final

import aiohttp
import orjson
from aiohttp.abc import AbstractResolver, ResolveResult

from probes.base import (
    Generated,
    ModelsSeen,
    ProbeError,
    Target,
    certificate_reason,
    os_reason,
)
from probes.resolver import Resolver

HEALTH_LIMIT: Final = 64 * 1024
GENERATED_LIMIT: Final = 64 * 1024
MODELS_LIMIT: Final = 1024 * 1024
"""Longest answers that are read, bytes."""

MODEL_NAME_LIMIT: Final = 512
"""Characters; longer names are left out."""

NO_HEALTH_ENDPOINT: Final = frozenset({401, 403, 404, 405, 501})
"""Answers to `GET /health` that say the server has none, or not for us: then its list of models tells."""

REFUSALS: Final = frozenset({400, 401, 403, 495, 496})
"""Answers to who shows a certificate that is not taken; the last two are nginx's."""


class _Known(AbstractResolver):
    """Asks our resolver, which has an answer also when the system has none."""

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in await self._resolver.addresses(host)
        ]

    async def close(self) -> None:
        """It is not ours."""


def new_session(resolver: Resolver | None = None) -> aiohttp.ClientSession:
    """A client for probes: no pool, no common limit (one hanging backend must not use it up), no proxies from
    the environment, no cookies, no timeouts of its own."""
    if resolver is None:
        return _session(aiohttp.TCPConnector(force_close=True, limit=0))
    return _session(
        aiohttp.TCPConnector(force_close=True, limit=0, resolver=_Known(resolver), use_dns_cache=False)
    )


def _session(connector: aiohttp.BaseConnector) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": "tidegate", "Accept-Encoding": "identity"},
        auto_decompress=False,
    )


async def fetch(
    session: aiohttp.ClientSession,
    target: Target,
    path: str,
    limit: int,
    headers: Mapping[str, str] | None = None,
    body: bytes | None = None,
) -> bytes:
    """The body of a 2xx answer, at most `limit` bytes. ProbeError for everything else. With a `body` it is a
    POST."""
    if target.socket_path:
        async with _session(aiohttp.UnixConnector(target.socket_path, force_close=True)) as own:
            return await _fetch(own, target, "http://localhost" + path, limit, headers, body)
    return await _fetch(session, target, target.url.rstrip("/") + path, limit, headers, body)


async def _fetch(
    session: aiohttp.ClientSession,
    target: Target,
    url: str,
    limit: int,
    headers: Mapping[str, str] | None,
    body: bytes | None,
) -> bytes:
    try:
        async with session.request(
            "GET" if body is None else "POST",
            url,
            headers=headers,
            data=body,
            ssl=target.tls or True,
            server_hostname=target.server_name,
            allow_redirects=False,
        ) as response:
            if not 200 <= response.status < 300:
                hint = _own_fault(target) if response.status in REFUSALS else ""
                raise ProbeError(f"{response.status}{hint}", response.status)
            answer = bytearray()
            async for piece in response.content.iter_any():
                answer += piece
                if len(answer) > limit:
                    raise ProbeError(f"answer longer than {limit} bytes")
            return bytes(answer)
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise ProbeError(_describe(error) + _hint(error, target)) from error


def _hint(error: Exception, target: Target) -> str:
    """What of ours may be the reason that a connection failed."""
    match error:
        case aiohttp.ClientConnectorCertificateError():
            return ": the authority in `ca_file` has expired" if target.authorities_end <= time.time() else ""
        case aiohttp.ClientConnectorDNSError() | aiohttp.ClientPayloadError() | ValueError():
            return ""
        case _:  # it may end the handshake, or, with TLS 1.3, what comes behind it
            return _own_fault(target)


def _own_fault(target: Target) -> str:
    return ": our certificate has expired" if target.certificate_ends <= time.time() else ""


def _describe(error: Exception) -> str:
    """What went wrong, in words that hold no header and no URL."""
    match error:
        case aiohttp.ClientConnectorCertificateError():
            return f"certificate refused: {certificate_reason(error.certificate_error)}"
        case aiohttp.ClientConnectorDNSError():
            return "name not resolved"
        case aiohttp.ClientSSLError():
            return "TLS handshake failed"
        case aiohttp.ServerDisconnectedError():
            return "closed without an answer"
        case aiohttp.ClientPayloadError():
            return "answer cut short"
        case aiohttp.ClientResponseError():
            return "malformed answer"
        case OSError():
            return os_reason(error)
        case _:
            return type(error).__name__


class Health:
    """`GET /health`: any 2xx is alive. vLLM answers 200 with an empty body, 503 once its engine is dead."""

    asks = "GET /health"

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def __call__(self, target: Target) -> None:
        await fetch(self._session, target, "/health", HEALTH_LIMIT)


class Models:
    """`GET /v1/models`, with the backend's key."""

    asks = "GET /v1/models"

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def __call__(self, target: Target) -> ModelsSeen:
        return parse_models(await fetch(self._session, target, "/v1/models", MODELS_LIMIT, target.headers))


def parse_models(body: bytes) -> ModelsSeen:
    """Read OpenAI's list of models with vLLM's additions (`max_model_len`, `parent`).

    Rows that make no sense are left out; ProbeError if the whole is no list of models.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ProbeError("not JSON") from error
    rows = document.get("data") if isinstance(document, dict) else None
    if not isinstance(rows, list):
        raise ProbeError("not a list of models")
    lengths: dict[str, int] = {}
    parents: dict[str, str] = {}
    names: set[str] = set()
    for row in rows:
        name = row.get("id") if isinstance(row, dict) else None
        if not isinstance(name, str) or not 0 < len(name) <= MODEL_NAME_LIMIT:
            continue
        names.add(name)
        length, parent = row.get("max_model_len"), row.get("parent")
        if type(length) is int and length > 0:
            lengths[name] = length
        if isinstance(parent, str) and parent:
            parents[name] = parent
    context_tokens = {
        name: length for name in names if (length := lengths.get(name) or lengths.get(parents.get(name, "")))
    }
    return ModelsSeen(frozenset(names), context_tokens, parents)


class Generate:
    """`POST /v1/chat/completions` for one token: does the engine still compute?"""

    asks = "POST /v1/chat/completions"

    def __init__(self, session: aiohttp.ClientSession, model: str) -> None:
        self._session = session
        self._model = model

    async def __call__(self, target: Target) -> Generated:
        message = {"role": "user", "content": "."}
        body = orjson.dumps({"model": self._model, "messages": [message], "max_tokens": 1})
        headers = {**target.headers, "Content-Type": "application/json"}
        return parse_generated(
            await fetch(self._session, target, self.asks[5:], GENERATED_LIMIT, headers, body)
        )


def parse_generated(body: bytes) -> Generated:
    """What a complete answer has used. ProbeError if it is none."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ProbeError("not JSON") from error
    if not isinstance(document, dict) or not document.get("choices"):
        raise ProbeError("no answer in it")
    usage = document.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    prompt, completion = (counts.get(name) for name in ("prompt_tokens", "completion_tokens"))
    return Generated(
        prompt if type(prompt) is int and prompt > 0 else 0,
        completion if type(completion) is int and completion > 0 else 0,
    )
