from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sim import tokens

texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(texts)
def test_pieces_are_the_text_and_come_back_from_their_ids(text: str) -> None:
    pieces = tokens.split(text)
    assert "".join(pieces) == text
    assert tokens.decode(tokens.encode(pieces)) == text


@given(texts, st.data())
def test_cutting_at_a_token_keeps_the_count(text: str, data: st.DataObject) -> None:
    pieces = tokens.split(text)
    kept = data.draw(st.integers(0, len(pieces)))
    assert tokens.split("".join(pieces[:kept])) == pieces[:kept]


@given(texts)
def test_ids_fit_what_every_json_reader_holds_exactly(text: str) -> None:
    assert all(0 < number < 2**53 for number in tokens.encode(tokens.split(text)))


def test_english_is_about_four_characters_a_token_and_chinese_one() -> None:
    english = "The harbour master depends on the next spring tide when the basin is full."
    assert 3.5 < len(english) / len(tokens.split(english)) < 5
    assert len(tokens.split("算力网加速")) == 5


def test_chat_template() -> None:
    pieces = tokens.chat_pieces([("user", "Hi")])
    assert "".join(pieces) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert pieces[0] == tokens.MESSAGE_START
    assert tokens.decode(tokens.encode(pieces)) == "".join(pieces)


@given(st.integers(0, 2**63))
def test_any_number_decodes_to_something(number: int) -> None:
    assert isinstance(tokens.decode([number]), str)
