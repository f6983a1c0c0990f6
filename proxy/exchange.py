"""One request's life, from its last byte to its ledger row.

    RECEIVED ──> HELD ──> CONNECTING ──> SENT ──> RELAYING ──> ENDED
        │          │          ^ │          │ │                   ^
        └──────────┴──────────┘ └──────────┘ └── retry, refuse ──┘

`MOVES` below is the whole table; a move that is not in it is a bug and raises. Until the first data event of an
answer its head is withheld (vLLM says 200 before it has begun to work), so up to there a failed attempt can go
to another backend and the client sees nothing of it. After it, nothing can be taken back: a stream that cannot
go on ends in one error event, any other answer in an aborted connection, and never in something that looks
complete.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from policies.base import Hold, Outcome, Reject, RequestFacts, Send
from policies.routing import Routing
from policies.rules import NOTHING_TRIED
from probes.base import os_reason
from probes.passive import AttemptError, backoff_s, is_silent, outcome_of
from proxy import records
from proxy.access.keys import Key
from proxy.access.limits import Refusal, Reservation
from proxy.answers import error_answer, kept_answer
from proxy.dialects import event_of, status_in
from proxy.endpoints import INPUT, stored_id
from proxy.errors import RequestError
from proxy.facts import check_model, facts_of, no_model, wants_hashes
from proxy.forms import content_type
from proxy.hedge import Hedge
from proxy.http1 import LAST_CHUNK, RequestHead, chunk
from proxy.idempotency import request_hash
from proxy.media import say_why_unmetered
from proxy.meters import ResponsesMeter
from proxy.openai import RequestBody, body_for_backend, is_slow_to_read, read_body, read_form
from proxy.prompt_hashes import prompt_hashes
from proxy.relay import EVENTS, RAW, WHOLE, Client, Relay
from proxy.upstream import OUR_SHORTAGE, BackendConnection, Endpoint, connect_failure

if TYPE_CHECKING:
    from proxy.runtime import Runtime

log = logging.getLogger("tidegate")

STALE_S: Final = 1.0
"""A backend that closed a connection while our request was on its way is heard of sooner than this."""

UNREACHABLE_RETRY_S: Final = 1.0
"""When to come again if no backend could be connected to: as often as the probes ask one that is down."""

PROGRESS_S: Final = 0.4
"""Least time between two notes in the journal of how far a stream is; the sweep makes them half seconds."""


class State(StrEnum):
    """Where an exchange is."""

    RECEIVED = "received"
    HELD = "held"
    """In the valve's queue."""
    CONNECTING = "connecting"
    SENT = "sent"
    """Waiting for the first data of the answer."""
    RELAYING = "relaying"
    ENDED = "ended"

    __hash__ = (
        str.__hash__
    )  # an enum's own is a Python function, and every move of every request looks states up


MOVES: Final[dict[State, frozenset[State]]] = {
    State.RECEIVED: frozenset({State.HELD, State.CONNECTING, State.SENT, State.ENDED}),
    State.HELD: frozenset({State.CONNECTING, State.SENT, State.ENDED}),
    State.CONNECTING: frozenset({State.CONNECTING, State.SENT, State.ENDED}),
    State.SENT: frozenset({State.CONNECTING, State.SENT, State.RELAYING, State.ENDED}),
    State.RELAYING: frozenset({State.ENDED}),
    State.ENDED: frozenset(),
}

_GIVE_UP_CODES: Final = {
    AttemptError.CONNECT: "backend_unreachable",
    AttemptError.TLS: "backend_unreachable",
    AttemptError.RESET: "backend_reset",
    AttemptError.STALE_CONNECTION: "backend_reset",
    AttemptError.MALFORMED: "backend_protocol",
    AttemptError.FIRST_TOKEN_TIMEOUT: "backend_timeout",
    AttemptError.STALLED: "backend_timeout",
    AttemptError.ERROR_EVENT: "backend_error",
    AttemptError.DEADLINE: "backend_timeout",
}


