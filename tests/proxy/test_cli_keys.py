from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import proxy.database
from proxy.access.limits import month_bounds
from proxy.cli import app
from proxy.database import DATABASE_FILE, open_database
from proxy.journal import Journal
from proxy.ledger import Ledger
from proxy.ledger_note import note_database
from proxy.prices import Prices
from proxy.records import Row

CONFIG = """\
backends:
  - {name: a, url: "http://a.test"}
  - {name: nj, url: "http://nj.test", site: nanjing}
sites:
  nanjing: {data_classes: [public, internal]}
currency: CNY
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands are typed; a terminal has 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def tidegate(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["keys", *arguments])


def create(*arguments: str, tenant: str = "acme") -> dict[str, Any]:
    found = tidegate("create", "--tenant", tenant, "--json", *arguments)
    assert found.exit_code == 0, found.stderr
    made: dict[str, Any] = json.loads(found.stdout)
    return made


def listed() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(tidegate("list", "--json").stdout)
    return rows


# List


def test_everything_about_a_key_is_listed() -> None:
    create(
        *("--name", "night batch", "--data-class", "internal", "--rpm", "6000", "--tpm", "100000"),
        *("--concurrency", "8", "--budget", "50", "--model", "m-2", "--model", "m-1", "--priority", "5"),
        *("--label", "team=research", "--label", "region=east", "--expires", "2999-12-30"),
    )
    (row,) = listed()
    assert row["labels"] == {"team": "research", "region": "east"}
    assert (row["priority"], row["spent"], row["models"], row["revoked"]) == (5, 0.0, ["m-1", "m-2"], None)
    text = tidegate("list").stdout
    assert all(len(line) <= 80 for line in text.splitlines())
    words = " ".join(part for line in text.splitlines()[2:] for part in line[36:].split())
    for said in (
        '"night batch"',
        "6,000 requests/min",
        "100,000 tokens/min",
        "8 at once",
        "0.00 of 50.00 spent this month",
        "only m-1, m-2",
        "priority 5",
        "region=east; team=research",
        "until 2999-12-31 00:00 UTC",
    ):
        assert said in words
    for part in (row["id"], "acme", "active", "internal"):
        assert part in text


def test_nothing_is_cut_at_eighty_columns() -> None:
    tenant, label = "a-tenant-with-a-long-name-" + "x" * 40, "v" * 70
    create("--label", f"label={label}", tenant=tenant)
    create(tenant="plain")
    lines = tidegate("list").stdout.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert "…" not in "".join(lines)
    assert ["plain", "active", "public"] in [line.split()[1:] for line in lines]
    assert "".join("".join(lines).split()).count("x") >= 40  # an id may have one too
    assert "".join("".join(lines).split()).count("v") >= 70


def test_no_keys_are_told_in_words(folder: Path) -> None:
    open_database(folder / "tidegate-data").dispose()
    assert tidegate("list").stdout == (
        "no keys in tidegate-data: requests need none, and the proxy serves this machine only\n"
    )
    assert listed() == []


def test_a_revoked_key_says_when() -> None:
    made = create()
    assert tidegate("revoke", made["id"]).exit_code == 0
    (row,) = listed()
    assert row["status"] == "revoked"
    assert abs(row["revoked"] - time.time()) < 60


async def test_a_budget_shows_what_is_spent_of_it_this_month(folder: Path) -> None:
    (folder / "tidegate.yaml").write_text(CONFIG)
    with_budget, without = create("--budget", "2.5"), create()
    spend(folder / "tidegate-data", with_budget["id"], without["id"])
    first, second = listed()
    assert (first["budget"], first["spent"]) == (2.5, 1.25)
    assert (second["budget"], second["spent"]) == (None, None)
    text = " ".join(tidegate("list").stdout.split())
    assert "1.25 of 2.50 CNY spent this month" in text


async def test_budgets_count_one_currency(folder: Path) -> None:
    (folder / "tidegate.yaml").write_text(CONFIG)
    made = create("--budget", "2.5")
    spend(folder / "tidegate-data", made["id"])
    spend(folder / "tidegate-data", made["id"], currency="USD")
    found = tidegate("list")
    assert "1.25 of 2.50 CNY spent" in " ".join(found.stdout.split())
    assert found.stderr == "note: budgets count CNY only; this month there are costs in USD too\n"
    (folder / "tidegate.yaml").write_text(CONFIG.replace("currency: CNY", "currency: USD"))
    (row,) = listed()
    assert row["spent"] == 1.25


async def test_budgets_run_by_the_months_of_their_zone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last second of UTC's October is one of November further east."""
    middle = datetime(2026, 11, 15, tzinfo=UTC).timestamp()
    monkeypatch.setattr(time, "time", lambda: middle)
    (folder / "tidegate.yaml").write_text(CONFIG + "budget_zone: Asia/Shanghai\n")
    made = create("--budget", "2.5")
    spend(folder / "tidegate-data", made["id"])
    (row,) = listed()
    assert row["spent"] == 11.25


