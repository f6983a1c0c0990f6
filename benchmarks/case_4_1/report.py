"""The load of case 4.1: what a report is, as a workload for the simulator and as the texts of a conversation.

A report is a conversation of `SECTIONS` requests: a brief of `BRIEF_TOKENS` with the first, an instruction of
`INSTRUCTION_TOKENS` with each, an answer of `SECTION_TOKENS`, which is part of every later prompt. Means; each
length but the instruction's varies by `SPREAD` to both sides, evenly. Chat templates are counted in. On average
a report has `PROMPT_TOKENS` in all, `OUTPUT_TOKENS` of output, and ends with 1,200 in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Final

from sim.tokens import chat_pieces
from sim.workload import Arrival, Workload, in_order

SECTIONS: Final = 6
BRIEF_TOKENS: Final = 300
INSTRUCTION_TOKENS: Final = 20
SECTION_TOKENS: Final = 130
SPREAD: Final = 0.2
OUTPUT_TOKENS: Final = SECTIONS * SECTION_TOKENS
"""Of a report, on average."""
PROMPT_TOKENS: Final = sum(
    BRIEF_TOKENS + (before + 1) * INSTRUCTION_TOKENS + before * SECTION_TOKENS for before in range(SECTIONS)
)
"""Of the prompts of a report, on average."""
RAMP_S: Final = 10.0
"""In which the users come, one after the other."""
BLOCK_TOKENS: Final = 16
"""Prompts share whole blocks."""

_WORDS: Final = (
    "road",
    "river",
    "slope",
    "soil",
    "cost",
    "plan",
    "lane",
    "curve",
    "ridge",
    "dam",
    "toll",
    "rail",
)
"""Each is one token."""
_TEMPLATE: Final = len(chat_pieces([("user", "")]))
"""Tokens around the first message; around a later one, two more, which end the answer before it."""
_REPORTS_PER_USER: Final = 1000
_BLOCKS_PER_REPORT: Final = 1000


@dataclass(frozen=True, slots=True)
class Section:
    """One request."""

    prompt_tokens: int
    output_tokens: int
    text: str
    """What is new in its prompt, besides the answer before it."""


@dataclass(frozen=True, slots=True)
class Report:
    """One conversation."""

    number: int
    """No two reports of a run share it, nor anything of their prompts."""
    sections: tuple[Section, ...]


def reports(user: int, count: int, seed: int) -> list[Report]:
    """What one user has written, one after the other."""
    random = Random(f"{seed}/{user}")
    return [_report(user * _REPORTS_PER_USER + one, random) for one in range(count)]


def _report(number: int, random: Random) -> Report:
    sections = []
    context = _about(BRIEF_TOKENS, random)
    title = f"{number:06d} "  # two tokens, with the word behind it: no two reports begin alike
    text = title + _text(context + INSTRUCTION_TOKENS - _TEMPLATE - 2, random)
    for _ in range(SECTIONS):
        prompt = context + INSTRUCTION_TOKENS
        output = _about(SECTION_TOKENS, random)
        sections.append(Section(prompt, output, text))
        context = prompt + output
        text = _text(INSTRUCTION_TOKENS - _TEMPLATE - 2, random)
    return Report(number, tuple(sections))


def _about(mean: int, random: Random) -> int:
    return round(mean * random.uniform(1 - SPREAD, 1 + SPREAD))


def _text(tokens: int, random: Random) -> str:
    """So many words."""
    return " ".join(random.choice(_WORDS) for _ in range(tokens))


def starts_s(users: int) -> list[float]:
    """When each user begins, seconds."""
    return [RAMP_S * user / users for user in range(users)]


def workload(users: int, count: int, seed: int) -> Workload:
    """Users in a closed loop, `count` reports each, for `sim.cluster.Cluster`: a user is a session."""
    arrivals = []
    for user, start_s in enumerate(starts_s(users)):
        for report in reports(user, count, seed):
            first = report.number * _BLOCKS_PER_REPORT
            for section in report.sections:
                blocks = (section.prompt_tokens + section.output_tokens) // BLOCK_TOKENS
                arrivals.append(
                    Arrival(
                        at=round(start_s * 1e6),
                        prompt_tokens=section.prompt_tokens,
                        output_tokens=section.output_tokens,
                        hashes=tuple(range(first, first + blocks)),
                        session=f"user-{user}",
                        think=0,
                    )
                )
    return Workload(f"{users} users, {count} reports each", in_order(arrivals), BLOCK_TOKENS)
