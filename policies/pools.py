"""From a fleet, a valve and standbys to the pools that `scaling.py` decides over; for proxy and simulator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp
from typing import Protocol

from policies.host import alarm_of
from policies.lengths import EXPECTED_TOKENS
from policies.offered import Offered
from policies.scaling import Pool, Unit
from policies.standby import Standby, State
from policies.state import Backend, Fleet

REQUEST_TOKENS = 2000.0
"""Of a request of a model that nobody has asked for yet."""
TOKENS_TAU_S = 600.0
"""Time constant of their average."""
KV_SHARE = 0.8
"""Of a KV cache that is filled at most: above, a step of a few long answers makes the engine preempt."""


class Waits(Protocol):
    """What of a valve is needed."""

    def waiting_by_model(self) -> Mapping[str, tuple[int, int]]:
        """Requests that are held, and their tokens, by model."""

    def waiting_for_standbys(self) -> list[tuple[frozenset[str], int, float]]:
        """For every queue of requests that nothing but standbys may serve: which ones, how many wait, and their
        tokens."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What is known of a standby besides its state. Durations are seconds."""

    cost_per_hour: float | None = None
    cold_start_s: float = 0.0
    least_on_s: float = 0.0
    least_off_s: float = 0.0
    in_state_s: float | None = None
    """By a clock that nobody sets; None: by the wall clock."""
    pause_s: float | None = None
    """Likewise."""
    allowed: bool = True
    """False: it may not be started now."""


class MeanTokens:
    """Tokens that a request is counted with, prompt and expected answer, by model: averages that age with time.

    In the same tokens as demand, so that a backend is full when its slots are.
    """

    def __init__(self) -> None:
        self._means: dict[str, tuple[float, float]] = {}

    def note(self, model: str, requests: int, tokens: float, now: float) -> None:
        """So many requests of a model are there now, and count so many tokens."""
        if requests <= 0:
            return
        mean = tokens / requests
        before = self._means.get(model)
        if before is not None:
            share = 1.0 - exp(-max(now - before[1], 0.05) / TOKENS_TAU_S)
            mean = before[0] + share * (mean - before[0])
        self._means[model] = mean, now

    def of(self, model: str) -> float:
        found = self._means.get(model)
        return found[0] if found is not None else REQUEST_TOKENS


def pools(
    fleet: Fleet,
    valve: Waits,
    standbys: Mapping[str, Standby],
    costs: Mapping[str, Terms],
    now: float,
    wall: float,
    means: MeanTokens | None = None,
    *,
    every_model: bool = False,
) -> list[Pool]:
    """A pool for every model that a standby serves. `now` is monotonic, `wall` Unix time.

    `every_model`: for those that no standby serves as well.
    """
    means = means or MeanTokens()
    cold, waiting = valve.waiting_for_standbys(), valve.waiting_by_model()
    serving = fleet if every_model else [fleet[name] for name in standbys if name in fleet.backends]
    models = sorted({model for backend in serving for model in backend.models})
    found = []
    for gone in fleet.offered.keys() - set(models):
        del fleet.offered[gone]
    for model in models:
        backends = [backend for backend in fleet if model in backend.models]
        names = {backend.name for backend in backends}
        count, tokens = waiting.get(model, (0, 0))
        in_use = float(sum(backend.in_flight_tokens for backend in backends))
        in_flight = sum(backend.in_flight for backend in backends)
        means.note(model, in_flight + count, in_use + tokens, now)
        offered = fleet.offered.setdefault(model, Offered())
        found.append(
            Pool(
                model,
                [_unit(backend, standbys, costs, means.of(model), now, wall) for backend in backends],
                tokens_in_use=in_use,
                tokens_waiting=float(tokens),
                offered=offered.samples(now),
                waiting=count,
                only=[only for only, _, _ in cold if not only.isdisjoint(names)],
                ttft_s=max((backend.ttft_s for backend in backends if backend.available), default=0.0),
                tpot_s=max((backend.tpot_s for backend in backends if backend.available), default=0.0),
                alarm=_alarm(backends, now),
            )
        )
    return found


def _alarm(backends: Sequence[Backend], now: float) -> str:
    """The first of those that serve."""
    raised = (f"{alarm} at {one.name}" for one in backends if one.available and (alarm := alarm_of(one, now)))
    return next(raised, "")


def _unit(
    backend: Backend,
    standbys: Mapping[str, Standby],
    costs: Mapping[str, Terms],
    request_tokens: float,
    now: float,
    wall: float,
) -> Unit:
    tokens = backend.full_slots * request_tokens
    if backend.kv_tokens:
        tokens = min(tokens, KV_SHARE * backend.kv_tokens)
    standby, terms = standbys.get(backend.name), costs.get(backend.name, Terms())
    price = None
    if backend.price_input is not None and backend.price_output is not None:
        price = (backend.price_input + backend.price_output) / 2e6
    in_use = float(backend.in_flight_tokens)
    seconds = backend.ttft_s + backend.tpot_s * EXPECTED_TOKENS
    pace = in_use / seconds if seconds > 0.0 else 0.0  # Little's law
    if standby is None:
        return Unit(
            backend.name,
            backend.site,
            tokens,
            available=backend.available,
            in_flight=backend.in_flight,
            tokens_in_use=in_use,
            tokens_per_s=pace,
            price_per_token=price,
        )
    in_state_s = max(wall - standby.since, 0.0) if terms.in_state_s is None else terms.in_state_s
    return Unit(
        backend.name,
        backend.site,
        tokens,
        standby.state,
        in_state_s,
        backend.available and standby.state is State.READY,
        backend.in_flight,
        in_use,
        pace,
        terms.cost_per_hour,
        price if terms.cost_per_hour is None else None,
        terms.cold_start_s,
        terms.least_on_s,
        terms.least_off_s,
        standby.pause_left(wall) if terms.pause_s is None else terms.pause_s,
        terms.allowed,
    )
