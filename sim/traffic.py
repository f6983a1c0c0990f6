"""The requests of one seed: drawn anew, or out of the blocks of a trace; at their own times, or after answers.

What is made up (`sim/generator.py`) or drawn (ServeGen) is drawn anew with each seed. A trace is one sample, so
a seed resamples it by moving blocks (Künsch, "The jackknife and the bootstrap for general stationary
observations", 1989): its time is cut into `BLOCKS` equal parts, each of which gets what began in a stretch of that
length, anywhere in the trace. Bursts and queues shorter than a block stay as they were. A session moves as a
whole, with the block in which it begins. A block may come twice, and then it is other people: prefixes that only
it has get other hashes each time, those that are found elsewhere too (system prompts) keep them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Final

from sim.generator import generate
from sim.generator_spec import WorkloadSpec, load_spec
from sim.streams import stream
from sim.traces import Span, form_of, read_workload
from sim.workload import Arrival, Workload, in_order

BLOCKS: Final = 12
SECOND: Final = 1_000_000
"""Microseconds."""
_COPY: Final = 1 << 64
"""Above every hash of a trace: so far apart are those of two blocks."""


class Loop(StrEnum):
    """When a request comes."""

    TRACE = "trace"
    """As the trace has it: at its time, or after an answer where it says so."""
    OPEN = "open"
    """At its time, whatever becomes of those before it."""
    CLOSED = "closed"
    """After the answer to the one before it in its session."""


@dataclass(slots=True)
class Traffic:
    """Where the requests of every seed come from."""

    source: Workload | WorkloadSpec | Path
    """A path: of a ServeGen trace."""
    span: Span | None = None
    """What is drawn of a ServeGen trace."""
    resamples: bool = True
    """Whether seeds draw a trace's blocks; else all seeds have the trace as it is."""
    loop: Loop = Loop.TRACE
    users: int = 0
    """So many, in a closed loop; 0: the trace's own sessions."""
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    """How long an answer took in the trace, which knows only when its session went on: so long is not thought."""

    def workload(self, seed: int, speed: float = 1.0) -> Workload:
        """The requests of a seed, `speed` times as many in a second. Raises ValueError and OSError."""
        source = self.source
        if isinstance(source, Path):
            found = read_workload(source, "servegen", span=replace(self.span or Span(), seed=seed))
        elif isinstance(source, WorkloadSpec):
            found = generate(source, seed)
        else:
            found = resampled(source, seed) if self.resamples else source
        found = replace(found, arrivals=[arrival._replace(model="") for arrival in found])
        if self.users:
            found = of_users(found, self.users)
        elif self.loop is Loop.OPEN:
            found = replace(found, arrivals=[arrival._replace(think=-1) for arrival in found])
        elif self.loop is Loop.CLOSED:
            found = by_sessions(found, self.ttft_s, self.tpot_s)
        return faster(found, speed)

    @property
    def unit_tokens(self) -> int:
        """Tokens that one hash of it stands for."""
        return 0 if isinstance(self.source, Path) else self.source.unit_tokens

    @property
    def seeds_in_words(self) -> str:
        """What is another one with each seed."""
        if not isinstance(self.source, Workload):
            return "requests drawn anew"
        return f"{BLOCKS} moving blocks of the trace" if self.resamples else "the trace as it is"


def read_traffic(
    path: Path, form: str | None = None, start_s: float = 0.0, duration_s: float | None = None
) -> Traffic:
    """The traffic in a trace of any form, or in a YAML file that `tidegate workload generate` takes.

    `start_s` and `duration_s` cut a piece out of it. Raises FileProblems, OSError, and ValueError.
    """
    if path.suffix in (".yaml", ".yml"):
        if start_s or duration_s is not None:
            raise ValueError("a workload that is made up has its own duration: say it in its file")
        return Traffic(load_spec(path))
    if (form or form_of(path)) == "servegen":
        span = Span(start_s, 3600.0 if duration_s is None else duration_s)
        return Traffic(path, span)
    workload = read_workload(path, form)
    if start_s or duration_s is not None:
        workload = cut(workload, start_s, duration_s)
    return Traffic(workload)


def cut(workload: Workload, start_s: float, duration_s: float | None) -> Workload:
    """What comes in a piece of its time, which then begins at zero. Raises ValueError for nothing."""
    start = round(start_s * SECOND)
    end = start + round(duration_s * SECOND) if duration_s is not None else workload.arrivals[-1].at + 1
    kept = [one._replace(at=one.at - start) for one in workload if start <= one.at < end]
    if not kept:
        whole = workload.arrivals[-1].at / SECOND
        raise ValueError(f"no request of the trace is in that piece: it has {whole:.0f} s in all")
    return replace(workload, arrivals=kept)


