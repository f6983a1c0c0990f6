"""What an emulated model says: planned whole, token by token, before the first token is due.

Prose is put together from a small stock of sentences by a generator seeded with the server's seed, the request's
seed, the prompt and the choice's index, so the same request gets the same answer. Its natural length is
log-normal, like real answers. As in vLLM, an answer that ends by itself ends in an end-of-sequence token that is
counted and has no text, and one that ends at a stop string counts the token that completed it.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import dataclass
from enum import Enum, auto
from random import Random

from sim import tokens

MEDIAN_TOKENS = 120
SPREAD = 0.6
"""Median and sigma (of the logarithm) of the tokens after which an answer stops at the end of a sentence."""

PAUSE_TOKENS = 1000
"""A long answer is planned in pieces of about so many tokens, 2 ms each."""

REASONING_TOKENS = (20, 60)
"""Least and most tokens after which reasoning stops at the end of a sentence."""


class Channel(Enum):
    """Where the text of a token goes."""

    REASONING = auto()
    CONTENT = auto()
    TOOL_NAME = auto()
    ARGUMENTS = auto()
    END = auto()
    """The end-of-sequence token; its text is content that had been held back."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice, complete."""

    tokens: list[tuple[Channel, str]]
    """Each token with the text it makes visible; it may be empty while a stop string could still begin."""
    finish_reason: str
    """`stop` or `length`."""
    stop_reason: str | None = None
    """The stop string that ended it."""
    tool: str | None = None
    """Name of the function it calls."""

    def text(self, channel: Channel) -> str:
        """All of its text on one channel; content includes what came with the end."""
        channels = (Channel.CONTENT, Channel.END) if channel is Channel.CONTENT else (channel,)
        return "".join(text for where, text in self.tokens if where in channels)


@dataclass(frozen=True, slots=True)
class Wish:
    """What decides an answer, apart from what it is about."""

    room: int
    """The most tokens it may have."""
    least: int = 0
    """The fewest tokens it may have (`min_tokens`)."""
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    keep_stop: bool = False
    """Whether a stop string that ended it stays in the text."""
    reasoning: bool = False
    json_text: str | None = None
    """The text to answer with, where a schema decides it."""
    tool: str | None = None
    """The function to call, with `json_text` as its arguments."""


def compose(wish: Wish, seed: str) -> Answer:
    """The answer to a wish; the same seed gives the same answer."""
    steps = composing(wish, seed)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            answer: Answer = done.value
            return answer


def composing(wish: Wish, seed: str) -> Generator[None, None, Answer]:
    """`compose` that pauses after every piece of a long answer, so that its caller may do something else."""
    # Not cryptography: words for a demonstration.
    random = Random(seed)  # noqa: S311
    planned: list[tuple[Channel, str]] = []
    if wish.reasoning:
        length = random.randint(*REASONING_TOKENS)
        yield from _prose(random, length, Channel.REASONING, planned)
    if wish.json_text is not None:
        if wish.tool is not None:
            planned.append((Channel.TOOL_NAME, ""))
        channel = Channel.CONTENT if wish.tool is None else Channel.ARGUMENTS
        planned += [(channel, piece) for piece in tokens.split(wish.json_text)]
        planned.append((Channel.END, ""))
        return (yield from _ended(wish, planned[: wish.room]))
    natural = max(round(random.lognormvariate(0.0, SPREAD) * MEDIAN_TOKENS), wish.least)
    length = wish.room if wish.ignore_eos else min(natural, wish.room)
    yield from _prose(random, length, Channel.CONTENT, planned)
    if not wish.ignore_eos:
        planned.append((Channel.END, ""))
    return (yield from _ended(wish, planned[: wish.room]))


def json_text(value: object) -> str:
    """A JSON value as a model would write it."""
    return json.dumps(value, ensure_ascii=False)


def _reason(planned: list[tuple[Channel, str]]) -> str:
    return "stop" if planned[-1][0] is Channel.END else "length"


