"""Conversations that share prefixes, as a workload for the simulator and as the bodies of requests.

Users of a few applications come at random. Each application has a system prompt of its own, each conversation
begins with a text of its own behind it (a document that is asked about), and each further turn adds a unit: what
was answered and what is asked now. Turns come at their times, whether or not the one before is answered (open
loop).

Engines share blocks of 16 tokens, the proxy knows blocks of 2 KiB, and a simulated workload has one unit for both.
So every text is whole units of 512 tokens of four bytes, and a few tokens more: all three find exactly the same in
common. What a conversation quotes as an answer is made up, it is not the answer that came: engines have to compute
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Final

import orjson

from benchmarks.open_loop import LEAST_PROMPT, MODEL
from sim.workload import Arrival, Workload

UNIT_TOKENS: Final = 512
APPLICATIONS: Final = 12
"""The k-th is used in proportion to 1/k."""
SYSTEM_UNITS: Final = (1, 3)
"""Of a system prompt, least and most."""
DOCUMENT_UNITS: Final = (1, 6)
"""Of what a conversation begins with."""
TURNS: Final = (1, 7)
PAUSE_S: Final = (5.0, 25.0)
"""From one turn to the next."""
OUTPUT_TOKENS: Final = (30, 170)
LONGEST: Final = UNIT_TOKENS * (SYSTEM_UNITS[1] + DOCUMENT_UNITS[1] + TURNS[1])
"""Units of a prompt at most, in tokens."""
_REST: Final = 5
"""Tokens behind the last unit, so that it ends before the text does: in tokens, of which 3 of the chat template
come before the text, as in bytes, of which 38 of JSON do."""
_SPAN: Final = 1000
"""Most units of one text."""
_WORDS: Final = tuple(f" {a}{b}{c}" for a in "bdfghjklmnprstvz" for b in "aeiou" for c in "bdfghjklmnprstvz")
"""Four bytes and one token each."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What the prompt of one request is made of."""

    application: int
    system_units: int
    conversation: int
    units: int
    """Behind the system prompt: the document and a unit for each turn."""


@dataclass(frozen=True, slots=True)
class Conversations:
    """So many requests, at so many a second."""

    workload: Workload
    turns: tuple[Turn, ...]
    """One for each arrival."""
    seed: int

    def faster(self, speed: float) -> Conversations:
        """The same, in time of the wall."""
        return Conversations(self.workload.scaled(speed), self.turns, self.seed)

    def bodies(self) -> list[bytes]:
        """One for each arrival."""
        return [
            _body(turn, arrival.output_tokens, self.seed)
            for turn, arrival in zip(self.turns, self.workload, strict=True)
        ]


def conversations(requests: int, rate: float, seed: int) -> Conversations:
    """`requests` at `rate` a second. The first of them are turns of conversations that have begun before.

    Times are stretched by some per cent, so that the rate is exact. Raises ValueError for less than two requests.
    """
    if requests < 2:
        raise ValueError("there are two requests at least")
    random = Random(f"conversations {seed}")
    mean_turns = (TURNS[0] + TURNS[1]) / 2
    longest_s = TURNS[1] * PAUSE_S[1]
    weights = [1 / place for place in range(1, APPLICATIONS + 1)]
    systems = [random.randint(*SYSTEM_UNITS) for _ in weights]
    begun, number = -longest_s, 0
    found: list[tuple[Arrival, Turn]] = []
    while begun < 3 * requests / rate:  # more than are wanted
        begun += random.expovariate(rate / mean_turns)
        (application,) = random.choices(range(APPLICATIONS), weights)
        units, at = random.randint(*DOCUMENT_UNITS), begun
        for _ in range(random.randint(*TURNS)):
            turn = Turn(application, systems[application], number, units)
            output = random.randint(*OUTPUT_TOKENS)
            if at >= 0:
                found.append((_arrival(turn, at, output), turn))
            units += 1
            at += random.uniform(*PAUSE_S)
        number += 1
    found.sort(key=lambda one: one[0].at)
    found = found[:requests]
    start, end = found[0][0].at, found[-1][0].at
    stretch = (requests - 1) / rate * 1e6 / (end - start)
    name = f"{requests} turns of conversations, {rate:g} a second, seed {seed}"
    arrivals = [arrival._replace(at=round((arrival.at - start) * stretch)) for arrival, _ in found]
    return Conversations(Workload(name, arrivals, UNIT_TOKENS), tuple(turn for _, turn in found), seed)


def _arrival(turn: Turn, at: float, output_tokens: int) -> Arrival:
    system = range(turn.application * _SPAN, turn.application * _SPAN + turn.system_units)
    first = (APPLICATIONS + turn.conversation) * _SPAN
    return Arrival(
        at=round(at * 1e6),
        prompt_tokens=LEAST_PROMPT + UNIT_TOKENS * (turn.system_units + turn.units) + _REST,
        output_tokens=output_tokens,
        hashes=(*system, *range(first, first + turn.units)),
        session=f"conversation-{turn.conversation}",
    )


def _body(turn: Turn, output_tokens: int, seed: int) -> bytes:
    """A streamed chat; the messages come first, so that what comes before them is the same for all."""
    system = _text(f"{seed} application {turn.application}", turn.system_units)
    said = _text(f"{seed} conversation {turn.conversation}", DOCUMENT_UNITS[1] + TURNS[1] + 1)
    mine = said[: 4 * (UNIT_TOKENS * turn.units + _REST)]
    fields = {
        "messages": [{"role": "user", "content": system + mine}],
        "model": MODEL,
        "max_tokens": output_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return orjson.dumps(fields)


@cache
def _text(name: str, units: int) -> str:
    """Always the same for a name."""
    return "".join(Random(name).choices(_WORDS, k=units * UNIT_TOKENS))
