"""Whether an engine could listen somewhere."""

from __future__ import annotations

import os
import socket

import pytest

from benchmarks.processes import free_port
from proxy.scaling.ports import listener, why_not


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_port_is_in_use_as_long_as_somebody_listens(everywhere: bool) -> None:
    with socket.create_server(("0.0.0.0" if everywhere else "127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert f"port {port} is in use by " in why_not("127.0.0.1", port)
        assert listener(port).endswith(f", process {os.getpid()}")
        assert why_not("127.0.0.1", 0) == ""
    assert why_not("127.0.0.1", port) == ""
    assert listener(port) == ""


def test_connections_that_have_just_ended_are_in_nobodys_way() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        served, _ = server.accept()
        served.close()
        client.close()
    assert why_not("127.0.0.1", port) == ""


def test_an_address_of_another_machine_is_none_of_ours() -> None:
    assert why_not("192.0.2.1", free_port()) == "192.0.2.1 is not an address of this machine"
    assert "is no address" in why_not("no host", 80)
