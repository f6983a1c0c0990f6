"""Prompts of exactly the wanted number of tokens, whatever the tokenizer.

They are random sequences of words of which each is one token for this server. Which are is found by asking it:
a group of words that adds as many tokens as it has words is taken, another one is halved and asked again. A
tokenizer splits at spaces before anything else, so no sequence of such words has another length.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum
from random import Random
from typing import Final

from sim.measure.endpoint import Endpoint, MeasureError

Count = Callable[[str], Awaitable[int]]
"""Tokens of a prompt that is this text, with all that the server adds to it."""

START: Final = "Words:"
"""What every prompt begins with, so that no word stands where a tokenizer treats it in another way."""

WORDS: Final = (
    "the of and to in is for that with as on be at by this from or an are it not can will all one if has have new "
    "more time when we no out up so what its about some other only line name list file set key value type water "
    "place year work part house world small large open high next long last good light point way day"
)

LEAST_WORDS: Final = 4
UNIQUE_WORDS: Final = 16
"""At the end of each prompt with a warm beginning, or half of it where it is short."""


class Prefix(StrEnum):
    """How much of a prompt the server may have seen."""

    COLD = "cold"
    """Nothing: each prompt is new from its first words on."""
    WARM = "warm"
    """All but the last words: a request before the level brings the rest into the prefix cache."""


class Prompts:
    """Makes prompts of one length. One seed and number, one prompt."""

    def __init__(self, words: Sequence[str], length: int, seed: int) -> None:
        """`words`: of one token each; `length`: how many of them a prompt has."""
        self._words = words
        self._length = length
        self._seed = seed

    def one(self, prefix: Prefix, number: int) -> str:
        """The prompt of that number; number 0 of the warm ones is for warming."""
        unique = self._length
        if prefix is Prefix.WARM:
            unique = min(UNIQUE_WORDS, self._length // 2)
        words = [*self._drawn("shared", self._length - unique), *self._drawn(f"{prefix}/{number}", unique)]
        return " ".join((START, *words))

    def _drawn(self, what: str, count: int) -> list[str]:
        return Random(f"{self._seed}/{what}").choices(self._words, k=count)  # noqa: S311 - no secret


async def make_prompts(endpoint: Endpoint, tokens: int, seed: int) -> Prompts:
    """Prompts of so many tokens, the chat template included. Raises MeasureError: it is not possible here."""
    count = await counter(endpoint)
    begins = await count(START)
    if tokens <= begins:
        raise MeasureError(
            f"a prompt has {begins + 1} tokens at least here: this many its template takes, and one word"
        )
    words = await one_token_words(count, WORDS.split(), begins)
    if len(words) < LEAST_WORDS:
        raise MeasureError(
            "cannot make prompts of exact length: this tokenizer has no tokens for common words"
        )
    return Prompts(words, tokens - begins, seed)


async def counter(endpoint: Endpoint) -> Count:
    """/tokenize, if the server has it and requests report the same; else what a request of one token reports."""
    if await endpoint.tokenize(START) != await endpoint.reported(START):
        return endpoint.reported

    async def count(text: str) -> int:
        found = await endpoint.tokenize(text)
        return found if found is not None else await endpoint.reported(text)

    return count


async def one_token_words(count: Count, words: Sequence[str], begins: int) -> list[str]:
    """Those of the words that are one token each; `begins`: tokens of a prompt without any."""
    if await count(" ".join((START, *words))) - begins == len(words):
        return list(words)
    if len(words) == 1:
        return []
    half = len(words) // 2
    return [
        *await one_token_words(count, words[:half], begins),
        *await one_token_words(count, words[half:], begins),
    ]
