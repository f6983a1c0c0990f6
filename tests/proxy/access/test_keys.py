from __future__ import annotations

import hmac
import logging
import string
import time
import zlib
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from proxy.access import keys
from proxy.access.keys import (
    Key,
    KeyFieldError,
    KeyStore,
    UnknownKeyError,
    create_key,
    list_keys,
    revoke_key,
)
from proxy.access.pepper import PepperError
from proxy.database import open_database
from proxy.tables import keys as keys_table
from proxy.tables import settings as settings_table
from tests.databases import NewDatabase, url_of

PEPPER = bytes(range(32))
BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase


def key_text(key_id: str, secret: str) -> str:
    """A well-formed key, put together without the code under test."""
    body = f"tg_{key_id}_{secret}"
    checksum, digits = zlib.crc32(body.encode()), ""
    for _ in range(6):
        checksum, digit = divmod(checksum, 62)
        digits = BASE62[digit] + digits
    return f"{body}_{digits}"


@pytest.fixture
def engine(tmp_path: Path, new_database: NewDatabase) -> Iterator[sa.Engine]:
    engine = new_database(tmp_path)
    yield engine
    engine.dispose()


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory, new_database: NewDatabase
) -> Iterator[tuple[KeyStore, str]]:
    """A store with one key, for tests that change nothing."""
    engine = new_database(tmp_path_factory.mktemp("state"))
    text, _ = create_key(engine, PEPPER, tenant="acme")
    yield KeyStore(engine, PEPPER), text
    engine.dispose()


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the costly steps that authentication takes."""
    steps: list[str] = []
    digest, compare = keys._digest, hmac.compare_digest

    def counted_digest(hasher: Any, body: bytes) -> bytes:
        steps.append("digest")
        return digest(hasher, body)

    def counted_compare(one: bytes, other: bytes) -> bool:
        steps.append(f"compare {len(one)} {len(other)}")
        return compare(one, other)

    monkeypatch.setattr(keys, "_digest", counted_digest)
    monkeypatch.setattr("hmac.compare_digest", counted_compare)
    return steps


# -- text


def test_a_key_has_the_form_that_scanners_know(engine: sa.Engine) -> None:
    text, key = create_key(engine, PEPPER, tenant="acme")
    prefix, key_id, secret, _ = text.split("_")
    assert len(text) == 64
    assert (prefix, key_id, len(secret)) == ("tg", key.id, 43)
    assert text == key_text(key_id, secret)
    assert set(key_id + secret) <= set(BASE62)


def test_keys_differ(engine: sa.Engine) -> None:
    texts = {create_key(engine, PEPPER, tenant="acme")[0] for _ in range(5)}
    assert len({text.split("_")[1] for text in texts}) == 5
    assert len({text.split("_")[2] for text in texts}) == 5


@pytest.mark.parametrize("form", ["{}", "Bearer {}", "bearer {}", "BEARER   {}"])
def test_a_key_is_recognised(shared: tuple[KeyStore, str], form: str) -> None:
    store, text = shared
    key = store.authenticate(form.format(text).encode(), 0.0)
    assert key is not None
    assert key.tenant == "acme"
    assert key.id == text[3:13]


@pytest.mark.parametrize(
    "form", ["Basic {}", "Bearer{}", " {}", "{} ", "{}\n", "Bearer {},", "{0}{0}", "Bearer\t{}"]
)
def test_a_key_in_other_dress_is_not(shared: tuple[KeyStore, str], form: str) -> None:
    store, text = shared
    assert store.authenticate(form.format(text).encode(), 0.0) is None


@pytest.mark.parametrize(
    "credential", [None, b"", b"Bearer ", b"sk-1234", b"tg_", b"\xff" * 64, b"Bearer " * 9000]
)
def test_no_key_at_all(shared: tuple[KeyStore, str], credential: bytes | None) -> None:
    assert shared[0].authenticate(credential, 0.0) is None


@given(st.binary(max_size=200))
def test_no_bytes_are_an_error(shared: tuple[KeyStore, str], credential: bytes) -> None:
    assert shared[0].authenticate(credential, 0.0) is None


@given(position=st.integers(0, 63), typed=st.sampled_from(BASE62 + "_- é"))
def test_a_typo_is_turned_away_without_hashing(
    shared: tuple[KeyStore, str], position: int, typed: str
) -> None:
    store, text = shared
    mistyped = text[:position] + typed + text[position + 1 :]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "_digest", lambda *_: pytest.fail("hashed") if mistyped != text else b"")
        assert store.authenticate(mistyped.encode(), 0.0) is None


@given(position=st.integers(0, 62))
def test_swapped_neighbours_are_turned_away_without_hashing(
    shared: tuple[KeyStore, str], position: int
) -> None:
    store, text = shared
    swapped = text[:position] + text[position + 1] + text[position] + text[position + 2 :]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "_digest", lambda *_: pytest.fail("hashed") if swapped != text else b"")
        assert store.authenticate(swapped.encode(), 0.0) is None


# -- who gets in


def test_a_wrong_secret_and_an_unknown_id_cost_the_same_work(
    shared: tuple[KeyStore, str], work: list[str]
) -> None:
    store, text = shared
    wrong_secret = key_text(text[3:13], "0" * 43)
    unknown_id = key_text("0" * 10, text[14:57])
    assert store.authenticate(text.encode(), 0.0) is not None
    good, work[:] = list(work), []
    assert good == ["digest", "compare 32 32"]
    for bad in (wrong_secret, unknown_id):
        assert store.authenticate(bad.encode(), 0.0) is None
        assert work == good
        work.clear()


def test_an_expired_key_is_refused_from_its_second_on(engine: sa.Engine) -> None:
    expires = time.time() + 1000.0
    text, _ = create_key(engine, PEPPER, tenant="acme", expires=expires)
    store = KeyStore(engine, PEPPER)
    assert store.authenticate(text.encode(), expires - 0.001) is not None
    assert store.authenticate(text.encode(), expires) is None
    listed = list_keys(engine)[0]
    assert [listed.status(expires - 1), listed.status(expires)] == ["active", "expired"]


def test_a_digest_copied_to_another_row_is_worth_nothing(engine: sa.Engine) -> None:
    rich, _ = create_key(engine, PEPPER, tenant="rich")
    poor, _ = create_key(engine, PEPPER, tenant="poor")
    table = keys_table
    with engine.begin() as connection:
        digest = connection.execute(sa.select(table.c.digest).where(table.c.id == poor[3:13])).scalar()
        connection.execute(table.update().where(table.c.id == rich[3:13]).values(digest=digest))
    store = KeyStore(engine, PEPPER)
    assert store.authenticate(key_text(rich[3:13], poor[14:57]).encode(), 0.0) is None


# -- changes by another process


def test_a_revocation_is_seen_by_another_store_on_the_same_database(engine: sa.Engine) -> None:
    ours, theirs = open_database(url_of(engine)), open_database(url_of(engine))
    text, key = create_key(theirs, PEPPER, tenant="acme")
    store = KeyStore(ours, PEPPER)
    assert store.authenticate(text.encode(), 0.0) == key
    assert store.ids == {key.id}
    assert store.refresh() is False

    assert revoke_key(theirs, key.id) is True
    assert store.refresh() is True
    assert store.authenticate(text.encode(), 0.0) is None
    assert store.ids == set()
    assert store.refresh() is False

    assert revoke_key(theirs, key.id) is False
    assert store.refresh() is False, "nothing changed"
    ours.dispose()
    theirs.dispose()


def test_a_change_between_the_two_reads_of_a_refresh_is_not_missed(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, key = create_key(engine, PEPPER, tenant="acme")
    store = KeyStore(engine, PEPPER)
    create_key(engine, PEPPER, tenant="acme")
    read, late = keys._setting, iter([key.id])

    def read_then_revoke(connection: sa.Connection, name: str) -> str | None:
        value = read(connection, name)
        connection.rollback()  # the next statement sees what others committed meanwhile
        for key_id in late:
            revoke_key(engine, key_id)
        return value

    monkeypatch.setattr(keys, "_setting", read_then_revoke)
    store.refresh()
    store.refresh()
    assert store.authenticate(text.encode(), 0.0) is None


def test_keys_stay_when_the_database_cannot_be_read(engine: sa.Engine) -> None:
    text, _ = create_key(engine, PEPPER, tenant="acme")
    store = KeyStore(engine, PEPPER)
    with engine.begin() as connection:
        settings_table.drop(connection)
    with pytest.raises(sa.exc.SQLAlchemyError):
        store.refresh()
    assert store.authenticate(text.encode(), 0.0) is not None


def test_a_store_is_empty_only_until_the_first_key(engine: sa.Engine) -> None:
    store = KeyStore(engine, PEPPER)
    assert store.empty
    _, key = create_key(engine, PEPPER, tenant="acme")
    store.refresh()
    assert not store.empty
    revoke_key(engine, key.id)
    store.refresh()
    assert not store.empty, "revoking the last key must not open the door"


# -- making, listing, revoking


def test_everything_about_a_key_comes_back(engine: sa.Engine) -> None:
    text, key = create_key(
        engine,
        PEPPER,
        tenant="koeln.research",
        name="Köln 研究",
        data_class="internal",
        models=["qwen3", "smollm2"],
        rpm=60,
        tpm=100_000,
        concurrency=8,
        budget="50.000000001",
        priority=-5,
        labels={"team": "search"},
        expires=4e9,
    )
    assert key == Key(
        id=text[3:13],
        tenant="koeln.research",
        name="Köln 研究",
        data_class="internal",
        models=frozenset({"qwen3", "smollm2"}),
        rpm=60,
        tpm=100_000,
        concurrency=8,
        budget_nano=50_000_000_001,
        priority=-5,
        labels={"team": "search"},
        expires=4e9,
    )
    assert KeyStore(engine, PEPPER).authenticate(text.encode(), 0.0) == key
    assert [listed.key for listed in list_keys(engine)] == [key]


def test_a_key_without_options_may_do_everything_with_public_data(engine: sa.Engine) -> None:
    text, key = create_key(engine, PEPPER, tenant="acme")
    assert KeyStore(engine, PEPPER).authenticate(text.encode(), 1e12) == key == Key(id=key.id, tenant="acme")
    assert key.data_class == "public"


def test_keys_are_listed_oldest_first_with_their_status(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = iter([2000.0, 1000.0, 3000.0])
    monkeypatch.setattr("time.time", lambda: next(moments))
    _, newer = create_key(engine, PEPPER, tenant="b")
    _, older = create_key(engine, PEPPER, tenant="a")
    revoke_key(engine, newer.id)
    listed = list_keys(engine)
    assert [(stored.key, stored.created, stored.revoked) for stored in listed] == [
        (older, 1000.0, None),
        (newer, 2000.0, 3000.0),
    ]
    assert [stored.status(0.0) for stored in listed] == ["active", "revoked"]


def test_revoking_again_keeps_the_first_time(engine: sa.Engine) -> None:
    _, key = create_key(engine, PEPPER, tenant="acme")
    assert revoke_key(engine, key.id) is True
    first = list_keys(engine)[0].revoked
    assert revoke_key(engine, key.id) is False
    assert list_keys(engine)[0].revoked == first


def test_revoking_what_is_not_there(engine: sa.Engine) -> None:
    with pytest.raises(UnknownKeyError, match="0123456789"):
        revoke_key(engine, "0123456789")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tenant", ""),
        ("tenant", "  "),
        ("tenant", " acme"),
        ("tenant", "ac\nme"),
        ("tenant", "x" * 257),
        ("tenant", 7),
        ("name", "a\x00b"),
        ("data_class", "Internal"),
        ("data_class", ""),
        ("data_class", None),
        ("models", []),
        ("models", [""]),
        ("models", "qwen3"),
        ("rpm", 0),
        ("rpm", -1),
        ("rpm", 1.5),
        ("rpm", True),
        ("rpm", 2**31),
        ("tpm", "100"),
        ("concurrency", 0),
        ("budget", 0),
        ("budget", -1),
        ("budget", "0.0000000001"),
        ("budget", "1.0000000000000000000000000000000000001"),
        ("budget", "nan"),
        ("budget", "inf"),
        ("budget", "1e999999"),
        ("budget", "9223372036.854775808"),
        ("budget", "fifty"),
        ("budget", True),
        ("priority", 0.5),
        ("priority", 2**31),
        ("labels", {"": "x"}),
        ("labels", ["team"]),
        ("labels", {"team": "a\nb"}),
        ("expires", 1.0),
        ("expires", float("nan")),
        ("expires", float("inf")),
        ("expires", "tomorrow"),
    ],
)
def test_a_bad_value_names_its_field(engine: sa.Engine, field: str, value: Any) -> None:
    fields: dict[str, Any] = {"tenant": "acme", field: value}
    with pytest.raises(KeyFieldError, match=f"^{field}: must ") as caught:
        create_key(engine, PEPPER, **fields)
    assert caught.value.field == field
    assert list_keys(engine) == []
    assert KeyStore(engine, PEPPER).empty


@pytest.mark.parametrize(
    ("budget", "nano"), [(50, 50 * 10**9), (0.1, 10**8), ("9223372036.854775807", 2**63 - 1)]
)
def test_budgets_are_exact(engine: sa.Engine, budget: Any, nano: int) -> None:
    assert create_key(engine, PEPPER, tenant="acme", budget=budget)[1].budget_nano == nano


# -- secrets


def test_another_pepper_is_noticed(engine: sa.Engine) -> None:
    KeyStore(engine, bytes(32))  # no keys yet: nothing to contradict
    create_key(engine, PEPPER, tenant="acme")
    with pytest.raises(PepperError, match="another pepper"):
        KeyStore(engine, bytes(32))
    with pytest.raises(PepperError, match="another pepper"):
        create_key(engine, bytes(32), tenant="acme")
    assert len(list_keys(engine)) == 1


def test_the_database_holds_no_secret(tmp_path: Path) -> None:
    engine = open_database(tmp_path)
    text, _ = create_key(engine, PEPPER, tenant="acme")
    engine.dispose()
    content = b"".join(file.read_bytes() for file in tmp_path.iterdir() if file.is_file())
    assert text[3:13].encode() in content
    assert text[14:57].encode() not in content
    assert PEPPER not in content


def test_no_secret_is_shown_or_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="sqlalchemy")
    engine = open_database(tmp_path)
    text, key = create_key(engine, PEPPER, tenant="acme")
    store = KeyStore(engine, PEPPER)
    store.authenticate(text.encode(), 0.0)
    with pytest.raises(KeyFieldError) as caught:
        revoke_key(engine, text)
    revoke_key(engine, key.id)
    engine.dispose()
    assert "keys_version" in caplog.text
    shown = caplog.text + repr([key, store, vars(store), list_keys(engine), caught.value, str(caught.value)])
    assert text[14:57] not in shown
    assert repr(PEPPER) not in shown
    assert PEPPER.hex() not in shown


def test_a_key_cannot_be_changed_in_use() -> None:
    key = Key(id="0123456789", tenant="acme")
    with pytest.raises(FrozenInstanceError):
        key.tenant = "other"  # type: ignore[misc]
    assert not hasattr(key, "__dict__")


@pytest.mark.parametrize("tenant", ["a b", "a/b", "Köln", "a,b", ".a", 'a"b', "a\nb", ""])
def test_a_tenant_is_a_word(engine: sa.Engine, tenant: str) -> None:
    with pytest.raises(KeyFieldError, match="tenant"):
        create_key(engine, PEPPER, tenant=tenant)
    assert list_keys(engine) == []
