"""Starting: what stands in the way is told in words. What a running proxy does is in tests/e2e."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from proxy import listeners
from proxy.build import ConfigError
from proxy.cli import app
from proxy.config import Config, load_config
from proxy.ledger_note import noted_database
from proxy.serve import Service


@pytest.mark.parametrize(("key", "address"), [("listen", "127.0.0.1"), ("admin", "127.0.0.1")])
async def test_a_port_in_use_names_the_option(key: str, address: str, tmp_path: Path) -> None:
    settings = {
        "listen": "127.0.0.1:0",
        "admin": "127.0.0.1:0",
        "state": str(tmp_path),
        "log": "off",
        "probing": {"enabled": False},
        "backends": [{"name": "a", "url": "http://127.0.0.1:1", "models": ["m"]}],
    }
    with socket.create_server((address, 0)) as taken:
        at = f"{address}:{taken.getsockname()[1]}"
        service = Service(Config.model_validate({**settings, key: at}))
        with pytest.raises(ConfigError) as caught:
            await service.start()
    assert str(caught.value) == (
        f"cannot listen on {at}: address already in use; "
        f"give another address with --{key} HOST:PORT, or `{key}` in the configuration"
    )
    await service.stop()


async def test_a_profile_that_says_no_slots_is_told_as_check_tells_it(tmp_path: Path) -> None:
    file = tmp_path / "tidegate.yaml"
    file.write_text(
        "backends:\n"
        '  - {name: a, url: "http://127.0.0.1:1", models: [m]}\n'
        '  - {name: b, url: "http://127.0.0.1:1", models: [m], profile: ../h20-8-32b}\n'
    )
    with pytest.raises(ConfigError) as caught:
        await Service(load_config(file), file).start()
    checked = CliRunner().invoke(app, ["check", str(file)])
    assert checked.exit_code == 1
    assert str(caught.value) == checked.stderr.rstrip("\n")
    assert f"{file}:3:64: " in str(caught.value)
    assert f"{tmp_path.parent}/h20-8-32b: no such file" in str(caught.value)


async def test_a_given_socket_that_others_reach_needs_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("0.0.0.0", 0)) as given:
        monkeypatch.setattr(listeners, "FIRST_DESCRIPTOR", os.dup(given.fileno()))
        port = given.getsockname()[1]
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "1")
    settings = {
        "listen": "127.0.0.1:0",
        "state": str(tmp_path),
        "backends": [{"name": "a", "url": "http://127.0.0.1:1"}],
    }
    service = Service(Config.model_validate(settings))
    taken = listeners.from_systemd
    given_to: list[listeners.Listeners] = []
    monkeypatch.setattr(
        listeners, "from_systemd", lambda environment: given_to.append(taken(environment)) or given_to[-1]
    )
    with pytest.raises(ConfigError, match=rf"listens on loopback only, not on 0\.0\.0\.0:{port}"):
        await service.start()
    given_to[0]["listen"][0].close()
    service._engine.dispose()


async def test_the_state_directory_tells_of_a_ledger_elsewhere(tmp_path: Path) -> None:
    settings = {
        "listen": "127.0.0.1:0",
        "admin": "127.0.0.1:0",
        "log": "off",
        "state": str(tmp_path / "state"),
        "probing": {"enabled": False},
        "backends": [{"name": "a", "url": "http://127.0.0.1:1", "models": ["m"]}],
    }
    for database in (f"sqlite:///{tmp_path}/elsewhere/ledger.db", None):
        service = Service(Config.model_validate({**settings, "database": database}))
        await service.start()
        await service.stop()
        assert noted_database(tmp_path / "state") == database, "also while no proxy runs"
