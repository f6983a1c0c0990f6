"""A proxy's ledger as a workload, and what the ledger says of how it went.

This room may not import the proxy's, so what is read here is whatever has the attributes of `LedgerRow`: the
command line hands in the rows of `proxy/records.py` as they are.

**Which rows are the workload.** Those that the router decided over: requests for text that were answered, cut, left
or failed, and those that it refused itself (`ROUTER_CODES`). Not those that never reached it (a key's limit, a bad
body), nor those that no backend ever worked on because an answer was kept.

**What a row does not know.** Of a request that was refused or failed, its lengths: the prompt is taken from the
bytes of its body, the answer from the router's forecast. Of an answer that was cut or whose client left, what would
have come after.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import ceil
from statistics import median
from typing import Any, Final, NamedTuple, Protocol

from policies.routing import Candidate
from sim.timings import Timing
from sim.traces.forms import EXPORT_UNIT
from sim.workload import Arrival, Workload

TEXT_ENDPOINTS: Final = frozenset(("chat", "completions", "responses", "messages"))
"""Those whose answers are generated text, which is what an engine of the simulator does."""
ROUTER_CODES: Final = frozenset(("data_class", "no_backend", "overloaded", "queue_full", "queue_timeout"))
"""Of the requests that were refused, those that the router refused: another policy may serve them."""
BYTES_PER_TOKEN: Final = 4
RTTS_KEPT: Final = 1000
"""Of one backend: the last ones."""
TIMINGS_KEPT: Final = 100_000

_SLOTS: Final = Candidate._fields.index("slots")
_RTT: Final = Candidate._fields.index("rtt_s")


class LedgerRow(Protocol):
    """One request in the ledger, by the names of `proxy.records.Row`."""

    arrived: float
    tenant: str
    key_id: str
    endpoint: str
    model: str
    served_model: str
    data_class: str
    session: str
    prefix: Sequence[int]
    stream: bool
    outcome: str
    code: str
    backend: str
    site: str
    rule: str
    candidates: Sequence[Sequence[Any]]
    attempts: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    expected_tokens: int
    body_bytes: int
    queue_s: float
    ttft_s: float | None
    total_s: float
    cost_nano: int
    currency: str


class Served(NamedTuple):
    """How one request went, in the ledger or in a simulation."""

    at: float
    """Unix time of its arrival."""
    stream: bool
    outcome: str
    """`ok`, `rejected`, `failed` or `gone`."""
    site: str
    """Empty: it reached none."""
    ttft_s: float | None
    tpot_s: float | None
    cost_nano: int | None
    """None: no price is known."""


@dataclass(slots=True)
class Seen:
    """What the ledger knows of one backend."""

    models: set[str] = field(default_factory=set)
    slots: int = 0
    """The last ones; 0: not known."""
    rtts: deque[float] = field(default_factory=lambda: deque(maxlen=RTTS_KEPT))
    timings: deque[Timing] = field(default_factory=lambda: deque(maxlen=TIMINGS_KEPT))
    """Of complete answers, `ttft` NaN where it was no stream; arrivals are those of the workload."""

    @property
    def rtt_s(self) -> float:
        """Median; 0: nobody has measured it."""
        return median(self.rtts) if self.rtts else 0.0


class InForce(NamedTuple):
    """The policy file that is simulated as the present one."""

    rules: frozenset[str]
    """Their names."""
    since: float
    """Unix time of its last change; 0: it never changes."""


@dataclass(slots=True)
class Past:
    """What was."""

    workload: Workload
    served: list[Served]
    """How each request of the workload went, in its order."""
    epoch: float
    """Unix time of its beginning."""
    backends: Mapping[str, Seen]
    notes: list[str]


def read_past(
    rows: Iterable[LedgerRow],
    aliases: Mapping[str, str] | None = None,
    keys: Mapping[str, tuple[int, Mapping[str, str]]] | None = None,
    present: InForce | None = None,
) -> Past:
    """From rows in order of arrival. `aliases`: name to model; `keys`: priority and labels by the id of a key;
    `present`: to note which of them another policy file has decided over.

    Raises ValueError: no row is one of the workload.
    """
    aliases, keys = aliases or {}, keys or {}
    arrivals: list[Arrival] = []
    served: list[Served] = []
    backends: defaultdict[str, Seen] = defaultdict(Seen)
    left_out: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    epoch = 0.0
    for row in rows:
        _learn(row, backends)
        if reason := _no_part(row):
            left_out[reason] += 1
            continue
        if not arrivals:
            epoch = row.arrived
        prompt, output = row.prompt_tokens, row.completion_tokens
        if not prompt or not output:
            counts["estimated"] += 1
            prompt = prompt or max(row.body_bytes // BYTES_PER_TOKEN, 1)
            output = output or max(row.expected_tokens, 1)
        elif row.outcome != "ok":
            counts["cut"] += 1
        counts["plain"] += not row.stream
        if present is not None:
            counts["before"] += row.arrived < present.since
            counts["other rule"] += bool(row.rule) and row.rule not in present.rules
        if row.key_id and row.key_id not in keys:
            counts["no key"] += 1
        priority, labels = keys.get(row.key_id, (0, {}))
        at = round((row.arrived - epoch) * 1e6)
        arrivals.append(
            Arrival(
                at,
                prompt,
                output,
                tuple(row.prefix[: prompt // EXPORT_UNIT]),
                tenant=row.tenant,
                model=row.served_model or aliases.get(row.model, row.model),
                data_class=row.data_class,
                priority=priority,
                session=row.session,
                labels=tuple(labels.items()),
                endpoint=row.endpoint,
                stream=row.stream,
            )
        )
        served.append(_served(row))
        if row.outcome == "ok" and row.attempts == 1 and output > 1:
            backends[row.backend].timings.append(_timing(row, at))
    if not arrivals:
        some = f"; left out are {_listed(left_out)}" if left_out else ""
        raise ValueError(f"no request for text is in this part of the ledger{some}")
    workload = Workload("the ledger", arrivals, EXPORT_UNIT)
    notes = [*_of_another_policy(len(arrivals), counts, present), *_notes(len(arrivals), left_out, counts)]
    return Past(workload, served, epoch, dict(backends), notes)


def _no_part(row: LedgerRow) -> str:
    """Why a row is no part of the workload; empty: it is."""
    if row.endpoint not in TEXT_ENDPOINTS:
        return "are for no text"
    if row.outcome == "rejected" and row.code not in ROUTER_CODES:
        return "were refused by a limit or for their key, before the router"
    if row.outcome == "client_error":
        return "were errors of their clients"
    if not row.attempts and row.outcome == "ok":
        return "were answered from what was kept"
    if not row.attempts and row.outcome in ("client_gone", "shutdown"):
        return "had left before they were sent anywhere"
    return ""


def _of_another_policy(count: int, counts: Counter[str], present: InForce | None) -> Iterator[str]:
    """Why what was may differ from the present file by more than the simulator's error."""
    if present is None:
        return
    if number := counts["before"]:
        since = datetime.fromtimestamp(ceil(present.since), UTC)
        yield (
            f"{number:,} of {count:,} requests came before the policy file was last changed: the file as it was "
            f"then decided over them; --from-ledger {since:%Y-%m-%dT%H:%M:%S} leaves them out"
        )
    if number := counts["other rule"]:
        yield f"{number:,} of {count:,} requests met a rule that the present policy file does not have"


