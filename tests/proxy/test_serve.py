"""Starting: what stands in the way is told in words. What a running proxy does is in tests/e2e."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from proxy.build import ConfigError
from proxy.cli import app
from proxy.config import Config, load_config
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
