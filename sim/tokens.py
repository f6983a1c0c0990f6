"""A tokenizer without a vocabulary, good enough to count by and exactly reversible.

Text is cut into pieces of at most six UTF-8 bytes: up to five letters with the space before them, up to three
digits, a run of spaces or of line breaks, or one other character. English comes out at about four characters a
token and Chinese at one, which is what real tokenizers do within a quarter. A token's id is the piece itself,
read as a number behind a marker bit, so that every id can be turned back into text with nothing to look up;
ids below 256 are special tokens.

A piece depends only on the characters it is made of, so the first k pieces of a text are the pieces of their
own concatenation: cutting an answer at a token never changes the count of what stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from zlib import crc32

_PIECE = re.compile(r" ?[A-Za-z]{1,5}| ?[0-9]{1,3}|\n{1,6}| {1,6}|.", re.DOTALL)
_MARKER = 1

MESSAGE_START = "<|im_start|>"
MESSAGE_END = "<|im_end|>"
_SPECIAL_IDS = {MESSAGE_START: 1, MESSAGE_END: 2}
_SPECIAL_TEXTS = {number: text for text, number in _SPECIAL_IDS.items()}


def split(text: str) -> list[str]:
    """The pieces of a text, in order; their concatenation is the text."""
    return _PIECE.findall(text)


def chat_pieces(messages: Iterable[tuple[str, str]]) -> list[str]:
    """The pieces of a conversation, given as (role, text), in the usual chat template up to the answer."""
    pieces: list[str] = []
    for role, text in messages:
        pieces += [MESSAGE_START, *split(f"{role}\n"), *split(text), MESSAGE_END, "\n"]
    return [*pieces, MESSAGE_START, *split("assistant\n")]


def encode(pieces: Iterable[str]) -> list[int]:
    """Token ids of pieces."""
    return [_SPECIAL_IDS.get(piece) or _number(piece) for piece in pieces]


def short_id(piece: str) -> int:
    """An id of 31 bits, for who takes no longer ones. Nothing turns it back, and two pieces may share one."""
    return _SPECIAL_IDS.get(piece) or crc32(piece.encode()) >> 1


def decode(ids: Sequence[int]) -> str:
    """Text of token ids; an id that no piece has becomes U+FFFD."""
    return "".join(_text(number) for number in ids)


def _number(piece: str) -> int:
    return int.from_bytes(bytes((_MARKER,)) + piece.encode(), "big")


def _text(number: int) -> str:
    if number < 256:
        return _SPECIAL_TEXTS.get(number, "\ufffd")
    data = number.to_bytes((number.bit_length() + 7) // 8, "big")
    if data[0] != _MARKER:
        return "\ufffd"
    return data[1:].decode(errors="replace")