def test_small_budgets_are_not_rounded_to_nothing() -> None:
    create("--budget", "0.0025")
    create("--budget", "1234.5")
    text = " ".join(tidegate("list").stdout.split())
    assert "0.00 of 0.0025 spent this month" in text
    assert "0.00 of 1,234.50 spent this month" in text


async def test_small_change_is_not_rounded_to_nothing(folder: Path) -> None:
    made = create("--budget", "2.5")
    spend(folder / "tidegate-data", made["id"], nano=40)
    assert "<0.0001 of 2.50 CNY spent this month" in " ".join(tidegate("list").stdout.split())


def spend(state: Path, *keys: str, currency: str = "CNY", nano: int = 1_250_000_000) -> None:
    """So much with each key this month, and 10 the month before."""
    engine = open_database(state)
    ledger = Ledger(engine, Journal(state / "journal"), Prices({}, currency))
    begin = month_bounds(time.time())[0]
    ledger.start(asyncio.get_running_loop(), print)
    for number, key in enumerate(keys):
        for arrived, cost in ((time.time(), nano), (begin - 1, 10_000_000_000)):
            row = Row(f"{number}-{cost}-{currency}", arrived=arrived, key_id=key, tenant="acme", status=200)
            row.cost_nano, row.currency = cost, currency
            ledger.journal.close(row)
    ledger.stop()
    engine.dispose()


# Create


def test_a_data_class_that_nobody_names_is_warned_of(folder: Path) -> None:
    (folder / "tidegate.yaml").write_text(CONFIG)
    found = tidegate("create", "--tenant", "acme", "--data-class", "internl", "--json")
    assert found.exit_code == 0
    assert json.loads(found.stdout)["key"].startswith("tg_")
    assert found.stderr == (
        "warning: no site in tidegate.yaml names data class 'internl' (did you mean 'internal'?): "
        "only site local serves it\n"
    )
    for known in ("internal", "public"):
        assert tidegate("create", "--tenant", "acme", "--data-class", known, "--json").stderr == ""


def test_a_budget_without_prices_is_warned_of(folder: Path) -> None:
    (folder / "tidegate.yaml").write_text(CONFIG)
    arguments = ("create", "--tenant", "acme", "--json")
    assert tidegate(*arguments, "--budget", "5").stderr == (
        "warning: no backend in tidegate.yaml has a price: nothing is ever taken from a budget\n"
    )
    price = "price: {input: 1, output: 2, currency: CNY}"
    priced = CONFIG.replace('url: "http://a.test"', f'url: "http://a.test", {price}')
    assert priced != CONFIG
    (folder / "tidegate.yaml").write_text(priced)
    assert tidegate(*arguments, "--budget", "5").stderr == ""


def test_a_state_directory_that_was_not_there_is_named(folder: Path) -> None:
    first, second = (tidegate("create", "--tenant", "acme", "--state", "mistyped") for _ in range(2))
    assert first.stderr.startswith(
        "note: mistyped is new, no proxy has kept its state there yet\n"
        "note: this is the first key: from now on every request needs one\nkey "
    )
    assert second.stderr.startswith("key ")
    assert all(", kept in mistyped; it is shown this once:" in found.stderr for found in (first, second))


@pytest.mark.parametrize(
    "broken",
    [
        "bogus: 1\ndatabase: {url}\n",
        "database: '{url}'  # ours\nbackends: [\n",
        'state: my state\ndatabase: "{url}"\n',
        "backends: [\n\tstate: x\nstate: my state # and no more\n",
    ],
)
def test_a_mistake_in_the_file_keeps_nobody_from_revoking(broken: str, folder: Path) -> None:
    """Wherever the ledger is: what the file says of that is read, whatever else is wrong in it."""
    url = f"sqlite:///{folder}/elsewhere/led#ger.db"
    elsewhere = f"database: {url}\n" if "{url}" in broken else ""
    state = "state: my state\n" if "my state" in broken else ""
    (folder / "tidegate.yaml").write_text(CONFIG + elsewhere + state)
    made, other = create(), create()
    (folder / "tidegate.yaml").write_text(broken.format(url=url))
    found = tidegate("revoke", made["id"])
    assert (found.exit_code, found.stdout) == (0, f"key {made['id']} is revoked\n")
    assert found.stderr == (
        "note: tidegate.yaml cannot be used as it is: only its `state` and `database` are read (`tidegate check`)\n"
    )
    assert {row["id"]: row["status"] for row in listed()} == {made["id"]: "revoked", other["id"]: "active"}
    found = tidegate("create", "--tenant", "acme")
    assert (found.exit_code, found.stdout) == (2, ""), "what a new key may do is checked against a whole file"
    assert "tidegate.yaml cannot be used:\n" in found.stderr


