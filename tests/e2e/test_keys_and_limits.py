"""Keys on real sockets: who is let in, how much they may use, and what becomes of secrets."""

from __future__ import annotations

import asyncio
import errno
import itertools
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy.exc

import proxy.access.key_watch
from tests.e2e import backends as b
from tests.e2e.backends import Request, answers, stalls
from tests.e2e.proxy_fixtures import (
    Answer,
    MakeKey,
    StartBackend,
    StartProxy,
    bound,
    chat,
    command,
    eventually,
)

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["authorization: Bearer sk-wrong"],
        ["authorization: Bearer tg_0123456789_" + "x" * 43 + "_000000"],
        ["authorization: Basic dXNlcjpwYXNz"],
        ["authorization: "],
        ["x-api-key: nothing"],
    ],
)
async def test_without_a_good_key_there_is_one_answer(
    lines: list[str], start_backend: StartBackend, start_proxy: StartProxy, make_key: MakeKey
) -> None:
    make_key()
    backend = await start_backend()
    proxy = await start_proxy(backend)
    answer = await proxy.chat(*lines)
    assert answer.status == 401
    error = answer.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("authentication_error", None, "invalid_api_key")
    assert answer.fields["www-authenticate"] == "Bearer"
    for path in (b"GET /v1/models", b"GET /nowhere"):
        assert (await proxy.ask(path + b" HTTP/1.1\r\nhost: x\r\n\r\n")).status == 401
    assert backend.raw == b""


async def test_a_key_is_taken_from_either_field(
    start_backend: StartBackend, start_proxy: StartProxy, make_key: MakeKey
) -> None:
    key = make_key().removeprefix("authorization: Bearer ")
    proxy = await start_proxy(await start_backend())
    for line in (f"authorization: bearer {key}", f"Authorization:Bearer  {key}", f"x-api-key: {key}"):
        assert (await proxy.chat(line)).status == 200


async def test_a_storm_of_bad_keys_is_held_off_and_good_ones_pass(
    start_backend: StartBackend, start_proxy: StartProxy, make_key: MakeKey
) -> None:
    key = make_key()
    proxy = await start_proxy(await start_backend())
    found = [await proxy.chat("authorization: Bearer nobody") for _ in range(25)]
    assert [answer.status for answer in found] == [401] * 20 + [429] * 5
    assert (found[-1].code, int(found[-1].fields["retry-after"]) >= 1) == ("auth_rate_limit", True)
    assert (await proxy.chat(key)).status == 200


async def test_a_key_revoked_by_another_process_is_refused_within_a_second(
    start_backend: StartBackend, start_proxy: StartProxy, make_key: MakeKey
) -> None:
    key, other = make_key(), make_key()
    proxy = await start_proxy(await start_backend(answers(), stalls, then=answers()))
    client = await proxy.connect()  # its head will be remembered
    await client.send(chat(None, key))
    assert (await client.answer()).status == 200
    running = await proxy.connect()
    await running.send(chat(None, key, stream=True))
    await eventually(lambda: proxy.runtime.exchanges)
    key_id = key.split("_")[1]
    state = str(proxy.state_folder)
    done = await command("keys", "revoke", key_id, "--state", state)
    assert done == (0, f"key {key_id} is revoked\n", "")
    revoked = time.monotonic()
    while True:
        await client.send(chat(None, key))
        if (await client.answer()).status == 401:
            break
        assert time.monotonic() - revoked < bound(1.0)
        await asyncio.sleep(0.02)
    assert proxy.runtime.exchanges  # what runs goes on
    assert (await proxy.chat(other)).status == 200
    # Revoking the last one does not open the door.
    await command("keys", "revoke", other.split("_")[1], "--state", state)
    await eventually(lambda: not proxy.runtime.keys.ids)
    assert (await proxy.chat()).status == 401


