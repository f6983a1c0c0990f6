"""The real proxy as a process, from the command line a user types, with what its other commands say of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.processes import Service, Services, StartError
from tests.e2e.local_http import get

COMMAND = Path(sys.executable).with_name("tidegate")


class TidegateProcess:
    """`tidegate serve --config FILE` on ports that the system chose."""

    def __init__(
        self,
        services: Services,
        folder: Path,
        config: Mapping[str, Any],
        *,
        before: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`folder`: for configuration and state. `config`: what the file says besides ports and state. `before`: a
        command that runs it as its own process (`prlimit`, `strace -D`); both may be changed for the next start."""
        self.before = before
        self.environment = dict(environment or {})
        self.config_file = folder / "tidegate.yaml"
        self.state_folder = folder / "state"
        settings = {
            "listen": "127.0.0.1:0",
            "admin": "127.0.0.1:0",
            "state": str(self.state_folder),
            **config,
        }
        self.config_file.write_text(json.dumps(settings))  # JSON is YAML
        self._services = services
        self.service: Service
        self.url = ""
        self.admin = ""
        self.start()

    def start(self, timeout_s: float = 60.0) -> None:
        """Start it (again) and wait until it serves. Raises StartError with the end of its log."""
        command = [*self.before, str(COMMAND), "serve", "--config", str(self.config_file)]
        self.service = self._services.start("tidegate", command, environment=self.environment)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self.service.process.poll() is None:
            try:
                ports = json.loads((self.state_folder / "ports.json").read_text())
            except OSError:
                ports = {}
            if ports.get("pid") == self.service.pid:  # not those of the last run
                self.url, self.admin = f"http://{ports['listen']}", f"http://{ports['admin']}"
                return
            time.sleep(0.05)
        raise StartError(f"tidegate did not start:\n{self.service.log_tail(6000)}")

    @property
    def serving(self) -> int:
        """The process that the state directory tells of: after an upgrade, another than `service`."""
        return int(json.loads((self.state_folder / "ports.json").read_text())["pid"])

    def upgrade(self, *options: str) -> subprocess.CompletedProcess[str]:
        """`tidegate upgrade`, by the state directory: the configuration may be broken."""
        command = [str(COMMAND), "upgrade", "--state", str(self.state_folder), *options]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    @property
    def port(self) -> int:
        """Of the OpenAI API."""
        return int(self.url.rpartition(":")[2])

    def run(self, *arguments: str) -> str:
        """What another of its commands prints, for the same configuration."""
        done = subprocess.run(
            [COMMAND, *arguments, "--config", self.config_file], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise StartError(f"tidegate {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}")
        return done.stdout

    def usage(self, by: str = "tenant") -> list[dict[str, Any]]:
        """The lines of `tidegate usage --json`."""
        lines: list[dict[str, Any]] = json.loads(self.run("usage", "--by", by, "--json"))
        return lines

    def export(self) -> list[dict[str, Any]]:
        """The rows of `tidegate export`, in order of arrival."""
        return [json.loads(line) for line in self.run("export").splitlines()]

    def rows(self, count: int, timeout_s: float = 10.0) -> list[dict[str, Any]]:
        """`export` as soon as it has `count` rows: they reach the ledger within a second. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while len(rows := self.export()) < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(rows)} of {count} rows after {timeout_s} s: {rows}")
            time.sleep(0.1)
        assert len(rows) == count, rows
        return rows

    def state(self) -> dict[str, Any]:
        """What `GET /state` on the admin port says."""
        state: dict[str, Any] = json.loads(get(f"{self.admin}/state"))
        return state

    def stop(self) -> None:
        """SIGTERM: let it drain and record everything."""
        self._services.stop(self.service, timeout_s=30.0)

    def reload(self) -> None:
        """SIGHUP: read its files again."""
        os.kill(self.service.pid, signal.SIGHUP)

    def kill(self) -> None:
        """SIGKILL: a crash."""
        self._services.kill(self.service)
