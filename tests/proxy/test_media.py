"""Sound and pictures: tokens where a backend tells them, seconds, and the reason where it tells neither."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.media import MediaMeter, SessionMeter
from proxy.multipart import Form
from proxy.records import as_json, from_values, to_values
from proxy.sse import EventReader
from tests.proxy.fakes import (
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    World,
    chunked,
    client_of,
    read,
    transport_of,
    whole,
)
from tests.proxy.test_server import Peer
from tests.proxy.uploads import FORM_TYPE, SOUND, field, file, form, upload

SOUND_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: audio/mpeg\r\ntransfer-encoding: chunked\r\n\r\n"
FORM = {"forward": b"content-type: %b\r\n" % FORM_TYPE}


def transcript(text: str, *, finish: str | None = None, completion: int | None = None) -> bytes:
    """An event of a vLLM."""
    choice: dict[str, Any] = {"delta": {"content": text}}
    if finish is not None:
        choice |= {"finish_reason": finish, "stop_reason": None}
    document: dict[str, Any] = {"id": "trsc-1", "object": "transcription.chunk", "choices": [choice]}
    if completion is not None:
        document["usage"] = {
            "prompt_tokens": 90,
            "total_tokens": 90 + completion,
            "completion_tokens": completion,
        }
    return b"data: " + orjson.dumps(document) + b"\n\n"


def metered(usage: Any) -> MediaMeter:
    meter = MediaMeter()
    meter.body(orjson.dumps({"text": "x", "usage": usage}))
    return meter


@pytest.mark.parametrize(
    ("usage", "tokens", "seconds"),
    [
        ({"type": "tokens", "input_tokens": 7, "output_tokens": 5}, (7, 0, 5), None),
        (
            {"input_tokens": 7, "input_tokens_details": {"cached_tokens": 2}, "output_tokens": 5},
            (7, 2, 5),
            None,
        ),
        (
            {"input_tokens": 7, "input_token_details": {"cached_tokens": 2}, "output_tokens": 5},
            (7, 2, 5),
            None,
        ),
        ({"prompt_tokens": 7, "total_tokens": 12, "completion_tokens": 5}, (7, 0, 5), None),
        ({"type": "duration", "seconds": 12}, (0, 0, 0), 12.0),
        ({"type": "duration", "seconds": 0.5}, (0, 0, 0), 0.5),
        ({"type": "duration", "seconds": -1}, (0, 0, 0), None),
        ({"type": "duration", "seconds": True}, (0, 0, 0), None),
        ({"type": "duration", "seconds": 1e300}, (0, 0, 0), None),
        ({"type": "tokens", "input_tokens": "7"}, (0, 0, 0), None),
        (None, (0, 0, 0), None),
        ("all", (0, 0, 0), None),
    ],
)
def test_usage_in_all_its_shapes(usage: Any, tokens: tuple[int, int, int], seconds: float | None) -> None:
    meter = metered(usage)
    assert (meter.usage, meter.audio_s) == (tokens, seconds)


def test_a_duration_without_usage_is_the_seconds() -> None:
    meter = MediaMeter()
    meter.body(b'{"text":"x","duration":3.5,"segments":[]}')
    assert (meter.audio_s, meter.reported) == (3.5, False)


def test_what_is_no_json_tells_nothing() -> None:
    meter = MediaMeter()
    for body in (b"1\n00:00 --> 00:01\nsea", b"[]", b"", b"\xff"):
        meter.body(body)
    assert not meter.reported
    assert meter.estimate_completion() == 0


def test_seconds_are_in_the_row_and_no_tokens() -> None:
    exchange = (w := World("a")).start(endpoint="transcriptions", raw=upload(), **FORM)
    w.answers(exchange, "a").data_received(
        whole(200, b'{"text":"sea","usage":{"type":"duration","seconds":12}}')
    )
    row = exchange.row
    assert (row.outcome, row.usage_source, row.prompt_tokens, row.completion_tokens) == ("ok", "none", 0, 0)
    assert (row.audio_s, row.unmetered) == (12.0, "seconds were reported, no tokens")
    assert (row.cost_nano, row.currency) == (0, "")
    again = from_values(to_values(row))
    assert (again.audio_s, again.unmetered) == (row.audio_s, row.unmetered)
    assert orjson.loads(as_json(row))["audio_s"] == 12.0


def test_an_upload_that_is_sent_again_has_another_boundary_and_the_same_answer() -> None:
    w = World("a")

    def again(boundary: bytes, model: str = "m") -> Any:
        raw = form(file("file"), field("model", model), boundary=boundary)
        kind = b"content-type: multipart/form-data; boundary=%b\r\n" % boundary
        return w.start(endpoint="transcriptions", raw=raw, forward=kind, idempotency_key=b"one")

    first = again(b"x1")
    w.answers(first, "a").data_received(whole(200, b'{"text":"sea"}'))
    second = again(b"x2")
    assert read(second).body == b'{"text":"sea"}'
    assert second.row.reason.startswith("answered before")
    assert again(b"x3", "other").row.code == "idempotency_mismatch"


def test_no_hashes_of_sound_are_kept() -> None:
    raw = form(file("file", SOUND * 20), field("model", "m"))
    exchange = (w := World("a")).start(endpoint="transcriptions", raw=raw, **FORM)
    w.answers(exchange, "a").data_received(whole(200, b'{"text":"sea"}'))
    assert exchange.row.prefix == ()


def test_a_refused_one_says_nothing_of_its_usage() -> None:
    exchange = (w := World("a")).start(endpoint="transcriptions", raw=upload(), **FORM)
    w.answers(exchange, "a").data_received(whole(400, b'{"error":{"message":"no sound"}}'))
    assert (exchange.row.outcome, exchange.row.unmetered) == ("client_error", "")


@settings(max_examples=30)  # each makes a proxy
@given(st.lists(st.integers(1, len(upload(stream="true")) + 100), max_size=6))
def test_wherever_an_upload_is_cut_it_is_the_same(cuts: list[int]) -> None:
    body = upload(model="m", stream="true", prompt="sea")
    head = (
        b"POST /v1/audio/transcriptions HTTP/1.1\r\nhost: x\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n"
    )
    raw = head % (FORM_TYPE, len(body)) + body
    world = World("a", aliases={"other": "m"})
    peer = Peer(world)
    at = 0
    for cut in [*sorted({min(cut, len(raw)) for cut in cuts}), len(raw)]:
        if raw[at:cut]:
            peer.send(raw[at:cut])
        at = cut
    connection = world.connects("a")
    got = transport_of(connection).written.partition(b"\r\n\r\n")[2]
    assert Form(got, FORM_TYPE).names == [
        "file",
        "model",
        "stream",
        "prompt",
        "stream_include_usage",
        "stream_continuous_usage_stats",
    ]
    assert SOUND in got
    connection.data_received(whole(200, b'{"text":"sea"}'))
    row = world.journal.closed[-1]
    assert (row.model, row.stream, row.outcome, row.body_bytes) == ("m", True, "ok", len(body))


# A vLLM's stream of a transcript


def stream(*events: bytes, **fields: str) -> tuple[World, Any]:
    w = World("a")
    exchange = w.start(endpoint="transcriptions", raw=upload(stream="true", **fields), **FORM)
    w.answers(exchange, "a").data_received(STREAM_HEAD + chunked(*events) + LAST_CHUNK)
    return w, exchange


VLLM = [
    transcript("The tide", completion=2),
    transcript(" comes", finish="stop", completion=4),
    transcript(" in.", finish="stop", completion=6),  # sound of more than half a minute has several ends
    b'data: {"id":"trsc-1","object":"transcription.chunk","choices":[],'
    b'"usage":{"prompt_tokens":90,"total_tokens":96,"completion_tokens":6}}\n\n',
    DONE,
]


def test_a_transcripts_usage_is_metered_and_cut_out() -> None:
    w, exchange = stream(*VLLM)
    found = read(exchange)
    assert found.text == "The tide comes in."
    assert b"usage" not in found.body
    assert found.done
    assert (exchange.row.prompt_tokens, exchange.row.completion_tokens) == (90, 6)
    assert (exchange.row.usage_source, exchange.row.unmetered) == ("reported", "")
    w.check()


def test_a_transcripts_usage_is_there_if_it_was_asked_for() -> None:
    _, exchange = stream(*VLLM, stream_include_usage="true")
    assert read(exchange).body.count(b"usage") == 1
    _, exchange = stream(*VLLM, stream_include_usage="true", stream_continuous_usage_stats="true")
    assert read(exchange).body == b"".join(VLLM)


def test_a_transcript_that_breaks_off_has_the_last_usage() -> None:
    _, exchange = stream(VLLM[0])
    assert exchange.row.outcome == "cut"
    assert (exchange.row.prompt_tokens, exchange.row.completion_tokens) == (90, 2)


# Events of OpenAI's


def events(*payloads: bytes) -> tuple[MediaMeter, bytes]:
    meter, out = MediaMeter(), b""
    for event in EventReader().feed(b"".join(payloads)):
        out += meter.event(event, include_usage=False, every_event=False)
    return meter, out


def test_the_usage_in_a_last_event_stays_there() -> None:
    done = b'event: x.done\ndata: {"type":"transcript.text.done","usage":{"input_tokens":7,"output_tokens":5}}\n\n'
    meter, out = events(b'data: {"type":"transcript.text.delta","delta":"x"}\n\n', done)
    assert out.endswith(done)
    assert (meter.usage, meter.finished) == ((7, 0, 5), 1)


def test_several_pictures_may_follow_each_other() -> None:
    picture = b'data: {"type":"image_generation.completed","b64_json":"AA==","usage":{"input_tokens":7}}\n\n'
    exchange = (w := World("a")).start(
        endpoint="images", raw=b'{"model":"m","prompt":"x","n":2,"stream":true}'
    )
    w.answers(exchange, "a").data_received(STREAM_HEAD + chunked(picture, picture) + LAST_CHUNK)
    assert read(exchange).body == picture * 2
    assert exchange.row.outcome == "ok"


@pytest.mark.parametrize(
    "data", [b'{"type":"error","message":"x"}', b'{"type":"error","error":{"message":"x"}}']
)
def test_an_error_event_is_a_failure(data: bytes) -> None:
    assert events(b"data: %b\n\n" % data)[0].failed


# Sound


def speech(w: World) -> Any:
    return w.start(endpoint="speech", raw=b'{"model":"m","input":"sea","voice":"x"}')


def test_sound_is_passed_on_as_it_comes() -> None:
    exchange = speech(w := World("a"))
    connection = w.answers(exchange, "a")
    connection.data_received(SOUND_HEAD + chunked(b"\xff\xf3\x00"))
    assert exchange.committed
    assert read(exchange).body == b"\xff\xf3\x00"
    w.check()
    connection.data_received(chunked(b"\x01") + LAST_CHUNK)
    found = read(exchange)
    assert (found.complete, found.body) == (True, b"\xff\xf3\x00\x01")
    assert found.fields["content-type"] == "audio/mpeg"
    assert (exchange.row.outcome, exchange.row.unmetered) == ("ok", "no usage was reported")


def test_sound_that_breaks_off_is_cut() -> None:
    exchange = speech(w := World("a"))
    connection = w.answers(exchange, "a")
    connection.data_received(SOUND_HEAD + chunked(b"\xff\xf3"))
    connection.connection_lost(ConnectionResetError())
    assert client_of(exchange).ended == "abort"
    assert exchange.row.outcome == "cut"
    assert exchange.row.usage_source == "none"


def test_nothing_is_estimated_of_sound_while_it_comes() -> None:
    exchange = speech(w := World("a"))
    connection = w.answers(exchange, "a")
    connection.data_received(SOUND_HEAD + chunked(b"\xff" * 4096))
    w.wait(1.0)
    assert exchange.committed
    assert w.journal.progressed == []


def test_a_long_picture_is_metered_from_its_end() -> None:
    body = orjson.dumps(
        {"data": [{"b64_json": "A" * 2_000_000}], "usage": {"input_tokens": 7, "output_tokens": 5}}
    )
    exchange = (w := World("a")).start(endpoint="images", raw=b'{"model":"m","prompt":"x"}')
    connection = w.answers(exchange, "a")
    reply = whole(200, body)
    for at in range(0, len(reply), 65536):
        connection.data_received(reply[at : at + 65536])
    assert read(exchange).body == body
    assert (exchange.row.prompt_tokens, exchange.row.completion_tokens) == (7, 5)


@pytest.mark.parametrize(
    ("endpoint", "fields"),
    [
        ("speech", {"ref_audio": "http://10.0.0.1/x.wav"}),
        ("speech", {"ref_audio": "file:///etc/passwd"}),
        ("speech", {"ref_audio": "\u0001http://10.0.0.1/x.wav"}),
        ("speech", {"ref_audio": "ht\ntp://10.0.0.1/x.wav"}),
        ("images", {"image": ["\ufeffh\tttp:\r//10.0.0.1"]}),
        ("images", {"mask": "da\nta:image/png;base64,AAAA"}),
        ("images", {"image": ["https://x/y.png"]}),
        ("images", {"image_url": "/etc/passwd"}),
        ("images", {"references": [{"image_url": "http://x"}]}),
    ],
)
def test_what_an_engine_would_fetch_is_refused(endpoint: str, fields: dict[str, Any]) -> None:
    document = {"model": "m", "input": "x", "prompt": "x", **fields}
    exchange = (w := World("a")).start(endpoint=endpoint, raw=orjson.dumps(document))
    assert (read(exchange).status, exchange.row.code) == (400, "media_url")
    assert not w.dialled()


@pytest.mark.parametrize(
    "sound", ["data:audio/wav;base64,AAAA", "UklGRiQAAABXQVZF", "UklGRiQA\nAABXQVZF\n", "UklG" * 100_000]
)
def test_sound_inline_passes(sound: str) -> None:
    document = {"model": "m", "input": "http://x is text", "ref_audio": sound}
    exchange = (w := World("a")).start(endpoint="speech", raw=orjson.dumps(document))
    assert w.dialled() == ["a"]
    assert exchange.body_read is not None
    assert exchange.body_read.prompt_tokens == 4


# A session


def test_a_session_is_the_sum_of_its_answers() -> None:
    meter = SessionMeter()
    done = {"input_tokens": 7, "output_tokens": 5, "input_token_details": {"cached_tokens": 2}}
    meter.message(orjson.dumps({"type": "response.done", "response": {"usage": done}}))
    meter.message(
        orjson.dumps({"type": "transcription.done", "usage": {"prompt_tokens": 1, "completion_tokens": 2}})
    )
    assert (meter.usage, meter.reported) == ((8, 2, 7), True)


@pytest.mark.parametrize(
    "message",
    [
        b'{"type":"response.created","response":{"usage":{"input_tokens":7}}}',
        b'{"type":"response.done","response":{"usage":null}}',
        b'{"type":"response.done","response":"usage"}',
        b'{"type":"response.output_text.delta","delta":"\\"usage\\""}',
        b'{"type":"response.done","response":{"usage":{"input_tokens":-7,"output_tokens":"5"}}}',
        b'["usage"]',
        b'"usage"',
        b'{"usage"',
    ],
)
def test_what_tells_no_usage_counts_nothing(message: bytes) -> None:
    meter = SessionMeter()
    meter.message(message)
    assert meter.usage == (0, 0, 0)
