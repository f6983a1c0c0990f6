"""What systemd is told."""

from __future__ import annotations

import os
import socket

import pytest

from proxy.notify import READY, notify, reloading


@pytest.mark.parametrize("kind", ["@", ""])
def test_lines_reach_the_named_socket(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    name = f"@tidegate-{os.getpid()}" if kind else str(tmp_path_factory.mktemp("n") / "s")
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name.replace("@", "\0"))
        sock.settimeout(10)
        notify(READY)
        assert sock.recv(100) == b"READY=1"
        reloading()
        first, second = sock.recv(100).split(b"\n")
        assert first == b"RELOADING=1"
        assert second.removeprefix(b"MONOTONIC_USEC=").isdigit()


def test_without_systemd_nobody_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify(READY)
    assert caplog.text == ""
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/at/all")
    notify(READY)
    assert "systemd cannot be told READY=1" in caplog.text
