"""Small fleets, requests and policies for tests of deciding."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from policies.base import BackendView, Decision, Finished, Outcome, Policy, RequestFacts, Send
from policies.health import Health
from policies.routing import Routing
from policies.rules import Queue, Rule, RuleSet, Selector, Spill, Tier
from policies.state import Backend, Fleet
from policies.valve import Valve

MODEL = "m"


def backend(name: str, **facts: Any) -> Backend:
    """A backend that serves `MODEL` and is at a site of its own name, unless said otherwise."""
    return Backend(**{"name": name, "site": name, "slots": 2, "models": frozenset({MODEL}), **facts})


def request(id: str = "r", **facts: Any) -> RequestFacts:
    return RequestFacts(**{"id": id, "model": MODEL, **facts})


class LeastInFlight(Policy):
    """The first of those with the fewest requests; remembers what it heard."""

    def __init__(self) -> None:
        self.needs = frozenset()
        self.heard: list[tuple[str, str]] = []

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        return Send(min(backends, key=lambda backend: backend.in_flight).name, reason="least in-flight")

    def dispatched(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        self.heard.append(("dispatched", backend.name))

    def first_token(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        self.heard.append(("first_token", backend.name))

    def finished(self, finished: Finished) -> None:
        self.heard.append(("finished", finished.backend))


class WeightedByRoom(Policy):
    """Draws a backend with weights from several figures, and proposes a fallback: something to replay."""

    def __init__(self, rng: Random) -> None:
        self.needs = frozenset()
        self.rng = rng

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        scores = {
            backend.name: backend.weight
            * (1.0 + backend.ttft_s + backend.rtt_s + backend.in_flight_tokens)
            / (1.0 + backend.saturation(now))
            for backend in backends
        }
        names = list(scores)
        chosen = self.rng.choices(names, [scores[name] for name in names])[0]
        others = tuple(name for name in reversed(names) if name != chosen)[:1]
        return Send(chosen, others, "drawn", scores, scores[chosen] / sum(scores.values()))


class Answers(Policy):
    """Gives fixed answers, the last one for ever; an exception among them is raised."""

    def __init__(self, *answers: Decision | Exception | Any) -> None:
        self.needs = frozenset()
        self.answers = list(answers)

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]


class Broken(Policy):
    """Raises, whatever it is asked or told."""

    def __init__(self) -> None:
        self.needs = frozenset()

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        raise ZeroDivisionError("choose")

    def dispatched(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        raise ZeroDivisionError("dispatched")

    def first_token(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        raise ZeroDivisionError("first_token")

    def finished(self, finished: Finished) -> None:
        raise ZeroDivisionError("finished")


def rule(name: str = "all", policy: Policy | None = None, **facts: Any) -> Rule:
    return Rule(name=name, policy=policy or LeastInFlight(), policy_name="chooser", **facts)


def one_tier(policy: Policy | None = None, **queue: Any) -> RuleSet:
    """One rule, one tier with every backend."""
    return RuleSet([rule(policy=policy, queue=Queue(**queue))])


def local_first(
    enter: float = 0.85, leave: float = 0.7, policy: Policy | None = None, **queue: Any
) -> RuleSet:
    """One rule: the site `local` with a spill, then every other."""
    tiers = (Tier(Selector(sites=frozenset({"local"})), Spill(enter, leave)), Tier())
    return RuleSet([rule(policy=policy, tiers=tiers, queue=Queue(**queue))])


STRICT = Health(slow_start_s=0.0, panic=0.0, most_ejected=1.0)
"""Sick is out, and back is back."""


def fleet(*backends: Backend, health: Health = STRICT) -> Fleet:
    return Fleet(backends, health)


def decided(routing: Any) -> str:
    """The backend it was sent to, `hold`, or the code of the refusal."""
    decision = routing.decision
    return getattr(decision, "backend", None) or getattr(decision, "code", None) or "hold"


def ids(routings: list[Routing]) -> list[str]:
    return [routing.request.id for routing in routings]


def release(homes: Fleet, routing: Routing, now: float, outcome: Outcome = Outcome.OK) -> None:
    assert routing.lease is not None
    homes.release(routing.lease, outcome, now)


def full(slots: int = 1, policy: Policy | None = None, **queue: Any) -> tuple[Valve, Fleet, list[Routing]]:
    """A valve over one backend `a` with all its slots taken at time 0."""
    homes = fleet(backend("a", slots=slots))
    valve = Valve(one_tier(policy, **queue), homes)
    running = [valve.submit(request(f"running{number}"), 0.0) for number in range(slots)]
    return valve, homes, running
