"""One row per request: what the journal saves, the ledger keeps and an export writes.

A row becomes `values`, one flat tuple: the columns of the SQL table in the order of `COLUMNS` and, last, the
fields of `DETAIL` as one JSON array. The journal saves that tuple, SQL takes it as it is; nothing is encoded
twice. `DETAIL` may only ever grow at its end: an older row then has fewer elements, and its missing fields
take their defaults. Times are rounded to microseconds.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Final, TypeAlias

import orjson

OK: Final = "ok"
CLIENT_ERROR: Final = "client_error"
"""The client's fault: bad request, no key, unknown model, or the backend's own 4xx."""
REJECTED: Final = "rejected"
"""Refused by us: limit, budget, full queue, no backend, policy."""
BACKEND_FAILED: Final = "backend_failed"
"""No backend answered; nothing of an answer reached the client."""
CLIENT_GONE: Final = "client_gone"
"""The client left before the end; what was delivered is billed."""
CUT: Final = "cut"
"""The backend was lost after the first data event."""
SHUTDOWN: Final = "shutdown"
"""The proxy stopped before the answer had ended."""
LOST: Final = "lost"
"""The proxy died while it served this; written by the replay of the journal."""
OUTCOMES = (OK, CLIENT_ERROR, REJECTED, BACKEND_FAILED, CLIENT_GONE, CUT, SHUTDOWN, LOST)

INTEGER: Final[float] = 1.5 * 2**52
"""Added to a number below 2**51 and subtracted again it leaves the nearest integer, for a tenth of `round`: there
are no bits for a fraction beside it."""

FAILED = (BACKEND_FAILED, CUT, SHUTDOWN, LOST)
"""Neither served nor refused: no client is to blame, and no limit."""

DATA_CLASS: Final = r"[a-z0-9][a-z0-9_-]{0,63}"
"""What a key may have as its data class, and a site may accept."""

USAGE_SOURCES = ("reported", "counted", "estimated", "none")


@dataclass(slots=True)
class Row:
    """One request, rejected ones too. Not to be changed any more once the journal has closed it."""

    op: str
    """Operation id, unique for ever: the idempotency key of the ledger. Minted by `OperationIds`."""
    instance: str = ""
    """The journal that holds it: one per state directory."""
    arrived: float = 0.0
    """Unix time, seconds."""
    tenant: str = ""
    key_id: str = ""
    endpoint: str = ""
    model: str = ""
    """As the client asked."""
    served_model: str = ""
    """As backends name it; empty while the asked one is not resolved."""
    data_class: str = ""
    session: str = ""
    """Salted hash of the affinity key, or empty."""
    prefix: Sequence[int] = ()
    """Salted hashes of the prompt's leading blocks; each below 2**63."""
    stream: bool = False
    status: int = 0
    """HTTP status sent to the client; 0: none was."""
    outcome: str = OK
    code: str = ""
    """Our error code, or empty."""
    backend: str = ""
    site: str = ""
    rule: str = ""
    policy: str = ""
    reason: str = ""
    propensity: float = 1.0
    candidates: Sequence[Sequence[Any]] = ()
    """The figures that the decision used, one list per backend considered."""
    attempts: int = 0
    """Backends that this request was sent to."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Those of `prompt_tokens` that came from a prefix cache."""
    completion_tokens: int = 0
    usage_source: str = "none"
    overhead_prompt_tokens: int = 0
    """Tokens of failed or lost attempts: metered, not billed to the client."""
    overhead_completion_tokens: int = 0
    max_tokens: int = 0
    expected_tokens: int = 0
    body_bytes: int = 0
    queue_s: float = 0.0
    ttft_s: float | None = None
    total_s: float = 0.0
    overhead_s: float = 0.0
    """Our own part of `total_s`."""
    cost_nano: int = 0
    """Nano-units (1e-9) of `currency`."""
    currency: str = ""
    """Empty: no price was known, the cost is 0 and nobody invented it."""
    hedge: str = ""
    """What became of a second attempt for a late first token: `won at NAME`, `lost at NAME`, `failed at NAME`."""
    audio_s: float | None = None
    """Seconds of sound, where the backend tells them in place of tokens."""
    unmetered: str = ""
    """Why an answer of sound or pictures has no tokens; empty: it has, or is none."""


COLUMNS = (
    "op",
    "instance",
    "arrived_us",
    "tenant",
    "key_id",
    "served_model",
    "backend",
    "site",
    "status",
    "outcome",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "overhead_prompt_tokens",
    "overhead_completion_tokens",
    "cost_nano",
    "currency",
    "ttft_s",
    "total_s",
)
"""What is queried or summed: columns of their own. `arrived_us` is `Row.arrived` in integer microseconds."""

DETAIL = (
    "endpoint",
    "model",
    "data_class",
    "session",
    "prefix",
    "stream",
    "code",
    "rule",
    "policy",
    "reason",
    "propensity",
    "candidates",
    "attempts",
    "usage_source",
    "max_tokens",
    "expected_tokens",
    "body_bytes",
    "queue_s",
    "overhead_s",
    "hedge",
    "audio_s",
    "unmetered",
)
"""The rest: elements of the JSON array in the column `detail`."""

HEAD = (
    "op",
    "instance",
    "arrived",
    "tenant",
    "key_id",
    "endpoint",
    "model",
    "served_model",
    "data_class",
    "session",
    "stream",
    "backend",
    "site",
    "rule",
    "policy",
    "attempts",
    "max_tokens",
    "body_bytes",
)
"""What is saved of a request when it is dispatched: enough to say whose it was, should nothing more be known."""

