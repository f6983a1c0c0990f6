"""The client side: one connection, its requests one after the other.

Bytes are read by `http1.py`; what is malformed or ambiguous is answered with an error of ours and the connection
is closed in stages (write, shut down our half, read what still comes, close), so that the client sees the answer
and not a reset (RFC 9112 9.6). Requests that arrive while one is being answered wait their turn, unread.

A client that closes or half-closes its connection while its request runs is gone: its generation is stopped.
"""

from __future__ import annotations

import asyncio
from math import inf
from typing import TYPE_CHECKING, Final, cast

from proxy.answers import refusal
from proxy.errors import RequestError
from proxy.exchange import Exchange
from proxy.http1 import ChunkedDecoder, PartialHead, RepeatedHead, RequestHead
from proxy.pressure import REFUSE_CONNECTIONS, REFUSE_REQUESTS
from proxy.realtime import Session
from proxy.relay import Client
from proxy.room import make_room

if TYPE_CHECKING:
    from proxy.runtime import Admission, Runtime

PIPELINE_BYTES: Final = 64 * 1024
"""Bytes of further requests that are kept while one is answered. Beyond, they are dropped and the connection ends
with the answer, as any server may end it (RFC 9112 9.3.2): not to read on would hide that the client has left."""

WRITE_BUFFER_BYTES: Final = 64 * 1024
"""Bytes that a slow client may have pending before its backend is not read any more."""

REFUSED_BODY_BYTES: Final = 64 * 1024
"""A refused request's body is read up to this size, to keep its connection; a larger one ends it."""

MOST_REFUSED: Final = 32
"""Connections beyond the cap that are told so at a time; more of them are closed without a word."""

SMALL_PIECE_BYTES: Final = 4096

REQUESTS_PER_TURN: Final = 32
"""Requests of one connection that are answered before others have their turn: such as need no backend."""

FREE_CHUNKS: Final = 4096
LEAST_CHUNK_BYTES: Final = 16
"""Beyond so many chunks they must be this long on average, or reading them costs more than they say."""

LINGER_S: Final = 2.0

SHED_RETRY_S: Final = 2.0
"""When to come again, for whom memory was too short."""

_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


