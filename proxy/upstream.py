"""The backend side: one connection, the idle ones of a backend, and how to open another.

A connection serves one request at a time. It is used again only after a reply that ended exactly where its
framing said, on a connection that both sides want to keep; whatever else happens to it, it is closed. Bytes that
arrive while nobody asked anything are a reason to close it too.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from abc import ABC, abstractmethod
from functools import partial
from math import inf
from typing import Final, cast
from urllib.parse import urlsplit

from probes.base import certificate_reason, os_reason, socket_path
from probes.passive import AttemptError
from probes.resolver import Resolver, is_address
from proxy.http1 import (
    ChunkedDecoder,
    MalformedResponseError,
    PartialHead,
    RepeatedResponseHead,
    ResponseHead,
    parse_response_head,
)
from proxy.pool import Pool

log = logging.getLogger("tidegate")

OUR_SHORTAGE: Final = frozenset(
    (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL)
)
"""Why no connection can be had that says nothing about a backend."""


def is_our_shortage(error: BaseException | None) -> bool:
    """Whether an error, or one that it arose from, says that this machine has no more of something."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in OUR_SHORTAGE:
            return True
        error = error.__context__
    return False


MAX_INFORMATIONAL: Final = 16
"""1xx responses in front of one reply; more is a flood."""

_IDLE: Final = 0
_HEAD: Final = 1
_LENGTH: Final = 2
_CHUNKED: Final = 3
_UNTIL_CLOSE: Final = 4
_CLOSED: Final = 5


class Receiver(ABC):
    """Who waits for a reply. After `body(..., done=True)` or `lost` the connection is no longer its own.

    A class to inherit from and no Protocol, so that compiled code calls its methods and does not look them up.
    """

    @abstractmethod
    def head(self, head: ResponseHead) -> None: ...

    @abstractmethod
    def body(self, payload: bytes, done: bool) -> None: ...

    @abstractmethod
    def lost(self, error: AttemptError, message: str) -> None: ...

    def backend_full(self, full: bool) -> None:  # noqa: B027 - only who sends more than requests needs it
        """The backend of a WebSocket takes no more for now, or again."""


