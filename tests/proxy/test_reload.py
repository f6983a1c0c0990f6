"""What a reload says, what it keeps, and when one that failed is tried again."""

from __future__ import annotations

import errno
import gc
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import trustme
from typer.testing import CliRunner

import proxy.build
import proxy.cli
import proxy.process
import proxy.serve
from proxy.access.keys import Key
from proxy.admin.http import state
from proxy.build import DEFAULT_SLOTS
from proxy.config import Config, load_config
from proxy.process import print_banner
from proxy.serve import Service

TEXT = """
listen: 127.0.0.1:0
admin: 127.0.0.1:0
log: off
state: %s
probing: {enabled: false}
backends: [{name: a, url: "http://127.0.0.1:9", models: [m]}]
"""

PROFILE = """
name: appliance
card: L40
model: m
step: {alpha_us: 50000, beta_us: 45, gamma_us: 0.2, delta_us: 260, source: {origin: derived, text: a test}}
limits: {source: {origin: derived, text: a test}}
capacity: {users: %d, prompt_tokens: 9, output_tokens: 9, source: {origin: measured, text: a test}}
"""


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    """One that serves, and watches the file it was configured by."""
    path = tmp_path / "tidegate.yaml"
    path.write_text(TEXT % (tmp_path / "state"))
    service = Service(load_config(path), path)
    await service.start()
    yield service
    await service.stop()


def seen(service: Service) -> bool:
    """Whether the watch is content with the files as they are."""
    return not service._watched.changed


