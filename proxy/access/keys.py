"""API keys: what they look like, how they are kept, how a request's key is recognised.

A key is `tg_<id>_<secret>_<checksum>`: 10, 43 and 6 characters of base 62, always 64 bytes in all. The prefix
and the CRC-32 of all that precedes it let secret scanners find leaked keys without false alarms, and turn a
mistyped key away before anything is looked up. The id is public and names the key in lists, logs and the
ledger. The secret has 256 bits of randomness and is shown once.

The database holds the id and BLAKE2b(id and secret) under a key of its own, the *pepper*: 32 random bytes in
a file of the state directory. A stolen database alone can neither be searched for keys nor used to make one,
and a digest copied to another row is worth nothing there. Since the secret is random in full there is nothing
to stretch (as argon2 does for passwords).

All keys are held in memory, so recognising one touches no database. `refresh` reads them again when the
database says that they changed: whoever changes a key writes a new random `keys_version` in the same
transaction.

Nothing here puts a secret, or a credential that was offered, in a log, a `repr` or an exception.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
import time
import zlib
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from proxy.access.pepper import PepperError
from proxy.records import DATA_CLASS
from proxy.tables import keys as keys_table
from proxy.tables import settings as settings_table

ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
ID_LENGTH = 10
SECRET_LENGTH = 43
"""62 ** 43 > 2 ** 256."""

NANO = 1_000_000_000
"""Nano-units in one unit of the ledger's currency."""

YEAR_10000 = 253_402_300_800
"""Unix time at which calendars end: beyond it no date can be shown."""

MAX_TEXT = 256
"""Longest tenant, name, model or label, characters."""

LEAST_PRIORITY, MOST_PRIORITY = -(2**31), 2**31 - 1

_CREDENTIAL = re.compile(
    rb"(?:(?i:bearer) ++)?(tg_([0-9A-Za-z]{10})_[0-9A-Za-z]{43})_([0-9A-Za-z]{6})"
).fullmatch
_ID = re.compile(r"[0-9A-Za-z]{10}").fullmatch
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*").fullmatch
_WORD = re.compile(DATA_CLASS).fullmatch
_PAIRS = [(a + b).encode() for a in ALPHABET for b in ALPHABET]


class KeyFieldError(ValueError):
    """A field of a new key has a value it cannot have; the message begins with the field's name."""

    def __init__(self, field_name: str, problem: str) -> None:
        super().__init__(f"{field_name}: {problem}")
        self.field = field_name


class UnknownKeyError(LookupError):
    """No key has this id."""


