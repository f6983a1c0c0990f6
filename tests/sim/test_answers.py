from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sim import tokens
from sim.answers import Answer, Channel, Wish, compose

seeds = st.text(max_size=8)


def counted(answer: Answer) -> int:
    """Tokens that a reader of the text would count, and the end."""
    ends = answer.tokens[-1][0] is Channel.END
    return len(tokens.split(answer.text(Channel.CONTENT))) + ends


@given(seeds, st.integers(1, 400))
def test_prose_has_as_many_tokens_as_it_says(seed: str, room: int) -> None:
    answer = compose(Wish(room=room), seed)
    assert len(answer.tokens) <= room
    assert counted(answer) == len(answer.tokens)
    assert answer.finish_reason == ("stop" if answer.tokens[-1][0] is Channel.END else "length")


@given(seeds)
def test_the_same_seed_gives_the_same_answer(seed: str) -> None:
    assert compose(Wish(room=200), seed) == compose(Wish(room=200), seed)
    assert compose(Wish(room=200), seed) != compose(Wish(room=200), seed + "x")


def test_an_answer_that_ends_by_itself_ends_with_a_sentence() -> None:
    answer = compose(Wish(room=8000), "a")
    assert answer.finish_reason == "stop"
    assert answer.text(Channel.CONTENT).endswith(".")


@given(seeds, st.integers(1, 300))
def test_ignore_eos_fills_the_room(seed: str, room: int) -> None:
    answer = compose(Wish(room=room, ignore_eos=True), seed)
    assert len(answer.tokens) == room
    assert answer.finish_reason == "length"


@given(seeds, st.integers(1, 300))
def test_min_tokens(seed: str, least: int) -> None:
    assert len(compose(Wish(room=1000, least=least), seed).tokens) >= least


@given(
    seeds,
    st.lists(st.sampled_from(["e", " the", "tide", "at a", "zzz", "."]), min_size=1, max_size=3),
    st.booleans(),
)
def test_stop_strings(seed: str, stops: list[str], keep: bool) -> None:
    whole = compose(Wish(room=150), seed)
    answer = compose(Wish(room=150, stop=tuple(stops), keep_stop=keep), seed)
    text, full = answer.text(Channel.CONTENT), whole.text(Channel.CONTENT)
    assert full.startswith(text)
    if answer.stop_reason is None:
        assert text == full
        assert not any(stop in full for stop in stops)
        assert answer.finish_reason == whole.finish_reason
        return
    assert answer.finish_reason == "stop"
    assert answer.stop_reason in stops
    before = text.removesuffix(answer.stop_reason) if keep else text
    assert full[len(before) :].startswith(answer.stop_reason)
    # Stop strings are looked for token by token: only the token that completed the first one may hold another.
    completed_by = len(tokens.split(full[: len(before)]))
    assert len(answer.tokens) >= completed_by
    read = "".join(piece for _, piece in whole.tokens[: len(answer.tokens) - 1])
    assert not any(stop in read for stop in stops)


@given(seeds, st.sampled_from(["tide", " the o", "harbour m"]))
def test_no_event_shows_the_beginning_of_a_stop_string(seed: str, stop: str) -> None:
    answer = compose(Wish(room=300, stop=(stop,)), seed)
    shown = "".join(piece for _, piece in answer.tokens)
    assert stop not in shown


def test_min_tokens_holds_against_stop_strings() -> None:
    assert len(compose(Wish(room=100, least=40, stop=("e",)), "a").tokens) >= 40


def test_a_tool_call_counts_its_name_its_arguments_and_the_end() -> None:
    answer = compose(Wish(room=100, tool="f", json_text='{"city": "Paris"}'), "a")
    assert [channel for channel, _ in answer.tokens[:1]] == [Channel.TOOL_NAME]
    assert answer.text(Channel.ARGUMENTS) == '{"city": "Paris"}'
    assert len(answer.tokens) == 1 + len(tokens.split('{"city": "Paris"}')) + 1
    assert answer.tool == "f"
    assert answer.text(Channel.CONTENT) == ""


def test_too_little_room_cuts_json() -> None:
    answer = compose(Wish(room=3, json_text='{"city": "Paris"}'), "a")
    assert answer.finish_reason == "length"
    assert len(answer.tokens) == 3


def test_reasoning_comes_first() -> None:
    answer = compose(Wish(room=8000, reasoning=True), "a")
    channels = [channel for channel, _ in answer.tokens]
    last = max(number for number, channel in enumerate(channels) if channel is Channel.REASONING)
    assert last < channels.index(Channel.CONTENT)
    assert answer.text(Channel.REASONING)
