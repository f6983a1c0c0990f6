"""Laws of what comes over a connection: HTTP, event streams, usage, bodies, PROXY headers.

However the bytes are cut, the same is read from them, and what is wrong with them is said in the parser's own way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from random import Random
from typing import Any, Final

import orjson

from proxy.endpoints import FORM_BODY, NO_BODY, TABLE, WEBSOCKET
from proxy.errors import RequestError
from proxy.media import MediaMeter
from proxy.meter import Meter
from proxy.meters import InputMeter, MessagesMeter, ResponsesMeter
from proxy.openai import ENGINE_FIELDS, body_for_backend, read_body
from proxy.sse import Event, EventReader
from tests.fuzz.target import Target, cuts, words
from tests.proxy.endpoint_samples import HELLO, SAMPLES
from tests.proxy.http_bytes import (
    REFUSED,
    WAITS,
    Reader,
    a_chunked_body,
    a_request,
    a_response,
    outcome,
    read_request,
    read_response,
    unchunked,
)
from tests.proxy.sse_events import BOM, canonical, is_bom
from tests.proxy.test_proxy_protocol import read as read_proxy_header
from tests.proxy.test_proxy_protocol import version_2


def _requests(data: bytes) -> None:
    _same_however_cut(read_request, data)


def _responses(data: bytes) -> None:
    _same_however_cut(read_response, data)


def _same_however_cut(read: Reader, data: bytes) -> None:
    whole = outcome(read, [data])
    for pieces in cuts(data):
        cut = outcome(read, pieces)
        # What is wrong with a set of fields may be said before the last of them has come, if they come at once.
        assert cut == whole or ((whole, cut) == (REFUSED, WAITS) and b"\r\n\r\n" not in data), (whole, cut)


def _chunks(data: bytes) -> None:
    whole = unchunked([data])
    for pieces in cuts(data):
        assert unchunked(pieces) == whole


def _events(data: bytes) -> None:
    whole, _ = _read_events([data])
    for pieces in cuts(data):
        events, reader = _read_events(pieces)
        assert [(event.name, event.data) for event in events] == [(event.name, event.data) for event in whole]
        passed = b"".join(event.raw for event in events)
        held = b"".join(reader._block) + bytes(reader._pending)
        assert reader.unfinished == bool(held)
        assert canonical(passed + held) == canonical(data if is_bom(data) else data.removeprefix(BOM))


def _read_events(pieces: Sequence[bytes]) -> tuple[list[Event], EventReader]:
    reader = EventReader()
    return [event for piece in pieces for event in reader.feed(piece)], reader


_METERS: Final[tuple[tuple[Callable[[], Meter], tuple[tuple[bool, bool], ...]], ...]] = (
    (Meter, ((False, False), (True, False), (True, True))),
    (lambda: Meter(choices=4, prompts=2), ((False, False),)),
    (ResponsesMeter, ((True, True),)),
    (MessagesMeter, ((True, True),)),
    (InputMeter, ((True, True),)),
    (MediaMeter, ((False, False), (True, True))),
)
"""Each meter, and what its client may have asked for: the last usage, that of every event."""


def _meters(data: bytes) -> None:
    for make, wishes in _METERS:
        for include_usage, every_event in wishes:
            whole = _metered(make(), [data], include_usage, every_event)
            pieces = cuts(data)[-1]  # byte by byte is slow, and a matter of the reader
            assert _metered(make(), pieces, include_usage, every_event) == whole
        meter = make()
        meter.body(data)
        _is_sane(meter)
        meter = make()
        for piece in cuts(data)[-1]:
            meter.piece(piece)
        _is_sane(meter)
        assert meter.failed == (b'"finish_reason":"abort"' in data)


def _metered(meter: Meter, pieces: Sequence[bytes], include_usage: bool, every_event: bool) -> list[Any]:
    """What a stream says to a meter, and what goes on to the client: as `Relay` does it."""
    reader, out = EventReader(), []
    for piece in pieces:
        if reader.between_events and not meter.done and (known := meter.recall(piece)):
            out.append(known)
            continue
        for event in reader.feed(piece):
            if meter.done or meter.failed:
                break
            out.append(meter.event(event, include_usage=include_usage, every_event=every_event))
        if meter.done or meter.failed:
            break
    _is_sane(meter)
    state = (meter.usage, meter.reported, meter.text_bytes, meter.done, meter.failed, meter.client_fault)
    return [*state, meter.fault, meter.finished, canonical(b"".join(out))]


def _is_sane(meter: Meter) -> None:
    assert min(*meter.usage, meter.text_bytes, meter.estimate_completion()) >= 0
    assert meter.client_fault == 0 or 400 <= meter.client_fault < 500


_ENDPOINTS: Final = tuple(
    {route.body: route.name for route in TABLE if route.body not in (NO_BODY, FORM_BODY, WEBSOCKET)}.values()
)
"""One for each kind of JSON."""


def _bodies(data: bytes) -> None:
    for name in _ENDPOINTS:
        try:
            body = read_body(name, data, media_urls=bool(data[-1:] == b" "))
        except RequestError:
            continue
        assert min(body.prompt_tokens, body.max_tokens, body.expected_tokens, body.reserved_tokens) >= 0
        assert min(body.prompts, body.choices) >= 0
        for model in (body.model, "another"):
            _check_sent(body_for_backend(body, model=model, continuous=True, cache_salt="ours"), data, model)


def _check_sent(sent: bytes, data: bytes, model: str) -> None:
    """A backend gets the client's document, but for what is ours to say."""
    asked, got = json.loads(data), json.loads(sent)
    assert got["model"] == model
    assert {name: got.get(name) for name in ENGINE_FIELDS} == dict.fromkeys(ENGINE_FIELDS) | {
        "cache_salt": "ours"
    }
    ours = {"model", "stream_options", "request_id", *ENGINE_FIELDS}
    assert repr({name: asked[name] for name in asked if name not in ours}) == repr(
        {name: got[name] for name in got if name not in ours}
    )


