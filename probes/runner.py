"""The schedule of all probes: asks every backend in its own time and keeps `policies.state.Backend` up to
date.

One round per backend at a time, and one question at a time within it, so that a slow engine is never asked
twice at once and a hanging backend holds up nobody but itself. A round is a check (TCP, `/health`, now and
then `/v1/models`), a look at the engine's figures, or both, in that order. What a check learns is in force
before the figures are asked for: a page of metrics that hangs keeps no backend out.

A standby that sleeps is not asked at all; while it starts it is asked until it answers, see `Prober.watch`.

`step` starts what is due and is all that the loop calls, so a test drives it by hand with a clock of its
own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from functools import partial
from math import inf
from random import Random
from typing import Any, Final, TypeAlias

import aiohttp

from policies.state import Fleet
from probes.active import NO_HEALTH_ENDPOINT, Generate, Health, Models, new_session
from probes.base import Clock, Hysteresis, ProbeResult, Target, Timing, ask
from probes.engine import Metrics
from probes.host import Hosts, HostTarget
from probes.network import Connect
from probes.resolver import Resolver
from probes.status import Liveness, TargetStatus

log = logging.getLogger("tidegate.probes")

Spawn: TypeAlias = Callable[[Coroutine[Any, Any, None], str], "asyncio.Task[Any]"]
"""Starts a task that somebody owns: `proxy.tasks.Tasks.spawn`."""

TICK_S: Final = 0.25
"""Longest time between two looks at what is due; also how late the end of a back-off is seen."""


GENERATE_TIMEOUT_S: Final = 10.0
"""For one token, on an engine that may be at work for others."""
NO_ANSWER: Final = frozenset({401, 403, 408})
"""Of the statuses 4xx, those that are no answer, as `passive.tried_elsewhere` has it; 429 is: full is well."""


class Questions:
    """All the questions there are, over one HTTP client."""

    def __init__(
        self, session: aiohttp.ClientSession, clock: Clock, resolver: Resolver | None = None
    ) -> None:
        self._connect = Connect(resolver)
        self._health = Health(session)
        self.models = Models(session)
        self.metrics = Metrics(session, clock)
        self._session = session

    def generate(self, model: str) -> Generate:
        return Generate(self._session, model)

    async def alive(self, target: Target, timeout_s: float) -> ProbeResult[Liveness]:
        """TCP, then `/health`; where there is no `/health`, `/v1/models` answers for it. One timeout each."""
        connected = await ask(self._connect, target, timeout_s)
        if connected.value is None:
            return ProbeResult(False, connected.reason, connected.duration_s, connected=False)
        healthy = await ask(self._health, target, timeout_s)
        seconds = connected.duration_s + healthy.duration_s
        if healthy.ok:
            return ProbeResult(True, "", seconds, Liveness(connected.value))
        if healthy.status not in NO_HEALTH_ENDPOINT:
            return ProbeResult(False, healthy.reason, seconds, None, healthy.status)
        listed = await ask(self.models, target, timeout_s)
        seconds += listed.duration_s
        if listed.value is None:
            return ProbeResult(False, f"{healthy.reason}; {listed.reason}", seconds, None, listed.status)
        return ProbeResult(True, "", seconds, Liveness(connected.value, listed.value))


async def _check(
    questions: Questions, status: TargetStatus, timing: Timing, clock: Clock, token_at: float = -inf
) -> bool:
    """Is it alive, and what does it serve? True: it came up or went down. `token_at`: when a client last had
    a token or a whole answer from it."""
    target, asked = status.target, clock()
    result = await questions.alive(target, timing.timeout_s)
    if result.value is not None:
        listed = result.value.models
        if listed is not None:
            status.learn_models(ProbeResult(True, "", result.duration_s, listed), asked)
        # One that is coming up may have been restarted with other models: know them before it is used.
        elif (
            not status.up
            or (status.models is None and target.models is None)
            or asked - status.models_at >= timing.models_s
        ):
            status.learn_models(await ask(questions.models, target, timing.timeout_s), asked)
        if timing.generate_s < inf and status.served:
            if status.generated_at == -inf:
                status.generated_at = asked  # a start is not to wait for it
            elif asked - max(status.generated_at, token_at) >= timing.generate_s:
                result = await _generate(questions, status, timing, result, clock)
    return status.learn_check(result, clock())


async def _generate(
    questions: Questions,
    status: TargetStatus,
    timing: Timing,
    alive: ProbeResult[Liveness],
    clock: Clock,
) -> ProbeResult[Liveness]:
    """Let a check depend on a token. Until one comes every check asks again, so that failures are in a row."""
    asked = clock()
    question = questions.generate(min(status.served))
    generated = await ask(question, status.target, max(timing.timeout_s, GENERATE_TIMEOUT_S))
    status.learn_generation(generated, asked)
    if generated.ok or generated.status == 429:  # full is well
        return alive
    if _cannot_chat(generated.status):
        status.generated_at = asked
        return alive
    seconds = alive.duration_s + generated.duration_s
    return ProbeResult(False, generated.reason, seconds, None, generated.status)


def _cannot_chat(status: int | None) -> bool:
    """Whether an engine that does not chat (one for embeddings, say) answers so: nothing is wrong with it."""
    return status == 501 or (status is not None and 400 <= status < 500 and status not in NO_ANSWER)


async def _look_at_engine(questions: Questions, status: TargetStatus, timing: Timing) -> None:
    status.learn_metrics(await ask(questions.metrics, status.target, timing.timeout_s))


async def probe_once(
    target: Target, session: aiohttp.ClientSession, clock: Clock, timing: Timing | None = None
) -> TargetStatus:
    """Ask one target everything once, for `tidegate check`; within a few timeouts, never raising."""
    timing = timing or Timing()
    status, questions = TargetStatus.new(target, timing), Questions(session, clock)
    await _check(questions, status, timing, clock)
    if status.up:
        await _look_at_engine(questions, status, timing)
    return status


@dataclass(slots=True)
class _Watched:
    """One target and its place in the schedule."""

    status: TargetStatus
    check_due: float = -inf
    metrics_asked: float = -inf
    metrics_stretch: float = 1.0
    """The jitter drawn for the present pause."""
    task: asyncio.Task[Any] | None = None
    complaints: list[str] = field(default_factory=list)
    """Misconfigurations that were logged already."""
    news: bool = False
    """What it serves or its slots have changed, and nobody was told yet."""
    starting: bool = False
    """A standby that was told to start."""

    @property
    def busy(self) -> bool:
        return self.task is not None and not self.task.done()

    def abandon(self) -> None:
        """Give up the running round, if any."""
        if self.task is not None:
            self.task.cancel()
            self.task = None

    def forget(self, timing: Timing) -> None:
        """Begin anew: what runs next may be another engine."""
        self.abandon()
        self.status = TargetStatus.new(self.status.target, timing)
        self.check_due = self.metrics_asked = -inf
        self.complaints.clear()


class Prober:
    """Probes all targets until it is closed.

    It owns `probed_up`, `models` and why they are unknown, `context_tokens`, the engine figures and `rtt_s` of
    every backend of the fleet that has a target of its name, and `slots` where the target has none. `changed`
    is called (synchronously, in the loop) whenever a backend became available or unavailable, serves other
    models or has other slots; `answered`, with its name, when a standby that starts has answered. Without `metrics`
    no engine is asked for its figures.
    """

    def __init__(
        self,
        targets: Iterable[Target],
        fleet: Fleet,
        *,
        spawn: Spawn,
        clock: Clock,
        timing: Timing | None = None,
        metrics: bool = True,
        changed: Callable[[], None] = lambda: None,
        answered: Callable[[str], None] = lambda name: None,
        session: Callable[[Resolver | None], aiohttp.ClientSession] = new_session,
        random: Random | None = None,
        resolver: Resolver | None = None,
        hosts: Iterable[HostTarget] = (),
    ) -> None:
        self._resolver = resolver
        self._fleet = fleet
        self._spawn = spawn
        self._clock = clock
        self._timing = timing or Timing()
        self._metrics = metrics
        self._changed = changed
        self._answered = answered
        self._new_session = session
        self._random = random or Random()  # noqa: S311  # jitter, no secret
        self._session: aiohttp.ClientSession | None = None
        self._questions: Questions | None = None
        self._loop_task: asyncio.Task[Any] | None = None
        self._watched: dict[str, _Watched] = {}
        self._hosts = Hosts(fleet, clock)
        self.replace(targets, hosts)

    async def start(self, patience_s: float = 2.5) -> None:
        """Ask everybody once, all at the same time, and then go on for ever.

        Returns as soon as all have answered, or after `patience_s`; what hangs goes on in the background.
        """
        rounds = self.step(self._clock())
        if rounds:
            await asyncio.wait(rounds, timeout=patience_s)
        self._loop_task = self._spawn(self._run(), "probes")

    async def close(self) -> None:
        """End all probes and the HTTP client."""
        tasks = [watched.task for watched in self._watched.values() if watched.task is not None]
        tasks += self._hosts.tasks
        if self._loop_task is not None:
            tasks.append(self._loop_task)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    def replace(self, targets: Iterable[Target], hosts: Iterable[HostTarget] = ()) -> None:
        """Watch other targets from now on, after a reload of the configuration and of the fleet.

        A target with the name and URL of an old one keeps all that is known, also when its backend is a new
        object; what else changed (models, key, certificates) is tried at once.
        """
        self._hosts.replace(hosts)
        before, self._watched = self._watched, {}
        for target in targets:
            watched = before.get(target.name)
            if watched is None or watched.status.target.url != target.url:
                watched = _Watched(TargetStatus.new(target, self._timing))
            else:
                del before[target.name]
                if watched.status.target != target:
                    watched.status.target = target
                    watched.status.models_at = watched.check_due = -inf
                    watched.abandon()  # it still asks as the old one said
            self._watched[target.name] = watched
        for gone in before.values():
            gone.abandon()
        self._apply(self._watched.values())
        for watched in self._watched.values():
            self._say_news(watched)

    def watch(self, name: str, starting: bool) -> None:
        """Ask a standby that sleeps until it answers, or (False) leave it alone again.

        Being down is expected of it, so nobody is told of that, and its first good answer is enough: `answered` is
        called once, and it is asked further until it is awake (`Fleet.put`) or this is called again.
        """
        watched = self._watched[name]
        watched.forget(self._timing)
        watched.starting = starting
        if starting:
            watched.status.health = Hysteresis(1, self._timing.down, is_up=False, decided=True)
        self._apply([watched])

    def _rests(self, watched: _Watched) -> bool:
        """Whether it is a standby of which no answer is expected."""
        backend = self._fleet.backends.get(watched.status.target.name)
        if backend is None or not backend.asleep or backend.draining:
            watched.starting = False
            return False
        return not watched.starting

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """What is known of each target, by name, as plain values (`TargetStatus.snapshot`)."""
        now = self._clock()
        return {name: watched.status.snapshot(now) for name, watched in self._watched.items()}

    def hosts(self) -> dict[str, dict[str, Any]]:
        """What the hosts say, by site (`Hosts.snapshot`)."""
        return self._hosts.snapshot()

    def step(self, now: float) -> list[asyncio.Task[Any]]:
        """Start the rounds that are due, and let the fleet see that time has passed. The tasks started."""
        if self._fleet.refresh(now):
            self._tell()
        started = []
        for name, watched in self._watched.items():
            if self._rests(watched):
                if watched.task is not None:  # it was awake, or has been asked
                    watched.forget(self._timing)
                    self._apply([watched])
                continue
            if watched.busy:
                continue
            check = now >= watched.check_due
            if check or self._metrics_due(watched, now):
                watched.task = self._spawn(self._round(watched, check), f"probe {name}")
                started.append(watched.task)
        for site in self._hosts.due(now):
            task = self._spawn(self._host_round(site), f"probe host of {site}")
            self._hosts.start(site, task)
            started.append(task)
        return started

    async def _run(self) -> None:
        timing = self._timing
        tick = min(TICK_S, timing.interval_s / 4, timing.retry_s / 4, timing.metrics_s / 4)
        while True:
            await asyncio.sleep(tick)
            self.step(self._clock())

    async def _round(self, watched: _Watched, check: bool) -> None:
        status, questions = watched.status, self._ask()
        if check:
            began, stretch = self._clock(), self._stretch()
            watched.check_due = began + self._timing.interval_s * stretch
            backend = self._fleet.backends.get(status.target.name)
            token_at = -inf if backend is None else max(backend.ttft_at, backend.ok_at)
            flipped = await _check(questions, status, self._timing, self._clock, token_at)
            if not status.up:
                pause = min(self._timing.retry_s, self._timing.interval_s)
                watched.check_due = began + pause * stretch
            self._checked(watched, flipped)
        if self._metrics_due(watched, self._clock()):
            watched.metrics_asked, watched.metrics_stretch = self._clock(), self._stretch()
            await _look_at_engine(questions, status, self._timing)
            self._apply([watched])
        self._say_news(watched)

    async def _host_round(self, site: str) -> None:
        self._ask()
        assert self._session is not None
        await self._hosts.ask(site, self._session)
        if self._fleet.refresh(self._clock()):
            self._tell()

    def _metrics_due(self, watched: _Watched, now: float) -> bool:
        """Whether to look at its engine's figures: often while it works, rarely where that fails."""
        status, timing = watched.status, self._timing
        if not self._metrics or not status.up or status.checked is None or not status.checked.ok:
            return False
        backend = self._fleet.backends.get(status.target.name)
        sample = status.sample
        # Others may use the engine too: its own word that it works is as good as our leases.
        works = (backend is not None and backend.in_flight > 0) or (
            sample is not None and sample.running + sample.waiting > 0
        )
        pause = timing.metrics_s if works else timing.metrics_idle_s
        if status.metrics_failures:
            doubled = timing.metrics_s * 2.0 ** min(status.metrics_failures, 60)
            pause = max(pause, min(doubled, timing.metrics_max_s))
        return now - watched.metrics_asked >= pause * watched.metrics_stretch

    def _checked(self, watched: _Watched, flipped: bool) -> None:
        """A check came back: bring the backend in line, say what changed."""
        if self._rests(watched):
            return  # it was put to sleep meanwhile
        status = watched.status
        now, name = self._clock(), status.target.name
        backend = self._fleet.backends.get(name)
        if backend is not None and status.checked is not None and status.checked.ok:
            backend.observe_rtt(status.rtt_s, now)
        if flipped and status.checked is not None:
            if status.up:
                status.health.up = self._timing.up
                # A new engine, perhaps: with other slots, and with figures where there were none.
                status.metrics_failures, watched.metrics_asked = 0, -inf
                log.info("backend %s is up", name)
            else:
                log.warning("backend %s is down: %s", name, status.checked.reason)
        complaints = status.misconfigured
        for complaint in complaints:
            if complaint not in watched.complaints:
                log.warning("backend %s: %s", name, complaint)
        watched.complaints = complaints
        self._apply([watched])
        if flipped and status.up and watched.starting:
            self._tell(partial(self._answered, name))

    def _apply(self, those: Iterable[_Watched]) -> None:
        now, changed = self._clock(), False
        for watched in those:
            backend = self._fleet.backends.get(watched.status.target.name)
            if backend is not None and watched.status.apply(backend, now):
                watched.news = changed = True
        if changed:
            self._fleet.version += 1
        if self._fleet.refresh(now) or changed:
            self._tell()

    def _say_news(self, watched: _Watched) -> None:
        """Once a round: its models come with the check, its slots with the figures after it."""
        backend = self._fleet.backends.get(watched.status.target.name)
        if watched.news and backend is not None and backend.models:  # that it serves none is a complaint
            models = ", ".join(sorted(backend.models))
            log.info("backend %s serves %s on %d slots", backend.name, models, backend.full_slots)
        watched.news = False

    def _tell(self, listener: Callable[[], None] | None = None) -> None:
        try:
            (listener or self._changed)()
        except Exception:
            # A fault in the listener must not end the watch over the backends.
            log.exception("after a probe")

    def _stretch(self) -> float:
        return 1.0 + self._random.uniform(-self._timing.jitter, self._timing.jitter)

    def _ask(self) -> Questions:
        if self._questions is None:
            self._session = self._new_session(self._resolver)
            self._questions = Questions(self._session, self._clock, self._resolver)
        return self._questions
