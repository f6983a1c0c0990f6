"""What would happen now to a request, and why, without its being sent: `POST /explain`.

The body is read as the data plane reads it, its facts are made as there, and the valve decides in a dry run
(`policies/whatif.py`). What a client would be refused for before anything is decided raises the same error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, Final, Protocol

from policies.base import Hold, Reject, RequestFacts, Send
from policies.fileschema import ENDPOINTS, offset_seconds
from policies.routing import SHARES, STANDBY, Routing
from policies.rules import Rule
from policies.split import Part
from policies.state import Backend
from policies.unmatched import why_not
from policies.whatif import DryRun
from proxy.access.keys import Key, KeyFieldError, imagined_key
from proxy.access.limits import Refusal
from proxy.admin.explain import WHY, Deciding, standby_words, tier_of, tiers, unavailable
from proxy.endpoints import BY_NAME, FORM_BODY, NO_BODY, WEBSOCKET
from proxy.errors import STATUS, RequestError
from proxy.facts import check_model, facts_of, no_model, wants_hashes
from proxy.observe import decision_shown
from proxy.openai import RequestBody
from proxy.prompt_hashes import prompt_hashes
from proxy.runtime import Runtime

ENDPOINTS_ASKED: Final = tuple(
    name for name in ENDPOINTS if BY_NAME[name].body not in (FORM_BODY, NO_BODY, WEBSOCKET)
)
"""Those with a JSON body."""

BY_LOT: Final = "without a session its part is drawn; this is the largest one that takes such requests"

_MOST_DRAWS: Final = 10_000
"""A part whose share is less than about one in so many is not shown."""

_CLOCK: Final = re.compile(r"([01]?[0-9]|2[0-3]):([0-5][0-9])")


class AskedError(ValueError):
    """What was asked for cannot be; the message names the option."""


class Reading(Deciding, Protocol):
    """What reads a request and decides over it."""

    @property
    def aliases(self) -> Mapping[str, str]: ...

    @property
    def salt(self) -> bytes: ...

    @property
    def wall(self) -> Callable[[], float]: ...

    @property
    def total_s(self) -> float:
        """What a request may take."""

    def holder(self, response: str, tenant: str) -> str | None:
        """The backend that keeps a stored response; None: nobody does."""

    def refusal(self, key: Key, body: RequestBody, facts: RequestFacts) -> Refusal | None:
        """By the limits of the key."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Whose request it would be, where it would come in, and when."""

    endpoint: str = "chat"
    key: Key | None = None
    """Its tenant, data class, labels and so on; None: a client without a key."""
    session: str = ""
    """The value of `x-session-id`."""
    at: str = ""
    """`23:00` or an ISO 8601 time, for rules on the time of day; empty: now."""