@dataclass(frozen=True, slots=True)
class Key:
    """What a request may do: everything about a key except its secret."""

    id: str
    tenant: str
    name: str = ""
    data_class: str = "public"
    models: frozenset[str] | None = None
    """Models it may use; None: all."""
    rpm: int | None = None
    tpm: int | None = None
    """Requests and tokens per minute; None: no limit."""
    concurrency: int | None = None
    """Requests at once; None: no limit."""
    budget_nano: int | None = None
    """Money per calendar month, nano-units of the ledger's currency; None: no limit."""
    priority: int = 0
    """Higher goes first."""
    labels: Mapping[str, str] = field(default_factory=dict)
    expires: float | None = None
    """Unix time from which it is refused; None: never."""


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key as an admin sees it in a list."""

    key: Key
    created: float
    """Unix time."""
    revoked: float | None
    """Unix time; None: it is not revoked."""

    def status(self, now_unix: float) -> str:
        """`active`, `expired` or `revoked`."""
        if self.revoked is not None:
            return "revoked"
        expires = self.key.expires
        return "active" if expires is None or now_unix < expires else "expired"


class KeyStore:
    """All keys of a database, in memory, ready to recognise requests by."""

    def __init__(self, engine: sa.Engine, pepper: bytes) -> None:
        """Reads all keys. Raises PepperError when they were made with another pepper."""
        self._engine = engine
        self._hasher = _hasher(pepper)
        self._nobody: tuple[bytes, Key | None] = (secrets.token_bytes(self._hasher.digest_size), None)
        self._keys: dict[bytes, tuple[bytes, Key | None]] = {}
        self._version: str | None = ""
        self._empty = True
        self.has_budgets = False
        """Whether some key that is not revoked has a budget."""
        self.trouble = ""
        """Why the keys could not be read when they were last looked at; empty: they were."""
        with engine.connect() as connection:
            _check_pepper(_setting(connection, "pepper_check"), pepper)
        self.refresh()

    @property
    def empty(self) -> bool:
        """Whether no key was ever made: only then may requests come without one.

        A revoked or expired key still counts: revoking the last one must not open the door.
        """
        return self._empty

    @property
    def version(self) -> str | None:
        """Changes when `refresh` has read other keys: what was decided by the old ones must be decided anew."""
        return self._version

    @property
    def ids(self) -> Set[str]:
        """Ids of the keys that are not revoked."""
        return {key.id for _, key in self._keys.values() if key is not None}

    def find(self, key_id: str) -> Key | None:
        """The key with this id; None: there is none, or it is revoked."""
        return self._keys.get(key_id.encode(), self._nobody)[1]

    def authenticate(self, credential: bytes | None, now_unix: float) -> Key | None:
        """The key a request carries; None: none, malformed, mistyped, unknown, wrong, revoked or expired.

        `credential` is the value of `Authorization` (its scheme `Bearer`, in any case, may be left out) or of
        `x-api-key`. An unknown id takes the same steps as a wrong secret, so neither timing nor answer tells
        which ids exist. Nothing is kept of what was refused.
        """
        match = _CREDENTIAL(credential) if credential is not None else None
        if match is None:
            return None
        body, key_id, checksum = match.groups()
        if _checksum(body) != checksum:
            return None
        digest, key = self._keys.get(key_id, self._nobody)
        if not hmac.compare_digest(_digest(self._hasher, body), digest) or key is None:
            return None
        if key.expires is not None and now_unix >= key.expires:
            return None
        return key

    def refresh(self) -> bool:
        """Read the keys again if they changed, seen by one small query. True: they did.

        Safe in another thread than `authenticate`: the new keys replace the old ones in one assignment. When
        the database cannot be read, SQLAlchemy's error passes through and the keys known so far remain.
        """
        with self._engine.connect() as connection:
            # The version first: a change between the two reads is then seen by the next refresh.
            version = _setting(connection, "keys_version")
            if version == self._version:
                return False
            rows = _rows(connection, sa.select(keys_table))
        self._keys = {row.id.encode(): (row.digest, _key(row)) for row in rows if row.revoked is None}
        self._empty = not rows
        self.has_budgets = any(row.revoked is None and row.budget_nano is not None for row in rows)
        self._version = version
        return True


def create_key(
    engine: sa.Engine,
    pepper: bytes,
    *,
    tenant: str,
    name: str = "",
    data_class: str = "public",
    models: Iterable[str] | None = None,
    rpm: int | None = None,
    tpm: int | None = None,
    concurrency: int | None = None,
    budget: Decimal | str | float | None = None,
    priority: int = 0,
    labels: Mapping[str, str] | None = None,
    expires: float | None = None,
) -> tuple[str, Key]:
    """Make a key. Returns its text, which exists nowhere else from now on, and what it may do.

    `budget` is in units of the ledger's currency per calendar month, `expires` Unix time. Raises
    KeyFieldError, naming the field, and PepperError when the database's keys were made with another pepper.
    """
    now = time.time()
    key = Key(
        id=_random_text(ID_LENGTH),
        tenant=_tenant(tenant),
        name=_text("name", name) if name else "",
        data_class=_data_class(data_class),
        models=_models(models),
        rpm=_limit("rpm", rpm),
        tpm=_limit("tpm", tpm),
        concurrency=_limit("concurrency", concurrency),
        budget_nano=_budget(budget),
        priority=_integer("priority", priority, LEAST_PRIORITY, MOST_PRIORITY),
        labels=_labels(labels),
        expires=_expires(expires, now),
    )
    body = f"tg_{key.id}_{_random_text(SECRET_LENGTH)}".encode()
    with engine.begin() as connection:
        connection.execute(
            keys_table.insert().values(
                id=key.id,
                tenant=key.tenant,
                name=key.name,
                digest=_digest(_hasher(pepper), body),
                created=now,
                expires=key.expires,
                data_class=key.data_class,
                models=None if key.models is None else sorted(key.models),
                rpm=key.rpm,
                tpm=key.tpm,
                concurrency=key.concurrency,
                budget_nano=key.budget_nano,
                priority=key.priority,
                labels=key.labels,
            )
        )
        _set_setting(connection, "pepper_check", _pepper_check(pepper), replace=False)
        _check_pepper(_setting(connection, "pepper_check"), pepper)
        _mark_changed(connection)
    return (body + b"_" + _checksum(body)).decode(), key


def imagined_key(tenant: str, data_class: str, priority: int, labels: Mapping[str, str]) -> Key:
    """A key that is not kept and has no id. Raises KeyFieldError as `create_key` does."""
    return Key(
        "",
        _tenant(tenant),
        data_class=_data_class(data_class),
        priority=_integer("priority", priority, LEAST_PRIORITY, MOST_PRIORITY),
        labels=_labels(labels),
    )


def list_keys(engine: sa.Engine) -> list[StoredKey]:
    """All keys ever made, oldest first."""
    with engine.connect() as connection:
        rows = _rows(connection, sa.select(keys_table).order_by(keys_table.c.created, keys_table.c.id))
    return [StoredKey(_key(row), row.created, row.revoked) for row in rows]


def revoke_key(engine: sa.Engine, key_id: str) -> bool:
    """Refuse a key from now on, for good. True: it is revoked now; False: it was already.

    Raises UnknownKeyError, and KeyFieldError for what cannot be an id: it is not repeated, for it may be a
    secret.
    """
    if not _ID(key_id):
        raise KeyFieldError(
            "id", "must be the 10 letters and digits between `tg_` and the next `_` of the key"
        )
    row = keys_table.c.id == key_id
    with engine.begin() as connection:
        update = keys_table.update().where(row, keys_table.c.revoked.is_(None)).values(revoked=time.time())
        if connection.execute(update).rowcount:
            _mark_changed(connection)
            return True
        if connection.execute(sa.select(keys_table.c.id).where(row)).first() is None:
            raise UnknownKeyError(f"there is no key with the id {key_id}")
    return False


def _hasher(pepper: bytes) -> hashlib.blake2b:
    """Keyed once; a copy of it hashes faster than a new one."""
    return hashlib.blake2b(key=pepper, digest_size=32)


def _digest(hasher: hashlib.blake2b, body: bytes) -> bytes:
    copy = hasher.copy()
    copy.update(body)
    return copy.digest()


def _checksum(body: bytes) -> bytes:
    """CRC-32 as six characters of base 62, two at a time."""
    rest, low = divmod(zlib.crc32(body), 3844)
    high, middle = divmod(rest, 3844)
    return _PAIRS[high] + _PAIRS[middle] + _PAIRS[low]


def _random_text(length: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


def _rows(connection: sa.Connection, statement: sa.Select[Any]) -> list[Any]:
    """Rows of any kind: `sa.Row` is declared to be a tuple and is none, so compiled code would refuse it."""
    result: Any = connection.execute(statement)
    return list(result)


def _key(row: Any) -> Key:
    return Key(
        id=row.id,
        tenant=row.tenant,
        name=row.name,
        data_class=row.data_class,
        models=None if row.models is None else frozenset(row.models),
        rpm=row.rpm,
        tpm=row.tpm,
        concurrency=row.concurrency,
        budget_nano=row.budget_nano,
        priority=row.priority,
        labels=row.labels or {},
        expires=row.expires,
    )


_SETTING = sa.select(settings_table.c.value).where(settings_table.c.name == sa.bindparam("setting"))
"""Built once: a running proxy asks it twice a second."""


def _setting(connection: sa.Connection, name: str) -> str | None:
    value: str | None = connection.execute(_SETTING, {"setting": name}).scalar()
    return value


def _set_setting(connection: sa.Connection, name: str, value: str, *, replace: bool) -> None:
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    statement = insert(settings_table).values(name=name, value=value)
    index = [settings_table.c.name]
    connection.execute(
        statement.on_conflict_do_update(index_elements=index, set_={"value": value})
        if replace
        else statement.on_conflict_do_nothing(index_elements=index)
    )


def _mark_changed(connection: sa.Connection) -> None:
    # Random and not counted up: needs no reading first, and two writers at once cannot write the same.
    _set_setting(connection, "keys_version", secrets.token_hex(8), replace=True)


def _pepper_check(pepper: bytes) -> str:
    """Tells one pepper from another and nothing about it."""
    return _digest(_hasher(pepper), b"tidegate pepper").hex()


def _check_pepper(check: str | None, pepper: bytes) -> None:
    if check is not None and check != _pepper_check(pepper):
        raise PepperError(
            "the keys of this database were made with another pepper: restore the file `pepper` of the state "
            "directory that they were made in"
        )


def _text(field_name: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise KeyFieldError(field_name, "must be text and not empty")
    if len(value) > MAX_TEXT or not value.isprintable() or value != value.strip():
        raise KeyFieldError(
            field_name, f"must be at most {MAX_TEXT} printable characters without spaces at its ends"
        )
    return value


def _tenant(value: object) -> str:
    """A word, as names in the configuration are: it stands in logs, metrics and options of commands."""
    tenant = _text("tenant", value)
    if _TENANT(tenant) is None:
        raise KeyFieldError("tenant", "is made of letters (A to Z), digits, '.', '_' and '-'")
    return tenant


def _integer(field_name: str, value: object, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise KeyFieldError(field_name, f"must be a whole number from {low} to {high}, not {value!r}")
    return value


def _limit(field_name: str, value: object) -> int | None:
    return None if value is None else _integer(field_name, value, 1, 2**31 - 1)


def _data_class(value: object) -> str:
    if not isinstance(value, str) or not _WORD(value):
        raise KeyFieldError("data_class", "must be a word such as public, internal or restricted")
    return value


def _models(value: Iterable[str] | None) -> frozenset[str] | None:
    if value is None:
        return None
    if isinstance(value, str):
        raise KeyFieldError("models", "must be a list of names")
    models = frozenset(_text("models", model) for model in value)
    if not models:
        raise KeyFieldError("models", "must name at least one model; leave it out to allow all")
    return models


def _labels(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise KeyFieldError("labels", "must be pairs of a name and a value")
    return {_text("labels", label): _text("labels", mark) for label, mark in value.items()}


def _budget(value: object) -> int | None:
    if value is None:
        return None
    problem = f"must be an amount above 0 with at most 9 decimals, not {value!r}"
    try:
        amount = Decimal(str(value))
        if not amount.is_finite() or amount.quantize(Decimal("1e-9")) != amount:
            raise KeyFieldError("budget", problem)
    except InvalidOperation:
        raise KeyFieldError("budget", problem) from None
    nano = int(amount * NANO)
    if not 0 < nano < 2**63:
        raise KeyFieldError("budget", problem)
    return nano


def _expires(value: object, now: float) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not now < value < YEAR_10000:
        raise KeyFieldError(
            "expires", f"must be a Unix time in the future, before the year 10000, not {value!r}"
        )
    return float(value)
