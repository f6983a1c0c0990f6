"""The tables of the database, as SQLAlchemy sees them. `migrations/` makes them; a test compares the two.

Only types and operations that SQLite and PostgreSQL share. Times count from the Unix epoch, in seconds unless
the name says otherwise; money is integer nano-units.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    ColumnElement,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    and_,
    case,
    cast,
    func,
)

from proxy.records import CLIENT_GONE, FAILED, OK

metadata = MetaData()

# SQLite makes only an INTEGER primary key its row id.
RowId = BigInteger().with_variant(Integer, "sqlite")

ledger = Table(
    "ledger",
    metadata,
    Column("id", RowId, primary_key=True, autoincrement=True),
    Column("op", Text, nullable=False),
    Column("instance", Text, nullable=False),
    Column("arrived_us", BigInteger, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("served_model", Text, nullable=False),
    Column("backend", Text, nullable=False),
    Column("site", Text, nullable=False),
    Column("status", SmallInteger, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("overhead_prompt_tokens", BigInteger, nullable=False),
    Column("overhead_completion_tokens", BigInteger, nullable=False),
    Column("cost_nano", BigInteger, nullable=False),
    Column("currency", Text, nullable=False),
    Column("ttft_s", Float(53), nullable=True),
    Column("total_s", Float(53), nullable=False),
    Column("detail", Text, nullable=False),
    Index("ledger_op", "op", unique=True),
    Index("ledger_arrived", "arrived_us"),
)
"""One row per request; `records.py` says what the fields are. `op` is what makes every insert idempotent."""

usage_hourly = Table(
    "usage_hourly",
    metadata,
    Column("hour", BigInteger, primary_key=True, autoincrement=False),
    Column("tenant", Text, primary_key=True),
    Column("key_id", Text, primary_key=True),
    Column("model", Text, primary_key=True),
    Column("backend", Text, primary_key=True),
    Column("site", Text, primary_key=True),
    Column("currency", Text, primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("errors", BigInteger, nullable=False),
    Column("unpriced", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("overhead_prompt_tokens", BigInteger, nullable=False),
    Column("overhead_completion_tokens", BigInteger, nullable=False),
    Column("cost_nano", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False, server_default="0"),
    sqlite_with_rowid=False,
)
"""Sums of `ledger` by hour of arrival (`hour`: Unix seconds at which it begins), added to in the transaction
that inserts the rows. `model` is the served one, empty for requests that reached no backend."""

HOUR_US = 3_600_000_000

HOURLY_GROUPS: dict[str, ColumnElement[Any]] = {
    "hour": ledger.c.arrived_us // HOUR_US * 3600,
    "tenant": ledger.c.tenant,
    "key_id": ledger.c.key_id,
    # What reached no backend may name a model that only its client knows: those must not grow the table.
    "model": case((ledger.c.backend == "", ""), else_=ledger.c.served_model),
    "backend": ledger.c.backend,
    "site": ledger.c.site,
    "currency": ledger.c.currency,
}
"""Key columns of `usage_hourly`, as expressions over `ledger`."""


def _total(amount: ColumnElement[Any]) -> ColumnElement[Any]:
    return cast(func.sum(amount), BigInteger)  # PostgreSQL sums bigint to numeric


HOURLY_SUMS: dict[str, ColumnElement[Any]] = {
    "requests": func.count(),
    "errors": _total(case((ledger.c.outcome.in_((OK, CLIENT_GONE)), 0), else_=1)),
    "unpriced": _total(
        case(
            (and_(ledger.c.currency == "", ledger.c.prompt_tokens + ledger.c.completion_tokens > 0), 1),
            else_=0,
        )
    ),
    "prompt_tokens": _total(ledger.c.prompt_tokens),
    "cached_tokens": _total(ledger.c.cached_tokens),
    "completion_tokens": _total(ledger.c.completion_tokens),
    "overhead_prompt_tokens": _total(ledger.c.overhead_prompt_tokens),
    "overhead_completion_tokens": _total(ledger.c.overhead_completion_tokens),
    "cost_nano": _total(ledger.c.cost_nano),
    "failed": _total(case((ledger.c.outcome.in_(FAILED), 1), else_=0)),
}
"""The other columns of `usage_hourly`, as sums over a group of `ledger`."""

capacity_hourly = Table(
    "capacity_hourly",
    metadata,
    Column("hour", BigInteger, primary_key=True, autoincrement=False),
    Column("run", Text, primary_key=True),
    Column("standby", Text, nullable=False),
    Column("site", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("plan", Text, nullable=False),
    Column("template", Text, nullable=False),
    Column("started", Float(53), nullable=False),
    Column("until", Float(53), nullable=False),
    Column("seconds", Float(53), nullable=False),
    Column("cost_nano", BigInteger, nullable=False),
    Column("currency", Text, nullable=False),
    Index("capacity_hourly_run", "run"),
    sqlite_with_rowid=False,
)
"""What each run of a standby has taken within each hour (`hour`: Unix seconds at which it begins): `seconds` of
capacity, and what they cost; `currency` empty: the price is not known. `until`: Unix time up to which the run is
counted. `model`: all of them, joined by commas."""

keys = Table(
    "keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    Column("created", Float(53), nullable=False),
    Column("expires", Float(53), nullable=True),
    Column("revoked", Float(53), nullable=True),
    Column("data_class", Text, nullable=False),
    Column("models", JSON(none_as_null=True), nullable=True),
    Column("rpm", Integer, nullable=True),
    Column("tpm", Integer, nullable=True),
    Column("concurrency", Integer, nullable=True),
    Column("budget_nano", BigInteger, nullable=True),
    Column("priority", Integer, nullable=False, server_default="0"),
    Column("labels", JSON, nullable=False, server_default="{}"),
)
"""API keys. `digest` is the keyed hash of the secret, which is nowhere; `created`, `expires`, `revoked` are Unix
seconds; `models` None: all of them; a limit that is None does not limit."""

settings = Table(
    "settings",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
)
"""Single values that outlive a process, such as the salt of hashes and the pepper of keys (hex)."""
