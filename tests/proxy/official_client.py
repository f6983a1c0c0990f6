"""The official `openai` client, and a server that answers it with whatever bytes a test wants it to read."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import openai


class _Server(socketserver.TCPServer):
    answer = b""


class _Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        length = 0
        while (line := self.rfile.readline().strip()) != b"":
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        self.rfile.read(length)
        assert isinstance(self.server, _Server)
        self.wfile.write(self.server.answer)


class OfficialClient:
    """`reads(answer)` makes the next answer; `client` is the official one, without retries."""

    def __init__(self, server: _Server, client: openai.OpenAI) -> None:
        self._server = server
        self.client = client

    def reads(self, answer: bytes) -> openai.OpenAI:
        """A client that will read `answer`, whatever it asks; the connection closes behind it."""
        self._server.answer = answer
        return self.client


@contextmanager
def official_client() -> Iterator[OfficialClient]:
    with _Server(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        base_url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        with openai.OpenAI(base_url=base_url, api_key="-", max_retries=0) as client:
            yield OfficialClient(server, client)
        server.shutdown()
        thread.join()
