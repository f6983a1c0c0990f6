"""Signs of life for who has asked for a stream and waits for its first token (`timeouts.heartbeat`).

A client that hears nothing for long may give up, or a proxy in between may cut it off. So after that time it gets
the head of its stream, and then a comment each time, until the first event of its answer, held or sent. From the
head on its status is 200: what goes wrong afterwards is told in an error event. Other backends can be tried all the
same, for no event of an answer has been sent.

A comment is a line that begins with a colon (WHATWG HTML, section 9.2.6). No blank line follows, for some clients
take that for the end of an event without data, and fail to read it as JSON.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from proxy.answers import stream_head
from proxy.http1 import chunk
from proxy.relay import EVENTS

if TYPE_CHECKING:
    from proxy.exchange import Exchange
    from proxy.runtime import Runtime

HEARTBEAT: Final = b": ping\n"


def beat(runtime: Runtime, now: float) -> None:
    """Write to everybody whose heartbeat is due; called a few times a second."""
    every = runtime.config.timeouts.heartbeat
    if not every:
        return
    for exchange in (*runtime.held.values(), *runtime.exchanges):
        if exchange.committed or now - (exchange.beat_at or exchange.arrived) < every or not _waits(exchange):
            continue
        if exchange.blocked_since is not None:
            if now - exchange.blocked_since > runtime.timeouts.client_write:
                exchange.client.abort()  # its connection's end is told to us as to anybody
            continue
        exchange.beat_at = now
        out = chunk(HEARTBEAT) if exchange.chunked else HEARTBEAT
        if not exchange.head_sent:
            out = _head(exchange) + out
            exchange.head_sent = True
        exchange.client.write(out)


def _waits(exchange: Exchange) -> bool:
    """Whether its client waits for the first event of a stream."""
    facts = exchange.facts
    route = exchange.route
    if facts is None or not facts.stream or not route.streams or route.media:
        return False  # not every backend that is asked for a stream of sound or pictures has one
    # An answer that is no stream has begun: if it is an error, its status can still be told.
    return exchange.head_sent or exchange.reply is None or exchange.mode == EVENTS


def _head(exchange: Exchange) -> bytes:
    request, runtime = exchange.request, exchange.runtime
    fields = b"transfer-encoding: chunked\r\n" if exchange.chunked else b""
    fields += b"x-request-id: %b\r\n" % exchange.id.encode("ascii")
    if exchange.key is not None:
        fields += runtime.limits.headers(exchange.key, exchange.arrived)
    if runtime.draining or runtime.shedding or not exchange.chunked:
        request.keep_alive = False
    return stream_head(fields=fields, keep_alive=request.keep_alive)
