"""Does the simulator's router decide as the proxy did? A recorded log (`policies/eventlog.py`), played again.

`Replay` goes through what happened outside the deciding, makes its own decisions, and records all of it anew. The
two logs have to be equal record by record, to the last bit of every float: the first that is not ends the
comparison. So not only another decision is found, but also one that only one of the two made, and an event that is
missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from policies.base import Outcome
from policies.eventlog import (
    FORMAT,
    EventLog,
    PolicySource,
    Retries,
    backend_from,
    facts_from,
    plain_back,
)
from policies.files import read_policy
from policies.health import Health
from policies.yamlfile import FileProblems
from probes.passive import AttemptError
from sim.record_forms import damage
from sim.recording import BadLogError
from sim.router import End, Request, Router

_ENDS: Final = {Outcome.OK: End.OK, Outcome.FAILED: End.CUT, Outcome.IGNORED: End.GONE}


PROGRESS_RECORDS: Final = 1000
"""After about so many records `progress` hears."""


@dataclass(slots=True)
class Difference:
    """The first record that is not the same."""

    number: int
    """Its place in the log, from 0."""
    recorded: Mapping[str, Any] | None
    """None: there is none where the replay has one."""
    replayed: Mapping[str, Any] | None

    @property
    def text(self) -> str:
        """In words, two lines."""
        return f"recorded: {_shown(self.recorded)}\nreplayed: {_shown(self.replayed)}"


@dataclass(slots=True)
class Comparison:
    """What a replay found."""

    decisions: int = 0
    """That are equal."""
    events: int = 0
    requests: int = 0
    difference: Difference | None = None
    end: str = ""
    """Why the log ends; empty: it breaks off."""


class _DifferentError(Exception):
    def __init__(self, difference: Difference) -> None:
        super().__init__(difference.text)
        self.difference = difference


class _BrokenOffError(Exception):
    """The log ends amid what is being replayed: a recorder that was killed."""


class _Reader:
    """The recorded log, with a place in it. It holds one record."""

    def __init__(self, records: Iterable[dict[str, Any]], comparison: Comparison) -> None:
        """Raises BadLogError."""
        self.comparison = comparison
        self.place = 0
        """Of `next`, from 0."""
        self._records = iter(records)
        self.next: dict[str, Any] | None = next(self._records, None)
        if self.next is None:
            raise BadLogError(1, "there is no record")
        if self.next.get("event") != "start":
            raise BadLogError(1, "the first line of an event log is another")
        if self.next.get("format") != FORMAT:
            raise BadLogError(1, f"it has format {self.next.get('format')}, this version reads {FORMAT}")
        self._check(self.next)

    @property
    def line(self) -> int:
        """Of `next`, from 1."""
        return self.place + 1

    def compare(self, replayed: dict[str, Any]) -> None:
        """Take the next record, which has to be this one. Raises BadLogError if what follows is damaged."""
        recorded = self.next
        if recorded is None:
            raise _BrokenOffError
        if recorded != replayed:
            raise _DifferentError(Difference(self.place, recorded, replayed))
        if "decision" in replayed:
            self.comparison.decisions += 1
        else:
            self.comparison.events += 1
        self.place += 1
        self.next = next(self._records, None)
        if self.next is not None:
            self._check(self.next)

    def _check(self, record: Mapping[str, Any]) -> None:
        problem = damage(record)
        if problem:
            raise BadLogError(self.line, problem)


class Replay(Router):
    """A router to which happens what a log says."""

    def __init__(self, records: Iterable[dict[str, Any]], comparison: Comparison) -> None:
        """Raises BadLogError."""
        self._reader = reader = _Reader(records, comparison)
        self._comparison = comparison
        self._requests: dict[str, Request] = {}
        """By id: those that have not ended."""
        self._ends = 0
        """After which nobody was offered the place yet."""
        first = reader.next
        assert first is not None
        self._start: float = first["start"]
        source, retries = PolicySource(**first["policy"]), Retries(**first["retries"])
        try:
            policy = read_policy(source.text, source.name, seed=source.seed)
        except FileProblems as error:
            raise BadLogError(1, f"its policy cannot be read: {error}") from error
        super().__init__(
            [backend_from(backend, self._start) for backend in first["backends"]],
            policy.rules,
            retry_ratio=retries.ratio,
            retries_per_s=retries.per_second,
            attempts=retries.attempts,
            health=Health(*first["health"]),
            log=EventLog(reader.compare, source, self._start),
        )

    def run(self, progress: Callable[[int], None] | None = None) -> None:
        """Go through the log. `progress` hears now and then how many records are behind it."""
        reader, told = self._reader, 0
        while (record := reader.next) is not None:
            if record.get("event") == "end":
                self._end_log(record["reason"])
                break
            self._happen(record)
            if progress is not None and reader.place - told >= PROGRESS_RECORDS:
                told = reader.place
                progress(told)

    def _end_log(self, reason: str) -> None:
        reader = self._reader
        if self._ends:
            raise _DifferentError(Difference(reader.place, reader.next, {"event": "freed"}))
        assert self.log is not None
        self.log.end(reason)
        self._comparison.end = reason
        if reader.next is not None:
            raise BadLogError(reader.line, "the log goes on behind its end")

    def _happen(self, record: dict[str, Any]) -> None:
        place, event = self._reader.place, record.get("event")
        if event is None:  # a decision that nobody makes here
            raise _DifferentError(Difference(place, record, None))
        if event == "start":
            raise BadLogError(place + 1, "another log begins")
        at = self._start + record["at"]
        if event == "arrival":
            request = Request(facts_from(record["request"], self._start))
            if request.facts.id in self._requests:
                raise BadLogError(place + 1, f"the request {request.facts.id!r} has arrived already")
            self._requests[request.facts.id] = request
            self._comparison.requests += 1
            self.submit(request, at)
        elif event == "poll":
            self.poll(at)
        elif event == "freed":
            if self._ends == 0:
                raise _DifferentError(Difference(place, record, None))
            self._ends -= 1
            super().freed(at)
        elif event == "refresh":
            self.fleet.version += record["renewed"]
            self.fleet.refresh(at)
        elif event == "figures":
            self._observe(record["backends"], at)
        else:
            self._happen_to(self._requests.get(record["request"]), record, at)
        if self._reader.place == place:  # nothing of the kind could happen here
            raise _DifferentError(Difference(place, record, None))

    def _happen_to(self, request: Request | None, record: dict[str, Any], at: float) -> None:
        if request is None:
            return
        event = record["event"]
        usage = tuple(record.get("usage", (0, 0, 0)))
        if event == "first token" and request.lease is not None:
            self.begun(request, at)
        elif event == "failed" and request.lease is not None:
            error, told = record["error"], None
            if isinstance(error, str):
                error = AttemptError(error)
            elif error == 429 or record["outcome"] == Outcome.IGNORED.value:
                told = record["pause"]  # of Retry-After the log has what came of it
            self.failed(request, error, at, told, usage)
        elif event == "ended":
            outcome = Outcome(record["outcome"])
            self.settled(request, _ENDS[outcome], outcome, at, usage)

    def _observe(self, backends: Mapping[str, Mapping[str, Any]], at: float) -> None:
        for name, figures in backends.items():
            backend = self.fleet.backends.get(name)
            if backend is None:
                raise BadLogError(self._reader.line, f"its first line has no backend {name!r}")
            asleep, draining = (
                figures.get("asleep", backend.asleep),
                figures.get("draining", backend.draining),
            )
            backend.put(asleep, draining, at)
            for figure, value in figures.items():
                if figure == "probed_up":
                    backend.probed(value, at)
                elif figure not in ("asleep", "draining"):
                    setattr(backend, figure, plain_back(figure, value, self._start))
        assert self.log is not None
        self.log.figures(self.fleet, at)

    # Router

    def send(self, request: Request, now: float) -> None:
        self._amid_a_poll()

    def over(self, request: Request, now: float) -> None:
        del self._requests[request.facts.id]
        self._amid_a_poll()

    def freed(self, now: float) -> None:
        """The log has its own time for it, and what may have come between. Amid a poll it has none."""
        if self._polling:
            super().freed(now)
        else:
            self._ends += 1

    def _amid_a_poll(self) -> None:
        """What happened while the answers of a poll were acted on, as far as they have been here."""
        while self._polling and (record := self._reader.next) is not None and "within" in record:
            if record["event"] != "arrival" and record.get("request") in self.held:
                break
            self._happen(record)


def compare(records: Iterable[dict[str, Any]], progress: Callable[[int], None] | None = None) -> Comparison:
    """Replay a log, which is gone through once. Raises BadLogError, and whatever going through it raises."""
    found = Comparison()
    try:
        Replay(records, found).run(progress)
    except _DifferentError as error:
        found.difference = error.difference
    except _BrokenOffError:
        pass
    return found


def _shown(record: Mapping[str, Any] | None) -> str:
    return "nothing of the kind" if record is None else orjson.dumps(record).decode()