def period(workload: Workload) -> int:
    """The time that the arrivals of a workload stand for, microseconds: one mean gap more than its span."""
    count = len(workload)
    return max(workload.span + workload.span // (count - 1), 1) if count > 1 else 1


def resampled(workload: Workload, seed: int, blocks: int = BLOCKS) -> Workload:
    """Another sample of what the workload is one of, by moving blocks; as long as it, from zero on.

    Raises ValueError if everything begins at one time.
    """
    random = stream(seed, "blocks")
    begin, whole = workload.arrivals[0].at, period(workload)
    length = -(-whole // blocks)
    starts = _session_starts(workload)
    if min(starts) == max(starts):
        raise ValueError(
            "all requests or sessions of the trace begin at the same time, so that it has no blocks to resample: "
            "play it as it is, with --seeds 1"
        )
    seen = _where_hashes_are(workload, starts)
    by_start = sorted(range(len(starts)), key=starts.__getitem__)
    drawn: list[Arrival] = []
    for block in range(blocks):
        first = begin + int(random.integers(0, max(whole - length, 0) + 1))
        shift = block * length - first
        begins = bisect_left(by_start, first, key=starts.__getitem__)
        ends = bisect_left(by_start, first + length, key=starts.__getitem__)
        for index in by_start[begins:ends]:
            arrival = workload.arrivals[index]
            drawn.append(
                arrival._replace(
                    at=arrival.at + shift,
                    session=f"{arrival.session}~{block}" if arrival.session else "",
                    hashes=tuple(
                        value + (block + 1) * _COPY if _within(seen[value], first, length) else value
                        for value in arrival.hashes
                    ),
                )
            )
    if not drawn:
        return workload
    return replace(workload, arrivals=in_order(drawn))


def _session_starts(workload: Workload) -> list[int]:
    """When the session of each arrival began; its own time for one without."""
    began: dict[tuple[str, str], int] = {}
    return [
        began.setdefault((one.tenant, one.session), one.at) if one.session else one.at for one in workload
    ]


def _where_hashes_are(workload: Workload, starts: list[int]) -> dict[int, tuple[int, int]]:
    """When the first and the last session began that has a hash."""
    seen: dict[int, tuple[int, int]] = {}
    for arrival, start in zip(workload, starts, strict=True):
        for value in arrival.hashes:
            first, last = seen.get(value, (start, start))
            seen[value] = min(first, start), max(last, start)
    return seen


def _within(seen: tuple[int, int], first: int, length: int) -> bool:
    return seen[0] >= first and seen[1] < first + length


def by_sessions(workload: Workload, ttft_s: float, tpot_s: float) -> Workload:
    """Each request of a session after the answer to the one before it; where the workload does not say how long
    was thought, as long as went by in it, less the time that an answer takes at this pace.

    Raises ValueError if no session has two requests.
    """
    last: dict[tuple[str, str], Arrival] = {}
    arrivals = []
    waits = False
    for arrival in workload:
        before = last.get((arrival.tenant, arrival.session)) if arrival.session else None
        if before is not None and arrival.think < 0:
            answer = round((ttft_s + tpot_s * (before.output_tokens - 1)) * SECOND)
            arrivals.append(arrival._replace(think=max(arrival.at - before.at - answer, 0)))
        else:
            arrivals.append(arrival)
        waits = waits or before is not None
        if arrival.session:
            last[arrival.tenant, arrival.session] = arrival
    if not waits:
        raise ValueError("a closed loop needs sessions, and the trace has none: say how many --users ask")
    return replace(workload, arrivals=arrivals)


def of_users(workload: Workload, users: int) -> Workload:
    """The same requests in the same order, asked by so many users, each as soon as it has its answer.

    Tenants have users in proportion to their requests, one at least. Raises ValueError for fewer users than
    tenants.
    """
    named = _users_of(Counter(arrival.tenant for arrival in workload), users)
    asked: Counter[str] = Counter()
    arrivals = []
    for arrival in workload:
        tenant = arrival.tenant
        user = asked[tenant] % named[tenant]
        think = 0 if asked[tenant] >= named[tenant] else -1
        asked[tenant] += 1
        arrivals.append(arrival._replace(at=0, session=f"user {user + 1}", think=think))
    return replace(workload, arrivals=arrivals)


def _users_of(requests: Counter[str], users: int) -> dict[str, int]:
    """Users by tenant: one each, the rest by largest remainders."""
    if users < len(requests):
        raise ValueError(f"{users} users are fewer than the {len(requests)} tenants of the trace: give more")
    rest, total = users - len(requests), sum(requests.values())
    exact = {tenant: rest * count / total for tenant, count in requests.items()}
    found = {tenant: 1 + int(share) for tenant, share in exact.items()}
    left = users - sum(found.values())
    for tenant in sorted(exact, key=lambda one: (int(exact[one]) - exact[one], one))[:left]:
        found[tenant] += 1
    return found


def faster(workload: Workload, speed: float) -> Workload:
    """`speed` times the load: times and think times are that much shorter."""
    if speed == 1.0:
        return workload
    return replace(workload, arrivals=list(_sped(workload, speed)))


def _sped(arrivals: Iterable[Arrival], speed: float) -> Iterable[Arrival]:
    for arrival in arrivals:
        think = round(arrival.think / speed) if arrival.think > 0 else arrival.think
        yield arrival._replace(at=round(arrival.at / speed), think=think)
