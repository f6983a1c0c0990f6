"""Makes up a workload from its specification (`sim/generator_spec.py`).

Every client draws from streams of its own, one for each thing it draws, named after the client: adding one
changes no other, and another distribution of lengths changes no arrival. The same specification and seed give
the same workload.

Sessions begin at the rate of the client over the mean number of their turns, and they begin with the
workload: those that were under way before it are not in it, so the first minutes have fewer requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import pi
from typing import TYPE_CHECKING, Final

from sim.arrival_process import Rate, arrival_times
from sim.generator_spec import HOURS, Bursts, Client, Day, Distribution, Loop, Sessions, WorkloadSpec
from sim.streams import number_of, stream
from sim.workload import Arrival, Workload, in_order

if TYPE_CHECKING:
    import numpy as np

MOST_REQUESTS: Final = 5_000_000
"""Of all clients; a request takes some 300 bytes of memory."""
MOST_HASHES: Final = 100_000_000
"""Of all requests; each takes some 36 bytes."""

_HOUR_S: Final = 3600.0
_SINE_STEPS_PER_HOUR: Final = 60


def generate(
    spec: WorkloadSpec, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> Workload:
    """The requests of all clients. `progress` is told how many clients are done, and how many there are.

    Raises ValueError, before it begins, for more requests than `MOST_REQUESTS` and more hashes than `MOST_HASHES`.
    """
    _check_counts(spec, seed)
    arrivals: list[Arrival] = []
    for done, client in enumerate(spec.clients, 1):
        arrivals += _requests(client, spec, seed)
        if progress is not None:
            progress(done, len(spec.clients))
    return Workload(spec.name, in_order(arrivals), spec.unit_tokens)


def _requests(client: Client, spec: WorkloadSpec, seed: int) -> Iterator[Arrival]:
    requests = _Requests(client, spec, seed)
    users = client.users
    if users is not None:
        for user in range(users.count):
            yield from requests.of_user(f"{client.name}/{user}", users.requests)
        return
    starts = _session_starts(client, spec, seed)
    for index, start in enumerate(starts.tolist()):
        yield from requests.of_session(f"{client.name}/{index}", round(start * 1e6))


# How many there will be


def _check_counts(spec: WorkloadSpec, seed: int) -> None:
    """Raises ValueError if they are too many."""
    requests = {client.name: _expected(client, spec, seed) for client in spec.clients}
    hashes = {
        client.name: requests[client.name] * mean_hashes(client, spec.unit_tokens) for client in spec.clients
    }
    for what, counts, most, advice in (
        ("requests", requests, MOST_REQUESTS, "take lower rates, fewer users or a shorter duration"),
        ("hashes", hashes, MOST_HASHES, "take a larger unit_tokens, shorter sessions or fewer requests"),
    ):
        total = sum(counts.values())
        if total > most:
            first = max(counts, key=counts.__getitem__)
            raise ValueError(
                f"about {total:.0f} {what}, more than {most}, {counts[first]:.0f} of them from {first}: {advice}"
            )


def _expected(client: Client, spec: WorkloadSpec, seed: int) -> float:
    """Requests of a client."""
    if client.users is not None:
        return float(client.users.count * client.users.requests)
    return rate_of(client, spec, seed).expected


def mean_hashes(client: Client, unit_tokens: int) -> float:
    """Of a request of a client, about: all prompts and answers taken for as long as their means."""
    import numpy as np

    if not unit_tokens:
        return 0.0
    sessions = client.sessions
    output = float(_spread(client.output).mean())
    new = float(_spread(client.prompt).mean()) + output
    most = max(1.0, (sessions.max_tokens - sessions.system_tokens) // new)
    turns = np.minimum(_spread(sessions.turns), most)
    # None stands for the last answer, nor for what is behind the last full unit: half a one on average.
    tokens = turns * sessions.system_tokens + new * turns * (turns + 1) / 2 - output
    return max(0.0, float(tokens.sum() / turns.sum()) / unit_tokens - 0.5)


# When sessions begin


def _session_starts(client: Client, spec: WorkloadSpec, seed: int) -> np.ndarray:
    """Seconds."""
    rate = rate_of(client, spec, seed)
    sessions = rate._replace(levels=rate.levels / mean_turns(client.sessions))
    return arrival_times(stream(seed, client.name, "arrivals"), client.process, client.cv or 1.0, sessions)


def mean_turns(sessions: Sessions) -> float:
    """Requests of a session, the mean; those that `max_tokens` or the end of the workload cuts are counted."""
    return float(_spread(sessions.turns, 1 << 14).mean())


def _spread(distribution: Distribution, steps: int = 1 << 8) -> np.ndarray:
    """So many values that stand for all that are drawn."""
    import numpy as np

    return distribution.whole((np.arange(steps) + 0.5) / steps)


def rate_of(client: Client, spec: WorkloadSpec, seed: int) -> Rate:
    """Requests per second of a client that has a rate, with its day and its bursts."""
    import numpy as np

    edges = [np.array([0.0, spec.duration])]
    if client.day is not None:
        step = _HOUR_S if client.day.hours is not None else _HOUR_S / _SINE_STEPS_PER_HOUR
        first = -(spec.start_hour * _HOUR_S) % step
        edges.append(np.arange(first, spec.duration, step))
    begins = np.zeros(0)
    if client.bursts is not None:
        begins = _burst_starts(client.bursts, spec.duration, stream(seed, client.name, "bursts"))
        edges += [begins, begins + client.bursts.length]
    points = np.unique(np.concatenate(edges))
    points = points[(points >= 0) & (points <= spec.duration)]
    middle = (points[:-1] + points[1:]) / 2
    levels = np.full(len(middle), client.rate or 0.0)
    if client.day is not None:
        levels = levels * day_factor(client.day, middle / _HOUR_S + spec.start_hour)
    if client.bursts is not None and len(begins):
        last = np.searchsorted(begins, middle) - 1
        inside = (last >= 0) & (middle < begins[last] + client.bursts.length)
        levels = np.where(inside, levels * client.bursts.factor, levels)
    return Rate(points, levels)


def day_factor(day: Day, hour: np.ndarray) -> np.ndarray:
    """By which the rate differs from its mean over a day, at these hours since a midnight."""
    import numpy as np

    if day.hours is not None:
        hours = np.array(day.hours)
        factors: np.ndarray = hours[hour.astype(int) % HOURS] / hours.mean()
    else:
        assert day.peak_hour is not None
        factors = 1.0 + day.amplitude * np.cos((hour - day.peak_hour) * (2.0 * pi / HOURS))
    return factors


def _burst_starts(bursts: Bursts, duration: float, random: np.random.Generator) -> np.ndarray:
    """Those before the beginning that reach into it are among them."""
    import numpy as np

    span = duration + bursts.length
    return np.sort(random.random(random.poisson(span / bursts.every)) * span) - bursts.length


# What sessions say


class _Requests:
    """The requests of one client, session by session."""

    def __init__(self, client: Client, spec: WorkloadSpec, seed: int) -> None:
        sessions = client.sessions
        self._sessions = sessions
        self._unit = spec.unit_tokens
        self._end = round(spec.duration * 1e6)
        self._turns = _draws(sessions.turns.whole, stream(seed, client.name, "turns"))
        self._prompts = _draws(client.prompt.whole, stream(seed, client.name, "prompt"))
        self._outputs = _draws(client.output.whole, stream(seed, client.name, "output"))
        self._thinks = _draws(sessions.think.at, stream(seed, client.name, "think"))
        self._alone = sessions.turns.constant is not None and sessions.turns.constant < 2
        """Every session has one request."""
        # Hashes are numbers in order, from one on that stands for the client.
        first = number_of(client.name, 8) % (2**63 - 2**48)
        units = sessions.system_tokens // self._unit if self._unit else 0
        self._system = tuple(range(first, first + units))
        self._next_hash = first + units
        self._like = Arrival(
            at=0,
            prompt_tokens=1,
            output_tokens=1,
            tenant=client.tenant or client.name,
            model=client.model,
            data_class=client.data_class,
            priority=client.priority,
        )

    def of_session(self, name: str, at: int) -> Iterator[Arrival]:
        """Those of one session that begins at a time, as far as they come before the end."""
        closed = self._sessions.loop is Loop.CLOSED
        like = self._like if self._alone else self._like._replace(session=name)
        for index, (prompt, output, hashes) in enumerate(self._session()):
            think = self._think() if index else 0
            at += think
            if at >= self._end:
                return
            yield like._replace(
                at=at,
                prompt_tokens=prompt,
                output_tokens=output,
                hashes=hashes,
                think=think if closed and index else -1,
            )

    def of_user(self, name: str, most: int) -> Iterator[Arrival]:
        """Those of one user in a closed loop, one session after the other. `at` is when they would come if
        answers took no time."""
        like = self._like._replace(session=name)
        at = sent = 0
        while True:
            for prompt, output, hashes in self._session():
                think = self._think()
                at += think
                if at >= self._end:
                    return
                yield like._replace(
                    at=at,
                    prompt_tokens=prompt,
                    output_tokens=output,
                    hashes=hashes,
                    think=think if sent else -1,
                )
                sent += 1
                if sent == most:
                    return

    def _think(self) -> int:
        """Microseconds."""
        return round(next(self._thinks) * 1e6)

    def _session(self) -> list[tuple[int, int, tuple[int, ...]]]:
        """Prompt tokens, output tokens and hashes of each turn of a new session."""
        lengths: list[tuple[int, int]] = []
        said = self._sessions.system_tokens
        for turn in range(int(next(self._turns))):
            prompt, output = said + int(next(self._prompts)), int(next(self._outputs))
            said = prompt + output
            if turn and said > self._sessions.max_tokens:
                break
            lengths.append((prompt, output))
        if not self._unit:
            return [(prompt, output, ()) for prompt, output in lengths]
        # The last answer is continued by nobody.
        own = lengths[-1][0] // self._unit - len(self._system)
        units = (*self._system, *range(self._next_hash, self._next_hash + own))
        self._next_hash += own
        return [(prompt, output, units[: (prompt + output) // self._unit]) for prompt, output in lengths]


def _draws(quantiles: Callable[[np.ndarray], np.ndarray], random: np.random.Generator) -> Iterator[float]:
    """Draws without end, some thousand at a time."""
    while True:
        yield from quantiles(random.random(1024)).tolist()