async def test_keys_that_cannot_be_read_are_read_when_they_can(
    start_backend: StartBackend,
    start_proxy: StartProxy,
    make_key: MakeKey,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class FailingEngine:
        def connect(self) -> None:
            failures.append(error := next(errors))
            raise error

    def told(text: str) -> int:
        return sum(text in record.getMessage() for record in caplog.records)

    no_file = sqlite3.OperationalError("unable to open database file")
    errors = itertools.cycle(
        [
            sqlalchemy.exc.OperationalError("SELECT", {}, no_file),
            OSError(errno.EMFILE, "Too many open files"),
            MemoryError(),
            RuntimeError("can't start new thread"),
        ]
    )
    failures: list[Exception] = []
    monkeypatch.setattr(proxy.access.key_watch, "KEYS_S", 0.01)
    key, other = make_key(), make_key()
    running = await start_proxy(await start_backend())
    engine = running.runtime.keys._engine
    monkeypatch.setattr(running.runtime.keys, "_engine", FailingEngine())
    await command("keys", "revoke", key.split("_")[1], "--state", str(running.state_folder))
    await eventually(lambda: len(failures) > 12)
    assert (await running.chat(other)).status == 200, "known keys go on"
    assert (told("keys cannot be read"), told("keys can be read again")) == (1, 0)
    monkeypatch.setattr(running.runtime.keys, "_engine", engine)
    await eventually(lambda: len(running.runtime.keys.ids) == 1)
    assert (await running.chat(key)).status == 401
    assert (await running.chat(other)).status == 200
    assert (told("keys cannot be read"), told("keys can be read again")) == (1, 1)
    assert "unable to open database file" in caplog.text


async def test_requests_per_minute(
    start_backend: StartBackend, start_proxy: StartProxy, make_key: MakeKey
) -> None:
    key, other = make_key(rpm=3), make_key(rpm=3)
    proxy = await start_proxy(await start_backend())
    found = [await proxy.chat(key) for _ in range(4)]
    assert [answer.status for answer in found] == [200, 200, 200, 429]
    fields = [answer.fields["x-ratelimit-remaining-requests"] for answer in found]
    assert fields == ["2", "1", "0", "0"]
    refused = found[-1]
    assert (refused.code, refused.json["error"]["type"]) == ("rate_limit_requests", "rate_limit_error")
    assert 1 <= int(refused.fields["retry-after"]) <= 62
    assert refused.fields["x-ratelimit-limit-requests"] == "3"
    assert refused.fields["x-ratelimit-reset-requests"].endswith("s")
    assert (await proxy.row(refused)).outcome == "rejected"
    assert (await proxy.chat(other)).status == 200


async def test_tokens_per_minute_are_reserved_and_given_back(
    start_backend: StartBackend, start_proxy: StartProxy, make_key: MakeKey
) -> None:
    key = make_key(tpm=400)
    backend = await start_backend(stalls, then=answers(5))
    proxy = await start_proxy(backend)
    client = await proxy.connect()
    await client.send(chat(None, key, max_tokens=200, stream=True))
    await eventually(lambda: backend.running)
    refused = await proxy.chat(key, max_tokens=200)  # the first one still holds its estimate
    assert (refused.status, refused.code) == (429, "rate_limit_tokens")
    client.close()
    await proxy.idle()
    answer = await proxy.chat(key, max_tokens=200)
    assert answer.status == 200
    answer = await proxy.chat(key, max_tokens=200)
    remaining = int(answer.fields["x-ratelimit-remaining-tokens"])
    assert 400 - 2 * 12 - 250 < remaining < 400 - 12  # 12 tokens really used, and the estimate of this one
    answer = await proxy.chat(key, max_tokens=1000, messages=[{"role": "user", "content": "x" * 4000}])
    assert (answer.status, answer.code) == (429, "rate_limit_tokens")
    assert "retry-after" not in answer.fields  # it can never pass


async def test_requests_at_once(
    start_backend: StartBackend, start_proxy: StartProxy, make_key: MakeKey
) -> None:
    key = make_key(concurrency=2)
    backend = await start_backend(stalls, stalls)
    proxy = await start_proxy(backend)
    clients = [await proxy.connect() for _ in range(2)]
    for client in clients:
        await client.send(chat(None, key, stream=True))
    await eventually(lambda: backend.running == 2)
    refused = await proxy.chat(key)
    assert (refused.status, refused.code, refused.fields["retry-after"]) == (429, "concurrency", "1")
    clients[0].close()
    await eventually(lambda: backend.running == 1)
    assert (await proxy.chat(key)).status == 200


async def test_a_budget_is_spent_and_survives_a_restart(
    start_backend: StartBackend, start_proxy: StartProxy, make_key: MakeKey
) -> None:
    # An answer costs 7 + 2 * 5 = 17 millionths; before it is known, prompt estimate + 2 * max_tokens are reserved.
    key = make_key(budget="0.0001")
    backend = await start_backend(then=answers(5))
    proxy = await start_proxy(backend)
    found: list[Answer] = []
    while not found or found[-1].status == 200:
        found.append(await proxy.chat(key, max_tokens=5))
        assert len(found) < 10
    served = len(found) - 1
    assert served >= 3
    assert (found[-1].status, found[-1].code) == (429, "budget")
    assert int(found[-1].fields["retry-after"]) > 1
    rows = [await proxy.row(answer) for answer in found[:-1]]
    assert sum(row.cost_nano for row in rows) == served * 17_000 <= 100_000
    await proxy.service.stop()
    proxy = await start_proxy(backend)
    again = await proxy.chat(key, max_tokens=5)
    assert (again.status, again.code) == (429, "budget")


async def test_a_key_may_be_for_some_models_only(
    start_backend: StartBackend, start_proxy: StartProxy, make_key: MakeKey
) -> None:
    key = make_key(models=["gpt-4"])
    backend = await start_backend(models=("m", "n"))
    proxy = await start_proxy({"url": backend.url, "models": ["m", "n"]}, aliases={"gpt-4": "m"})
    assert (await proxy.chat(key, model="gpt-4")).status == 200
    refused = await proxy.chat(key, model="n")
    assert (refused.status, refused.code, refused.json["error"]["param"]) == (
        403,
        "model_not_allowed",
        "model",
    )
    listed = await proxy.ask(f"GET /v1/models HTTP/1.1\r\nhost: x\r\n{key}\r\n\r\n".encode())
    assert [row["id"] for row in listed.json["data"]] == ["gpt-4"]


async def test_a_backends_own_key_replaces_the_clients_and_no_secret_is_written_anywhere(
    start_backend: StartBackend,
    start_proxy: StartProxy,
    make_key: MakeKey,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("NJ_KEY", "sk-backend-secret-1")
    secret_file = tmp_path / "key"
    secret_file.write_text("sk-backend-secret-2\n")
    key = make_key()
    client_secret = key.split(" ")[2]
    script: list[Any] = [answers(), b.status(401, b'{"detail":"wrong key"}'), b.resets_before_head]
    first, second = await start_backend(*script), await start_backend(*script)
    log = tmp_path / "requests.log"
    proxy = await start_proxy(
        {"url": first.url, "api_key_env": "NJ_KEY", "site": "local"},
        {"url": second.url, "api_key_file": str(secret_file), "site": "local"},
        log=str(log),
    )
    cookie = ["cookie: session=client-cookie-secret", "x-forwarded-for: 10.0.0.1"]
    found = [await proxy.chat(key, *cookie) for _ in range(6)]
    found.append(await proxy.chat("authorization: Bearer client-guess-secret"))
    assert found[-1].status == 401
    received: list[Request] = [*first.received, *second.received]
    assert {request.fields["authorization"] for request in first.received} == {"Bearer sk-backend-secret-1"}
    assert {request.fields["authorization"] for request in second.received} == {"Bearer sk-backend-secret-2"}
    assert all("cookie" not in r.fields and "x-forwarded-for" not in r.fields for r in received)
    assert client_secret.encode() not in bytes(first.raw + second.raw)

    secrets = ["sk-backend-secret", client_secret, "client-guess-secret", "client-cookie-secret"]
    admin = [await proxy.get(path) for path in ("/state", "/metrics", f"/explain/{found[0].id}")]
    await proxy.service.stop()
    files = b"".join(file.read_bytes() for file in [*proxy.state_folder.rglob("*"), log] if file.is_file())
    for secret in secrets:
        assert secret not in caplog.text
        assert secret.encode() not in files
        assert all(secret.encode() not in body for _, body in admin)
        assert all(
            secret not in str(answer.fields) and secret.encode() not in answer.body for answer in found
        )


async def test_tenants_do_not_share_a_prefix_cache(
    start_backend: StartBackend, start_proxy: StartProxy, make_key: MakeKey
) -> None:
    keys = [make_key(tenant="one"), make_key(tenant="one"), make_key(tenant="two")]
    backend = await start_backend()
    proxy = await start_proxy(backend)
    for key in keys:
        await proxy.chat(key, cache_salt="mine", priority=-100)
    salts = [request.document["cache_salt"] for request in backend.received]
    assert salts[0] == salts[1] != salts[2]
    assert "mine" not in salts
    assert all("priority" not in request.document for request in backend.received)


async def test_the_row_knows_the_key_and_the_class_of_its_data(
    start_backend: StartBackend, start_proxy: StartProxy, make_key: MakeKey
) -> None:
    key = make_key(tenant="acme", data_class="internal")
    local, remote = await start_backend(), await start_backend()
    proxy = await start_proxy(local, remote)
    row = await proxy.row(await proxy.chat(key, user="u1"))
    assert (row.tenant, row.key_id, row.data_class) == ("acme", key.split("_")[1], "internal")
    assert row.session
    assert "u1" not in row.session
