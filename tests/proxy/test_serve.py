"""Starting: what stands in the way is told in words. What a running proxy does is in tests/e2e."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from proxy.build import ConfigError
from proxy.config import Config
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