class ClientConnection(Client):
    """One client connection: an `asyncio.Protocol` in all but name, since a class that inherits from one outside
    cannot be compiled well."""

    def __init__(self, runtime: Runtime, client: str = "") -> None:
        """`client`: its address, if something in front told it."""
        self.runtime = runtime
        # The connection
        self.transport: asyncio.Transport | None = None
        self.peer = client
        """Address of who has connected."""
        self.source = ""
        """Address of whose request it is: the peer's, or what a trusted proxy says."""
        self.pending = bytearray()
        """Bytes that are not read yet: requests that wait their turn, or the empty line in front of one."""
        self.reading = False
        """Inside `_read`: an exchange that ends at once is followed by the loop there."""
        self.paused = False
        self.overrun = False
        """More was sent ahead than is kept: no further request is read."""
        self.blocked = False
        """The client reads slower than we write: nothing further is begun before it has caught up."""
        self.lingering = False
        self.opened = 0.0
        self.requests = 0
        """Requests that went to a backend."""
        self.deadline = inf
        """Monotonic time at which `sweep` ends what the connection is doing."""
        # The request
        self.partial: PartialHead | None = None
        self.repeated = RepeatedHead()
        self.remembered: Admission | None = None
        """What the repeated head was admitted to."""
        self.remembered_in: object = None
        self.head: RequestHead | None = None
        self.admission: Admission | None = None
        self.decoder: ChunkedDecoder | None = None
        self.parts: list[bytes] = []
        self.body_bytes = 0
        self.counted = 0
        """Bytes of the present request's body in `runtime.body_bytes`."""
        self.exchange: Exchange | None = None
        self.session: Session | None = None
        """The exchange, once it is a WebSocket: until the connection ends."""
        self.half_closed = False
        """The client of a WebSocket has closed its half."""

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        if not self.peer:
            peer = transport.get_extra_info("peername")
            self.peer = peer[0] if isinstance(peer, tuple) else ""
        runtime = self.runtime
        if runtime.shedding >= REFUSE_CONNECTIONS:
            self.lingering = True
            self.transport.abort()
            return
        runtime.clients.add(self)
        self.opened = runtime.now()
        self.deadline = self.opened + runtime.timeouts.idle
        over = len(runtime.clients) - runtime.most_clients
        if over > 0 and not make_room(runtime, self):
            if over > MOST_REFUSED:
                self.lingering = True
                self.transport.abort()
            else:
                self._reject(RequestError("overloaded", "too many connections", retry_after_s=1.0))

    def data_received(self, data: bytes) -> None:
        if self.exchange is not None:
            if self.session is not None:
                self.session.client_sent(data)
            elif not self.overrun:
                self.pending += data
                if len(self.pending) > PIPELINE_BYTES:
                    self.overrun = True
                    self.pending.clear()
                    self.exchange.last_on_connection()
        elif self.blocked:
            self.pending += data
            if len(self.pending) > PIPELINE_BYTES and not self.paused and self.transport is not None:
                self.paused = True
                self.transport.pause_reading()
        elif not self.lingering:
            self._read(self._take_pending() + data if self.pending else data)

    def eof_received(self) -> bool:
        # Half-closing after a request is how some clients cancel; see the module's docstring. Not left to
        # `connection_lost`, which comes only after what is buffered has been read by somebody.
        session, transport = self.session, self.transport
        if session is not None and self.exchange is not None and transport is not None:
            # It is no leaving in a WebSocket: the backend may have more to say. Behind TLS there is no half.
            self.half_closed = transport.can_write_eof() and session.client_ended()
            if self.half_closed:
                return True
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.client_gone()
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.runtime.clients.discard(self)
        exchange, self.exchange = self.exchange, None
        self.transport = None
        self._forget()
        if exchange is not None:
            exchange.client_gone()
        self._count_body(0)

    def pause_writing(self) -> None:
        self.blocked = True
        if self.exchange is not None:
            self.exchange.block()

    def resume_writing(self) -> None:
        self.blocked = False
        if self.exchange is not None:
            self.exchange.unblock()
        elif not self.lingering:
            self._next()

    # Reading requests

    def _read(self, data: bytes) -> None:
        """Read requests until one is being answered or more bytes are needed."""
        self.reading = True
        answered = 0
        try:
            while data and not self.lingering and self.transport is not None:
                data = self._read_head(data) if self.head is None else self._read_body(data)
                if self.exchange is not None or self.blocked:
                    self.pending += data
                    break
                if self.head is None:
                    answered += 1
                    if data and answered == REQUESTS_PER_TURN:
                        self._read_later(data)
                        break
        except RequestError as error:
            self._reject(error)
        finally:
            self.reading = False

    def _read_later(self, data: bytes) -> None:
        """Go on in the loop's next turn, and take nothing from the socket before."""
        self.pending += data
        if not self.paused and self.transport is not None:
            self.paused = True
            self.transport.pause_reading()
        self.runtime.loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        if self.exchange is None and not self.blocked and not self.lingering:
            self._next()

    def _read_head(self, data: bytes) -> bytes:
        """-> what is left to read; empty: it is kept in `partial` or `pending`, or all is read."""
        runtime = self.runtime
        start = 0
        if self.partial is not None:
            if not self.partial.add(data):
                return b""
            data, self.partial = self.partial.whole(), None
        elif data[0] == 13:
            # An empty line in front of a request is to be ignored (RFC 9112 2.2): one, not a flood of them.
            if data in (b"\r", b"\r\n"):
                self.pending += data
                return b""
            start = 2 if data.startswith(b"\r\n") else 0
        parsed = self._match_head(data, start)
        if isinstance(parsed, PartialHead):
            # The clock runs from the first byte of a head, however slowly it comes.
            self.deadline = runtime.now() + runtime.timeouts.head
            self.partial = parsed
            return b""
        head, admission, position = parsed
        if runtime.shedding >= REFUSE_REQUESTS:
            raise RequestError("overloaded", "memory runs short", retry_after_s=SHED_RETRY_S)
        self.head = head
        self.admission = admission
        limit = runtime.most_body_bytes
        if head.content_length > limit:
            raise RequestError("body_too_large", f"a body may have {limit} bytes")
        if admission.error is not None and (
            head.expects_continue or head.content_length > REFUSED_BODY_BYTES
        ):
            raise admission.error
        if head.chunked:
            self.decoder = ChunkedDecoder()
        elif head.content_length <= len(data) - position:
            end = position + head.content_length
            self._count_body(head.content_length)
            self._complete(data[position:end])
            return data[end:]
        if admission.key is not None and (head.expects_continue or head.content_length > REFUSED_BODY_BYTES):
            # Who has used up its limits need not send a large body to be told so.
            runtime.check_limits(admission.key)
        # Counted as it comes: what is only announced takes no room, and must not take that of others.
        self.body_bytes = 0
        self.deadline = runtime.now() + runtime.timeouts.body
        if head.expects_continue and position == len(data):
            self.write(_CONTINUE)
        return data[position:]

    def _match_head(self, data: bytes, start: int) -> tuple[RequestHead, Admission, int] | PartialHead:
        """-> (head, what it is admitted to, position behind it), or its beginning when it is incomplete.

        A head like the last one has been parsed and admitted before; it is admitted again without a look as long
        as keys and configuration are the same.
        """
        runtime = self.runtime
        if (remembered := self.remembered) is not None and self.remembered_in == runtime.generation():
            recalled = self.repeated.recall(data, start)
            if recalled is not None:
                return recalled[0], remembered, recalled[1]
        parsed = runtime.grammar.parse(data, start)
        if isinstance(parsed, PartialHead):
            return parsed
        head, position = parsed
        generation = runtime.generation()
        self.source = self.peer
        if head.forwarded and runtime.trusted_proxies is not None:
            self.source = runtime.trusted_proxies.client(self.peer, head.forwarded)
        admission = runtime.admit(head, self.source)
        self.remembered = None
        if admission.repeatable:
            self.repeated.remember(data, start, position, head)
            self.remembered, self.remembered_in = admission, generation
        return head, admission, position

    def _read_body(self, data: bytes) -> bytes:
        head = self.head
        assert head is not None
        if self.decoder is None:
            missing = head.content_length - self.body_bytes
            piece, rest = (data, b"") if len(data) <= missing else (data[:missing], data[missing:])
            self._keep(piece)
            if self.body_bytes == head.content_length:
                self._complete(b"".join(self.parts))
            return rest
        try:
            payload, end = self.decoder.feed(data)
        except ValueError as error:
            raise RequestError("malformed_body", str(error)) from None
        self._keep(payload)
        if self.decoder.chunks > FREE_CHUNKS and self.body_bytes < LEAST_CHUNK_BYTES * self.decoder.chunks:
            raise RequestError("malformed_body", "too many small chunks")
        if self.body_bytes > self.runtime.most_body_bytes:
            raise RequestError("body_too_large", f"a body may have {self.runtime.most_body_bytes} bytes")
        admission = self.admission
        if admission is not None and admission.error is not None and self.body_bytes > REFUSED_BODY_BYTES:
            raise admission.error
        if self.decoder.done:
            self._complete(b"".join(self.parts))
        return data[end:]

    def _count_body(self, size: int) -> None:
        """Have `size` bytes of the present request's body counted. RequestError when there is no room for them."""
        runtime = self.runtime
        more = size - self.counted
        if more > 0 and runtime.body_bytes + more > runtime.most_bodies_bytes:
            raise RequestError("overloaded", "too many large requests at once", retry_after_s=1.0)
        runtime.body_bytes += more
        self.counted = size

    def _keep(self, piece: bytes) -> None:
        """Keep a piece of the body. Small ones are put together: single, they would take many times their size."""
        self.body_bytes += len(piece)
        if self.body_bytes > self.counted:
            self._count_body(self.body_bytes)
        parts = self.parts
        if parts and len(parts[-1]) < SMALL_PIECE_BYTES:
            parts[-1] += piece
        else:
            parts.append(piece)

    def _complete(self, body: bytes) -> None:
        """A whole request is here."""
        head, admission = self.head, self.admission
        assert head is not None
        assert admission is not None
        self.head = self.admission = self.decoder = None
        self.parts = []
        self.deadline = inf
        if admission.error is not None:
            keep_alive = head.keep_alive and not self.runtime.draining and not self.runtime.shedding
            # A storm of bad keys is not to have its connections kept.
            keep_alive = keep_alive and admission.error.code != "auth_rate_limit"
            self._answer_error(admission.error, head, keep_alive=keep_alive)
            self.finished(keep_alive=keep_alive)
            return
        if admission.answer is not None:
            self.write(admission.answer)
            self.finished(keep_alive=head.keep_alive and not self.runtime.draining)
            return
        runtime = self.runtime
        now = runtime.now()
        self.requests += 1
        if self.requests >= runtime.most_requests or now - self.opened >= runtime.timeouts.connection:
            head.keep_alive = False
        endpoint, key = admission.endpoint, admission.key
        if head.websocket is None or runtime.forward_model:
            exchange = Exchange(runtime, self, head, endpoint, key, now)
        else:
            exchange = Session(runtime, self, head, endpoint, key, now)
        self.exchange = exchange
        exchange.start(body)

    def _reject(self, error: RequestError) -> None:
        """Answer bytes that are no acceptable request, and close the connection in stages."""
        head, transport = self.head, self.transport
        if transport is None:
            return
        self._answer_error(error, head, keep_alive=False)
        self._close()

    def _answer_error(self, error: RequestError, head: RequestHead | None, *, keep_alive: bool) -> None:
        runtime = self.runtime
        request_id = runtime.request_id(head)
        runtime.observer.rejected(error, self.peer if head is None else self.source, head, request_id)
        self.write(refusal(error, head, request_id, keep_alive=keep_alive))

    def _close(self) -> None:
        """Close in stages: our half first, the rest when the client has closed or a moment has passed."""
        transport = self.transport
        self.lingering = True
        self._forget()
        self._count_body(0)
        if transport is None or transport.is_closing():
            return
        patience = self.runtime.timeouts.client_write if self.unsent else LINGER_S
        self.deadline = self.runtime.now() + patience
        if transport.can_write_eof() and not self.half_closed:
            transport.write_eof()
            if self.paused:
                self.paused = False
                transport.resume_reading()
        else:
            transport.close()

    def _take_pending(self) -> bytes:
        data = bytes(self.pending)
        self.pending.clear()
        return data

    def _forget(self) -> None:
        """Drop what was read and not used."""
        self.pending.clear()
        self.partial, self.parts = None, []

    # proxy.relay.Client

    def write(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)

    def abort(self) -> None:
        """Cut the connection so that nothing looks complete."""
        if self.transport is not None:
            self.transport.abort()

    def switch(self, session: Session) -> bytes:
        """The connection is a WebSocket from now on."""
        self.session = session
        return self._take_pending()

    def pause(self) -> None:
        """Its backend takes no more for now."""
        if not self.paused and self.transport is not None:
            self.paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self.paused and self.transport is not None:
            self.paused = False
            self.transport.resume_reading()

    def finished(self, *, keep_alive: bool) -> None:
        """The answer is written."""
        self.exchange = None
        self._count_body(0)
        transport = self.transport
        if transport is None:
            return
        if not keep_alive:
            self._close()
            return
        if self.blocked:
            self.deadline = self.runtime.now() + self.runtime.timeouts.client_write
        else:
            self._next()

    def _next(self) -> None:
        """Wait for the next request, or read it if it has come already."""
        self.deadline = self.runtime.now() + self.runtime.timeouts.idle
        if self.paused and self.transport is not None:
            self.paused = False
            self.transport.resume_reading()
        if self.pending and not self.reading:
            self._read(self._take_pending())

    def close_if_idle(self) -> None:
        """Between two requests, the connection can go."""
        if self.idle and self.transport is not None:
            self.transport.close()

    # Time

    @property
    def idle(self) -> bool:
        """Between two requests."""
        return self.exchange is None and self.head is None and self.partial is None and not self.lingering

    @property
    def receiving(self) -> bool:
        """Amid a request that is not complete yet."""
        return (self.head is not None or self.partial is not None) and not self.lingering

    @property
    def unsent(self) -> int:
        """Bytes that the client has not taken yet."""
        return 0 if self.transport is None else self.transport.get_write_buffer_size()

    def sweep(self, now: float) -> None:
        """Look at the deadline; called a few times a second."""
        if now < self.deadline or self.transport is None:
            return
        self.deadline = inf
        if self.lingering:
            self.transport.abort()
        elif self.head is not None:
            self._reject(RequestError("request_timeout", "the body took too long"))
        elif self.partial is not None:
            self._reject(RequestError("request_timeout", "the request head took too long"))
        elif self.unsent:
            self.transport.abort()  # closing would wait for a client that reads nothing
        else:
            self.transport.close()
