"""`/v1/realtime`: a WebSocket through the proxy, as one exchange.

Up to the backend's 101 it is a request like any other: admitted, held, sent, and sent elsewhere if that fails. From
there on bytes go both ways as they come. Who reads slowly is waited for, by not reading the other one. Frames
are followed, not changed. Those of the backend: to find the usage of each answer, to see that the session ends in a
close frame, and to know where one of ours may stand, should it have to end without. Those of the client: a message
that asks for another model than was admitted, or has the engine fetch something, ends the session before its last
byte goes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from policies.base import Outcome
from probes.passive import AttemptError, outcome_of
from proxy import records
from proxy.access.keys import Key
from proxy.errors import RequestError
from proxy.exchange import Exchange, State
from proxy.http1 import RequestHead, ResponseHead
from proxy.media import SessionMeter
from proxy.openai import RequestBody, has_remote_url, model_name, read_document
from proxy.relay import Client
from proxy.upstream import BackendConnection, Endpoint
from proxy.websocket import (
    BAD_GATEWAY,
    GOING_AWAY,
    MOST_MESSAGE,
    POLICY_VIOLATION,
    PROTOCOL_ERROR,
    TOO_BIG,
    Frames,
    Handshake,
    close_frame,
    target_for,
)

if TYPE_CHECKING:
    from proxy.runtime import Runtime

CLOSING_S: Final = 5.0
"""How long a session stays that its backend has closed, or whose client has closed its half."""

_MESSAGE_DEPTH: Final = -24
"""Where `has_remote_url` begins to count: the schemas of tools nest more deeply than media do."""


class Session(Exchange):
    """One WebSocket: an exchange whose answer is a conversation."""

    handshake: Handshake | None = None
    switched = False
    """The client has had its 101."""

    def __init__(
        self, runtime: Runtime, client: Client, head: RequestHead, endpoint: str, key: Key | None, now: float
    ) -> None:
        super().__init__(runtime, client, head, endpoint, key, now)
        self.frames = Frames()
        """The backend's."""
        self.asked = Frames(masked=True)
        """The client's."""
        self.idle_s = runtime.timeouts.idle
        """Kept from the beginning: a process that is replaced closes idle connections sooner, not sessions."""
        self.closing_since: float | None = None
        head.keep_alive = False  # what a client sends behind a handshake is never read as a request

    def start(self, raw: bytes) -> None:
        """The handshake is complete: check it, decide, send, hold or refuse."""
        try:
            self._read_head(0)
            handshake = self.handshake = Handshake(self.request)
            # For the row it is a stream; no second attempt is made for it, since it has no first token.
            body = RequestBody(b"", {}, model_name(handshake.model or None))
            facts = self._read(body)
            body.stream = self.row.stream = True
            self._admit(facts)
        except Exception as error:
            self._not_started(error)
            return
        self._submit(facts)

    # With the backend

    def request_for(self, endpoint: Endpoint) -> bytes:
        """The handshake as a backend gets it."""
        assert self.facts is not None
        assert self.handshake is not None
        head = self.request
        return endpoint.request(
            b"GET",
            target_for(head.target.partition(b"?")[0], self.facts.model),
            head.forward + self.handshake.fields(),
            None,
            self.row.op.encode("ascii"),
        )

    def _send(self, connection: BackendConnection) -> None:
        self._move(State.SENT)
        self.connection = connection
        connection.upgrade(self, self.request_for(connection.endpoint))

    def head(self, head: ResponseHead) -> None:
        """101, or an answer that refuses."""
        if head.handshake is not None:
            assert self.handshake is not None
            try:
                fields = self.handshake.answer(head.handshake)
            except ValueError as error:
                message = f"the backend's answer to the handshake is wrong: {error}"
                self._attempt_failed(AttemptError.MALFORMED, message)
                return
            self.reply = head
            self._switch(fields)
        elif 200 <= head.status < 300:
            self._attempt_failed(AttemptError.MALFORMED, "the backend did not switch to a WebSocket")
        else:
            super().head(head)

    def _switch(self, fields: bytes) -> None:
        runtime, row, lease = self.runtime, self.row, self.lease
        assert lease is not None
        now = runtime.now()
        self._begun()
        self.committed = self.switched = True
        self.quiet_since = now
        # It is no first token to be timed, but a circuit breaker's trial need not wait for the end of a session.
        if lease.backend.breaker.first_token(lease.started, now):
            runtime.fleet.refresh(now)
        row.overhead_s = max(self.dispatched - self.arrived - row.queue_s, 0.0)
        head = b"HTTP/1.1 101 Switching Protocols\r\n%bx-request-id: %b\r\nx-tidegate-backend: %b\r\n" % (
            fields,
            self.id.encode("ascii"),
            row.backend.encode("ascii"),
        )
        if self.key is not None:
            head += runtime.limits.headers(self.key, self.arrived)
        self.client.write(head + b"\r\n")
        if ahead := self.client.switch(self):
            self.client_sent(ahead)

    def body(self, payload: bytes, done: bool) -> None:
        """Bytes of the backend's frames; `done`: it has closed the connection."""
        if not self.switched:
            super().body(payload, done)
            return
        if done:
            self.connection = None
        if payload and not self.frames.closed:
            self.alive = True
            try:
                messages = self.frames.feed(payload)
            except ValueError as error:
                self._cut(AttemptError.MALFORMED, f"what the backend sent is no WebSocket: {error}")
                return
            self.client.write(payload)
            meter = self.meter
            assert isinstance(meter, SessionMeter)
            for message in messages:
                meter.message(message)
            if self.frames.closed:
                meter.done = True
                self.closing_since = self.runtime.now()
        if done:
            self._cut(AttemptError.RESET, "the backend is gone")

    def backend_full(self, full: bool) -> None:
        """The backend reads slower than the client writes: stop reading the client."""
        if self.switched and full:
            self.client.pause()
        elif self.switched:
            self.client.resume()

    # With the client

    def client_sent(self, data: bytes) -> None:
        """Bytes of the client's frames."""
        asked = self.asked
        if asked.closed:
            return  # nothing counts behind its close frame
        self.alive = True
        try:
            for message in asked.feed(data):
                self._check_message(message)
        except ValueError as error:
            what = f"what was sent is no WebSocket: {error}"
            self._refuse_message(RequestError("malformed_request", what), PROTOCOL_ERROR)
        except RequestError as error:
            self._refuse_message(error, POLICY_VIOLATION)
        else:
            if asked.too_long:
                what = f"a message has at most {MOST_MESSAGE} bytes"
                self._refuse_message(RequestError("body_too_large", what), TOO_BIG)
            elif self.connection is not None:
                self.connection.write(data)

    def _check_message(self, text: bytes) -> None:
        """Raise RequestError if it asks for what was not admitted. Whatever can name a model or a URL is read, also
        by a key with escapes in it."""
        if text.find(b'"model"') < 0 and text.find(b'url"') < 0 and text.find(b"\\") < 0:
            return
        document = read_document(text)
        for part in (document, document.get("session"), document.get("response")):
            if type(part) is dict and (model := part.get("model")) is not None and not self._is_ours(model):
                message = f"this session has the model {self.row.model[:48]!r} and no other"
                raise RequestError("model_not_allowed", message, "model")
        if not self.runtime.media_urls and has_remote_url(document, _MESSAGE_DEPTH):
            raise RequestError("media_url", "media must be sent inline as a data: URL")

    def _is_ours(self, model: Any) -> bool:
        """Whether that is the model that was admitted, by any of its names."""
        assert self.facts is not None
        if type(model) is not str:
            return False
        return model == self.row.model or self.runtime.aliases.get(model, model) == self.facts.model

    def _refuse_message(self, error: RequestError, code: int) -> None:
        self.row.code = error.code
        self._over(records.CLIENT_ERROR, Outcome.IGNORED, code, error.message)

    def client_ended(self) -> bool:
        """The client has closed its half. False: the backend can't be told, so the client is gone."""
        if self.connection is None or not self.connection.end_writing():
            return False
        self.closing_since = self.runtime.now()
        return True

    def last_on_connection(self) -> None:
        """The client has sent more than is kept before it was answered: it speaks no WebSocket."""
        if self.state is State.HELD:
            self.runtime.cancel_hold(self.row.op)
        self._drop_connection()
        self._release(Outcome.IGNORED)
        self.refuse(
            RequestError("malformed_request", "a WebSocket's client waits for the answer to its handshake")
        )

    # Ending

    def sweep(self, now: float) -> None:
        """Look at the deadlines; called a few times a second."""
        if not self.switched:
            super().sweep(now)
            return
        timeouts = self.runtime.timeouts
        if self.alive:
            self.alive = False
            self.quiet_since = now
        if self.blocked_since is not None and now - self.blocked_since > timeouts.client_write:
            self.client.abort()  # its connection's end is told to us as to anybody
        elif self.closing_since is not None and now - self.closing_since > CLOSING_S:
            if self.frames.closed:
                self._over(records.OK, Outcome.OK, GOING_AWAY, "")
            else:
                self._over(records.CLIENT_GONE, Outcome.IGNORED, GOING_AWAY, "")
        elif now - self.quiet_since > self.idle_s:
            self._over(records.OK, Outcome.OK, GOING_AWAY, f"nothing was said for {self.idle_s:g} s")
        elif now - self.arrived > timeouts.total:
            self._over(records.OK, Outcome.OK, GOING_AWAY, f"a session may last {timeouts.total:g} s")
        else:
            self._journal_progress()

    def _cut(self, error: AttemptError, message: str) -> None:
        """The session cannot go on."""
        if not self.switched:
            super()._cut(error, message)
        elif self.frames.closed:
            self._over(records.OK, Outcome.OK, GOING_AWAY, "")
        elif self.closing_since is not None:  # its client has left, and it has followed
            self._over(records.CLIENT_GONE, Outcome.IGNORED, GOING_AWAY, "")
        elif error is AttemptError.SHUTDOWN:
            self.row.code = "shutting_down"
            self._over(records.SHUTDOWN, Outcome.IGNORED, GOING_AWAY, message)
        else:
            self.row.code = "backend_protocol" if error is AttemptError.MALFORMED else "backend_reset"
            self._over(
                records.CUT, outcome_of(error), BAD_GATEWAY, message, broken=error is AttemptError.MALFORMED
            )

    def _over(self, outcome: str, blame: Outcome, code: int, reason: str, *, broken: bool = False) -> None:
        """End it: with a close frame, if the backend has not sent one and no frame of its own is half sent."""
        frames = self.frames
        whole = frames.closed or (frames.between and not broken)
        if whole and not frames.closed:
            self.client.write(close_frame(code, reason))
        self._drop_connection()
        self._release(blame)
        self._end(outcome, 101, keep_alive=False if whole else None)

    def client_gone(self) -> None:
        """The client reset or closed its connection: stop the engine, bill what was said."""
        if self.switched and self.state is not State.ENDED:
            self._drop_connection()
            done = self.frames.closed
            self._release(Outcome.OK if done else Outcome.IGNORED)
            self._end(records.OK if done else records.CLIENT_GONE, 101, keep_alive=None)
        else:
            super().client_gone()