class BackendConnection:
    """One connection to a backend: an `asyncio.Protocol` in all but name, as `ClientConnection` is."""

    __slots__ = (
        "_decoder",
        "_informational",
        "_keep_alive",
        "_partial",
        "_receiver",
        "_remaining",
        "_state",
        "_to_head_request",
        "_to_upgrade",
        "address",
        "endpoint",
        "idle_since",
        "opened",
        "received",
        "requests",
        "transport",
    )

    def __init__(self, endpoint: Endpoint, address: str = "") -> None:
        """`address`: what the endpoint's name stood for; empty: it has no name."""
        self.endpoint = endpoint
        self.address = address
        self.transport: asyncio.Transport | None = None
        self.requests = 0
        """Requests sent on it, the present one included."""
        self.opened = endpoint.pool.now()
        self.idle_since = 0.0
        self.received = False
        """Whether a byte of the present reply has come."""
        self._receiver: Receiver | None = None
        self._state = _IDLE
        self._partial: PartialHead | None = None
        self._decoder: ChunkedDecoder | None = None
        self._remaining = 0
        self._informational = 0
        self._keep_alive = True
        self._to_head_request = False
        self._to_upgrade = False
        """It may become a WebSocket, and serves nothing else any more."""

    def send(self, receiver: Receiver, request: bytes, *, to_head_request: bool = False) -> None:
        """Send a whole request; `receiver` hears of its reply."""
        assert self._state == _IDLE
        assert self.transport is not None
        self._receiver = receiver
        self._state = _HEAD
        self._to_head_request = to_head_request
        self._informational = 0
        self.received = False
        self.requests += 1
        self.transport.write(request)

    def upgrade(self, receiver: Receiver, request: bytes) -> None:
        """Send the handshake of a WebSocket; behind a 101, `receiver` gets as its body whatever comes."""
        self._to_upgrade = True
        self.send(receiver, request)

    def write(self, data: bytes) -> None:
        """More for the backend of a WebSocket."""
        if self.transport is not None and self._state != _CLOSED:
            self.transport.write(data)

    def end_writing(self) -> bool:
        """Close our half of a WebSocket. False: that cannot be done, since it is behind TLS, or gone."""
        transport = self.transport
        if transport is None or self._state == _CLOSED or not transport.can_write_eof():
            return False
        transport.write_eof()
        return True

    @property
    def closed(self) -> bool:
        """Whether nothing can be sent on it any more."""
        return self._state == _CLOSED

    def hand_over(self, receiver: Receiver) -> None:
        """Somebody else hears of the rest of the reply; for its present receiver to call, from `body`, or from
        outside."""
        assert self._receiver is not None
        self._receiver = receiver

    def pause(self) -> None:
        """Stop reading: the client is slow."""
        if self.transport is not None and self._state not in (_IDLE, _CLOSED):
            self.transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self.transport is not None and self._state not in (_IDLE, _CLOSED):
            self.transport.resume_reading()

    def abort(self) -> None:
        """Close at once; the engine takes that as the end of its request. Nobody is told."""
        self._receiver = None
        self._state = _CLOSED
        if self.transport is not None:
            self.transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's
        self.transport = cast("asyncio.Transport", transport)

    def eof_received(self) -> bool:
        return False  # what that means is decided when the connection is lost

    def pause_writing(self) -> None:
        """A request body is kept whole anyway: the transport sends it as fast as the backend takes it."""
        if self._to_upgrade and self._receiver is not None:
            self._receiver.backend_full(True)

    def resume_writing(self) -> None:
        """See `pause_writing`."""
        if self._to_upgrade and self._receiver is not None:
            self._receiver.backend_full(False)

    def data_received(self, data: bytes) -> None:
        state = self._state
        if state == _CHUNKED:
            assert self._decoder is not None
            self._read_chunked(data, 0)
        elif state == _HEAD:
            self.received = True
            self._read_head(data)
        elif state == _LENGTH:
            self._read_length(data, 0)
        elif state == _UNTIL_CLOSE:
            assert self._receiver is not None
            self._receiver.body(data, False)
        else:
            self.endpoint.pool.forget(self)
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        state, receiver = self._state, self._receiver
        self._state, self._receiver = _CLOSED, None
        self.endpoint.pool.forget(self)
        if receiver is None:
            return
        if state == _UNTIL_CLOSE and error is None:
            _finish(receiver, b"")
        elif state == _HEAD and not self.received and self.requests > 1:
            receiver.lost(AttemptError.STALE_CONNECTION, "an idle connection had been closed")
        else:
            receiver.lost(
                AttemptError.RESET, "the backend closed the connection before its answer was complete"
            )

    # reading

    def _read_head(self, data: bytes) -> None:
        position = 0
        receiver = self._receiver
        assert receiver is not None
        try:
            if self._partial is not None:
                if not self._partial.add(data):
                    return
                data, self._partial = self._partial.whole(), None
            repeated = self.endpoint.repeated
            recalled = None if self._to_head_request else repeated.recall(data, 0)
            if recalled is not None:
                head, position = recalled
            while recalled is None:
                parsed = parse_response_head(
                    data, position, to_head_request=self._to_head_request, to_upgrade=self._to_upgrade
                )
                if isinstance(parsed, PartialHead):
                    self._partial = parsed
                    return
                start, (head, position) = position, parsed
                if head.status >= 200:
                    if not self._to_head_request:
                        repeated.remember(data, start, position, head)
                    break
                if head.status == 101:
                    break
                self._informational += 1
                if self._informational > MAX_INFORMATIONAL:
                    raise MalformedResponseError("too many informational responses")
        except MalformedResponseError as error:
            self._malformed(str(error))
            return
        self._keep_alive = head.keep_alive and not self._to_upgrade
        receiver.head(head)
        if self._receiver is not receiver:
            return  # it lost interest
        if head.chunked:
            self._state = _CHUNKED
            self._decoder = ChunkedDecoder()
            if position < len(data):
                self._read_chunked(data, position)
        elif head.content_length is None:
            self._state = _UNTIL_CLOSE
            if position < len(data):
                receiver.body(data[position:], False)
        else:
            self._state = _LENGTH
            self._remaining = head.content_length
            self._read_length(data, position)

    def _read_chunked(self, data: bytes, position: int) -> None:
        decoder, receiver = self._decoder, self._receiver
        assert decoder is not None
        assert receiver is not None
        try:
            payload, end = decoder.feed(data, position)
        except ValueError as error:
            self._malformed(str(error))
            return
        if decoder.done:
            self._release(end == len(data))
            _finish(receiver, payload)
        elif payload:
            receiver.body(payload, False)

    def _read_length(self, data: bytes, position: int) -> None:
        receiver = self._receiver
        assert receiver is not None
        size = len(data) - position
        if size < self._remaining:
            self._remaining -= size
            if size:
                receiver.body(data[position:] if position else data, False)
            return
        end = position + self._remaining
        self._release(end == len(data))
        _finish(receiver, data[position:end])

    def _release(self, clean: bool) -> None:
        """The reply is complete: keep the connection, or close it."""
        self._receiver = None
        self._decoder = None
        transport = self.transport
        if (
            clean
            and self._keep_alive
            and transport is not None
            and not transport.is_closing()
            and not transport.get_write_buffer_size()  # it answered without having read the whole request
        ):
            self._state = _IDLE
            self.endpoint.pool.give(self)
        else:
            self.abort()

    def _malformed(self, message: str) -> None:
        receiver = self._receiver
        self.abort()
        if receiver is not None:
            receiver.lost(AttemptError.MALFORMED, message)


def _finish(receiver: Receiver, payload: bytes) -> None:
    """Hand over the end of a reply. The connection has let go of its receiver, so nobody else would tell it of a
    bug in reading that end."""
    try:
        receiver.body(payload, True)
    except Exception:
        log.exception("the end of an answer could not be read")
        receiver.lost(AttemptError.MALFORMED, "the backend's answer could not be read")