def _notes(count: int, left_out: Counter[str], counts: Counter[str]) -> list[str]:
    notes = [f"{number:,} requests {reason}: left out" for reason, number in left_out.most_common()]
    if number := counts["estimated"]:
        notes.append(
            f"of {number:,} requests no lengths are known, since they were refused or failed: estimated from their "
            "bytes and the router's forecast"
        )
    if number := counts["cut"]:
        notes.append(
            f"{number:,} answers ended early, and do so again: what would have followed is not known"
        )
    if number := counts["plain"]:
        notes.append(
            f"{number:,} of {count:,} requests were no streams: nobody saw their first token, so times and "
            "goodput are those of the others"
        )
    if number := counts["no key"]:
        notes.append(f"of {number:,} requests the key is gone: priority 0 and no labels")
    notes.append(
        "requests come when they came, whatever became of those before; who never came, or was turned away before "
        "the ledger (no key, malformed), is not in it"
    )
    return notes


def _learn(row: LedgerRow, backends: defaultdict[str, Seen]) -> None:
    if row.backend and row.served_model:
        backends[row.backend].models.add(row.served_model)
    for candidate in row.candidates:
        if len(candidate) <= _RTT:
            continue
        seen = backends[candidate[0]]
        seen.slots = candidate[_SLOTS]
        if candidate[_RTT] > 0:
            seen.rtts.append(candidate[_RTT])


def _served(row: LedgerRow) -> Served:
    outcome = {"ok": "ok", "rejected": "rejected", "client_gone": "gone"}.get(row.outcome, "failed")
    tpot = None
    if outcome == "ok" and row.ttft_s is not None and row.completion_tokens > 1:
        tpot = (row.total_s - row.ttft_s) / (row.completion_tokens - 1)
    cost = row.cost_nano if row.currency else None
    return Served(row.arrived, row.stream, outcome, row.site, row.ttft_s, tpot, cost)


def _timing(row: LedgerRow, at: int) -> Timing:
    """As its backend saw it: without the time in the router's queue, and without what was cached of its prompt."""
    held = row.queue_s
    ttft = float("nan") if row.ttft_s is None else (row.ttft_s - held) * 1e6
    prompt = max(row.prompt_tokens - row.cached_tokens, 1)
    return Timing(at + round(held * 1e6), prompt, row.completion_tokens, ttft, (row.total_s - held) * 1e6)


def _listed(counts: Counter[str]) -> str:
    return "; ".join(f"{number:,} that {reason}" for reason, number in counts.most_common())