@pytest.mark.parametrize("where", ["configuration", "policy"])
async def test_a_reload_without_file_descriptors_is_tried_again(
    service: Service, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_descriptors(*_: object) -> NoReturn:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        if where == "configuration":
            patched.setattr(proxy.serve, "load_config", no_descriptors)
        else:
            patched.setattr(proxy.build, "load_policy", no_descriptors)
        assert not service.reload()
        assert not service.reload()
        assert not seen(service)
    assert caplog.text.count("reload refused") == 1
    assert service.reload()
    assert seen(service)


async def test_a_backend_and_the_policy_move_together(service: Service, tmp_path: Path) -> None:
    """The policy is checked against the sites of the same file, not against those of before."""
    assert service.path is not None
    for site in ("nanjing", "suzhou"):
        (tmp_path / "own.yaml").write_text(f"rules: [{{name: all, sites: [{site}]}}]")
        backend = f'{{name: b, url: "http://10.0.0.1:9", site: {site}, models: [m]}}'
        text = TEXT.replace("[{name: a", f"[{backend}, {{name: a") + "policy: ./own.yaml\n"
        service.path.write_text(text % (tmp_path / "state"))
        assert service.reload()
    assert service.runtime.fleet["b"].site == "suzhou"
    assert service.runtime.built.policy.warnings == []


async def test_what_waits_for_the_next_start_is_told_and_nothing_else(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    assert service.path is not None
    text = service.path.read_text()
    service.path.write_text(text + "retries: {attempts: 5}\nbudget_zone: Asia/Shanghai\n")
    assert service.reload()
    told = [record.getMessage() for record in caplog.records if "next start" in record.getMessage()]
    assert told == ["a change of `budget_zone` takes effect at the next start"]
    assert state(service.runtime, 0.0)["restart_for"] == ["budget_zone"]
    service.path.write_text(text + "retries: {ratio: 0.5}\nbudget_zone: Asia/Shanghai\n")
    assert service.reload()
    assert "a change of `retries.ratio` takes effect at the next start" in caplog.text
    assert state(service.runtime, 0.0)["restart_for"] == ["budget_zone", "retries.ratio"]
    service.path.write_text(text + "tls: [{certificate: nowhere.pem, key: nowhere.pem}]\nbudget_zone: UTC\n")
    assert not service.reload()
    assert state(service.runtime, 0.0)["restart_for"] == ["budget_zone", "retries.ratio"], "it was refused"
    caplog.clear()
    service.path.write_text(text)  # as it runs
    assert service.reload()
    assert "next start" not in caplog.text
    assert state(service.runtime, 0.0)["restart_for"] == []


async def test_https_that_neither_begins_nor_ends_is_no_change(
    service: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    made = trustme.CA().issue_cert("a.example")
    (tmp_path / "a.pem").write_bytes(made.cert_chain_pems[0].bytes())
    (tmp_path / "a.key").write_bytes(made.private_key_pem.bytes())
    assert service.path is not None
    text = service.path.read_text()
    service.path.write_text(text + "tls: [{certificate: a.pem, key: a.key}]\n")
    assert service.reload()
    assert caplog.messages[-2:] == [
        "`tls` was not applied: until the next start clients speak plain HTTP",
        "reloaded: nothing changed",
    ]
    with_tls = Service(load_config(service.path), service.path, {"state": tmp_path / "another"})
    with_tls.config = with_tls._started_with = with_tls.config.model_copy(
        update={"state": tmp_path / "another"}
    )
    await with_tls.start()
    service.path.write_text(text)
    caplog.clear()
    assert with_tls.reload()
    assert caplog.messages[-2:] == [
        "`tls` was not applied: until the next start clients speak HTTPS, with the certificates it has",
        "reloaded: nothing changed",
    ]
    await with_tls.stop()


async def test_how_many_clients_there_may_be_changes_at_once(service: Service) -> None:
    assert service.path is not None
    service.path.write_text(service.path.read_text() + "limits: {connections: 77}\n")
    assert service.reload()
    assert service.runtime.most_clients == 77


async def test_backends_with_the_same_authorities_share_what_checks_them(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making it holds up the loop, and with it all streams."""
    made: list[Any] = []
    create = ssl.create_default_context
    monkeypatch.setattr(ssl, "create_default_context", lambda **given: made.append(given) or create(**given))
    assert service.path is not None
    text = service.path.read_text().replace("http://127.0.0.1:9", "https://127.0.0.1:9")
    more = [f'{{name: b{n}, url: "https://127.0.0.1:{n + 9}", models: [m]}}' for n in range(3)]
    service.path.write_text(text.replace("[{name: a", f"[{', '.join(more)}, {{name: a"))
    assert service.reload()
    assert len(made) == 1
    assert len({id(endpoint._tls) for endpoint in service.runtime.endpoints.values()}) == 1


async def test_another_currency_is_counted_by_itself(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    assert service.path is not None
    limits, budget = service.runtime.limits, Key("abcdefghij", "acme", budget_nano=100)
    limits.usage(budget, time.time()).month.spent = 100
    assert service.reload()
    assert limits.check(budget, 0.0, time.time()) is not None
    service.path.write_text(service.path.read_text() + "currency: CNY\n")
    assert service.reload()
    assert limits.check(budget, 0.0, time.time()) is None
    assert "budgets count CNY from now on" in caplog.text
    service.path.write_text(service.path.read_text().replace("currency: CNY\n", ""))
    assert service.reload()
    assert limits.check(budget, 0.0, time.time()) is not None


async def test_a_file_that_a_refused_reload_missed_is_watched(service: Service, tmp_path: Path) -> None:
    assert service.path is not None
    key = tmp_path / "key"
    service.path.write_text(service.path.read_text().replace("[m]}", f"[m], api_key_file: {key}}}"))
    assert not service.reload()
    assert seen(service)
    key.write_text("sk-1\n")
    assert not seen(service)
    assert service.reload()
    assert seen(service)


async def test_no_secret_gets_into_the_log(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    assert service.path is not None
    service.path.write_text(service.path.read_text().replace("models: [m]", "api_key: sk-live-1"))
    assert not service.reload()
    assert "api_key: unknown key" in caplog.text
    assert "sk-live" not in caplog.text
    service.config = service.config.model_copy(update={"database": "postgresql://tide:s3cret@db/ledger"})
    with caplog.at_level("INFO"):
        print_banner(service)
    assert "ledger in postgresql://tide:***@db/ledger" in caplog.text


async def test_a_wrong_file_is_not_read_again_until_it_changes(service: Service) -> None:
    assert service.path is not None
    right = service.path.read_text()
    service.path.write_text("backends: 7")
    assert not seen(service)
    assert not service.reload()
    assert seen(service)
    service.path.write_text(right)
    assert not seen(service)
    assert service.reload()


async def test_rules_that_say_the_same_keep_what_they_remember(service: Service, tmp_path: Path) -> None:
    assert service.path is not None
    rules = service.runtime.valve.rules
    service.path.write_text(service.path.read_text() + "aliases: {x: m}\n")
    assert service.reload()
    assert service.runtime.aliases == {"x": "m"}
    assert service.runtime.valve.rules is rules  # spill flags, turns, bookings of max_qps
    policy = tmp_path / "policy.yaml"
    policy.write_text("rules: [{name: all, pick: random}]\n")
    service.path.write_text(service.path.read_text() + f"policy: {policy}\n")
    assert service.reload()
    assert service.runtime.valve.rules is not rules


async def test_a_key_or_certificate_in_a_file_is_watched_too(service: Service, tmp_path: Path) -> None:
    assert service.path is not None
    key = tmp_path / "key"
    key.write_text("one\n")
    service.path.write_text(service.path.read_text().replace("[m]}", f"[m], api_key_file: {key}}}"))
    assert service.reload()
    first = service.runtime.endpoints["a"]
    key.write_text("another\n")
    assert not seen(service)
    assert service.reload()
    assert service.runtime.endpoints["a"] is not first
    again = service.runtime.endpoints["a"]
    service.path.write_text(service.path.read_text() + "timeouts: {backend_idle: 2s}\n")
    assert service.reload()
    assert service.runtime.endpoints["a"] is again
    assert again.pool.idle_s == 2.0


def said(service: Service, text: str, caplog: pytest.LogCaptureFixture) -> str:
    """What the log calls the change to a text of the configuration."""
    assert service.path is not None
    service.path.write_text(text)
    caplog.clear()
    with caplog.at_level("INFO"):
        assert service.reload()
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("reloaded")]
    return line.removeprefix("reloaded: ")


async def test_a_reload_says_what_changed(
    service: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert service.path is not None
    text = service.path.read_text()
    assert said(service, text, caplog) == "nothing changed"
    more = text.replace("[m]}", '[m], slots: 4}, {name: b, url: "http://127.0.0.1:8", models: [m]}')
    assert said(service, more, caplog) == "backend b added; backend a changed (slots)"
    assert said(service, text, caplog) == "backend b removed; backend a changed (slots)"
    rest = "aliases: {x: m}\ntimeouts: {drain: 1m}\nlimits: {body: 2MiB}\nmedia_urls: true\n"
    assert said(service, text + rest, caplog) == (
        "aliases changed; media_urls false -> true; timeouts.drain 30 -> 60; limits.body 33554432 -> 2097152"
    )
    assert said(service, text + rest + "recent: 5\n", caplog) == "nothing changed"
    policy = tmp_path / "own.yaml"
    policy.write_text("rules: [{name: all, pick: random}]")
    text += f"policy: {policy}\n"
    assert said(service, text + rest, caplog) == f"policy local-first -> {policy}"
    policy.write_text("rules: [{name: all, prefer: [{labels: {card: a100}}, {site: '*'}]}]")
    assert said(service, text + rest, caplog) == f"policy {policy} changed"
    assert f"policy {policy}:1: " in caplog.text, "what `check` warns of"
    (tmp_path / "key").write_text("one")
    text = text.replace("[m]}", f"[m], api_key_file: {tmp_path / 'key'}}}")
    assert said(service, text + rest, caplog) == "backend a changed (api_key_file)"
    (tmp_path / "key").write_text("two")
    assert said(service, text + rest, caplog) == "backend a changed (what its files hold)"
    profile = tmp_path / "a.yaml"
    profile.write_text(PROFILE % 17)
    text = text.replace("[m],", f"[m], profile: {profile},")
    assert said(service, text + rest, caplog) == "backend a changed (profile)"
    assert service.runtime.fleet["a"].slots == 17
    profile.write_text(PROFILE % 9)
    assert not seen(service)
    assert said(service, text + rest, caplog) == "backend a changed (what its files hold)"
    assert service.runtime.fleet["a"].slots == 9
    text = text.replace(f"profile: {profile},", "")
    assert said(service, text + rest, caplog) == "backend a changed (profile)"
    assert service.runtime.fleet["a"].slots == DEFAULT_SLOTS


async def test_a_file_that_is_gone_is_told_in_words(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    assert service.path is not None
    service.path.unlink()
    assert not service.reload()
    assert f"goes on:\n{service.path}: no such file or directory" in caplog.text
    assert "Errno" not in caplog.text


async def test_a_policy_file_that_is_newly_named_is_watched_from_then_on(
    service: Service, tmp_path: Path
) -> None:
    assert service.path is not None
    policy = tmp_path / "own.yaml"
    service.path.write_text(service.path.read_text() + f"policy: {policy}\n")
    assert not service.reload()
    assert seen(service)
    policy.write_text("rules: [{name: all, pick: random}]")
    assert not seen(service), "it was missing, and is there now"
    assert service.reload()
    assert seen(service), "nothing has changed since"
    policy.write_text("rules: [{name: all, pick: round-robin}]")
    assert not seen(service)


async def test_what_changes_while_it_is_read_is_read_again(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert service.path is not None
    policy = tmp_path / "own.yaml"
    policy.write_text("rules: [{name: all, pick: random}]")
    service.path.write_text(service.path.read_text() + f"policy: {policy}\n")
    build = proxy.serve.build

    def slow(*arguments: Any) -> proxy.build.Built:
        built = build(*arguments)
        policy.write_text("rules: [{name: another, pick: random}]")
        return built

    monkeypatch.setattr(proxy.serve, "build", slow)
    assert service.reload()
    assert not seen(service)


async def test_what_was_configured_before_is_not_kept(service: Service) -> None:
    """What reads YAML leaves cycles, and the garbage collector hardly ever looks by itself (`proxy.process`)."""
    assert service.path is not None
    service.reload()
    gc.disable()
    try:
        before = len(gc.get_objects())
        for _ in range(5):
            assert service.reload()
        assert len(gc.get_objects()) - before < 200, "each leaves ninety where nothing collects them"
    finally:
        gc.enable()


async def test_what_is_saved_while_the_proxy_starts_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, policy = tmp_path / "tidegate.yaml", tmp_path / "policy.yaml"
    path.write_text(TEXT % (tmp_path / "state") + f"policy: {policy}\n")
    policy.write_text("rules: [{name: first, pick: random}]\n")
    right = proxy.serve.build

    def saved_meanwhile(*given: Any) -> Any:
        built = right(*given[:3], resolver=None, path=path)
        policy.write_text("rules: [{name: second, pick: random}]\n")
        return built

    service = Service(load_config(path), path)
    monkeypatch.setattr(proxy.serve, "build", lambda *given, **_: saved_meanwhile(*given))
    await service.start()
    monkeypatch.undo()
    try:
        assert not seen(service)
        assert service.reload()
        assert seen(service)
        assert [rule.name for rule in service.runtime.valve.rules.rules] == ["second"]
    finally:
        await service.stop()


def test_the_configuration_is_watched_from_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tidegate.yaml"
    path.write_text(TEXT % (tmp_path / "state"))
    right, watched = proxy.cli.load, []

    def saved_after(path: Path) -> Config:
        config = right(path)
        path.write_text(path.read_text() + "aliases: {x: m}\n")
        return config

    monkeypatch.setattr(proxy.cli, "load", saved_after)
    monkeypatch.setattr(proxy.process, "serve", lambda *_, **given: watched.append(given["watched"].changed))
    assert CliRunner().invoke(proxy.cli.app, ["serve", "--config", str(path)]).exit_code == 0
    assert watched == [True]
