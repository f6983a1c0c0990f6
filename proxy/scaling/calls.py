"""Calls of an operator's HTTP endpoint: signed, bounded, and repeated until an answer or the end of the time.

A call keeps its `webhook-id` over all its attempts, so that an endpoint which did the work and whose answer was
lost can say so again. Tried again: what was not answered, 408, 409 (busy), 425, 429 and 5xx, after a pause that
doubles and is partly random, and not before `Retry-After` says. Any other answer is final. Redirects are not
followed: a message signed for one address is not carried to another.
"""

from __future__ import annotations

import asyncio
import secrets as random_bytes
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from random import Random
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
import orjson

from probes.active import new_session
from probes.resolver import Resolver, SystemLookup
from proxy.config_values import is_metadata
from proxy.scaling.provider import ProviderError
from proxy.scaling.signing import signed, what_is_signed

MOST_ANSWER_BYTES: Final = 64 * 1024
FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 30.0
LONGEST_RETRY_AFTER_S: Final = 3600.0
AGAIN: Final = frozenset({408, 409, 425, 429})
"""Besides 5xx: answers that say that it may be otherwise later."""
MOST_SHOWN: Final = 200
"""Characters of an answer in an error message."""
_LOOKUP: Final = SystemLookup()
"""One for all callers: it has threads."""


class RefusedError(ProviderError):
    """An answer that asking again will not change."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Answer:
    """A 2xx answer."""

    status: int
    body: bytes = field(default=b"", repr=False)

    def json(self) -> dict[str, Any]:
        """Its body as an object; empty, if it has none. Raises ProviderError."""
        if not self.body.strip():
            return {}
        try:
            value = orjson.loads(self.body)
        except orjson.JSONDecodeError:
            raise ProviderError(f"its answer is not JSON: {shown(self.body)}") from None
        if not isinstance(value, dict):
            raise ProviderError(f"its answer is not a JSON object: {shown(self.body)}")
        return value


def new_id() -> str:
    """An id for a message that nobody has had."""
    return f"msg_{random_bytes.token_hex(12)}"


class Caller:
    """Calls endpoints with one set of secrets. The session opens with the first call."""

    def __init__(
        self,
        secrets: Sequence[bytes] = (),
        *,
        timeout_s: float = 10.0,
        first_pause_s: float = FIRST_PAUSE_S,
        tls: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        random: Random | None = None,
    ) -> None:
        """`secrets`: none: calls are not signed. `timeout_s`: of one attempt. `tls`: default: the system's
        authorities."""
        self._secrets = tuple(secrets)
        self._timeout_s = timeout_s
        self._first_pause_s = first_pause_s
        self._tls = tls
        self._clock = clock
        self._wall = wall
        self._sleep = sleep
        self._random = random or Random()  # noqa: S311 (it spreads pauses)
        self._session: aiohttp.ClientSession | None = None
        self._resolver: Resolver | None = None

    async def call(
        self, method: str, url: str, content: Mapping[str, Any] | None = None, *, id: str, within_s: float
    ) -> Answer:
        """The 2xx answer to a request with this JSON body, asked for again and again for at most `within_s`.

        Raises RefusedError: it refuses for good; ProviderError: it gave no answer in time.
        """
        body = b"" if content is None else orjson.dumps(content)
        deadline = self._clock() + within_s
        attempt = 0
        while True:
            left_s = deadline - self._clock()
            try:
                async with asyncio.timeout(min(self._timeout_s, max(left_s, 0.0))):
                    status, answer, after_s = await self._attempt(method, url, body, id)
                if 200 <= status < 300:
                    return Answer(status, answer)
                said = f"{status}{_said(answer)}"
                if status < 500 and status not in AGAIN:
                    kind = "answers with a redirect, which is not followed" if status < 400 else "refuses it"
                    raise RefusedError(f"{_place(url)} {kind}: {said}", status)
                problem = f"it is busy: {said}" if status == 409 else f"it answers {said}"
            except TimeoutError:
                problem, after_s = f"no answer within {min(self._timeout_s, within_s):g} s", 0.0
            except (aiohttp.ClientError, OSError, ValueError) as error:
                problem, after_s = _reason(error), 0.0
            attempt += 1
            longest_s = min(self._first_pause_s * 2.0 ** min(attempt - 1, 16), LONGEST_PAUSE_S)
            pause_s = max(longest_s * self._random.uniform(0.5, 1.0), after_s)
            if self._clock() + pause_s >= deadline:
                times = "once" if attempt == 1 else f"{attempt} times"
                raise ProviderError(f"{_place(url)}, asked {times}: {problem}")
            await self._sleep(pause_s)

    async def _attempt(self, method: str, url: str, body: bytes, id: str) -> tuple[int, bytes, float]:
        """Status, body, and how long to wait before the next attempt."""
        if self._session is None:
            # The operator may mean private addresses; a name that leads to a metadata service is never meant.
            self._resolver = Resolver(_LOOKUP, allowed=lambda address: not is_metadata(address))
            self._session = new_session(self._resolver)
        assert self._resolver is not None
        parts = urlsplit(url)
        await self._resolver.refresh([parts.hostname or ""])  # it may have moved
        headers = {"content-type": "application/json"} if body else {}
        if self._secrets:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            headers |= signed(self._secrets, id, int(self._wall()), what_is_signed(method, path, body))
        async with self._session.request(
            method, url, data=body or None, headers=headers, allow_redirects=False, ssl=self._tls or True
        ) as response:
            answer = bytearray()
            async for piece in response.content.iter_any():
                answer += piece
                if len(answer) > MOST_ANSWER_BYTES:
                    message = f"{_place(url)} answers with more than {MOST_ANSWER_BYTES} bytes"
                    raise RefusedError(message, response.status)
            return response.status, bytes(answer), self._retry_after(response.headers.get("Retry-After", ""))

    def _retry_after(self, value: str) -> float:
        """Seconds, of a number or a date (RFC 9110, 10.2.3); 0: it says nothing."""
        value = value.strip()
        if value.isascii() and value.isdigit():
            seconds = float(value[:9])
        else:
            try:
                seconds = parsedate_to_datetime(value).timestamp() - self._wall()
            except (ValueError, TypeError, OverflowError):
                return 0.0
        return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_S)

    async def close(self) -> None:
        """Let connections go."""
        if self._session is not None:
            await self._session.close()
            self._session = None
        if self._resolver is not None:
            await self._resolver.close()
            self._resolver = None


def shown(body: bytes) -> str:
    """The beginning of an answer, in one printable line."""
    text = " ".join(body[: 4 * MOST_SHOWN].decode("utf-8", "replace").split())
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 3] + "..."


def _said(body: bytes) -> str:
    return f" ({text})" if (text := shown(body)) else ""


def _place(url: str) -> str:
    """Scheme, host and port: what stands behind may be a secret."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _reason(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientSSLError):
        return f"TLS fails: {error}"
    if isinstance(error, OSError) and error.strerror:
        return f"it cannot be reached: {error.strerror}"
    return f"it gives no proper answer: {str(error) or type(error).__name__}"