class Exchange(Relay):
    """Glue between one client connection, the valve, one backend connection at a time, meter and journal."""

    raw_body: bytes | None = None
    reservation: Reservation | None = None
    # The present attempt
    target: Endpoint | None = None
    connecting: asyncio.Task[Any] | None = None
    tried: frozenset[str]
    hedge: Hedge | None = None
    """Waits for the first token too, and may have an attempt of its own."""
    wasted = 0
    """Attempts that were aborted because another one was first."""
    # The client's side
    blocked_since: float | None = None
    quiet_since = 0.0
    journaled = 0
    """Completion tokens in the journal."""
    journaled_at = 0.0

    def __init__(
        self, runtime: Runtime, client: Client, head: RequestHead, endpoint: str, key: Key | None, now: float
    ) -> None:
        super().__init__(runtime, client, head, endpoint, key, now)
        self.state = State.RECEIVED
        self.tried = NOTHING_TRIED
        self.routings: list[Routing] = []
        """All decisions, in order."""
        self.routing: Routing | None = None
        """That of the present attempt."""

    def __repr__(self) -> str:
        backend = self.lease.backend.name if self.lease else "-"
        return f"<Exchange {self.id} {self.state.value} {self.endpoint} on {backend}>"

    def _move(self, to: State) -> None:
        if to not in MOVES[self.state]:
            raise RuntimeError(f"{self!r} cannot become {to.value}")
        self.state = to

    def _begun(self) -> None:
        if self.state is State.SENT:
            self._move(State.RELAYING)
        hedge = self.hedge
        if hedge is not None:
            if self.mode == EVENTS:
                hedge.first_token(self.runtime.now())
            hedge.end()

    # Deciding

    def start(self, raw: bytes) -> None:
        """The request is complete: check it, decide, send, hold or refuse."""
        media_urls = self.runtime.media_urls
        try:
            self._read_head(len(raw))
            if self.route.stored:
                facts = self._stored()
            elif self.endpoint == "forward":
                facts = self._forwarded(raw)
            elif is_slow_to_read(raw):
                self.runtime.tasks.spawn(self._start_large(raw, media_urls), "read body")
                return
            else:
                facts = self._read(self._parsed(raw, media_urls))
            # What reads or deletes may be done again without a key (RFC 9110 9.2.2).
            if self.request.idempotency_key and self.request.method == b"POST" and self._answered_before():
                return
            self._admit(facts)
        except Exception as error:
            self._not_started(error)
            return
        self._submit(facts)

    async def _start_large(self, raw: bytes, media_urls: bool) -> None:
        """As `start`, reading the body in a thread."""
        try:
            body = await asyncio.to_thread(self._parsed, raw, media_urls)
            if self.state is not State.RECEIVED:
                return  # the client has left meanwhile, or the proxy stops
            facts = self._read(body)
            if self.request.idempotency_key and self._answered_before():
                return
            self._admit(facts)
        except Exception as error:
            if self.state is State.RECEIVED:
                self._not_started(error)
            return
        self._submit(facts)

    def _parsed(self, raw: bytes, media_urls: bool) -> RequestBody:
        """What the body says. Raises RequestError."""
        head = self.request
        if self.route.form:
            body = read_form(self.endpoint, raw, content_type(head.forward), media_urls=media_urls)
        else:
            body = read_body(self.endpoint, raw, media_urls=media_urls)
        if head.idempotency_key:
            # Clients make a new boundary for each try.
            body.digest = request_hash(self.endpoint, raw if body.form is None else body.form.content())
        return body

    def _not_started(self, error: Exception) -> None:
        if isinstance(error, RequestError):
            self.refuse(error)
        else:
            log.error("request %s could not be read", self.id, exc_info=error)
            self.fail()

    def _submit(self, facts: RequestFacts) -> None:
        runtime = self.runtime
        runtime.retry_budget.deposit(self.arrived)
        self._routed(runtime.valve.submit(facts, self.arrived))

    def _read_head(self, body_bytes: int) -> None:
        """What head and key alone say of the ledger's row. Raises RequestError."""
        runtime, head, key, row = self.runtime, self.request, self.key, self.row
        row.instance = runtime.instance
        row.arrived = runtime.wall()
        row.endpoint = self.endpoint
        row.body_bytes = body_bytes
        if key is None:
            row.tenant, row.data_class = "default", "public"
        else:
            row.tenant, row.data_class, row.key_id = key.tenant, key.data_class, key.id
        if runtime.journal.failed or runtime.ledger.failed:
            raise RequestError("ledger_unavailable", "usage cannot be recorded now", retry_after_s=5.0)
        if self.endpoint == "forward":
            return
        if head.content_encoding not in (b"", b"identity"):
            raise RequestError("unsupported_media_type", "send the body without Content-Encoding")
        if head.codings:
            raise RequestError("unsupported_transfer_coding", "only chunked is understood here")

    def _forwarded(self, raw: bytes) -> RequestFacts:
        """A request that is passed on unread."""
        row = self.row
        self.raw_body = raw
        self.mode = RAW
        self.facts = RequestFacts(
            row.op, self.runtime.forward_model, "forward", tenant=row.tenant, arrived=self.arrived
        )
        return self.facts

    def _stored(self) -> RequestFacts:
        """A request about a response that a backend keeps. Raises RequestError."""
        runtime, row, key = self.runtime, self.row, self.key
        name = stored_id(self.request.target)
        stored = runtime.responses.find(name, row.tenant)
        if stored is None or stored.backend not in runtime.fleet.backends:
            raise RequestError("response_not_found", f"there is no response {name!r}", "response_id")
        row.model = model = stored.model
        usable = () if key is None or key.models is None else key.models
        # It may have been asked for by an alias.
        asked = next((name for name in usable if runtime.aliases.get(name) == model), model)
        check_model(key, asked, model)
        self.facts = facts = RequestFacts(
            row.op,
            model,
            self.endpoint,
            tenant=row.tenant,
            key_id=row.key_id,
            data_class=row.data_class,
            arrived=self.arrived,
            wall=row.arrived,
            deadline=self.arrived + runtime.timeouts.total,
            backend=stored.backend,
        )
        if key is not None:
            facts.priority = key.priority
            facts.labels = key.labels
        return facts

    def _read(self, body: RequestBody) -> RequestFacts:
        """What a decision needs to know of the request. Raises RequestError."""
        runtime, head, key, row = self.runtime, self.request, self.key, self.row
        self.body_read = body
        row.model = body.model
        row.stream = body.stream
        model = runtime.aliases.get(body.model, body.model)
        check_model(key, body.model, model)
        prefix: tuple[int, ...] = ()
        if wants_hashes(runtime.fleet.needs, self.route):
            prefix = prompt_hashes(body.raw, runtime.salt)
        self.include_usage = body.include_usage
        self.every_event = body.every_event
        if body.choices > 1:
            self.meter = self.new_meter()
        facts = facts_of(
            body,
            self.route,
            model,
            key,
            op=row.op,
            session=head.session,
            arrived=self.arrived,
            wall=row.arrived,
            total_s=runtime.timeouts.total,
            body_bytes=row.body_bytes,
        )
        facts.prefix = prefix
        if body.previous_response:
            previous = runtime.responses.find(body.previous_response, row.tenant)
            if previous is None or previous.backend not in runtime.fleet.backends:
                message = f"there is no response {body.previous_response!r}"
                raise RequestError("response_not_found", message, "previous_response_id")
            facts.backend = previous.backend
        if facts.session:
            row.session = runtime.salted(facts.session.encode("utf-8", "replace"))
        row.max_tokens = facts.max_tokens
        row.expected_tokens = facts.expected_tokens  # the policy may know better
        self.facts = facts
        return facts

    def _answered_before(self) -> bool:
        """Take the client's Idempotency-Key. True: its request had been answered, and is so again. Raises
        RequestError when it is not to be sent."""
        runtime, row, head = self.runtime, self.row, self.request
        if self.body_read is not None:
            request = self.body_read.digest
        else:  # only the target says which response it is about
            request = request_hash(head.target.decode("latin-1"), self.raw_body or b"")
        claim = runtime.idempotency.take(row.tenant, head.idempotency_key, request, row.op, row.arrived)
        if claim.op == row.op:
            self.claim = claim
            return False
        assert claim.answer is not None
        status, fields, body = claim.answer
        row.reason = f"answered before, as {claim.op}"
        self.client.write(
            kept_answer(
                status,
                body,
                fields=b"%bx-request-id: %b\r\nidempotent-replayed: true\r\n" % (fields, self.id.encode()),
                keep_alive=self._keeps_alive(),
                version=head.version,
            )
        )
        self._end(records.OK, status, keep_alive=True)
        return True

    def _admit(self, facts: RequestFacts) -> None:
        """Reserve within the key's limits. Raises RequestError."""
        key = self.key
        if key is None:
            return
        runtime, body = self.runtime, self.body_read
        answer = body.reserved_tokens if body is not None and facts.expected_tokens else 0
        cost = 0
        if key.budget_nano is not None:
            cost = runtime.estimate_cost(facts, answer)
        tokens = facts.prompt_tokens + answer
        reservation = runtime.limits.admit(key, tokens, cost, self.arrived, facts.wall)
        if isinstance(reservation, Refusal):
            raise RequestError(reservation.code, reservation.message, retry_after_s=reservation.retry_after_s)
        self.reservation = reservation

    def _routed(self, routing: Routing) -> None:
        """The valve has decided."""
        self.routings.append(routing)
        self.routing = routing
        self.row.expected_tokens = routing.request.expected_tokens
        decision = routing.decision
        if type(decision) is Send:
            self._dispatch(routing, decision)
        elif type(decision) is Hold:
            self._move(State.HELD)
            self.runtime.hold(self)
        else:
            assert type(decision) is Reject
            self._rejected(decision)

    def released(self, routing: Routing) -> None:
        """The valve lets go of a held request."""
        self.row.queue_s = routing.held_s
        self._routed(routing)

    def _rejected(self, decision: Reject) -> None:
        assert self.facts is not None
        message, param = decision.reason, None
        if decision.code == "model_not_found":
            message, param = no_model(self.row.model, self.facts.model, self.runtime.fleet), "model"
        self.refuse(RequestError(decision.code, message or decision.code, param, decision.retry_after_s))

    # Sending

    def _dispatch(self, routing: Routing, decision: Send) -> None:
        runtime, row = self.runtime, self.row
        row.attempts += 1
        assert routing.lease is not None
        self._go_to(routing, decision, runtime.endpoints[routing.lease.backend.name])
        if row.attempts == 1:
            self.dispatched = runtime.now()
            runtime.exchanges.add(self)
            if (
                runtime.hedging is not None
                and self.facts is not None
                and self.facts.stream
                and not self._in_background
            ):
                self.hedge = Hedge(self, runtime.hedging)
                runtime.hedging.sent(self.dispatched)
            if runtime.strict:
                self._move(State.CONNECTING)
                self.connecting = runtime.tasks.spawn(self._after_sync(), "journal sync")
                return
        self._connect()

    def _go_to(self, routing: Routing, decision: Send, target: Endpoint) -> None:
        """The present attempt is the one that was decided so."""
        runtime, row = self.runtime, self.row
        lease = routing.lease
        assert lease is not None
        self.lease = lease
        backend = lease.backend
        self.target = target
        row.backend = backend.name
        row.site = backend.site
        row.served_model = routing.request.model
        row.rule = routing.rule
        row.policy = routing.decided_by
        row.reason = decision.reason
        row.propensity = decision.propensity
        row.candidates = [tuple(candidate) for candidate in routing.candidates]
        self.quiet_since = routing.at
        runtime.journal.open(row)

    async def _after_sync(self) -> None:
        """`durability: strict`: nothing is sent before the journal says that it will be remembered."""
        try:
            await self.runtime.journal.synced()
        except Exception as error:
            self.connecting = None
            self._release(Outcome.IGNORED)
            self.refuse(RequestError("ledger_unavailable", f"usage cannot be recorded: {error}"))
            return
        self.connecting = None
        if self.state is State.CONNECTING:
            self._connect()

    def _connect(self) -> None:
        assert self.target is not None
        if self.hedge is not None:
            self.hedge.wait(self.runtime.now())
        connection = self.target.pool.take()
        if connection is not None:
            self._send(connection)
        else:
            self._connect_anew()

    def _connect_anew(self) -> None:
        self._move(State.CONNECTING)
        self.connecting = self.runtime.tasks.spawn(self._open_connection(), "connect")

    async def _open_connection(self) -> None:
        endpoint = self.target
        assert endpoint is not None
        try:
            connection = await endpoint.connect(self.runtime.config.timeouts.connect)
        except (OSError, UnicodeError) as failure:
            self.connecting = None
            # A host name with an empty label fails in IDNA, before anybody asks for its address.
            error = failure if isinstance(failure, OSError) else socket.gaierror(failure)
            if error.errno in OUR_SHORTAGE:
                self._release(Outcome.IGNORED)
                reason = f"the proxy cannot connect: {os_reason(error)}"
                self.refuse(RequestError("overloaded", reason, retry_after_s=1.0))
                return
            kind, reason = connect_failure(error)
            self._attempt_failed(kind, f"cannot connect to {endpoint.name}: {reason}")
            return
        except Exception:
            log.exception("connecting to %s", endpoint.name)
            self.connecting = None
            self.fail()
            return
        self.connecting = None
        if connection.closed:
            self._attempt_failed(AttemptError.RESET, "the backend closed the connection at once")
        else:
            self._send(connection)

    def _send(self, connection: BackendConnection) -> None:
        self._move(State.SENT)
        self.connection = connection
        request = self.request_for(connection.endpoint)
        connection.send(self, request, to_head_request=self.request.method == b"HEAD")
        if self.blocked_since is not None:  # by heartbeats that it has not read
            connection.pause()

    def request_for(self, endpoint: Endpoint) -> bytes:
        """The request as a backend gets it."""
        head = self.request
        if self.body_read is not None:
            assert self.facts is not None
            salt = self.runtime.cache_salt(self.facts.tenant) if endpoint.cache_salt else ""
            body = body_for_backend(
                self.body_read,
                model=self.facts.model,
                continuous=endpoint.continuous_usage,
                cache_salt=salt if self.route.salted else "",
            )
            # A path of the table, without the query.
            target = head.target.partition(b"?")[0]
            return endpoint.request(b"POST", target, head.forward, body, self.row.op.encode("ascii"))
        if self.route.stored:
            nothing = b"" if head.method == b"POST" else None
            return endpoint.request(
                head.method, head.target, head.forward, nothing, self.row.op.encode("ascii")
            )
        return self.runtime.forward_request(endpoint, head, self.raw_body or b"", self.id)

    @property
    def _may_send_again(self) -> bool:
        """Whether nothing was sent yet, or a second time is harmless (which RFC 9110 9.2.2 wants declared)."""
        if self.state is not State.SENT or self.endpoint in ("tokenize", "detokenize"):
            return True
        return self.runtime.config.retries.idempotent and not self._in_background

    @property
    def _in_background(self) -> bool:
        """Whether an engine goes on with it whatever becomes of its connection."""
        return self.body_read is not None and self.body_read.background

    # A second attempt (proxy.hedge)

    def give_up_attempt(self, now: float) -> None:
        """The second attempt was first: abort the present one."""
        if self.state is State.SENT:
            self.wasted += 1
        self._drop_connection()
        self._release(Outcome.IGNORED, now)
        self._forget_answer()

    def adopt(
        self, routing: Routing, target: Endpoint, connection: BackendConnection | None, *, waiting: bool
    ) -> None:
        """Go on with the second attempt, as it is; `target`: where it was sent, which a reload may have removed;
        `waiting`: for more of its answer."""
        decision = routing.decision
        assert type(decision) is Send
        self.hedge = None
        self.connection = connection  # whatever happens now, it is ours to end
        self.routing = routing
        self._go_to(routing, decision, target)
        if connection is None and waiting:
            self._connect()
            return
        self._move(State.SENT)
        if connection is not None and self.blocked_since is not None:  # as `_send`
            connection.pause()

    # Losing the backend

    def lost(self, error: AttemptError, message: str) -> None:
        """The connection is gone before the answer was complete."""
        self.connection = None
        if self.state is State.ENDED:  # a bug in settling it: nothing can be said any more
            self.client.abort()
        elif self.committed:
            self._cut(error, message)
        elif error is not AttemptError.STALE_CONNECTION:
            self._attempt_failed(error, message)
        elif self.runtime.now() - self.quiet_since < STALE_S and self._may_send_again:
            # No byte of an answer: the backend closed it as our request was on its way. Once, on a new one.
            self._connect_anew()
        else:  # it may have worked on it
            self._attempt_failed(AttemptError.RESET, "the backend closed the connection without an answer")

    # Failing

    def _attempt_failed(self, error: AttemptError | int, message: str) -> None:
        """Nothing has reached the client: try elsewhere if that is allowed, else say so."""
        runtime, lease = self.runtime, self.lease
        assert lease is not None
        assert self.facts is not None
        now = runtime.now()
        may_send_again = self._may_send_again
        self._drop_connection()
        meter, row = self.meter, self.row
        row.overhead_prompt_tokens += meter.prompt
        row.overhead_completion_tokens += meter.completion
        retry_after: str | None = None
        if isinstance(error, int) and self.reply is not None and self.reply.retry_after:
            retry_after = self.reply.retry_after.decode("latin-1")
        outcome = outcome_of(error, retry_after is not None)
        name = lease.backend.name
        lease.silent = is_silent(error)
        self._release(outcome, now)
        pause = backoff_s(error, retry_after, runtime.wall()) if isinstance(error, int) else 0.0
        if pause > 0 and name in runtime.fleet.backends:  # a reload may have removed it
            runtime.fleet.back_off(name, pause, now)
        runtime.observer.attempt_failed(name, error)
        routing = self.routing
        assert routing is not None
        routing.failure = message
        self.tried |= {name}
        self._forget_answer()
        if self.hedge is not None and self.hedge.lease is not None:
            self.hedge.take_over()
            return
        if not may_send_again:
            self._give_up(error, message)
            return
        others = runtime.valve.rules.candidates(self.facts, runtime.fleet).without(self.tried).order
        if others and row.attempts < runtime.config.retries.attempts and runtime.retry_budget.withdraw(now):
            routing = runtime.valve.retry(self.facts, routing, self.tried, now)
            if type(routing.decision) is Send:
                self._routed(routing)
                return
        self._give_up(error, message)

    def _forget_answer(self) -> None:
        """What the failed attempt has brought."""
        self.meter, self.reader, self.reply, self.parts_bytes = self.new_meter(), None, None, 0
        if self.mode != RAW or self.endpoint != "forward":
            self.mode = WHOLE

    def _give_up(self, error: AttemptError | int, message: str) -> None:
        """No other backend: the backend's own error if it is well-formed, else ours."""
        if self.last_error is not None and self.last_error[0].status not in (401, 403):
            self.reply, body, backend = self.last_error
            self.row.backend, self.row.site = backend.name, backend.site
            self._answer_whole(self.reply, body)
            return
        if isinstance(error, int):
            code = "backend_auth" if error in (401, 403) else "backend_error"
        else:
            code = _GIVE_UP_CODES.get(error, "backend_error")
        # It may be back by the next probe, or those will have said that it is down.
        wait = UNREACHABLE_RETRY_S if code == "backend_unreachable" else None
        self.refuse(RequestError(code, message, retry_after_s=wait))

    def _cut(self, error: AttemptError, message: str) -> None:
        """The answer has begun and cannot go on."""
        if self.meter.done:
            self._complete()
        elif self.mode == EVENTS:
            code = _GIVE_UP_CODES.get(error, "shutting_down")
            event = event_of(self.route, code, message, self.meter.next_sequence())
            # A half-written event of the backend's was never passed on, so this one stands alone: unless it was too
            # long to wait for.
            if self.reader is not None and self.reader.cut_short:
                event = b"\n\n" + event
            self.client.write(chunk(event) + LAST_CHUNK if self.chunked else event)
            self._finish_cut(code, error, keep_alive=False)
        else:
            self._finish_cut(_GIVE_UP_CODES.get(error, ""), error, keep_alive=None)

    def _finish_cut(self, code: str, error: AttemptError, *, keep_alive: bool | None) -> None:
        self._drop_connection()
        self._release(outcome_of(error))
        outcome = records.SHUTDOWN if error is AttemptError.SHUTDOWN else records.CUT
        self.row.code = code
        self._end(outcome, 200, keep_alive=keep_alive)

    def refuse(self, error: RequestError) -> None:
        """Answer with an error of ours; no event or byte of an answer has been sent to the client yet."""
        status = error.status
        dialect = self.route.dialect
        row = self.row
        row.code = error.code
        if error.code in ("shutting_down",):
            outcome = records.SHUTDOWN
        elif status in (502, 504) or error.code == "internal":
            outcome = records.BACKEND_FAILED
        elif status in (429, 503) or error.code in ("data_class", "model_not_allowed"):
            outcome = records.REJECTED
        else:
            outcome = records.CLIENT_ERROR
        if self.head_sent:
            event = event_of(self.route, error.code, error.message, self.meter.next_sequence())
            self.client.write(chunk(event) + LAST_CHUNK if self.chunked else event)
            self._end(outcome, 200, keep_alive=False)
            return
        fields = b"x-request-id: %b\r\n" % self.id.encode("ascii")
        if row.backend:
            fields += b"x-tidegate-backend: %b\r\n" % row.backend.encode("ascii")
        if self.key is not None:
            fields += self.runtime.limits.headers(self.key, self.arrived)
        if error.code == "idempotency_spent":
            fields += b"x-should-retry: false\r\n"  # OpenAI's clients try again after any other 409
        self.client.write(
            error_answer(
                error,
                fields=fields,
                keep_alive=self._keeps_alive(),
                version=self.request.version,
                without_body=self.request.method == b"HEAD",
                dialect=dialect,
            )
        )
        self._end(outcome, status_in(dialect, error.code), keep_alive=True)

    def _end_without_stream(self) -> None:
        """A good answer that is no stream, for a client that has been promised one. Another backend would generate
        it once more, and hardly do better; what it says of its usage counts."""
        self._drop_connection()
        self._release(Outcome.IGNORED)
        message = "the backend's answer is no stream to be read, and its client has been promised one"
        self.refuse(RequestError("backend_protocol", message))

    def fail(self) -> None:
        """A bug of ours, before anything was answered."""
        self._drop_connection()
        self._release(Outcome.IGNORED)
        self.refuse(RequestError("internal", "an error of the proxy's own"))

    # Events from outside

    def client_gone(self) -> None:
        """The client reset, closed, or half-closed its connection: stop the engine, bill what was delivered."""
        if self.state is State.ENDED:
            return
        if self.state is State.HELD:
            self.runtime.cancel_hold(self.row.op)
        self._drop_connection()
        done = self.meter.done  # some clients hang up on `[DONE]`
        self._release(Outcome.OK if done else Outcome.IGNORED)
        status = 200 if self.committed or self.head_sent else 0
        self._end(records.OK if done else records.CLIENT_GONE, status, keep_alive=None)

    def block(self) -> None:
        """The client reads slower than the backend writes: stop reading the backend."""
        self.blocked_since = self.runtime.now()
        if self.connection is not None:
            self.connection.pause()

    def unblock(self) -> None:
        """The client has caught up."""
        self.blocked_since = None
        self.quiet_since = self.runtime.now()  # the backend was not listened to
        if self.connection is not None:
            self.connection.resume()

    def last_on_connection(self) -> None:
        """The client has sent more ahead than is kept: its connection ends behind this answer."""
        self.request.keep_alive = False

    def stop(self) -> None:
        """The proxy stops now."""
        if self.state is State.ENDED:
            return
        if self.committed:
            self._cut(AttemptError.SHUTDOWN, "the proxy is shutting down")
            return
        if self.state is State.HELD:
            self.runtime.cancel_hold(self.row.op)
        self._drop_connection()
        self._release(Outcome.IGNORED)
        self.refuse(RequestError("shutting_down", "the proxy is shutting down", retry_after_s=1.0))

    def sweep(self, now: float) -> None:
        """Look at the deadlines; called a few times a second."""
        timeouts = self.runtime.timeouts
        if self.alive:
            self.alive = False
            self.quiet_since = now
        if self.committed:
            if self.blocked_since is not None:
                if now - self.blocked_since > timeouts.client_write:
                    self.client.abort()  # its connection's end is told to us as to anybody
                    return
            elif now - self.quiet_since > timeouts.between_tokens:
                self._cut(AttemptError.STALLED, f"no token for {timeouts.between_tokens:g} s")
                return
            if now - self.arrived > timeouts.total:
                self._cut(AttemptError.DEADLINE, f"the request took longer than {timeouts.total:g} s")
                return
            if now - self.journaled_at >= PROGRESS_S:
                self.journaled_at = now
                self._journal_progress()
        elif now - self.arrived > timeouts.total:
            self._drop_connection()
            self._release(Outcome.IGNORED)
            self.refuse(RequestError("backend_timeout", f"no answer within {timeouts.total:g} s"))
        elif self.state is State.SENT:
            if self.body_read is None or self.body_read.stream:
                if now - self.quiet_since > timeouts.first_token:
                    message = f"no answer within {timeouts.first_token:g} s"
                    self._attempt_failed(AttemptError.FIRST_TOKEN_TIMEOUT, message)
            elif now - self.quiet_since > timeouts.answer:
                # It may have been at work all the time: once more elsewhere would cost as much again.
                self._drop_connection()
                self._release(Outcome.IGNORED)
                self.refuse(RequestError("backend_timeout", f"no answer within {timeouts.answer:g} s"))

    def _journal_progress(self) -> None:
        """What a crash must not take with it, if there is more of it than the last time."""
        meter, row = self.meter, self.row
        completion = meter.completion if meter.reported else meter.estimate_completion()
        if completion == self.journaled:
            return
        self.journaled = completion
        journal = self.runtime.journal
        if meter.reported:
            journal.progress(row.op, row.backend, meter.prompt, meter.cached, completion)
        elif self.facts is not None:
            prompt = meter.prompt or self.facts.prompt_tokens
            journal.progress(row.op, row.backend, prompt, meter.cached, completion, "estimated")

    # Ending

    def _drop_connection(self) -> None:
        """Abort the attempt's connection, or the attempt to have one."""
        if self.connection is not None:
            self.connection.abort()
            self.connection = None
        if self.connecting is not None:
            self.connecting.cancel()
            self.connecting = None

    def _release(self, outcome: Outcome, now: float | None = None) -> None:
        """Take the load of the present attempt off its backend."""
        lease = self.lease
        if lease is None:
            return
        self.lease = None
        runtime = self.runtime
        meter = self.meter
        runtime.fleet.release(lease, outcome, runtime.now() if now is None else now, meter.usage)

    def _end(self, outcome: str, status: int, *, keep_alive: bool | None) -> None:
        """Settle, record, and give the connection back; `keep_alive` None: it must not look like an end."""
        self._move(State.ENDED)
        runtime, row, meter = self.runtime, self.row, self.meter
        now = runtime.now()
        if self.hedge is not None:
            self.hedge.end()
            self.hedge = None  # they hold each other, and would wait for the garbage collector
        row.outcome = outcome
        row.status = status
        row.total_s = now - self.arrived
        route = self.route
        if route.stores or route.stored:
            self._settle_response(status)
        if meter.reported:
            row.prompt_tokens, row.cached_tokens, row.completion_tokens = meter.usage
            row.usage_source = "reported"
        elif (meter.text_bytes or meter.prompt) and self.facts is not None and route.generates:
            row.prompt_tokens = meter.prompt or self.facts.prompt_tokens
            row.cached_tokens = meter.cached
            row.completion_tokens = meter.estimate_completion()
            row.usage_source = "estimated"
        elif route.metering == INPUT and outcome == records.OK and self.facts is not None:
            row.prompt_tokens = self.facts.prompt_tokens
            row.usage_source = "estimated"
        if route.media:
            say_why_unmetered(row, meter)
        if self.wasted and self.facts is not None:
            # Its engine has reported nothing. The prompt is the same, so this is the most it can have read.
            row.overhead_prompt_tokens += self.wasted * (row.prompt_tokens or self.facts.prompt_tokens)
        if row.usage_source != "none":
            row.cost_nano, row.currency = runtime.prices.cost(
                row.backend, row.served_model, row.prompt_tokens, row.cached_tokens, row.completion_tokens
            )
        if self.reservation is not None:
            runtime.limits.settle(
                self.reservation, row.prompt_tokens + row.completion_tokens, row.cost_nano, now
            )
        if self.body_read is not None and not route.media:  # no engine has a cache of these
            known = self.facts is not None and self.facts.prefix
            row.prefix = known or prompt_hashes(self.body_read.raw, runtime.salt)
        if self.claim is not None:
            charged = outcome == records.OK or row.usage_source != "none"
            runtime.idempotency.end(self.claim, charged, self.kept)
        runtime.exchanges.discard(self)
        if (
            row.attempts or row.code != "ledger_unavailable"
        ):  # what can't be recorded is not to fill the memory
            runtime.journal.close(row)
        runtime.observer.ended(self)
        if keep_alive is not None:
            promised = self.committed and self.request.keep_alive and self.runtime.handed_over
            self.client.finished(keep_alive=keep_alive and (promised or self._keeps_alive()))
        else:
            self.client.abort()
        runtime.capacity_freed(now)

    def _settle_response(self, status: int) -> None:
        """Tokens of a response that outlives its request are counted once, by who first sees them: at its end, or,
        by estimate, in a stream that ends before."""
        meter, row, responses = self.meter, self.row, self.runtime.responses
        if not isinstance(meter, ResponsesMeter):
            if 200 <= status < 300:
                responses.forget(stored_id(self.request.target))
            return
        stored = self.route.stored
        if self.facts is None or not (stored or meter.background):
            return
        name = stored_id(self.request.target) if stored else meter.response_id
        if meter.reported and meter.ended:
            prompt, completion = responses.count(name, meter.prompt, meter.completion, ended=True)
            row.cached_tokens = min(meter.cached, prompt)
            source = "reported"
        elif meter.text_bytes and self.mode == EVENTS:
            resumed = stored and self.request.target.find(b"starting_after=") >= 0
            prompt, completion = responses.count(
                name, self.facts.prompt_tokens, meter.estimate_completion(), ended=False, resumed=resumed
            )
            source = "estimated"
        else:
            prompt = completion = 0
        if prompt or completion:
            row.prompt_tokens, row.completion_tokens, row.usage_source = prompt, completion, source
        # All of it is in the row.
        meter.reported, meter.text_bytes, meter.prompt = False, 0, 0