class Running:
    """A running proxy as a `Reading`."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.now, self.wall, self.probes = runtime.now, runtime.wall, runtime.probes
        self.scaling = runtime.scaling
        self.fleet, self.valve, self.built = runtime.fleet, runtime.valve, runtime.built
        self.aliases, self.salt, self.total_s = runtime.aliases, runtime.salt, runtime.timeouts.total

    def holder(self, response: str, tenant: str) -> str | None:
        stored = self._runtime.responses.find(response, tenant)
        return None if stored is None else stored.backend

    def refusal(self, key: Key, body: RequestBody, facts: RequestFacts) -> Refusal | None:
        runtime = self._runtime
        answer = body.reserved_tokens if facts.expected_tokens else 0
        cost = 0 if key.budget_nano is None else runtime.estimate_cost(facts, answer)
        return runtime.limits.foresee(key, facts.prompt_tokens + answer, cost, self.now(), facts.wall)


def asked(given: Sequence[tuple[str, str]], key: Callable[[str], Key | None], wall: float) -> Asked:
    """What the parameters of a query ask for. `key`: a key by its id. `wall`: Unix time, to tell an expired one.

    Raises AskedError; RequestError for a key that no client could use.
    """
    values: dict[str, str] = {}
    labels: dict[str, str] = {}
    for name, value in given:
        if name == "label":
            label, equals, meant = value.partition("=")
            if not label or not equals:
                raise AskedError(f"label: expected NAME=VALUE, got {value!r}")
            if label in labels:
                raise AskedError(f"label: {label} given twice")
            labels[label] = meant
        elif name not in ("endpoint", "key", "tenant", "data_class", "priority", "session", "at"):
            raise AskedError(f"there is no parameter {name!r}")
        elif name in values:
            raise AskedError(f"{name}: given twice")
        else:
            values[name] = value
    endpoint = values.get("endpoint", "chat")
    if endpoint not in ENDPOINTS_ASKED:
        raise AskedError(
            f"endpoint: no endpoint with a JSON body is called {endpoint!r}; there are "
            f"{', '.join(ENDPOINTS_ASKED)}"
        )
    imagined = labels or values.keys() & {"tenant", "data_class", "priority"}
    found: Key | None = None
    if "key" in values:
        if imagined:
            raise AskedError(
                "key: it says tenant, data class, priority and labels: give the key or these, not both"
            )
        found = key(values["key"])
        if found is None or (found.expires is not None and wall >= found.expires):
            raise RequestError("invalid_api_key", f"no valid API key has the id {values['key'][:64]!r}")
    elif imagined:
        try:
            priority = int(values.get("priority", "0"))
        except ValueError:
            raise AskedError(f"priority: expected a whole number, got {values['priority']!r}") from None
        tenant, data_class = values.get("tenant", "default"), values.get("data_class", "public")
        try:
            found = imagined_key(tenant, data_class, priority, labels)
        except KeyFieldError as error:
            raise AskedError(str(error)) from None
    return Asked(endpoint, found, values.get("session", ""), values.get("at", ""))


def what_if(reading: Reading, body: RequestBody, asked: Asked) -> dict[str, Any]:
    """What `POST /explain` answers. Raises AskedError, and RequestError as a client would get it."""
    facts = _facts(reading, body, asked)
    if asked.key is not None:
        refusal = reading.refusal(asked.key, body, facts)
        if refusal is not None:
            raise RequestError(refusal.code, refusal.message, retry_after_s=refusal.retry_after_s)
    drawn = _drawn(reading, facts)
    trial, routing = _tried(reading, drawn[0][1] if drawn else facts)
    others = [(part, _tried(reading, its)[1]) for part, its in drawn[1:]]
    facts = routing.request
    chosen = routing.decision.backend if type(routing.decision) is Send else ""
    expected = next((one.ttft_s for one in routing.candidates if one.name == chosen and one.ttft_s > 0), None)
    decision = decision_shown(routing)
    decision["tiers"] = list(tiers(reading, routing))
    decision["others"] = dict(_others(reading, trial, routing))
    return {
        "request": {
            "endpoint": facts.endpoint,
            "model": body.model,
            "served_model": facts.model,
            "tenant": facts.tenant,
            "key_id": facts.key_id,
            "data_class": facts.data_class,
            "priority": facts.priority,
            "labels": dict(facts.labels),
            "has_session": bool(facts.session),
            "stream": facts.stream,
            "body_bytes": facts.body_bytes,
            "prompt_tokens": facts.prompt_tokens,
            "max_tokens": facts.max_tokens,
            "expected_tokens": facts.expected_tokens,
            "at": datetime.fromtimestamp(facts.wall, _zone(reading)).isoformat(timespec="seconds"),
        },
        "rules": list(_rules(trial.rules.rules, facts)),
        "decisions": [decision],
        "queue": _queue(reading, trial, routing),
        "answer": _answer(reading, body, routing),
        "forecast": {"ttft_s": expected, "completion_tokens": facts.expected_tokens},
        "parts": [
            _part_shown(part, of_part)
            for part, of_part in ([(drawn[0][0], routing), *others] if drawn else ())
        ],
        "notes": [BY_LOT] if drawn else [],
    }


def _tried(reading: Reading, facts: RequestFacts) -> tuple[DryRun, Routing]:
    """Raises AskedError."""
    try:
        trial = DryRun(reading.valve)
    except Exception as error:  # copying runs somebody else's code
        raise AskedError(f"what the policies would do is not known: one cannot be copied ({error})") from None
    return trial, trial.decide(facts, reading.now())


def _drawn(reading: Reading, facts: RequestFacts) -> list[tuple[Part, RequestFacts]]:
    """One like it for each part that its rule splits requests into by chance, the largest share first.

    Empty: it has a session, or there are no parts.
    """
    split = reading.valve.rules.rule_for(facts).split
    if split is None or facts.session:
        return []
    wanted = {index for index, part in enumerate(split.parts) if part.share > 0.0}
    found: list[tuple[Part, RequestFacts]] = []
    for number in range(_MOST_DRAWS):
        like = replace(facts, id=f"{facts.id} {number}")
        own = split.order(like)[0]
        if own in wanted:
            wanted.remove(own)
            found.append((split.parts[own], like))
        if not wanted:
            break
    return sorted(found, key=lambda drawn: -drawn[0].share)


def _part_shown(part: Part, routing: Routing) -> dict[str, Any]:
    decision = routing.decision
    return {
        "part": part.name,
        "share": part.share,
        "decision": type(decision).__name__.lower(),
        "backend": decision.backend if type(decision) is Send else None,
        "code": decision.code if type(decision) is Reject else None,
    }


def _facts(reading: Reading, body: RequestBody, asked: Asked) -> RequestFacts:
    """As `proxy/exchange.py` makes them. Raises AskedError and RequestError."""
    key, route = asked.key, BY_NAME[asked.endpoint]
    model = reading.aliases.get(body.model, body.model)
    check_model(key, body.model, model)
    facts = facts_of(
        body,
        route,
        model,
        key,
        op="what if",
        session=asked.session.encode("utf-8"),
        arrived=reading.now(),
        wall=_wall(reading, asked.at),
        total_s=reading.total_s,
        body_bytes=len(body.raw),
    )
    if wants_hashes(reading.fleet.needs, route):
        facts.prefix = prompt_hashes(body.raw, reading.salt)
    if body.previous_response:
        holder = reading.holder(body.previous_response, facts.tenant)
        if holder is None or holder not in reading.fleet.backends:
            message = f"there is no response {body.previous_response!r}"
            raise RequestError("response_not_found", message, "previous_response_id")
        facts.backend = holder
    return facts


def _zone(reading: Reading) -> timezone:
    """That of the policy file's times."""
    seconds = offset_seconds(reading.built.policy.file.utc_offset)
    return timezone(timedelta(seconds=seconds)) if seconds else UTC


