from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from proxy.ask import AskError, admin_address, ask
from proxy.config import Config

BACKENDS = [{"name": "a", "url": "http://127.0.0.1:1"}]


def config(state: Path, admin: str = "127.0.0.1:9") -> Config:
    return Config.model_validate({"backends": BACKENDS, "state": str(state), "admin": admin})


def runs(state: Path, admin: str) -> None:
    """A proxy runs on this state directory."""
    state.mkdir(exist_ok=True)
    (state / "ports.json").write_text(json.dumps({"listen": "127.0.0.1:1", "admin": admin, "pid": 1}))


# Where


def test_what_is_given_comes_before_what_is_written_before_what_is_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert admin_address(None, None, None) == "127.0.0.1:8081"
    configured = config(tmp_path / "data")
    assert admin_address(None, None, configured) == "127.0.0.1:9"
    runs(tmp_path / "data", "127.0.0.1:10")
    assert admin_address(None, None, configured) == "127.0.0.1:10"
    assert admin_address("127.0.0.1:11", None, configured) == "127.0.0.1:11"
    assert admin_address("http://127.0.0.1:11/", None, None) == "127.0.0.1:11"
    assert admin_address(None, tmp_path / "data", None) == "127.0.0.1:10"
    runs(tmp_path / "tidegate-data", "127.0.0.1:12")
    assert admin_address(None, None, None) == "127.0.0.1:12"


def test_a_directory_without_a_running_proxy_is_not_passed_over(tmp_path: Path) -> None:
    with pytest.raises(AskError, match=f"no proxy is running on {tmp_path}"):
        admin_address(None, tmp_path, None)
    with pytest.raises(AskError, match="no proxy is running on"):
        admin_address(None, None, config(tmp_path, "127.0.0.1:0"))


def test_a_port_without_a_host_is_completed(tmp_path: Path) -> None:
    with pytest.raises(AskError) as caught:
        admin_address("18481", None, None)
    assert str(caught.value) == (
        "--admin: an address is HOST:PORT, got '18481' (did you mean 127.0.0.1:18481?)"
    )
    with pytest.raises(AskError, match="not both"):
        admin_address("127.0.0.1:1", tmp_path, None)


# What it answers


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            thread.join()


def test_an_answer_is_handed_over() -> None:
    with answering(200, b'{"ready": true}') as address:
        assert ask(address, "/state") == {"ready": True}


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (404, b'{"error": {"message": "no request \'x\' among the last 10"}}', "no request 'x' among"),
        (404, b'{"error": {"message": "no path", "code": "not_found"}}', "is not the admin port of tidegate"),
        (200, b"<html>", "is not the admin port of tidegate"),
        (200, b"[]", "is not the admin port of tidegate"),
    ],
)
def test_other_answers_are_told_in_words(status: int, body: bytes, words: str) -> None:
    with answering(status, body) as address, pytest.raises(AskError, match=words):
        ask(address, "/state")


def test_nobody_there_is_told_without_numbers_of_errors() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(AskError) as caught:
            ask(address, "/state")
    assert str(caught.value) == f"no proxy answers at {address}: connection refused"
