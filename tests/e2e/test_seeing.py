"""What can be seen from outside: metrics, the request log, records of decisions, and what the commands print."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proxy.records import OUTCOMES
from tests.e2e import backends as b
from tests.e2e.backends import answers, status
from tests.e2e.proxy_fixtures import (
    Answer,
    MakeKey,
    Proxy,
    StartBackend,
    StartProxy,
    chat,
    command,
    eventually,
)

pytestmark = pytest.mark.e2e

SAME = (
    *("tenant", "endpoint", "model", "stream", "status", "outcome", "code", "backend", "site", "rule"),
    *("attempts", "prompt_tokens", "completion_tokens", "queue_s", "ttft_s", "total_s"),
)
"""What the log and the ledger call alike."""

LABELS = {"backend", "site", "gen_ai_request_model", "gen_ai_token_type", "outcome", "code", "error", "le"}


async def some_of_everything(proxy: Proxy, key: str) -> list[Answer]:
    """Requests that end in many ways, one of them by leaving."""
    found = [await proxy.chat(key, stream=number % 2 == 0) for number in range(4)]
    found.append(await proxy.chat(key, model="none"))
    found.append(await proxy.ask(chat(b"{", key)))
    client = await proxy.connect()
    left = Answer()
    await client.send(chat(None, key, stream=True))
    await client.first(left)
    client.close()
    await proxy.idle()
    return [*found, left]


@pytest.fixture
async def seen(
    start_backend: StartBackend, start_proxy: StartProxy, make_key: MakeKey, tmp_path: Path
) -> tuple[Proxy, list[Answer]]:
    """A proxy that has served some of everything."""
    key = make_key(tenant="acme", rpm=100)
    script: list[Any] = [status(500), answers(4), b.resets_midstream, answers(3), b.stalls_midstream]
    bad, good = await start_backend(*script), await start_backend()
    proxy = await start_proxy(bad, good, log=str(tmp_path / "requests.log"), aliases={"gpt-4": "m"})
    return proxy, await some_of_everything(proxy, key)


async def test_metrics_are_well_formed_and_their_labels_bounded(seen: tuple[Proxy, list[Answer]]) -> None:
    proxy, _ = seen
    text = (await proxy.get("/metrics"))[1].decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = [sample for family in families.values() for sample in family.samples]
    assert {label for sample in samples for label in sample.labels} <= LABELS
    assert {sample.labels["backend"] for sample in samples if "backend" in sample.labels} == {"a", "b"}
    models = {s.labels["gen_ai_request_model"] for s in samples if "gen_ai_request_model" in s.labels}
    assert models == {"m"}  # an invented model gets no series of its own
    assert all(family.documentation for family in families.values())

    def value(name: str, **labels: str) -> float:
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    outcomes = Counter(record.row.outcome for record in proxy.runtime.observer.recent if record.row.backend)
    for outcome, count in outcomes.items():
        assert value("tidegate_requests_total", outcome=outcome) == count
    rows = [record.row for record in proxy.runtime.observer.recent]
    assert value("tidegate_tokens_total", gen_ai_token_type="output") == sum(
        row.completion_tokens for row in rows
    )
    assert value("tidegate_cost_total") == pytest.approx(sum(row.cost_nano for row in rows) / 1e9)
    assert value("tidegate_failed_attempts_total", backend="a", error="500") == 1
    assert value("tidegate_errors_total", code="model_not_found") == 1
    for name in ("gen_ai_server_time_to_first_token_seconds", "gen_ai_server_request_duration_seconds"):
        for backend in ("a", "b"):
            buckets = [
                s for s in families[name].samples if s.labels.get("backend") == backend and "le" in s.labels
            ]
            if buckets:
                assert buckets[-1].labels["le"] == "+Inf"
                counts = [bucket.value for bucket in buckets]
                assert counts == sorted(counts)
    await proxy.chat("authorization: Bearer x", model="another-invented-one")
    again = (await proxy.get("/metrics"))[1].decode()
    assert "another-invented-one" not in again


async def test_request_log_ledger_export_and_usage_tell_the_same(
    seen: tuple[Proxy, list[Answer]], tmp_path: Path
) -> None:
    proxy, found = seen
    await proxy.chat("authorization: Bearer wrong")
    await proxy.service.stop()
    lines = [json.loads(line) for line in (tmp_path / "requests.log").read_text().splitlines()]
    assert len(lines) == len(found) + 1
    assert (lines[-1]["status"], lines[-1]["code"], lines[-1]["path"]) == (
        401,
        "invalid_api_key",
        "/v1/chat/completions",
    )
    state = ("--state", str(proxy.state_folder))
    code, text, complaint = await command("export", *state)
    assert (code, complaint) == (0, "")
    exported = {row["op"]: row for row in map(json.loads, text.splitlines())}
    assert set(exported) == {line["id"] for line in lines[:-1]} == {answer.id for answer in found}
    for line in lines[:-1]:
        row = exported[line["id"]]
        assert row["outcome"] in OUTCOMES
        assert {name: line[name] for name in SAME} == {name: row[name] for name in SAME}
        assert line["usage"] == row["usage_source"]
    assert Counter(line["outcome"] for line in lines[:-1]) == Counter(
        ok=3, cut=1, client_error=2, client_gone=1
    )

    code, text, _ = await command("usage", "--json", *state)
    (line,) = json.loads(text)
    assert (line["tenant"], line["requests"], line["currency"]) == ("acme", len(found), "EUR")
    for name in ("prompt_tokens", "completion_tokens"):
        assert line[name] == sum(row[name] for row in exported.values())
    assert line["cost_nano"] == sum(row["cost_nano"] for row in exported.values())

    code, text, _ = await command("usage", "--by", "backend", "--csv", *state)
    by_backend = {row["backend"]: row for row in csv.DictReader(io.StringIO(text))}
    assert set(by_backend) == {"", "a", "b"}
    assert sum(int(row["requests"]) for row in by_backend.values()) == len(found)
    code, text, _ = await command("usage", "--by", "model", *state)
    assert code == 0
    assert "EUR" in text


async def test_explain_says_why(seen: tuple[Proxy, list[Answer]]) -> None:
    proxy, found = seen
    retried = found[0]
    assert retried.backend == "b"
    admin = ("--admin", proxy.admin.removeprefix("http://"))
    code, text, _ = await command("explain", retried.id, *admin)
    assert code == 0
    assert f"request {retried.id}: 200 ok, b (away)" in text
    assert "decision 1: send to a, by weighted-qps under the rule 'local first'" in text
    assert "this attempt failed: the backend answered 500" in text
    assert "decision 2: send to b, by fallback" in text
    assert "3 tokens" not in text.split("forecast")[0]
    code, text, _ = await command("explain", retried.id, "--json", "--state", str(proxy.state_folder))
    record = json.loads(text)
    assert (record["request_id"], record["attempts"], record["backend"]) == (retried.id, 2, "b")
    assert [decision["backend"] for decision in record["decisions"]] == ["a", "b"]
    assert record["happened"]["completion_tokens"] == 3
    nobody = next(answer for answer in found if answer.status == 404)
    code, text, _ = await command("explain", nobody.id, *admin)
    assert "a was out: does not serve none" in text
    code, text, complaint = await command("explain", "never-seen", *admin)
    assert (code, text) == (1, "")
    assert "no request 'never-seen'" in complaint


async def test_state_shows_this_moment(seen: tuple[Proxy, list[Answer]]) -> None:
    proxy, found = seen
    state = await proxy.state()
    assert (state["ready"], state["policy"]["name"]) == (True, "local-first")
    assert state["requests"]["total"] == len(found)
    assert [backend["name"] for backend in state["backends"]] == ["a", "b"]
    assert state["backends"][0]["failed"] == 2
    assert state["connections"]["open_exchanges"] == 0
    assert state["tokens"]["completion"] == sum(
        r.row.completion_tokens for r in proxy.runtime.observer.recent
    )
    await eventually(lambda: proxy.runtime.ledger.lag == 0)


async def test_check_and_schema(start_backend: StartBackend, tmp_path: Path) -> None:
    backend = await start_backend()
    good = tmp_path / "tidegate.yaml"
    good.write_text(json.dumps({"backends": [{"name": "a", "url": backend.url}]}))
    code, text, _ = await command("check", str(good))
    assert code == 0
    assert "1 backend." in text
    bad = tmp_path / "policy.yaml"
    bad.write_text("rules:\n  - name: all\n    pikc: random\n")
    code, text, complaint = await command("check", str(bad))
    assert (code, text) == (1, "")
    assert f"{bad}:3:5" in complaint
    assert "pick" in complaint
    code, text, _ = await command("check", str(bad), "--json")
    problem = json.loads(text)["problems"][0]
    assert (code, problem["line"], problem["column"]) == (1, 3, 5)
    for which in ("config", "policy"):
        code, text, _ = await command("schema", which)
        assert (code, json.loads(text)["type"]) == (0, "object")


async def test_keys_are_made_listed_and_revoked_by_commands(
    start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    state = ("--state", str(tmp_path / "state"))
    code, text, _ = await command(
        "keys", "create", "--tenant", "acme", "--rpm", "5", "--budget", "50", "--data-class", "internal",
        "--json", *state,
    )  # fmt: skip
    made = json.loads(text)
    assert (code, set(made), made["tenant"]) == (0, {"id", "key", "tenant"}, "acme")
    proxy = await start_proxy(await start_backend())
    assert (await proxy.chat(f"authorization: Bearer {made['key']}")).status == 200
    assert (await proxy.chat()).status == 401
    code, text, _ = await command("keys", "list", "--json", *state)
    (row,) = json.loads(text)
    assert (row["id"], row["status"], row["rpm"], row["budget"]) == (made["id"], "active", 5, 50.0)
    assert made["key"] not in text
    assert (await command("keys", "revoke", made["id"], *state))[0] == 0
    code, _, complaint = await command("keys", "revoke", "0123456789", *state)
    assert (code, "no key" in complaint) == (2, True)


async def test_a_wrong_key_is_seen_everywhere_and_keeps_nobody_waiting(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend(refuses_models=401)
    probing = {"interval": 0.2, "timeout": 0.1}
    proxy = await start_proxy({"url": backend.url, "models": "auto"}, probing=probing)
    reason = "models unknown: GET /v1/models: 401: is its key right?"
    code, body = await proxy.get("/readyz")
    assert (code, json.loads(body)["reason"]) == (503, "no backend serves any model")
    metrics = (await proxy.get("/metrics"))[1].decode()
    assert 'tidegate_backend_available{backend="a",site="local"} 0.0' in metrics
    (shown,) = (await proxy.state())["backends"]
    assert (shown["probed_up"], shown["available"], shown["unavailable"]) == (True, False, reason)
    refused = await proxy.chat()
    assert (refused.status, refused.code) == (404, "model_not_found")
    _, text, _ = await command("explain", refused.id, "--admin", proxy.admin.removeprefix("http://"))
    assert f"a was out: {reason}" in text

    backend.refuses_models = 0
    await eventually(lambda: proxy.backend("a").available)
    assert (await proxy.get("/readyz"))[0] == 200
    assert (await proxy.chat()).status == 200


async def test_a_list_of_models_that_may_still_come_is_worth_another_try(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend(refuses_models=500)
    proxy = await start_proxy({"url": backend.url, "models": "auto"}, probing={})
    answer = await proxy.chat()
    assert (answer.status, answer.code) == (503, "no_backend")