FIELDS = tuple(field.name for field in fields(Row))

Head: TypeAlias = Sequence[Any]
"""The fields of `HEAD`."""

Values: TypeAlias = tuple[Any, ...]
"""`COLUMNS`, then the detail as JSON text: the parameters of one SQL row."""

MOST_TOKENS = 2**31 - 1
MOST_NANO = 2**50
"""Bounds of one row. A backend that reports more is lying, and must not make the sums overflow 64 bits."""

_TOKENS = tuple(name for name in COLUMNS if name.endswith("_tokens"))


# The fields are read one by one, in the order of the names above (tests compare them): an interpreted attribute
# costs 4 ns, one that `attrgetter` fetches 11.


def to_head(row: Row) -> Head:
    """The fields of `HEAD`."""
    return (
        row.op,
        row.instance,
        row.arrived,
        row.tenant,
        row.key_id,
        row.endpoint,
        row.model,
        row.served_model,
        row.data_class,
        row.session,
        row.stream,
        row.backend,
        row.site,
        row.rule,
        row.policy,
        row.attempts,
        row.max_tokens,
        row.body_bytes,
    )


def to_values(row: Row) -> Values:
    """Flatten a row. What does not fit (numbers out of bounds, foreign types) is made to fit, never refused."""
    try:
        # One test for five bounds: a negative number keeps its sign when shifted.
        tokens = row.prompt_tokens | row.cached_tokens | row.completion_tokens
        overhead = row.overhead_prompt_tokens | row.overhead_completion_tokens
        if not (tokens | overhead) >> 31 and not row.cost_nano >> 50:
            return _flatten(row)
    except TypeError:
        pass
    return _flatten(_repaired(row))


def as_json(row: Row) -> bytes:
    """A JSON object with every field, as an export has it."""
    # Not given to orjson as it is: it looks into dataclasses, and a compiled one is none.
    return orjson.dumps({name: getattr(row, name) for name in FIELDS})


def plain(value: Any) -> Any:
    """The nearest value that JSON and SQL have: 64-bit integers, floats, valid Unicode, lists."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return max(-(2**63), min(int(value), 2**63 - 1))
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return plain(str(value))


def _flatten(row: Row) -> Values:
    ttft_s = row.ttft_s
    return (
        row.op,
        row.instance,
        round(row.arrived * 1e6),
        row.tenant,
        row.key_id,
        row.served_model,
        row.backend,
        row.site,
        row.status,
        row.outcome,
        row.prompt_tokens,
        row.cached_tokens,
        row.completion_tokens,
        row.overhead_prompt_tokens,
        row.overhead_completion_tokens,
        row.cost_nano,
        row.currency,
        None if ttft_s is None else (ttft_s * 1e6 + INTEGER - INTEGER) / 1e6,
        (row.total_s * 1e6 + INTEGER - INTEGER) / 1e6,
        orjson.dumps(_detail(row)).decode(),
    )


def _detail(row: Row) -> tuple[Any, ...]:
    """The fields of `DETAIL`."""
    return (
        row.endpoint,
        row.model,
        row.data_class,
        row.session,
        row.prefix,
        row.stream,
        row.code,
        row.rule,
        row.policy,
        row.reason,
        row.propensity,
        row.candidates,
        row.attempts,
        row.usage_source,
        row.max_tokens,
        row.expected_tokens,
        row.body_bytes,
        (row.queue_s * 1e6 + INTEGER - INTEGER) / 1e6,
        (row.overhead_s * 1e6 + INTEGER - INTEGER) / 1e6,
        row.hedge,
        row.audio_s,
        row.unmetered,
    )


def _repaired(row: Row) -> Row:
    copy = Row(**{name: plain(getattr(row, name)) for name in FIELDS})
    for name in _TOKENS:
        setattr(copy, name, max(0, min(getattr(copy, name), MOST_TOKENS)))
    copy.cost_nano = max(0, min(copy.cost_nano, MOST_NANO))
    return copy


def from_values(values: Sequence[Any]) -> Row:
    """The row that `to_values` flattened, to the microsecond of its arrival."""
    row = Row(op=values[0], instance=values[1], arrived=values[2] / 1e6)
    for name, value in zip(COLUMNS[3:], values[3:], strict=False):
        setattr(row, name, value)
    for name, value in zip(DETAIL, orjson.loads(values[-1]), strict=False):
        setattr(row, name, value)
    return row


def from_head(head: Head) -> Row:
    """The row that `to_head` had, as far as it is known."""
    return Row(**dict(zip(HEAD, head, strict=False)))


class OperationIds:
    """Mints operation ids: unique over restarts and instances, growing, telling nobody how many there are.

    An id is 12 hex digits of Unix milliseconds, 10 of a random number drawn per process, and 3 that count
    within the millisecond. The time never goes back, whatever the clock does, so ids of one process grow and
    an index over them is written at its end.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._process = secrets.token_hex(5)
        self._ms = 0
        self._count = 0
        self._prefix = ""
        """Of all ids of this millisecond."""

    def mint(self) -> str:
        """A new id, 25 hex digits."""
        ms = int(self._clock() * 1000)
        if ms <= self._ms and self._count < 0xFFF:
            self._count += 1
        else:
            self._ms = max(ms, self._ms + 1)
            self._count = 0
            self._prefix = f"{self._ms:012x}{self._process}"
        return self._prefix + _COUNTS[self._count]


_COUNTS = [f"{count:03x}" for count in range(0x1000)]
