"""Answers as they come: what is a token, what is an error, whatever the pieces they come in."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.measure.wire import Answer, Api, message_of
from tests.sim.measure.fake_server import DONE, event, token, usage

ROLE = event(
    {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
)


def fed(*pieces: bytes) -> Answer:
    """An answer whose n-th piece came at time n."""
    answer = Answer()
    for number, piece in enumerate(pieces):
        answer.feed(piece, float(number))
    answer.close()
    return answer


def test_first_and_last_token_and_the_reported_counts() -> None:
    answer = fed(ROLE, token("a"), token(" long piece"), usage(7, 12), DONE)
    assert (answer.first_at, answer.last_at, answer.error) == (1.0, 2.0, "")
    assert (answer.prompt_tokens, answer.output_tokens) == (7, 12)


def test_an_event_without_text_is_a_token_still() -> None:
    assert fed(token(""), token(""), usage(7, 2), DONE).first_at == 0.0


@pytest.mark.parametrize(
    "delta",
    [
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "tool_calls": [{}]},
        {"reasoning_content": "a"},
    ],
)
def test_a_role_that_brings_something_is_a_token(delta: dict[str, object]) -> None:
    assert fed(event({"choices": [{"delta": delta}]})).first_at == 0.0


def test_completions_have_text_in_the_place_of_a_delta() -> None:
    assert fed(event({"choices": [{"text": "a"}]}), usage(1, 1), DONE).error == ""


def test_usage_in_every_event_counts_by_the_last_one() -> None:
    answer = fed(
        token("a", usage={"prompt_tokens": 3, "completion_tokens": 1}),
        token("b", usage={"prompt_tokens": 3, "completion_tokens": 2}),
        usage(3, 2, prompt_tokens_details={"cached_tokens": 1}),
        DONE,
    )
    assert (answer.output_tokens, answer.last_at, answer.cached_tokens) == (2, 1.0, 1)


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ((token("a"), usage(1, 1)), "the stream was cut"),
        ((token("a"), DONE), "the server reported no usage"),
        ((ROLE, usage(1, 1), DONE), "the stream had no token"),
        ((token("a"), event({"error": {"message": "engine died"}}), DONE), "error event: engine died"),
        ((b"data: {\n\n",), "an event is not what OpenAI's are"),
        ((b"data: 7\n\n",), "an event is not what OpenAI's are"),
        ((event({"choices": [], "usage": {"prompt_tokens": 1}}),), "an event is not what OpenAI's are"),
    ],
)
def test_what_is_not_whole_says_why(pieces: tuple[bytes, ...], error: str) -> None:
    assert fed(*pieces).error == error


@given(st.sets(st.integers(1, 300)), st.booleans())
def test_pieces_do_not_matter(cuts: set[int], crlf: bool) -> None:
    data = b": keep-alive\n\n" + ROLE + token("a") + token("é") + usage(7, 2) + DONE
    if crlf:
        data = data.replace(b"\n", b"\r\n")
    places = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    answer = fed(*(data[begin:end] for begin, end in pairwise(places)))
    assert (answer.error, answer.prompt_tokens, answer.output_tokens) == ("", 7, 2)
    for at, text in ((answer.first_at, '"a"'), (answer.last_at, '"é"')):
        assert at is not None
        ends = data.index(b"\n", data.index(text.encode()))
        assert places[int(at)] <= ends < places[int(at) + 1]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"error": {"message": "no such\nmodel", "code": 404}}, "no such model"),
        ({"error": "Unauthorized"}, "Unauthorized"),
        ({"detail": "Not Found"}, "Not Found"),
        ("busy", "busy"),
        ("x" * 1000, "x" * 200),
        ("word " * 40, ("word " * 40).strip()),
        ("word " * 41, "word " * 39 + "..."),
    ],
)
def test_errors_in_any_shape(body: object, text: str) -> None:
    assert message_of(body) == text


def test_each_endpoint_has_its_prompt() -> None:
    assert Api.CHAT.prompt("a") == {"messages": [{"role": "user", "content": "a"}]}
    assert Api.COMPLETIONS.prompt("a") == {"prompt": "a"}
    assert {api.path for api in Api} == {"/v1/chat/completions", "/v1/completions"}
