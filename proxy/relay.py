"""How the answer to one request is passed on: as events, when it is complete, or as it comes.

Until the first data event of a stream its head is withheld, and an answer that is no stream is kept until it is
complete, if it is not too long for that: so far `Exchange` can try another backend. From there on nothing can be
taken back, and what breaks off is made to look so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

import orjson

from policies.base import Outcome, RequestFacts
from policies.state import Backend, Lease
from probes.passive import AttemptError, outcome_of, tried_elsewhere
from proxy import records
from proxy.access.keys import Key
from proxy.answers import answer
from proxy.dialects import event_of_answer, not_served, translated
from proxy.endpoints import BY_NAME, RESPONSE_ID, RUNNING
from proxy.errors import REASON_PHRASES
from proxy.http1 import LAST_CHUNK, RequestHead, ResponseHead, chunk
from proxy.idempotency import Claim
from proxy.meter import ABORTED, Meter
from proxy.meters import ResponsesMeter, new_meter
from proxy.openai import RequestBody
from proxy.records import Row
from proxy.responses import StoredResponse
from proxy.sse import MAX_EVENT_BYTES, Event, EventReader
from proxy.upstream import BackendConnection, Receiver

if TYPE_CHECKING:
    from proxy.realtime import Session
    from proxy.runtime import Runtime

WHOLE_ANSWER_BYTES: Final = 1024 * 1024
"""Answers that are not streams are kept until they are complete, so that a broken one can be tried elsewhere;
beyond this size they are passed on as they come."""

UNTIL_CLOSE_BYTES: Final = 8 * 1024 * 1024
"""The same for an answer that only its connection's end delimits: it has to be parsed to know that it is whole."""

_NO_DATA: Final = (None, b"", b"[DONE]")


def commits_nothing(event: Event) -> bool:
    """Whether an event at the beginning of a stream is no data: a heartbeat, or an end of what never began."""
    return event.data in _NO_DATA and len(event.raw) <= MAX_EVENT_BYTES


EVENTS: Final = 0
WHOLE: Final = 1
RAW: Final = 2
"""How the answer is passed on: as events, when it is complete, or as it comes."""


class Client(ABC):
    """What an exchange needs of the connection it answers on (a class for the reason that `Receiver` is one)."""

    @abstractmethod
    def write(self, data: bytes) -> None: ...

    @abstractmethod
    def finished(self, *, keep_alive: bool) -> None: ...

    @abstractmethod
    def abort(self) -> None: ...

    @abstractmethod
    def switch(self, session: Session) -> bytes:
        """Behind the answer to a handshake: all that comes is for `session`. -> what has come already."""

    @abstractmethod
    def pause(self) -> None:
        """Take no more from the client for now."""

    @abstractmethod
    def resume(self) -> None: ...


