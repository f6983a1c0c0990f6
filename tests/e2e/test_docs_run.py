"""What the documentation says to type is typed: blocks marked `run` end well, blocks marked `serve` serve.

The addresses of a page stand for real ones here: 8000 and 8001 are emulated backends, 8080 and 8081 the proxy.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.pages import Block, Page, page, pages

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

START_TIMEOUT_S = 60.0


def runs(one: Page) -> bool:
    return any(set(block.marks) & {"run", "serve"} for block in one.blocks)


@contextmanager
def child(
    command: list[str], folder: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[str]]:
    """A process that is stopped at the end."""
    with subprocess.Popen(
        command, cwd=folder, env=dict(environment), stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture(scope="module")
def backends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Two emulated backends, under the addresses that pages give them."""
    folder = tmp_path_factory.mktemp("backends")
    command = [sys.executable, "-m", "proxy.cli", "emulate", "--port", "0", "--speed", "20"]
    with child(command, folder, os.environ) as first, child(command, folder, os.environ) as second:
        found = {}
        for address, process in {"127.0.0.1:8000": first, "127.0.0.1:8001": second}.items():
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("listening on http://"), line
            found[address] = line.split()[2].removeprefix("http://")
        yield found


class Reader:
    """Somebody who types what a page says, in a folder of their own."""

    def __init__(self, folder: Path, addresses: Mapping[str, str]) -> None:
        self.folder = folder
        self.addresses = dict(addresses)
        self.environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        (folder / ".venv").symlink_to(sys.prefix)

    def write(self, block: Block) -> None:
        (self.folder / block.file).write_text(self._here(block.text))

    def run(self, block: Block) -> None:
        """Run a block to its end. AssertionError with what it printed, when it fails."""
        command = [sys.executable, "-"] if block.language == "python" else ["bash", "-eo", "pipefail"]
        done = subprocess.run(
            command,
            input=self._here(block.text),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
        assert done.stdout or ">" in block.text, f"{block.text}\nprinted nothing"

    @contextmanager
    def serving(self, block: Block) -> Iterator[None]:
        """Run a block that starts the proxy, on ports that the system chooses, until the end."""
        assert block.text.count("tidegate serve") == 1
        command = "exec tidegate serve --listen 127.0.0.1:0 --admin 127.0.0.1:0 --log off"
        text = self._here(block.text).replace("tidegate serve", command)
        with child(["bash", "-ec", text], self.folder, self.environment) as process:
            ports = self._ports(process)
            self.addresses |= {"127.0.0.1:8080": ports["listen"], "127.0.0.1:8081": ports["admin"]}
            yield

    def _ports(self, process: subprocess.Popen[str]) -> dict[str, str]:
        file = self.folder / "tidegate-data" / "ports.json"
        deadline = time.monotonic() + START_TIMEOUT_S
        while not file.exists():
            assert process.poll() is None, "the proxy has ended"
            assert time.monotonic() < deadline, "the proxy does not start"
            time.sleep(0.05)
        ports: dict[str, str] = json.loads(file.read_text())
        return ports

    def _here(self, text: str) -> str:
        for written, real in self.addresses.items():
            text = text.replace(written, real)
        return text


@pytest.mark.parametrize("one", [one for one in pages() if runs(one)], ids=repr)
def test_what_a_page_says_to_type_works(one: Page, backends: dict[str, str], tmp_path: Path) -> None:
    reader = Reader(tmp_path, backends)
    marked = [block for block in one.blocks if block.marks]
    if not any("serve" in block.marks for block in marked):
        # A page about a proxy that runs: the shortest configuration, as its own page starts it.
        marked = [
            block for block in page("configuration").blocks if block.file or "serve" in block.marks
        ] + marked
    _read(reader, marked)


def _read(reader: Reader, blocks: list[Block]) -> None:
    for number, block in enumerate(blocks):
        if block.file:
            reader.write(block)
        elif "serve" in block.marks:
            with reader.serving(block):
                _read(reader, blocks[number + 1 :])
            return
        else:
            reader.run(block)
