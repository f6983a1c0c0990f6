"""The second attempt of a request whose first token is late (`hedging` in the configuration).

It stands beside its exchange, which knows one attempt at a time, until one of the two has given a data event.
If that is the first one, the second is aborted. If it is the second, it hands over to the exchange its lease, its
connection and what it has read, as if the exchange had gone there by itself; so it does when the first fails.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from math import inf
from typing import TYPE_CHECKING, Any, Final

from policies.base import Outcome
from policies.hedging import Hedging
from policies.routing import Routing
from policies.state import Lease
from probes.passive import AttemptError, backoff_s, outcome_of
from proxy.http1 import ResponseHead
from proxy.meter import Meter
from proxy.relay import commits_nothing
from proxy.sse import EventReader
from proxy.upstream import OUR_SHORTAGE, BackendConnection, Endpoint, Receiver, connect_failure

if TYPE_CHECKING:
    from proxy.exchange import Exchange

log = logging.getLogger("tidegate")

WON: Final = "won"
LOST: Final = "lost"
FAILED: Final = "failed"
OUTCOMES: Final = (WON, LOST, FAILED)


class Hedge(Receiver):
    """Waits with an exchange for its first token, and makes a second attempt when that is late. One at most."""

    timer: asyncio.TimerHandle | None = None
    # The second attempt
    routing: Routing | None = None
    lease: Lease | None = None
    """Held while it runs."""
    target: Endpoint | None = None
    connecting: asyncio.Task[Any] | None = None
    connection: BackendConnection | None = None
    sent = False
    reply: ResponseHead | None = None
    handed_over = False

    def __init__(self, exchange: Exchange, hedging: Hedging) -> None:
        self.exchange = exchange
        self.hedging = hedging
        self.reader = EventReader()
        self.parts: list[bytes] = []
        """Of the answer, what the exchange has to read again."""
        self.meter: Meter | None = None
        """Reads the answer until it commits."""
        self.withheld: list[bytes] = []
        """Events that commit nothing, but belong to the answer."""

    # The wait

    def wait(self, now: float) -> None:
        """An attempt of the exchange begins."""
        self._stop_timer()
        exchange = self.exchange
        if exchange.row.hedge or self.lease is not None:
            return
        facts = exchange.facts
        assert facts is not None
        seconds = self.hedging.late_after(facts.model, facts.prompt_tokens, now)
        if seconds < inf:
            self.timer = exchange.runtime.loop.call_later(seconds, self._late)

    def first_token(self, now: float) -> None:
        """The exchange's own attempt has given the first data event."""
        exchange = self.exchange
        lease, facts = exchange.lease, exchange.facts
        assert lease is not None
        assert facts is not None
        self.hedging.observe(facts.model, facts.prompt_tokens, now - lease.started, now)

    def end(self) -> None:
        """The exchange needs no second attempt, or no more."""
        self._stop_timer()
        if self.lease is not None:
            if self.sent:
                self.exchange.wasted += 1
            self._over(LOST, Outcome.IGNORED)

    def _stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _late(self) -> None:
        """The first token should have come by now."""
        self.timer = None
        exchange = self.exchange
        runtime, row, own = exchange.runtime, exchange.row, exchange.lease
        now = runtime.now()
        if own is None or exchange.committed or row.attempts >= runtime.config.retries.attempts:
            return
        if not self.hedging.affords(now):
            return
        assert exchange.facts is not None
        routing = runtime.valve.hedge(exchange.facts, exchange.tried | {own.backend.name}, now)
        if routing is None:
            return
        assert routing.lease is not None
        self.hedging.spend(now)
        self.routing = routing
        self.lease = routing.lease
        self.target = runtime.endpoints[routing.lease.backend.name]
        row.attempts += 1
        exchange.routings.append(routing)
        connection = self.target.pool.take()
        if connection is not None:
            self._send(connection)
        else:
            self._dial()

    # Sending

    def _dial(self) -> None:
        self.connecting = self.exchange.runtime.tasks.spawn(self._connect(), "connect")

    async def _connect(self) -> None:
        target = self.target
        assert target is not None
        try:
            connection = await target.connect(self.exchange.runtime.config.timeouts.connect)
        except (OSError, UnicodeError) as failure:
            self.connecting = None
            error = failure if isinstance(failure, OSError) else socket.gaierror(failure)
            kind, reason = connect_failure(error)
            blameless = error.errno in OUR_SHORTAGE
            self._failed(kind, f"cannot connect to {target.name}: {reason}", blameless=blameless)
            return
        except Exception:
            log.exception("connecting to %s", target.name)
            self.connecting = None
            self._failed(AttemptError.CONNECT, "an error of the proxy's own", blameless=True)
            return
        self.connecting = None
        if connection.closed:
            self._failed(AttemptError.RESET, "the backend closed the connection at once")
        else:
            self._send(connection)

    def _send(self, connection: BackendConnection) -> None:
        self.connection = connection
        self.sent = True
        connection.send(self, self.exchange.request_for(connection.endpoint))

    # From the backend (proxy.upstream.Receiver)

    def head(self, head: ResponseHead) -> None:
        """A response head. Only a stream of events can be first: another answer is the exchange's to get."""
        self.reply = head
        if not 200 <= head.status < 300:
            self._failed(head.status, f"the backend answered {head.status}")
        elif head.content_type[:17].lower() != b"text/event-stream" or head.content_encoding not in (
            b"",
            b"identity",
        ):
            self._failed(
                AttemptError.MALFORMED, "the backend's answer is no stream to be read", blameless=True
            )

    def body(self, payload: bytes, done: bool) -> None:
        """Payload of the stream: the first data event wins."""
        if done:
            self.connection = None
        self.parts.append(payload)
        exchange = self.exchange
        meter = self.meter
        if meter is None:
            meter = self.meter = exchange.new_meter()
        for event in self.reader.feed(payload):
            if commits_nothing(event):
                continue
            if exchange.route.withholds and meter.withholds(event):
                self.withheld.append(event.raw)
                continue
            meter.event(event, include_usage=True, every_event=True)
            if meter.failed:
                row = exchange.row
                row.overhead_prompt_tokens += meter.prompt
                row.overhead_completion_tokens += meter.completion
                message = "the backend answered with an error event"
                self._failed(AttemptError.ERROR_EVENT, message, blameless=bool(meter.client_fault))
                return
            self._win(done)
            return
        if done:
            self._failed(AttemptError.RESET, "the backend's stream held no event")
        elif self.reader.between_events:
            self.parts = [*self.withheld]  # without heartbeats, of which there may be many

    def lost(self, error: AttemptError, message: str) -> None:
        """The connection is gone."""
        self.connection = None
        if self.handed_over:  # the end of an answer came with its beginning, and could not be read
            self.exchange.lost(error, message)
        elif error is AttemptError.STALE_CONNECTION:
            self.sent = False
            self._dial()
        elif self.lease is not None:
            self._failed(error, message)

    # Its end

    def _win(self, done: bool) -> None:
        """Its data event is the first: it takes the place of the exchange's own attempt."""
        exchange = self.exchange
        facts, now = exchange.facts, exchange.runtime.now()
        own = exchange.lease
        assert facts is not None
        assert own is not None
        waited = now - own.started
        self.hedging.observe(facts.model, facts.prompt_tokens, waited, now)
        if waited > own.backend.ttft_s:  # it would have taken longer; so much is known
            own.backend.observe_ttft(waited, now)
        exchange.give_up_attempt(now)
        self.take_over(done)

    def take_over(self, done: bool = False) -> None:
        """The exchange goes on with this attempt, and has none of its own; `done`: all of its answer is here."""
        exchange = self.exchange
        runtime, routing, connection = exchange.runtime, self.routing, self.connection
        assert routing is not None
        assert self.target is not None
        self.handed_over = True
        self.lease = None
        if self.connecting is not None:
            self.connecting.cancel()
            self.connecting = None
        self.connection = None
        self._count(WON)
        runtime.valve.hedge_won(routing, runtime.now())
        if connection is not None:
            connection.hand_over(exchange)
        exchange.adopt(routing, self.target, connection, waiting=not done)
        if self.reply is not None:
            exchange.head(self.reply)
            payload = b"".join(self.parts)
            if payload or done:
                exchange.body(payload, done)

    def _failed(self, error: AttemptError | int, message: str, *, blameless: bool = False) -> None:
        """It will not be first. The exchange's own attempt goes on as if nothing had been."""
        exchange, lease, reply = self.exchange, self.lease, self.reply
        assert lease is not None
        assert self.routing is not None
        runtime, name = exchange.runtime, lease.backend.name
        self.routing.failure = message
        exchange.tried |= {name}
        retry_after: str | None = None
        pause = 0.0
        if isinstance(error, int):
            if reply is not None and reply.retry_after:
                retry_after = reply.retry_after.decode("latin-1")
            pause = backoff_s(error, retry_after, runtime.wall())
        self._over(FAILED, Outcome.IGNORED if blameless else outcome_of(error, retry_after is not None))
        if pause > 0 and name in runtime.fleet.backends:
            runtime.fleet.back_off(name, pause, runtime.now())
        runtime.observer.attempt_failed(name, error)

    def _over(self, how: str, outcome: Outcome) -> None:
        """Give back what it holds."""
        lease, self.lease = self.lease, None
        assert lease is not None
        self._count(how)
        if self.connecting is not None:
            self.connecting.cancel()
            self.connecting = None
        if self.connection is not None:
            self.connection.abort()
            self.connection = None
        runtime = self.exchange.runtime
        runtime.fleet.release(lease, outcome, runtime.now())

    def _count(self, how: str) -> None:
        assert self.target is not None
        self.exchange.row.hedge = f"{how} at {self.target.name}"
        hedges = self.exchange.runtime.observer.hedges
        hedges[how] = hedges.get(how, 0) + 1