def connect_failure(error: OSError) -> tuple[AttemptError, str]:
    """Why a connection could not be made: what kind of failure it is, and words that name no address."""
    match error:
        case ssl.SSLCertVerificationError():
            return AttemptError.TLS, f"its certificate was refused: {certificate_reason(error)}"
        case ssl.SSLError():
            return AttemptError.TLS, "TLS handshake failed"
        case TimeoutError():
            return AttemptError.CONNECT, "timed out"
        case socket.gaierror():
            return AttemptError.CONNECT, "its name was not resolved"
        case _:
            return AttemptError.CONNECT, os_reason(error)


class Endpoint:
    """Where a backend is, and the connections to it."""

    def __init__(
        self,
        name: str,
        url: str,
        loop: asyncio.AbstractEventLoop,
        *,
        key: str | None = None,
        idle_s: float = 4.0,
        tls: ssl.SSLContext | None = None,
        tls_files: bytes = b"",
        server_name: str | None = None,
        continuous_usage: bool = True,
        cache_salt: bool = True,
        resolver: Resolver | None = None,
        age_s: float = inf,
        most_requests: int = 1_000_000_000,
    ) -> None:
        """`key` replaces the client's credential; `tls` is needed for https URLs, and `tls_files` is what it was
        made of, in any form that tells whether it has changed."""
        self.name = name
        self.url = url
        self.socket_path = socket_path(url)
        parts = urlsplit("http://localhost" if self.socket_path else url)
        assert parts.hostname is not None
        self.host = parts.hostname
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.prefix = parts.path.rstrip("/").encode("ascii")
        self.continuous_usage = continuous_usage
        self.cache_salt = cache_salt
        self.pool = Pool(idle_s, loop, age_s, most_requests)
        self.repeated = RepeatedResponseHead()
        host = f"[{self.host}]" if ":" in self.host else self.host
        authority = host if parts.port is None else f"{host}:{parts.port}"
        # What is encoded cannot be metered.
        fields = f"host: {authority}\r\naccept-encoding: identity\r\n"
        if key is not None:
            fields += f"authorization: Bearer {key}\r\n"
        self._fields = fields.encode("ascii")
        self._loop = loop
        self._tls = tls
        self._tls_files = tls_files
        self._server_name = (server_name or self.host) if tls is not None else None
        self._resolver = None if self.socket_path or is_address(self.host) else resolver
        self._good = ""
        """The address that the last connection was made to."""
        self._told = ""
        """What of its TLS the log complains of."""

    def same_credentials(self, other: Endpoint) -> bool:
        """Whether both send the same key, and trust and show the same certificates."""
        return self._fields == other._fields and self._tls_files == other._tls_files

    def __repr__(self) -> str:
        return f"<Endpoint {self.name} {self.url}, {len(self.pool)} idle>"

    def request(
        self, method: bytes, target: bytes, forward: bytes, body: bytes | None, request_id: bytes
    ) -> bytes:
        """A whole request as bytes. `forward`: field lines of the client that go on; `body` None: no body."""
        head = b"%b %b%b HTTP/1.1\r\n%b%bx-request-id: %b\r\n" % (
            method,
            self.prefix,
            target,
            self._fields,
            forward,
            request_id,
        )
        if body is None:
            return head + b"\r\n"
        return b"%bcontent-length: %b\r\n\r\n%b" % (head, str(len(body)).encode(), body)

    async def connect(self, timeout_s: float) -> BackendConnection:
        """Open a connection. Raises OSError (also for TLS) or TimeoutError."""
        try:
            async with asyncio.timeout(timeout_s):
                if self._resolver is None:
                    connection = await self._open(self.host, "")
                else:
                    connection = await self._open_any(await self._addresses(), timeout_s)
        except ssl.SSLError as error:
            reason = connect_failure(error)[1]
            if reason != self._told:
                self._told = reason
                log.warning("backend %s: %s", self.name, reason)
            raise
        self._told = ""
        return connection

    async def _addresses(self) -> list[str]:
        """Those to try, the one that was good before the others."""
        assert self._resolver is not None
        found = list(await self._resolver.addresses(self.host))
        if self._good in found:
            found.remove(self._good)
            found.insert(0, self._good)
        return found

    async def _open_any(self, addresses: list[str], timeout_s: float) -> BackendConnection:
        """One address after the other; each has an equal share of the time that is left."""
        end = self._loop.time() + timeout_s
        while True:
            address = addresses.pop(0)
            try:
                async with asyncio.timeout((end - self._loop.time()) / (1 + len(addresses))):
                    connection = await self._open(address, address)
            except OSError:  # TimeoutError is one
                if not addresses:
                    raise
            else:
                self._good = address
                return connection

    async def _open(self, host: str, address: str) -> BackendConnection:
        new = partial(_new_connection, self, address)
        protocol: asyncio.BaseProtocol
        if self.socket_path:
            _, protocol = await self._loop.create_unix_connection(new, self.socket_path)
        else:
            _, protocol = await self._loop.create_connection(
                new, host, self.port, ssl=self._tls, server_hostname=self._server_name
            )
        return cast("BackendConnection", protocol)


def _new_connection(endpoint: Endpoint, address: str) -> asyncio.Protocol:
    return cast("asyncio.Protocol", BackendConnection(endpoint, address))
