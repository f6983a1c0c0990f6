"""Answers of our own, as bytes."""

from __future__ import annotations

import time
from email.utils import formatdate
from functools import lru_cache
from math import ceil

from proxy.dialects import body_in, status_in
from proxy.endpoints import OPENAI, dialect_of
from proxy.errors import REASON_PHRASES, RequestError
from proxy.http1 import RequestHead


@lru_cache(maxsize=1)
def _date(second: int) -> bytes:
    """Unix time as an HTTP date (RFC 9110 5.6.7)."""
    return formatdate(second, usegmt=True).encode("ascii")


def answer(
    status: int,
    body: bytes,
    *,
    fields: bytes = b"",
    keep_alive: bool = True,
    version: int = 1,
    without_body: bool = False,
) -> bytes:
    """A whole JSON answer. `fields`: further field lines; `without_body`: the request was HEAD."""
    connection = b""
    if not keep_alive:
        connection = b"connection: close\r\n"
    elif version == 0:
        connection = b"connection: keep-alive\r\n"
    return (
        b"HTTP/1.1 %d %b\r\ndate: %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%b%b\r\n%b"
        % (
            status,
            REASON_PHRASES[status].encode("ascii"),
            _date(int(time.time())),
            len(body),
            fields,
            connection,
            b"" if without_body else body,
        )
    )


def stream_head(*, fields: bytes = b"", keep_alive: bool = True) -> bytes:
    """Head of a stream of events, before any backend has begun to answer. `fields`: further field lines."""
    return (
        b"HTTP/1.1 200 OK\r\ndate: %b\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
        b"cache-control: no-cache\r\nx-accel-buffering: no\r\n%b%b\r\n"
        % (_date(int(time.time())), fields, b"" if keep_alive else b"connection: close\r\n")
    )


def kept_answer(
    status: int, body: bytes, *, fields: bytes, keep_alive: bool = True, version: int = 1
) -> bytes:
    """A backend's answer once more. `fields`: its own field lines and further ones."""
    connection = b""
    if not keep_alive:
        connection = b"connection: close\r\n"
    elif version == 0:
        connection = b"connection: keep-alive\r\n"
    phrase = REASON_PHRASES.get(status, "OK").encode("ascii")
    head = b"HTTP/1.1 %d %b\r\n%bcontent-length: %d\r\n%b\r\n"
    return head % (status, phrase, fields, len(body), connection) + body


def error_answer(
    error: RequestError,
    *,
    fields: bytes = b"",
    keep_alive: bool = True,
    version: int = 1,
    without_body: bool = False,
    dialect: str = OPENAI,
) -> bytes:
    """The answer to a request that is refused, in the dialect of its endpoint."""
    if error.retry_after_s is not None:
        fields += b"retry-after: %d\r\n" % max(1, ceil(error.retry_after_s))
    if error.allow:
        fields += b"allow: %b\r\n" % error.allow.encode("ascii")
    if error.status == 401:
        fields += b"www-authenticate: Bearer\r\n"
    if error.status == 426:
        fields += b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
    return answer(
        status_in(dialect, error.code),
        body_in(dialect, error.code, error.message, error.param),
        fields=fields,
        keep_alive=keep_alive,
        version=version,
        without_body=without_body,
    )


def refusal(error: RequestError, head: RequestHead | None, request_id: str, *, keep_alive: bool) -> bytes:
    """The answer to a request that was not admitted; `head`: None if that much could not be read."""
    return error_answer(
        error,
        fields=b"x-request-id: %b\r\n" % request_id.encode("ascii"),
        keep_alive=keep_alive,
        version=1 if head is None else head.version,
        without_body=head is not None and head.method == b"HEAD",
        dialect=OPENAI if head is None else dialect_of(head.target),
    )
