"""The rush hour of `tidegate demo --traffic`: requests that arrive whether or not earlier ones are done.

An open loop, because real users do not wait for each other. Arrivals are a Poisson process whose rate stands at
half of what the local backend can serve, climbs to four times that, and comes back; they are drawn by thinning
(Lewis and Shedler 1979) before the first one is sent, so that one seed gives one rush hour.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

import aiohttp

from proxy.tasks import Tasks

PROFILE = ((0.0, 0.5), (0.2, 0.5), (0.35, 4.0), (0.65, 4.0), (0.8, 0.5), (1.0, 0.5))
"""Corners of the rate over time: (share of the duration, multiple of local capacity)."""

MEAN_ANSWER_TOKENS = 90
ANSWER_TOKENS = (30, 150)
"""Answers are as long as asked for, evenly between these, tokens."""

TURNED_AWAY = (429, 503)
"""Statuses by which the proxy refuses, as against failing."""

_QUESTIONS = (
    "When is high water today?",
    "Write a short poem about a harbour at night.",
    "Explain how a tide mill works.",
    "Summarise the log of the night watch.",
    "Why are there two tides a day?",
    "Draft a reply to the harbour master.",
)


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request to come."""

    at_s: float
    """After the start of the rush hour."""
    question: str
    max_tokens: int


@dataclass(slots=True)
class Served:
    """How one request went."""

    at_s: float
    """When it was sent, after the start."""
    backend: str = ""
    """Who served it, as the proxy says."""
    ttft_s: float | None = None
    status: int = 0
    """0: no answer came."""
    complete: bool = False
    """Whether the stream ended as it should."""
    done: bool = False

    @property
    def turned_away(self) -> bool:
        """Refused in good order."""
        return self.status in TURNED_AWAY

    @property
    def failed(self) -> bool:
        """Neither served nor refused in good order."""
        return self.done and not self.complete and not self.turned_away


def rate_at(share: float) -> float:
    """Rate as a multiple of local capacity, at a share of the duration from 0 to 1."""
    for (left, low), (right, high) in pairwise(PROFILE):
        if share <= right:
            return low + (high - low) * (share - left) / (right - left)
    return PROFILE[-1][1]


def rush_hour(duration_s: float, capacity: float, seed: int) -> list[Arrival]:
    """All arrivals in order. `capacity`: requests a second that the local backend can serve."""
    random = Random(seed)  # noqa: S311 - repeatable on purpose
    peak = max(multiple for _, multiple in PROFILE) * capacity
    arrivals = []
    now = random.expovariate(peak)
    while now < duration_s:
        if random.random() * peak < rate_at(now / duration_s) * capacity:
            arrivals.append(Arrival(now, random.choice(_QUESTIONS), random.randint(*ANSWER_TOKENS)))
        now += random.expovariate(peak)
    return arrivals


@dataclass(slots=True)
class Traffic:
    """Sends arrivals and keeps how each went, in order of sending."""

    url: str
    """The proxy's address, without a path."""
    model: str
    arrivals: Sequence[Arrival]
    served: list[Served] = field(default_factory=list)
    started_at: float = 0.0
    """On the event loop's clock."""

    async def run(self) -> None:
        """Send everything on time and wait until all of it is done."""
        loop = asyncio.get_running_loop()
        tasks = Tasks()
        self.started_at = loop.time()
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=120)
        ) as session:
            try:
                sent = []
                for number, arrival in enumerate(self.arrivals):
                    await asyncio.sleep(self.started_at + arrival.at_s - loop.time())
                    sent.append(tasks.spawn(self._send(session, arrival), f"demo request {number}"))
                await asyncio.gather(*sent)
            finally:
                await tasks.cancel_all()

    def now_s(self) -> float:
        """Time since the start."""
        return asyncio.get_running_loop().time() - self.started_at

    async def _send(self, session: aiohttp.ClientSession, arrival: Arrival) -> None:
        record = Served(self.now_s())
        self.served.append(record)
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": arrival.question}],
            "max_tokens": arrival.max_tokens,
            "ignore_eos": True,
            "stream": True,
        }
        try:
            async with session.post(f"{self.url}/v1/chat/completions", json=body) as response:
                record.status = response.status
                record.backend = response.headers.get("x-tidegate-backend", "")
                tail = b""
                async for chunk in response.content.iter_any():
                    if record.ttft_s is None and response.status == 200:
                        record.ttft_s = self.now_s() - record.at_s
                    tail = (tail + chunk)[-64:]
                record.complete = response.status == 200 and tail.endswith(b"data: [DONE]\n\n")
        except (aiohttp.ClientError, TimeoutError):
            pass  # neither complete nor turned away: it counts as failed
        finally:
            record.done = True