def test_a_ledger_elsewhere_is_not_begun_anew_beside_the_proxys_state(folder: Path) -> None:
    (folder / "pgstate").mkdir()
    note_database(folder / "pgstate", "postgresql://tidegate:secret@db/ledger")
    for command in (("create", "--tenant", "zz"), ("list",), ("revoke", "7Hq2mXw0Ab")):
        found = tidegate(*command, "--state", "pgstate")
        assert (found.exit_code, found.stdout) == (2, "")
        assert found.stderr.startswith(
            "tidegate: the proxy on pgstate has its ledger in postgresql://tidegate:***@db/ledger: give its "
            "configuration instead (--config FILE, without --state)"
        )
    (folder / "tidegate.yaml").write_text("databse: postgresql://db/ledger\nstate: pgstate\n")
    assert "has its ledger in postgresql://tidegate:***@db/ledger" in tidegate("list").stderr
    assert [path.name for path in (folder / "pgstate").iterdir()] == ["database.json"]
    (folder / "tidegate.yaml").write_text(CONFIG + "state: pgstate\n")
    create()  # a whole configuration says that it is there now, and is right


def test_a_data_class_that_nobody_accepts_is_warned_of(folder: Path) -> None:
    remote = CONFIG.replace('{name: a, url: "http://a.test"}', '{name: b, url: "http://b.test", site: b}')
    (folder / "tidegate.yaml").write_text(remote)
    found = tidegate("create", "--tenant", "acme", "--data-class", "secret")
    assert found.stderr.startswith("warning: no site in tidegate.yaml names data class 'secret': nobody")
    (folder / "tidegate.yaml").write_text(remote.replace("site: nanjing", "site: c"))
    found = tidegate("create", "--tenant", "acme", "--data-class", "internal")
    assert found.stderr.startswith("warning: no backend accepts data class 'internal': nobody")


def test_without_a_configuration_nobody_knows_the_classes(folder: Path) -> None:
    found = tidegate("create", "--tenant", "acme", "--data-class", "secret", "--json")
    assert (found.exit_code, found.stderr) == (0, "")


def test_a_key_is_valid_on_its_last_day() -> None:
    today = datetime.now(UTC).date()
    create("--expires", today.isoformat())
    (row,) = listed()
    midnight = datetime.combine(today + timedelta(days=1), datetime.min.time(), UTC)
    assert (row["status"], row["expires"]) == ("active", midnight.timestamp())


def test_a_length_of_time_counts_from_now() -> None:
    create("--expires", "90d")
    (row,) = listed()
    assert abs(row["expires"] - time.time() - 90 * 86_400) < 60


@pytest.mark.parametrize("text", ["999999w", "9999-12-31"])
def test_an_expiry_that_no_calendar_has_is_refused(text: str) -> None:
    found = tidegate("create", "--tenant", "acme", "--expires", text)
    assert (found.exit_code, found.stderr.partition(", not ")[0]) == (
        2,
        "tidegate: expires: must be a Unix time in the future, before the year 10000",
    )


def test_a_broken_configuration_leaves_no_key_behind(folder: Path) -> None:
    (folder / "broken.yaml").write_text("bakends: []")
    found = tidegate("create", "--tenant", "acme", "--state", "data", "--config", "broken.yaml")
    assert (found.exit_code, found.stdout) == (2, "")
    assert not (folder / "data").exists()


def test_the_ledger_may_be_elsewhere_before_there_is_a_state_directory(folder: Path) -> None:
    (folder / "tidegate.yaml").write_text(f"{CONFIG}database: sqlite:///{folder}/elsewhere/ledger.db\n")
    create()
    assert (folder / "tidegate-data" / "pepper").is_file()
    assert len(listed()) == 1


def test_a_locked_database_is_told_in_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy.database, "BUSY_TIMEOUT_S", 0.01)
    made = create()
    with closing(sqlite3.connect(folder / "tidegate-data" / DATABASE_FILE, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for command in (("create", "--tenant", "acme"), ("revoke", made["id"])):
            found = tidegate(*command)
            assert (found.exit_code, found.stderr) == (2, "tidegate: database is locked\n")
    assert [row["status"] for row in listed()] == ["active"]


@pytest.mark.parametrize(
    "text", ["2020-01-31", "2020-01-31T10:00:00", "2020-06-01T00:00:00Z", "2020-06-01T00:00:00+08:00"]
)
def test_an_expiry_in_the_past_is_refused_in_words(text: str) -> None:
    found = tidegate("create", "--tenant", "acme", "--expires", text)
    assert found.exit_code == 2
    assert found.stderr == (
        f"tidegate: --expires: {text} is in the past; give a day to come, or how long from now, such as 90d\n"
    )
