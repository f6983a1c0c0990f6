"""The measurement: level after level, cold and warm, and between levels where an SLA asks for it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sim.measure.connections import check_room
from sim.measure.endpoint import Endpoint, Facts
from sim.measure.level import Level, RequestRecord
from sim.measure.prompts import Prefix, Prompts, make_prompts
from sim.measure.verdict import KNEE_RULE, Capacity, Sla, capacity, knee
from sim.measure.wire import Api

REQUESTS_PER_USER = 4
"""Of a level, where nothing else is asked for."""

Progress = Callable[[Prefix, int, int, int], None]
"""Told prefix, concurrency, requests done, requests in all."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be measured. Raises ValueError."""

    concurrency: tuple[int, ...]
    prompt_tokens: int = 1024
    output_tokens: int = 1024
    requests: int | None = None
    """Of each level, one for each user at least; None: `REQUESTS_PER_USER` for each user."""
    prefixes: tuple[Prefix, ...] = (Prefix.COLD,)
    sla: Sla | None = None
    search: bool = False
    """Measure between levels until the most users that the SLA allows are known within 5 %."""
    seed: int = 0
    """Of the prompts: a server that has seen a seed may have its prompts in its prefix cache."""

    def __post_init__(self) -> None:
        if not self.concurrency or min(self.concurrency) < 1:
            raise ValueError("concurrency is one user or more")
        if min(self.prompt_tokens, self.output_tokens) < 1 or (
            self.requests is not None and self.requests < 1
        ):
            raise ValueError("tokens and requests are one or more")
        if self.requests is not None and self.requests < max(self.concurrency):
            raise ValueError(
                f"{self.requests} requests are too few for {max(self.concurrency)} users: only so many would be "
                "at work; ask for one for each user at least, better four"
            )
        if self.search and self.sla is None:
            raise ValueError("a search needs an SLA")


@dataclass(slots=True)
class Series:
    """Levels of one kind of prompt, by concurrency."""

    prefix: Prefix
    levels: list[Level] = field(default_factory=list)
    knee: int | None = None
    capacity: Capacity | None = None

    @property
    def complete(self) -> list[Level]:
        """Levels that were not interrupted."""
        return [level for level in self.levels if not level.interrupted]

    @property
    def cached_share(self) -> float | None:
        """Of all prompt tokens, those that the server found in its prefix cache; None: it reports none."""
        known = [level for level in self.levels if level.cached_tokens is not None and level.prompt_tokens]
        if not known:
            return None
        return sum(level.cached_tokens or 0 for level in known) / sum(level.prompt_tokens for level in known)

    @property
    def never_warmed(self) -> bool:
        """Whether it is of prompts with a warm beginning, and nothing ever brought that into the cache."""
        return (
            self.prefix is Prefix.WARM
            and bool(self.levels)
            and all(level.warm_up_error for level in self.levels)
        )


@dataclass(slots=True)
class Report:
    """All that was measured, and of what."""

    url: str
    model: str
    api: Api
    exact_length: bool
    """Whether the server was asked for exactly so many tokens; else an answer may be shorter."""
    facts: Facts
    plan: Plan
    began: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    series: list[Series] = field(default_factory=list)
    interrupted: bool = False
    """Whether the user ended it."""
    knee_rule: str = KNEE_RULE

    @property
    def levels(self) -> list[Level]:
        """Of all series."""
        return [level for series in self.series for level in series.levels]


async def measure(
    url: str, server: Mapping[str, Any], plan: Plan, progress: Progress | None = None
) -> Report:
    """Measure what a plan asks for; `server`: further arguments of `Endpoint`.

    When it is cancelled while it measures, the report has what was measured until then. Raises MeasureError:
    this server cannot be measured, or not from here with so many users.
    """
    check_room(max(plan.concurrency))
    async with Endpoint(url, **server) as endpoint:
        facts = await endpoint.prepare()
        prompts = await make_prompts(endpoint, plan.prompt_tokens, plan.seed)
        sweep = Sweep(endpoint, facts, prompts, plan, progress)
        try:
            await sweep.run()
        except asyncio.CancelledError:
            pass
        return sweep.report


class Sweep:
    """Measures what a plan asks for. Cancel `run`, and `report` has what was measured until then."""

    def __init__(
        self, endpoint: Endpoint, facts: Facts, prompts: Prompts, plan: Plan, progress: Progress | None = None
    ) -> None:
        self.report = Report(endpoint.url, endpoint.model, endpoint.api, endpoint.exact_length, facts, plan)
        self._endpoint = endpoint
        self._prompts = prompts
        self._plan = plan
        self._progress = progress
        self._sent = 0
        """Prompts used so far: none is used twice."""

    async def run(self) -> None:
        """Measure. A level in which every request fails is the last one of its series."""
        try:
            await self._run()
        except asyncio.CancelledError:
            self.report.interrupted = True
            raise

    async def _run(self) -> None:
        for prefix in self._plan.prefixes:
            series = Series(prefix)
            self.report.series.append(series)
            for concurrency in sorted(set(self._plan.concurrency)):
                level = await self._level(series, concurrency)
                if not level.completed:
                    break
            while self._plan.search and series.capacity and (between := series.capacity.next_to_try):
                await self._level(series, between)

    async def _level(self, series: Series, concurrency: int) -> Level:
        prefix = series.prefix
        total = self._plan.requests or REQUESTS_PER_USER * concurrency
        warm_up_error = ""
        if prefix is Prefix.WARM:
            warm_up_error = (
                await self._endpoint.ask(self._endpoint.body(self._prompts.one(prefix, 0), 1))
            ).error
        bodies = deque(
            self._endpoint.body(self._prompts.one(prefix, self._sent + number), self._plan.output_tokens)
            for number in range(1, total + 1)
        )
        self._sent += total
        requests: list[RequestRecord] = []

        def done(record: RequestRecord) -> None:
            requests.append(record)
            if self._progress is not None:
                self._progress(prefix, concurrency, len(requests), total)

        interrupted = True
        began, cpu = time.perf_counter(), time.process_time()
        try:
            await closed_loop(lambda body: self._endpoint.ask(body, began), bodies, concurrency, done)
            interrupted = False
        finally:
            duration, cpu = time.perf_counter() - began, time.process_time() - cpu
            level = Level.of(
                concurrency,
                requests,
                duration,
                cpu,
                interrupted=interrupted,
                warm_up_error=warm_up_error,
            )
            if requests:
                self._add(series, level)
        return level

    def _add(self, series: Series, level: Level) -> None:
        series.levels.append(level)
        series.levels.sort(key=lambda level: level.concurrency)
        series.knee = knee(series.complete)
        if self._plan.sla is not None:
            series.capacity = capacity(series.complete, self._plan.sla)


async def closed_loop(
    ask: Callable[[bytes], Awaitable[RequestRecord]],
    bodies: deque[bytes],
    users: int,
    done: Callable[[RequestRecord], None],
) -> None:
    """So many users, each with one request under way, until the bodies, which they share, are used up."""

    async def user() -> None:
        while bodies:
            done(await ask(bodies.popleft()))

    async with asyncio.TaskGroup() as group:
        for _ in range(min(users, len(bodies))):
            group.create_task(user())