def _ended(wish: Wish, planned: list[tuple[Channel, str]]) -> Generator[None, None, Answer]:
    """The answer with stop strings applied to its content.

    A token shows no text that may turn out to be the beginning of a stop string; the last one shows the rest.
    """
    if not wish.stop:
        return Answer(planned, _reason(planned), tool=wish.tool)
    hold_back = 0 if wish.keep_stop else max(len(stop) for stop in wish.stop) - 1
    shown: list[tuple[Channel, str]] = []
    text, visible = "", 0
    for number, (channel, piece) in enumerate(planned, 1):
        if number % PAUSE_TOKENS == 0:
            yield
        if channel not in (Channel.CONTENT, Channel.END):
            shown.append((channel, piece))
            continue
        text += piece
        found = _find_stop(text, len(piece), wish.stop) if number >= wish.least else None
        if found is not None:
            stop, at = found
            end = at + len(stop) if wish.keep_stop else at
            return Answer([*shown, (channel, text[visible:end])], "stop", stop)
        until = len(text) if number == len(planned) else max(visible, len(text) - hold_back)
        shown.append((channel, text[visible:until]))
        visible = until
    return Answer(shown, _reason(planned), tool=wish.tool)


def _find_stop(text: str, new: int, stops: tuple[str, ...]) -> tuple[str, int] | None:
    """The first stop string that the last `new` characters complete, and where it begins."""
    for stop in stops:
        at = text.find(stop, max(0, len(text) - new - len(stop) + 1))
        if at >= 0:
            return stop, at
    return None


def _prose(
    random: Random, length: int, channel: Channel, planned: list[tuple[Channel, str]]
) -> Generator[None, None, None]:
    """Plan whole sentences of at least `length` tokens together."""
    end, pause = len(planned) + length, len(planned) + PAUSE_TOKENS
    sentences = 0
    while len(planned) < end:
        if len(planned) >= pause:
            pause += PAUSE_TOKENS
            yield
        sentence = _sentence(random)
        if sentences:
            sentence = ("\n\n" if sentences % 4 == 0 else " ") + sentence
        # Split with what comes before would be the same: a sentence begins with a space, a break or a letter.
        planned += [(channel, piece) for piece in tokens.split(sentence)]
        sentences += 1


def _sentence(random: Random) -> str:
    body = f"{random.choice(_SUBJECTS)} {random.choice(_VERBS)} {random.choice(_OBJECTS)}"
    if random.random() < 0.5:
        body += f" {random.choice(_CIRCUMSTANCES)}"
    if random.random() < 0.3:
        return f"{random.choice(_OPENINGS)}, {body}."
    return f"{body[0].upper()}{body[1:]}."


_OPENINGS = (
    "In short",
    "As a rule",
    "On most days",
    "By contrast",
    "In practice",
    "For the same reason",
    "Seen from the shore",
    "At first sight",
)
_SUBJECTS = (
    "the tide",
    "a small harbour",
    "the pilot",
    "the night watch",
    "a good chart",
    "the sluice",
    "the far bank",
    "a patient engineer",
    "the lighthouse keeper",
    "the channel",
    "every second boat",
    "the harbour master",
)
_VERBS = (
    "waits for",
    "makes room for",
    "carries",
    "follows",
    "answers to",
    "keeps an eye on",
    "gives way to",
    "counts",
    "remembers",
    "turns towards",
    "depends on",
    "takes the measure of",
)
_OBJECTS = (
    "the open water",
    "a steady current",
    "the morning traffic",
    "what the river brings",
    "the last ferry",
    "a wind from the south",
    "the boats that come in late",
    "the height of the water",
    "an old agreement",
    "the next spring tide",
    "whatever does not fit the basin",
    "a lamp on the pier",
)
_CIRCUMSTANCES = (
    "before the gates close",
    "without much noise",
    "for an hour or two",
    "when the basin is full",
    "twice a day",
    "in any weather",
    "as long as the light lasts",
    "once the moon is up",
    "at the lowest cost",
    "and writes it down",
)