class Relay(Receiver):
    """One request's answer, from the first byte of a backend to the last one for the client.

    `Exchange` inherits from it and adds the request's life: it decides, sends, tries again and settles.
    """

    facts: RequestFacts | None = None
    body_read: RequestBody | None = None
    # The present attempt
    lease: Lease | None = None
    connection: BackendConnection | None = None
    dispatched = 0.0
    # Its answer
    reply: ResponseHead | None = None
    mode: int
    reader: EventReader | None = None
    parts: list[bytes]
    """Set with the head of each answer."""
    parts_bytes = 0
    last_error: tuple[ResponseHead, bytes, Backend] | None = None
    """A complete error answer, for the client if no other backend does better."""
    # The client's side
    committed = False
    head_sent = False
    """The client has the head of its stream, though no answer has begun (`proxy.heartbeat`)."""
    beat_at = 0.0
    """When it last got a heartbeat."""
    include_usage = False
    every_event = False
    claim: Claim | None = None
    """Of the client's `Idempotency-Key`."""
    kept: tuple[int, bytes, bytes] | None = None
    """The answer, for who comes with that key again."""
    alive = False
    """A token has come since the last sweep, or a piece of another answer."""

    def __init__(
        self, runtime: Runtime, client: Client, head: RequestHead, endpoint: str, key: Key | None, now: float
    ) -> None:
        self.mode = WHOLE
        self.runtime = runtime
        self.client = client
        self.request = head
        self.endpoint = endpoint
        route = self.route = BY_NAME[endpoint]
        self.key = key
        self.arrived = now
        row = self.row = Row(runtime.operation_ids.mint())
        self.id = runtime.request_id(head) if head.request_id else row.op
        self.meter = Meter() if route.metering == RUNNING else new_meter(route)
        self.chunked = head.version == 1

    # What the exchange does

    @abstractmethod
    def _begun(self) -> None:
        """The client gets the head now."""

    @abstractmethod
    def _attempt_failed(self, error: AttemptError | int, message: str) -> None: ...

    @abstractmethod
    def _cut(self, error: AttemptError, message: str) -> None: ...

    @abstractmethod
    def _finish_cut(self, code: str, error: AttemptError, *, keep_alive: bool | None) -> None: ...

    @abstractmethod
    def _end_without_stream(self) -> None: ...

    @abstractmethod
    def _drop_connection(self) -> None: ...

    @abstractmethod
    def _release(self, outcome: Outcome, now: float | None = None) -> None: ...

    @abstractmethod
    def _end(self, outcome: str, status: int, *, keep_alive: bool | None) -> None: ...

    # From the backend (proxy.upstream.Receiver)

    def head(self, head: ResponseHead) -> None:
        """A response head arrived; it is withheld."""
        self.reply = head
        self.parts = []
        if self.mode == RAW:
            return
        if 200 <= head.status < 300:
            if head.content_encoding not in (b"", b"identity"):
                self.mode = RAW
            elif head.content_type[:17].lower() == b"text/event-stream":
                self.mode = EVENTS
                self.reader = EventReader()
            elif self.route.media and not _is_text(head.content_type):
                self.mode = RAW  # sound is to be heard as it comes

    def body(self, payload: bytes, done: bool) -> None:
        """Payload of the answer; `done`: its last, and the connection is not ours any more."""
        if done:
            self.connection = None
        if self.mode == EVENTS:
            self._relay_events(payload, done)
            return
        self.alive = True
        if self.mode == RAW:
            self._relay_raw(payload, done)
        else:
            self._collect(payload, done)

    def _relay_events(self, payload: bytes, done: bool) -> None:
        reader, meter = self.reader, self.meter
        assert reader is not None
        if self.committed and not (done or meter.done) and reader.between_events:
            out = meter.recall(payload, self.chunked)
            if out:
                self.alive = True
                self.client.write(out)
                return
        events = reader.feed(payload)
        if not self.alive:
            # Signs of life are no token; a piece of an event that is too long to read is part of one.
            self.alive = reader.cut_short or meter.answers(events)
        if len(events) == 1 and self.committed and not meter.done:
            out = meter.event(events[0], include_usage=self.include_usage, every_event=self.every_event)
        else:
            pieces = []
            started = self.committed
            withholds = not started and self.route.withholds
            for event in events:
                if meter.done or meter.failed:
                    done = True  # nothing may follow `[DONE]` or an error
                    break
                if not started:
                    if commits_nothing(event):
                        continue
                    if withholds and meter.withholds(event):
                        continue
                    started = True
                pieces.append(
                    meter.event(event, include_usage=self.include_usage, every_event=self.every_event)
                )
            out = b"".join(pieces)
            if not self.committed:
                if meter.client_fault:
                    self._answer_client_fault(meter.fault)
                    return
                if meter.failed and not any(pieces[:-1]):
                    self._attempt_failed(AttemptError.ERROR_EVENT, "the backend answered with an error event")
                    return
                if not started:
                    if done:
                        self._attempt_failed(AttemptError.RESET, "the backend's stream held no event")
                    return
                if withholds:
                    out = meter.preface() + out
                out = self._commit_stream() + (chunk(out) if self.chunked else out)
                self._end_of_read(out, done)
                return
        self._end_of_read(chunk(out) if self.chunked and out else out, done)

    def _end_of_read(self, out: bytes, done: bool) -> None:
        """Write what one read of the backend gave, in one go, and end the stream where it ends."""
        meter = self.meter
        if not done and not meter.failed:
            if out:
                self.client.write(out)
            return
        reader, reply = self.reader, self.reply
        assert reader is not None
        assert reply is not None
        if meter.failed:
            self.client.write(out + LAST_CHUNK if self.chunked else out)
            if meter.client_fault:
                self._release(Outcome.IGNORED)  # the engine did what it should
            self._finish_cut("backend_error", AttemptError.ERROR_EVENT, keep_alive=False)
        elif not meter.done and (
            (meter.finished < self._choices and not meter.unread) or reply.until_close or reader.unfinished
        ):
            if out:
                self.client.write(out)
            self._cut(AttemptError.RESET, "the backend's stream ended before it was complete")
        else:
            self._complete(out)

    def _complete(self, out: bytes = b"") -> None:
        """`out` is the last of the stream; whatever its backend still does is of no interest."""
        if self.chunked:
            out += LAST_CHUNK
        if out:
            self.client.write(out)
        self._drop_connection()
        self._release(Outcome.OK)
        self._end(records.OK, 200, keep_alive=self.chunked)

    def _answer_client_fault(self, body: bytes) -> None:
        """vLLM finds some faults of a request only when it has said 200: an event with the error it would have
        answered. Nothing has reached the client yet, so it gets that answer."""
        status = self.meter.client_fault if self.meter.client_fault in REASON_PHRASES else 400
        if self.head_sent:
            self._end_in_event(status, body, Outcome.IGNORED)
            return
        body = translated(self.route.dialect, status, body)
        self._drop_connection()
        fields = b"x-request-id: %b\r\n" % self.id.encode("ascii")
        keep_alive = self._keeps_alive()
        self.client.write(
            answer(status, body, fields=fields, keep_alive=keep_alive, version=self.request.version)
        )
        self._release(Outcome.IGNORED)
        self._end(records.CLIENT_ERROR, status, keep_alive=keep_alive)

    def _relay_raw(self, payload: bytes, done: bool) -> None:
        reply = self.reply
        assert reply is not None
        if self.head_sent:  # an answer that is too long to keep
            if reply.status >= 300:
                self._end_in_event(reply.status, b"", outcome_of(reply.status))
                return
            self.meter.piece(payload)
            if done:
                self._end_without_stream()
            return
        out = b""
        if self.body_read is not None and 200 <= reply.status < 300:
            self.meter.piece(payload)
            if self.meter.failed or (done and reply.until_close):
                # It is not whole, or nobody can tell.
                if not self.committed:
                    self._attempt_failed(AttemptError.ERROR_EVENT, "the backend's answer is not whole")
                else:
                    self._cut(AttemptError.ERROR_EVENT, "")
                return
        chunked = reply.content_length is None and self.chunked and self.request.method != b"HEAD"
        if not self.committed:
            if chunked:
                framing = b"transfer-encoding: chunked\r\n"
            elif reply.content_length is not None and reply.status >= 200 and reply.status not in (204, 304):
                framing = b"content-length: %d\r\n" % reply.content_length
            else:
                framing = b""
            if self.request.method == b"HEAD":
                framing = b""
            out = self._commit(framing)
        out += chunk(payload) if chunked else payload
        if done and chunked:
            out += LAST_CHUNK
        if out:
            self.client.write(out)
        if done:
            self._release(outcome_of(reply.status))
            keep_alive = chunked or reply.content_length is not None
            self._end(_outcome(reply.status), reply.status, keep_alive=keep_alive)

    def _collect(self, payload: bytes, done: bool) -> None:
        """An answer that is not a stream: kept until it is complete, or too large to keep."""
        reply = self.reply
        assert reply is not None
        self.parts.append(payload)
        self.parts_bytes += len(payload)
        if not done:
            if reply.until_close:
                if self.parts_bytes > UNTIL_CLOSE_BYTES:
                    message = "the backend's answer is long, and its length is not said"
                    self._attempt_failed(AttemptError.MALFORMED, message)
            elif self.parts_bytes > WHOLE_ANSWER_BYTES:
                body, self.parts = b"".join(self.parts), []
                self.mode = RAW
                self._relay_raw(body, False)
            return
        if reply.until_close and not self._is_whole():
            self._attempt_failed(AttemptError.RESET, "the backend's answer broke off")
            return
        body = self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)
        status = reply.status
        if status >= 300 and tried_elsewhere(status):
            if status < 400:
                self._attempt_failed(status, f"the backend answered {status}: it stands elsewhere")
            else:
                assert self.lease is not None
                self.last_error = (reply, body, self.lease.backend)
                self._attempt_failed(status, f"the backend answered {status}")
            return
        if body.find(ABORTED) >= 0:
            self.meter.body(body)
            self._attempt_failed(AttemptError.ERROR_EVENT, "the backend aborted the request")
            return
        self._answer_whole(reply, body)

    def _is_whole(self) -> bool:
        """Whether an answer that only its connection's end delimits is complete, as far as can be told."""
        assert self.reply is not None
        body = b"".join(self.parts)
        self.parts = [body]
        begin = body.lstrip()[:1]
        if begin not in (b"{", b"["):
            return bool(begin) or self.reply.status >= 300
        try:
            orjson.loads(body)
        except orjson.JSONDecodeError:
            return False
        return True

    def _answer_whole(self, reply: ResponseHead, body: bytes) -> None:
        status, dialect = reply.status, self.route.dialect
        if status in (404, 405):
            reply, body = self.reply, body = not_served(dialect, reply, body, self.row.model, self.request)
        if 200 <= status < 300:
            self.meter.body(body)
            if self.head_sent:
                self._end_without_stream()
                return
        elif self.head_sent:
            self._end_in_event(status, body, outcome_of(status))
            return
        else:
            body = translated(dialect, status, body)
        if self.claim is not None:
            self.kept = (status, reply.fields, body)
        self.client.write(self._commit(b"content-length: %b\r\n" % str(len(body)).encode()) + body)
        self._release(outcome_of(status))
        self._end(_outcome(status), status, keep_alive=True)

    def _end_in_event(self, status: int, body: bytes, outcome: Outcome) -> None:
        """A backend's error, for a client that has the head of a stream: the only event of that."""
        event = event_of_answer(self.route, status, body, self.meter.next_sequence())
        self._drop_connection()
        self.client.write(chunk(event) + LAST_CHUNK if self.chunked else event)
        self._release(outcome)
        self._end(_outcome(status), 200, keep_alive=False)

    def _commit_stream(self) -> bytes:
        """Head of an event stream: from here on the client knows."""
        framing = b"transfer-encoding: chunked\r\n" if self.chunked else b""
        head = self._commit(framing + b"cache-control: no-cache\r\nx-accel-buffering: no\r\n")
        now = self.runtime.now()
        self.row.ttft_s = now - self.arrived
        if self.lease is not None:
            self.runtime.fleet.first_token(self.lease, now)
        return head

    def _commit(self, framing: bytes) -> bytes:
        reply = self.reply
        assert reply is not None
        self._begun()
        self.committed = True
        row = self.row
        if self.route.stores:
            self._remember_response(reply.status)
        row.overhead_s = max(self.dispatched - self.arrived - row.queue_s, 0.0)
        if self.head_sent:
            return b""
        keep_alive = self._keeps_alive() and (self.chunked or framing.startswith(b"content-length"))
        overhead_us = int(row.overhead_s * 1e6)
        # Only `%b`, since that is compiled; any other format is not.
        fields = (
            b"HTTP/1.1 %b %b\r\n%b%bx-request-id: %b\r\nx-tidegate-backend: %b\r\nx-tidegate-reason: %b\r\n"
            b"x-tidegate-queue-ms: %b\r\nx-tidegate-overhead-ms: %b.%b\r\n"
            % (
                str(reply.status).encode(),
                reply.phrase,
                reply.fields,
                framing,
                self.id.encode(),
                row.backend.encode(),
                _field_text(row.reason),
                str(int(row.queue_s * 1000)).encode(),
                str(overhead_us // 1000).encode(),
                str(1000 + overhead_us % 1000)[1:].encode(),
            )
        )
        if self.key is not None:
            fields += self.runtime.limits.headers(self.key, self.arrived)
        if not keep_alive:
            self.request.keep_alive = False
            return fields + b"connection: close\r\n\r\n"
        return fields + (b"\r\n" if self.chunked else b"connection: keep-alive\r\n\r\n")

    def _remember_response(self, status: int) -> None:
        """Before the client knows a response's id, the backend that has it is known by it."""
        meter, runtime = self.meter, self.runtime
        if (
            isinstance(meter, ResponsesMeter)
            and 200 <= status < 300
            and RESPONSE_ID.fullmatch(meter.response_id)
        ):
            row = self.row
            # What runs in the background is not over yet; all else is metered with this request.
            stored = StoredResponse(row.backend, row.tenant, row.served_model, not meter.background)
            runtime.responses.add(meter.response_id, stored)

    def _keeps_alive(self) -> bool:
        return self.request.keep_alive and not self.runtime.draining and not self.runtime.shedding

    @property
    def _choices(self) -> int:
        return 1 if self.body_read is None else self.body_read.choices

    def new_meter(self) -> Meter:
        """One of the kind that this request needs."""
        body = self.body_read
        return new_meter(self.route) if body is None else new_meter(self.route, body.choices, body.prompts)


def _outcome(status: int) -> str:
    """How a request ended whose backend's complete answer was passed on."""
    if status < 300:
        return records.OK
    return records.CLIENT_ERROR if status < 500 and status != 429 else records.BACKEND_FAILED


def _is_text(content_type: bytes) -> bool:
    return content_type[:16].lower().startswith((b"application/json", b"text/"))


def _field_text(text: str) -> bytes:
    """Any text as a header field value."""
    raw = text.encode("ascii", "replace")
    return raw if text.isprintable() else bytes(c if 32 <= c < 127 else 63 for c in raw)
