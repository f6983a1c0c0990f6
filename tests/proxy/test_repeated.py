"""An event that is known by the last one is read as the meter would have read it, whatever bytes it has."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.http1 import ChunkedDecoder, chunk
from proxy.meter import Meter
from proxy.repeated import RepeatedEvent
from proxy.sse import EventReader


def token_event(
    text: str, completion: int, *, prompt: int = 7, key: str = "content", details: str = "", rest: str = ""
) -> bytes:
    """One token as vLLM writes it, with running usage."""
    inside = orjson.dumps(text).decode()
    return (
        f'data: {{"id":"c","model":"m","choices":[{{"index":0,"delta":{{"{key}":{inside}}},"logprobs":null,'
        f'"finish_reason":null}}],"usage":{{"prompt_tokens":{prompt},"total_tokens":{prompt + completion},'
        f'"completion_tokens":{completion}{details}}}{rest}}}\n\n'
    ).encode()


class Reading:
    """The bytes that a client gets and what was counted, with and without going by the last event."""

    def __init__(self, choices: int = 1) -> None:
        self.quick, self.slow = Meter(choices), Meter(choices)
        self.events = self.recalled = 0

    def read(self, raw: bytes) -> None:
        """Read an event both ways and compare."""
        events = EventReader().feed(raw)
        chunked = self.events % 2 == 1
        self.events += 1
        out = self.quick.recall(raw, chunked)
        if out:
            self.recalled += 1
            assert len(events) == 1
            if chunked:
                payload, _ = ChunkedDecoder().feed(out + b"0\r\n\r\n")
                assert out == chunk(payload)
                out = payload
        else:
            out = b"".join(self.quick.event(e, include_usage=False, every_event=False) for e in events)
        expected = []
        for event in events:
            self.slow._repeated = RepeatedEvent()  # nothing to go by
            expected.append(self.slow.event(event, include_usage=False, every_event=False))
        assert out == b"".join(expected)
        for figure in ("usage", "reported", "failed", "done", "finished", "text_bytes"):
            assert getattr(self.quick, figure) == getattr(self.slow, figure), figure


def test_tokens_of_a_stream_are_known_from_the_second_on() -> None:
    reading = Reading()
    for number, text in enumerate(["A", " tide", "", " is", '\n"quoted" \\', "潮汐", "x" * 60], 1):
        reading.read(token_event(text, number))
    assert reading.recalled == 6


@pytest.mark.parametrize("key", ["content", "text", "reasoning", "reasoning_content"])
@pytest.mark.parametrize(
    "details", ["", ',"completion_tokens_details":null', ',"prompt_tokens_details":{"cached_tokens":3}']
)
@pytest.mark.parametrize("rest", ["", ',"service_tier":null'])
def test_every_usual_shape_is_known(key: str, details: str, rest: str) -> None:
    reading = Reading()
    for number in range(1, 12):
        reading.read(token_event("x", 2 * number, key=key, details=details, rest=rest))
    assert reading.recalled == 10  # steps of two are steps too; 9 -> 10 has a digit more


@pytest.mark.parametrize(
    "other",
    [
        token_event("x", 4),
        token_event("x", 2),
        token_event("x", 3, prompt=8),
        token_event("x", 3, key="refusal"),
        token_event("x", 3).replace(b'"finish_reason":null', b'"finish_reason":"abort"'),
        token_event("x", 3).replace(b'"finish_reason":null', b'"finish_reason":"stop"'),
        token_event("x", 3).replace(b'[{"index":0', b'[],"more":[{"index":0'),
        token_event("x", 3).replace(b'"content":"x"', b'"content":"x","content":"y"'),
        token_event("x", 3).replace(b'"content":"x"', b'"content":"x\ndata: y"'),
        token_event("x", 3).replace(b'"content":"x"', b'"content":"x\ry"'),
        token_event("x", 3).replace(b'"content":"x"', b'"content":"x\\"'),
        token_event("x", 3).replace(b'"content":"x"', b'"content":"x\\\n"'),
        token_event("x", 3).replace(b"\n\n", b"\r\n\r\n"),
        token_event("x", 3) + token_event("x", 4),
        token_event("x", 3)[:-1],
        token_event("x", 3)[: -len(b'":null}],"usage":{"prompt_tokens":7')],
        b"data: [DONE]\n\n",
        b"",
    ],
)
def test_what_differs_elsewhere_is_read(other: bytes) -> None:
    reading = Reading()
    reading.read(token_event("x", 1))
    reading.read(token_event("x", 2))
    assert reading.recalled == 1
    reading.read(other)
    assert reading.recalled == 1


def test_with_several_choices_every_event_is_read() -> None:
    reading = Reading(2)
    for count in (1, 2, 3):
        reading.read(token_event("x", count))
    reading.read(token_event("y", 1).replace(b'"index":0', b'"index":1'))
    assert (reading.recalled, reading.quick.completion) == (0, 4)


@pytest.mark.parametrize("prompt", [9_990, 1_000_000])
def test_counts_beyond_the_table_are_written(prompt: int) -> None:
    reading = Reading()
    for number in range(9_990, 10_010):
        reading.read(token_event("t", number, prompt=prompt))
    assert reading.recalled == 18


@pytest.mark.parametrize("length", range(3_700, 4_100, 25))
def test_events_of_any_length_are_framed(length: int) -> None:
    reading = Reading()
    for number in range(1, 6):
        reading.read(token_event("t" * number * 12, number, rest=f',"system_fingerprint":"{"f" * length}"'))
    assert reading.recalled in (0, 4)


def test_long_text_is_searched_and_not_walked_through() -> None:
    reading = Reading()
    for number, length in enumerate((1, 64, 65, 1), 1):
        reading.read(token_event("x" * length, number))
    assert reading.recalled == 2


def test_a_count_that_is_behind_what_was_read_otherwise_takes_nothing_back() -> None:
    reading = Reading()
    reading.read(token_event("x", 1))
    reading.read(token_event("x", 9, key="refusal"))  # read, and no text to go by
    reading.read(token_event("x", 2))
    assert reading.quick.completion == 9


TEXT = st.one_of(
    st.text(max_size=6),
    st.sampled_from(
        ['"', "\\", '\\"', ',"usage":{', '"choices":[]', '"finish_reason":"abort"', "\n", "\x7f"]
    ),
)
EVENT = st.builds(
    token_event,
    TEXT,
    st.integers(0, 12),
    prompt=st.sampled_from([7, 7, 7, 8]),
    key=st.sampled_from(["content", "content", "content", "text", "refusal"]),
    details=st.sampled_from(["", "", ',"completion_tokens_details":null']),
)


@settings(max_examples=300)
@given(st.lists(st.one_of(EVENT, TEXT), max_size=12))
def test_any_stream_reads_the_same(stream: list[bytes | str]) -> None:
    reading = Reading()
    for count, item in enumerate(stream, 1):
        reading.read(token_event(item, count) if isinstance(item, str) else item)


@settings(max_examples=600)
@given(st.data())
def test_any_change_of_an_expected_event_is_noticed_or_harmless(data: st.DataObject) -> None:
    reading = Reading()
    reading.read(token_event("x", 1))
    reading.read(token_event("y", 2))
    raw = bytearray(token_event("tide", 3))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw)))
        until = data.draw(st.integers(at, min(at + 3, len(raw))))
        raw[at:until] = data.draw(
            st.sampled_from(
                [b"", b'"', b"\\", b"\n", b"\r", b"{", b"}", b",", b"1", b"x", b'"usage":{', b"\xff"]
            )
        )
    reading.read(bytes(raw))
