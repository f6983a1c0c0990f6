"""When a reload that failed is tried again."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NoReturn

import pytest

import proxy.build
import proxy.serve
from proxy.config import load_config
from proxy.serve import Service

TEXT = """
listen: 127.0.0.1:0
admin: 127.0.0.1:0
log: off
state: %s
probing: {enabled: false}
backends: [{name: a, url: "http://127.0.0.1:9", models: [m]}]
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
    return service._fingerprint() == service._seen


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