def _wall(reading: Reading, at: str) -> float:
    """Unix time of `at`. Raises AskedError."""
    if not at:
        return reading.wall()
    zone = _zone(reading)
    clock = _CLOCK.fullmatch(at)
    try:
        if clock is not None:
            today = datetime.fromtimestamp(reading.wall(), zone)
            moment = today.replace(hour=int(clock[1]), minute=int(clock[2]), second=0, microsecond=0)
        else:
            moment = datetime.fromisoformat(at)
            moment = moment if moment.tzinfo else moment.replace(tzinfo=zone)
        wall = moment.timestamp()
        datetime.fromtimestamp(wall, zone)  # where the answer shows it, there has to be such a year
        return wall
    except (ValueError, OverflowError):
        raise AskedError(f"at: expected a time such as 23:00 or 2026-01-31T23:00, got {at[:64]!r}") from None


def _rules(rules: Sequence[Rule], facts: RequestFacts) -> Iterator[dict[str, Any]]:
    """Those that were looked at: the last one matches."""
    for rule in rules:
        why = why_not(rule.match, facts)
        yield {"rule": rule.name, "matches": not why, "why_not": why}
        if not why:
            return


def _queue(reading: Reading, trial: DryRun, routing: Routing) -> dict[str, Any] | None:
    """Of a request that is held: how many wait already, how long it waits at most, and for which standbys."""
    if type(routing.decision) is not Hold:
        return None
    request, cold = routing.request, routing.decided_by == STANDBY
    until = trial.rules.hold_until(request, trial.rules.rule_for(request), cold)
    asleep = trial.rules.candidates(request, trial.fleet).asleep if cold else ()
    return {
        "waiting": trial.waiting,
        "until_s": max(until - reading.now(), 0.0),
        "standbys": {name: standby_words(reading, trial.fleet[name]) for name in asleep},
    }


def _answer(reading: Reading, body: RequestBody, routing: Routing) -> dict[str, Any] | None:
    """The error that the client would get; None: it would get none of ours."""
    decision, facts = routing.decision, routing.request
    if type(decision) is not Reject:
        return None
    message = decision.reason or decision.code
    if decision.code == "model_not_found":
        message = no_model(body.model, facts.model, reading.fleet)
    return {
        "status": STATUS[decision.code],
        "code": decision.code,
        "message": message,
        "retry_after_s": decision.retry_after_s,
        "why": WHY.get(decision.code, ""),
    }


def _others(reading: Reading, trial: DryRun, routing: Routing) -> Iterator[tuple[str, str]]:
    """Backends that may serve the request and are no candidates, with the reason in words."""
    if routing.decided_by == "queue":
        return  # nobody was compared
    candidates = {candidate.name for candidate in routing.candidates}
    rule = trial.rules.rule_for(routing.request)
    for name, tier in tier_of(reading, routing).items():
        if name in candidates:
            continue
        if tier > routing.tier >= 0:
            yield name, "of a later tier"
        elif routing.waits and tier in routing.waits:
            yield name, f"its tier has room, but asks to wait: {routing.waits[tier] or 'no reason given'}"
        else:
            yield name, _absence(reading, trial.fleet[name], rule, tier, routing.decided_by)


def _absence(reading: Reading, backend: Backend, rule: Rule, tier: int, decided_by: str) -> str:
    reason, _ = unavailable(reading, backend)
    if reason:
        return reason
    now = reading.now()
    if backend.in_flight >= backend.slots:
        return f"no free slot: {backend.in_flight} of {backend.slots} in use"
    if backend.measuring_slots and backend.in_flight >= backend.measuring_slots:
        return f"it is being measured with {backend.measuring_slots} in flight at most"
    if (saturation := backend.saturation(now)) >= 1.0:
        return f"its engine is full: saturation {saturation:.2f}"
    host = rule.tiers[tier].host if tier >= 0 else None
    if host is not None and not host.accept(backend, now):
        return "its host is outside of the bounds that the tier's `host` sets"
    if decided_by == SHARES:
        return "its free slots are kept for other tenants"
    return "it was not asked"
