"""Where backends are: names that move or cannot be resolved, several addresses, Unix sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from probes.resolver import Resolver
from proxy import serve
from tests.e2e import backends as b
from tests.e2e.faults.figures import Figure
from tests.e2e.proxy_fixtures import Proxy, StartBackend, StartProxy, chat, eventually

pytestmark = pytest.mark.e2e


class Names:
    """A resolver that says what the test wants; an empty list: it fails."""

    def __init__(self) -> None:
        self.addresses: list[str] = ["127.0.0.1"]
        self.asked = 0

    async def __call__(self, host: str) -> Sequence[str]:
        self.asked += 1
        if not self.addresses:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return self.addresses

    async def looked_up(self, proxy: Proxy) -> None:
        """As the proxy does every few seconds."""
        hosts = [endpoint.host for endpoint in proxy.runtime.endpoints.values()]
        await proxy.service._resolver.refresh(hosts)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    names = Names()
    monkeypatch.setattr(serve, "Resolver", partial(Resolver, names))
    return names


PROBING = {"enabled": True, "interval": "50ms", "timeout": "40ms", "down": 1, "up": 1}


async def test_a_name_is_followed_and_idle_connections_to_the_old_address_end(
    names: Names, start_backend: StartBackend, start_proxy: StartProxy, figure: Figure
) -> None:
    gate = asyncio.Event()
    old = await start_backend(b.answers(), b.waits(gate))
    new = await start_backend(host="127.0.0.2", port=old.port)
    url = f"http://engine.test:{old.port}"
    proxy = await start_proxy({"url": url}, timeouts={"backend_idle": "60s"})
    assert (await proxy.chat()).status == 200
    running = await proxy.connect()
    await running.send(chat(stream=True))
    await eventually(lambda: old.running)
    assert (await proxy.chat()).status == 200  # a second connection, idle from now on
    assert old.open == 2

    names.addresses = ["127.0.0.2"]
    await names.looked_up(proxy)
    await eventually(lambda: old.open == 1)
    assert (await proxy.chat()).status == 200
    assert len(new.received) == 1
    gate.set()
    assert (await running.answer()).done  # what runs is left alone, and its connection not kept
    await eventually(lambda: old.open == 0)
    assert proxy.backend("a").failed == 0
    await proxy.idle()
    figure("F27", 0, "of 4 requests failed while the name moved")


async def test_a_resolver_that_fails_costs_nothing_once_a_name_is_known(
    names: Names, start_backend: StartBackend, start_proxy: StartProxy, figure: Figure
) -> None:
    backend = await start_backend()
    proxy = await start_proxy(
        {"url": f"http://engine.test:{backend.port}"}, probing=PROBING, timeouts={"backend_idle": "1ms"}
    )
    names.addresses = []
    await names.looked_up(proxy)
    asked = names.asked
    before = proxy.runtime.probes()["a"]
    for _ in range(5):
        assert (await proxy.chat()).status == 200
    await eventually(lambda: backend.connections > 30)  # probes, and requests on connections of their own
    assert proxy.runtime.probes()["a"]["up"] == before["up"]
    assert proxy.backend("a").available
    assert names.asked == asked, "known names are asked for in the background only"
    figure("F27", 0, "of 5 requests failed while the resolver did")


async def test_addresses_are_tried_in_turn_and_the_good_one_first_then(
    names: Names, start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    names.addresses = ["127.0.0.9", "127.0.0.1"]
    backend = await start_backend()
    proxy = await start_proxy({"url": f"http://engine.test:{backend.port}"})
    assert (await proxy.chat()).status == 200
    endpoint = proxy.runtime.endpoints["a"]
    assert await endpoint._addresses() == ["127.0.0.1", "127.0.0.9"]
    assert proxy.backend("a").failed == 0


async def test_a_silent_address_takes_its_share_of_the_time_only(
    names: Names, start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend()
    with socket.socket() as silent, socket.socket() as filler:
        # Its queue is full and nobody accepts: further handshakes are not answered.
        silent.bind(("127.0.0.3", backend.port))
        silent.listen(0)
        filler.connect(("127.0.0.3", backend.port))
        names.addresses = ["127.0.0.3", "127.0.0.1"]
        proxy = await start_proxy({"url": f"http://engine.test:{backend.port}"}, timeouts={"connect": "1s"})
        with socket.socket() as another:
            another.setblocking(False)
            another.connect_ex(("127.0.0.3", backend.port))
            assert (await proxy.chat()).status == 200
    assert proxy.backend("a").failed == 0


async def test_a_name_that_stands_for_a_metadata_service_is_not_connected_to(
    names: Names, start_proxy: StartProxy
) -> None:
    names.addresses = ["169.254.169.254"]
    proxy = await start_proxy({"url": "http://engine.test:80"})
    answer = await proxy.chat()
    assert (answer.status, answer.json["error"]["message"]) == (
        502,
        "cannot connect to a: its name was not resolved",
    )


async def test_a_backend_on_a_unix_socket_is_probed_and_spoken_to(
    start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    backend = await start_backend(b.answers(4), path=str(tmp_path / "vllm.sock"))
    proxy = await start_proxy({"url": backend.url, "models": "auto"}, probing=PROBING)
    assert proxy.backend("a").models == {"m"}
    assert (await proxy.chat(stream=True)).text == "xxxx"
    assert (await proxy.chat()).status == 200
    assert backend.received[0].fields["host"] == "localhost"
    assert (await proxy.state())["backends"][0]["url"] == backend.url
    await backend.stop()
    await eventually(lambda: not proxy.backend("a").available)
    await proxy.idle()


async def test_a_unix_socket_that_is_not_there_is_a_failed_attempt(
    start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    proxy = await start_proxy({"url": f"unix:{tmp_path}/nothing.sock"}, await start_backend())
    answer = await proxy.chat()
    assert (answer.status, answer.backend) == (200, "b")
    (failure, _) = (proxy.runtime.observer.find(answer.id).explain())["decisions"]
    assert failure["failure"] == "cannot connect to a: No such file or directory"
