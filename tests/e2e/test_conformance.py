"""The conformance cases and their runners from `../shared/conformance`, against a whole proxy on real sockets.

Twice: as the proxy is configured by default, where most requests end at an unknown path; and with every path passed
on to the backend, so that whatever gets through the same parser reaches an origin.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from proxy.config import Config
from proxy.errors import STATUS
from proxy.serve import Service
from tests.e2e.faults.figures import Figure

pytestmark = [pytest.mark.e2e, pytest.mark.shared]

CHAT_PATH = "/v1/chat/completions"
CHAT_BODY = '{"model":"m","messages":[{"role":"user","content":"case-{n}"}]}'

INCOMPLETE_BY_CONSTRUCTION = "llhttp/response/connection/HTTP-103-first-then-200"
"""Its origin announces one byte more than it sends, and keeps its connection open."""

REFUSALS = {
    *("malformed_request", "malformed_body", "ambiguous_framing", "bad_host", "expectation_failed"),
    *("unsupported_transfer_coding", "unsupported_method", "unsupported_version"),
}
"""How bytes that are no acceptable HTTP may be refused."""


class Stage:
    """A proxy in front of an origin that answers every case in its own way."""

    def __init__(self, cases: Path, service: Service, log: Path, results: Path) -> None:
        self.cases = cases
        self.service = service
        self.log = log
        """Targets that the origin was asked for."""
        self.results = results

    @property
    def port(self) -> str:
        return self.service.ports.listen.rpartition(":")[2]

    async def run(self, script: str, *arguments: str) -> tuple[int, str, list[dict[str, Any]]]:
        """Exit status, output and verdicts of a runner."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(self.cases / script), *arguments, "--json", str(self.results)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        assert process.returncode is not None
        return process.returncode, output.decode(), json.loads(self.results.read_text())


@asynccontextmanager
async def stage(shared: Path, directory: Path, *, forwarding: bool) -> AsyncIterator[Stage]:
    cases = shared / "conformance"
    log = directory / "origin.log"
    log.touch()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    origin = await asyncio.create_subprocess_exec(
        *(sys.executable, str(cases / "upstream_cases.py"), "serve", str(port), "--log", str(log))
    )
    config = Config.model_validate(
        {
            "listen": "127.0.0.1:0",
            "admin": "127.0.0.1:0",
            "state": directory / "state",
            "log": "off",
            "probing": {"enabled": False},
            "backends": [{"name": "b", "url": f"http://127.0.0.1:{port}", "models": ["m"], "slots": 1000}],
        }
    )
    service = Service(config, forward_model="m" if forwarding else "")
    try:
        await listening(port)
        await service.start()
        service.runtime.fleet["b"].breaker.threshold = 10**9
        try:
            yield Stage(cases, service, log, directory / "results.json")
        finally:
            await service.stop()
    finally:
        origin.terminate()
        await origin.wait()


async def listening(port: int) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.02)
            else:
                writer.close()
                return


@pytest.fixture(params=["default", "forwarding"])
def on_stage(request: pytest.FixtureRequest, shared: Path, tmp_path: Path) -> Callable[..., None]:
    """Runs a test's body in front of a proxy that forwards everything, or nothing but the API."""

    def run(play: Callable[[Stage, bool], Awaitable[None]]) -> None:
        forwarding = request.param == "forwarding"

        async def main() -> None:
            async with stage(shared, tmp_path, forwarding=forwarding) as prepared:
                await play(prepared, forwarding)

        uvloop.run(main())

    return run


def test_requests(on_stage: Callable[..., None], figure: Figure) -> None:
    async def play(stage: Stage, forwarding: bool) -> None:
        status, output, rows = await stage.run(
            *("run_raw_http.py", "127.0.0.1", stage.port, "--canary", "--upstream-log", str(stage.log), "-v")
        )
        assert status == 0, output
        assert "bar met" in output
        assert [row for row in rows if row["class"] == "either" and row["verdict"] != "pass"] == []
        assert [row for row in rows if row["verdict"] not in ("pass", "info")] == [], output
        assert Counter(row["class"] for row in rows)["reject"] > 100
        assert bool(stage.log.read_bytes()) == forwarding
        refused = Counter(row["class"] for row in rows)["reject"]
        figure("F12", refused, f"of {refused} requests refused that must be; 0 canaries served")

    on_stage(play)


def test_refused_requests_are_told_why(on_stage: Callable[..., None]) -> None:
    async def play(stage: Stage, _: bool) -> None:
        lines = (stage.cases / "http1_requests.jsonl").read_text().splitlines()
        cases = [case for case in map(json.loads, lines) if case["class"] == "reject"]
        limit = asyncio.Semaphore(8)

        async def refusal(case: dict[str, Any]) -> str:
            async with limit:
                answer = await last_answer(
                    stage.port, b"".join(base64.b64decode(s["send_b64"]) for s in case["steps"])
                )
            head, _, body = answer.partition(b"\r\n\r\n")
            assert b"connection: close" in head.lower(), case["id"]
            error = json.loads(body)["error"]
            assert head.split(b" ")[1] == b"%d" % STATUS[error["code"]], case["id"]
            assert error["message"], case["id"]
            return str(error["code"])

        codes = Counter(await asyncio.gather(*map(refusal, cases)))
        assert set(codes) <= REFUSALS
        assert len(codes) > 5
        assert codes.total() == len(cases)

    on_stage(play)


async def last_answer(port: str, request: bytes) -> bytes:
    """The last answer on a connection that the proxy closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
    writer.write(request)
    async with asyncio.timeout(5):
        answers = await reader.read()
    writer.close()
    *_, last = re.finditer(rb"HTTP/1\.1 [0-9]{3} ", answers)
    return answers[last.start() :]


def test_replies_of_backends(on_stage: Callable[..., None], figure: Figure) -> None:
    async def play(stage: Stage, forwarding: bool) -> None:
        asking = () if forwarding else ("--path", CHAT_PATH, "--body", CHAT_BODY)
        status, output, rows = await stage.run("upstream_cases.py", "run", stage.port, *asking)
        assert status == 0, output
        assert [row for row in rows if row["after"] != "ok"] == []
        verdicts = Counter(row["verdict"] for row in rows)
        assert verdicts["fail"] == 0, output
        hanging = [row["id"] for row in rows if row["verdict"] == "hang"]
        assert len(hanging) == 1, output
        assert hanging[0].startswith(INCOMPLETE_BY_CONSTRUCTION)
        assert [row for row in rows if row["class"] == "bad_gateway" and row["verdict"] != "pass"] == []
        figure(
            "F11", 0, f"of {len(rows)} answers reached another request or left a proxy that does not serve"
        )

    on_stage(play)
