"""Networks whose packets are dropped, and names that move: in namespaces of their own."""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.processes import Services
from tests.e2e.backends import answers
from tests.e2e.emulator_process import EmulatorProcess
from tests.e2e.faults.conftest import Serve, needed
from tests.e2e.faults.figures import Figure
from tests.e2e.faults.streams import Heard, ask
from tests.e2e.proxy_fixtures import StartBackend, bound, chat_body, eventually
from tests.e2e.tidegate_process import TidegateProcess

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS = 0x8914
IFF_UP = 0x1
DROP = """
table inet faults {{
    chain input {{
        type filter hook input priority 0;
        tcp dport {port} drop
    }}
}}
"""


def in_namespace(work: Callable[[], None]) -> None:
    """Do it in a thread whose network is its own: a loopback interface and nothing else. Processes that it starts
    have the same. Skips the test where that is not allowed."""
    raised: list[BaseException] = []
    refused = 0

    def run() -> None:
        nonlocal refused
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
            refused = ctypes.get_errno()
            return
        try:
            with socket.socket() as sock:
                fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", IFF_UP))
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if refused:
        pytest.skip(f"NOT RUN: no network namespace can be made ({os.strerror(refused)}); run it as root")
    if raised:
        raise raised[0]


def drop(nft: str, port: int) -> None:
    """From now on, drop every packet to a port."""
    subprocess.run([nft, "-f", "-"], input=DROP.format(port=port).encode(), check=True, timeout=10)


def allow(nft: str) -> None:
    subprocess.run([nft, "delete", "table", "inet", "faults"], check=True, timeout=10)


def test_f05_packets_that_are_dropped_cost_the_connect_timeout(
    tidegate_services: Services, tmp_path: Path, figure: Figure
) -> None:
    nft = needed("nft", "nftables")
    connect_s, interval_s = 0.3, 0.2

    def asked(proxy: TidegateProcess) -> tuple[str, float]:
        """-> the backend that has answered, and how long it took."""
        began = time.monotonic()
        request = urllib.request.Request(
            f"{proxy.url}/v1/chat/completions", chat_body(), {"content-type": "application/json"}
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            assert answer.status == 200
            return answer.headers["x-tidegate-backend"], time.monotonic() - began

    def work() -> None:
        engines = EmulatorProcess(tidegate_services, "a", "b", slots=8, ttft=0.02, tpot=0.001)
        near, far = engines.sections(slots=8)
        config = {
            "log": "off",
            "backends": [near, far | {"site": "far"}],
            "sites": {"far": {}},
            "timeouts": {"connect": connect_s, "first_token": 60},
            "limits": {"requests": 1},  # each has a connection of its own
            "probing": {"interval": 60, "timeout": 0.15, "metrics": False},
        }
        proxy = TidegateProcess(tidegate_services, tmp_path, config)
        assert asked(proxy)[0] == "a"
        drop(nft, engines.ports["a"])
        found = [asked(proxy) for _ in range(10)]
        assert [backend for backend, _ in found] == ["b"] * 10
        slowest = max(took for _, took in found)
        assert connect_s <= slowest < bound(connect_s + 0.3)
        assert max(took for _, took in found[5:]) < connect_s, "it is left out"
        figure(
            "F5", slowest, f"s was the longest request with dropped packets, {connect_s} s allowed to connect"
        )
        proxy.stop()

        allow(nft)
        config["probing"] = {"interval": interval_s, "timeout": 0.15, "metrics": False}
        proxy = TidegateProcess(tidegate_services, tmp_path, config)
        drop(nft, engines.ports["a"])
        until = time.monotonic() + 30
        while proxy.state()["backends"][0]["available"]:
            assert time.monotonic() < until
        allow(nft)
        back = time.monotonic()
        while not proxy.state()["backends"][0]["available"]:
            assert time.monotonic() < until
        took = time.monotonic() - back
        assert took < bound(2.2 * interval_s + 0.15)
        assert asked(proxy)[0] == "a"
        figure("F5", took, f"s until it is used again, with 2 successes at {interval_s} s wanted")

    in_namespace(work)


IN_MOUNTS = ("unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"')
"""Runs a command with another file in the place of `/etc/hosts`."""


async def test_f27_a_name_that_moves_is_followed_and_one_that_is_lost_is_kept(
    start_backend: StartBackend, serve: Serve, tmp_path: Path, figure: Figure
) -> None:
    if os.geteuid() != 0:
        pytest.skip("NOT RUN: no mount namespace can be made; run it as root")
    old = await start_backend(then=answers(20, gap_s=0.002))
    new = await start_backend(then=answers(20, gap_s=0.002), host="127.0.0.2", port=old.port)
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 engine.test\n")
    section = {"name": "a", "url": f"http://engine.test:{old.port}", "models": ["m"], "site": "local"}
    proxy = await serve(section, before=(*IN_MOUNTS, str(hosts)), resolve="1s")
    heard: list[Heard] = []

    async def goes_on(received: Callable[[], bool]) -> None:
        async with asyncio.timeout(bound(6.0)):
            while not received():
                heard.append(await ask(proxy.port, stream=True))

    await goes_on(lambda: len(old.received) >= 3)
    hosts.write_text("127.0.0.2 engine.test\n")
    moved = time.monotonic()
    await goes_on(lambda: len(new.received) >= 3)
    took = time.monotonic() - moved
    assert took < bound(1.0 + 5.0)
    await eventually(lambda: old.open == 0)
    before = len(old.received)
    hosts.write_text("\n")
    await goes_on(
        lambda: "engine.test cannot be resolved, its last addresses go on" in proxy.service.log_tail()
    )
    await goes_on(lambda: len(new.received) >= 20)
    assert len(old.received) == before
    assert {(one.status, one.done) for one in heard} == {(200, True)}
    figure(
        "F27",
        took,
        f"s until a name was followed that is looked up every 1 s, {len(heard)} requests, 0 failed",
    )