def _proxy_headers(data: bytes) -> None:
    try:
        found, behind = read_proxy_header(data)
    except (ValueError, EOFError):
        return
    if found:
        ip_address(found)
    header = data[: len(data) - len(behind)]
    assert read_proxy_header(header + b"GET / ") == (found, b"GET / ")
    for end in range(len(header)):
        try:
            read_proxy_header(header[:end])
        except EOFError:
            continue
        raise AssertionError(f"the first {end} bytes of it are a header too")


def _made_by(make: Callable[[Random], bytes]) -> list[bytes]:
    return [make(Random(seed)) for seed in range(40)]


def _streams() -> list[bytes]:
    streams = [b"".join(sample.events) for sample in SAMPLES.values() if sample.events]
    answers = [orjson.dumps(sample.answer) for sample in SAMPLES.values()]
    return [
        *streams,
        *(stream.replace(b"\n", b"\r\n") for stream in streams),
        *answers,
        *(b"data: %b\n\n" % answer for answer in answers),
        BOM + b": hi\r\ndata: {\rdata:}\r\n\r\nretry: 1\n\nevent: x\ndata: [DONE]\n\ndata",
        b'event: error\ndata: {"type":"error","error":{"code":400,"message":"no"}}\n\n',
    ]


def _bodies_of_clients() -> list[bytes]:
    media = [{"type": "image_url", "image_url": {"url": "data:x"}}, {"type": "text", "text": "é\u2028"}]
    both = {"include_usage": True, "continuous_usage_stats": True}
    more: list[dict[str, Any]] = [
        {"messages": HELLO, "stream": True, "stream_options": both},
        {"messages": HELLO, "n": 3, "max_tokens": 7, "user": "u", "cache_salt": "mine", "priority": 1},
        {"messages": [{"role": "user", "content": media}], "seed": 2**63, "temperature": 0.1},
        {"prompt": [[1, 2], [3]], "n": 2, "best_of": 3},
        {"input": [{"role": "user", "content": "x"}], "previous_response_id": "resp_1"},
        {"messages": HELLO, "max_tokens": 1, "metadata": {"user_id": "u"}, "stream": True},
    ]
    fields = [*(sample.body for sample in SAMPLES.values()), *more]
    return [
        *(orjson.dumps({"model": "m", **body}) for body in fields),
        b'{"model":"m","messages":[],"seed":123456789012345678901234567890}',
        b' {"model" : "m", "messages" : [ ], "temperature" : 1E5, "a":1, "a":2}',
        b'{"model":"m","prompt":"\\ud83d\\ude00","request_id":"x","tools":[{"server_url":"http://a"}]}',
    ]


def _headers() -> list[bytes]:
    return [
        b"PROXY TCP4 1.2.3.4 10.0.0.1 56324 443\r\nGET / HTTP/1.1\r\n",
        b"PROXY TCP6 2001:db8::1 ::1 1 65535\r\n",
        b"PROXY UNKNOWN ffff::1 x\r\n",
        version_2(0x20, 0),
        version_2(0x21, 0x11, bytes(range(12)), [(1, b"h2"), (4, b"")]),
        version_2(0x21, 0x21, bytes(range(36)), [(0x20, b"\x01" * 9)]) + b"GET /",
    ]


TARGETS: Final[dict[str, Target]] = {
    "requests": Target(_requests, lambda: _made_by(a_request), words("http", "chunks")),
    "responses": Target(_responses, lambda: _made_by(a_response), words("http", "chunks")),
    "chunks": Target(
        _chunks, lambda: _made_by(lambda rng: a_chunked_body(rng, rng.randbytes(99))), words("chunks")
    ),
    "events": Target(_events, _streams, words("events")),
    "meters": Target(_meters, _streams, words("events", "usage", "json")),
    "bodies": Target(_bodies, _bodies_of_clients, words("bodies", "json")),
    "proxy-headers": Target(_proxy_headers, _headers, words("proxy")),
}
