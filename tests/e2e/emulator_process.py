"""`tidegate emulate` as a process that a test may kill, stop or let do wrong."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import urllib.request
from typing import Any

from benchmarks.processes import Service, Services, StartError
from tests.e2e.local_http import get
from tests.e2e.tidegate_process import COMMAND

MODEL = "m"


class EmulatorProcess:
    """One process with an emulated vLLM for each name, all with the model `m`, on ports that stay the same."""

    def __init__(self, services: Services, *names: str, **options: float) -> None:
        """`options`: those of the command, `slots=4, tpot=0.01`."""
        self.ports = dict.fromkeys(names, 0)
        self._services = services
        self._options = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        self.service: Service
        self.start()

    def start(self) -> None:
        """Start it (again) and wait until it serves. Raises StartError with the end of its log."""
        name = "emulator-" + "-".join(self.ports)
        ports = [text for port in self.ports.values() for text in ("--port", str(port))]
        command = [str(COMMAND), "emulate", "--model", MODEL, "--control", *ports, *self._options]
        self.service = self._services.start(name, command, stdout=subprocess.PIPE)
        assert self.service.process.stdout is not None
        for backend in self.ports:
            said = self.service.process.stdout.readline().decode()
            if not (found := re.match(r"listening on http://127\.0\.0\.1:(\d+) ", said)):
                raise StartError(f"{name} did not start:\n{said}{self.service.log_tail()}")
            self.ports[backend] = int(found[1])

    def sections(self, **fields: Any) -> list[dict[str, Any]]:
        """Its backends as a configuration has them."""
        return [
            {"name": name, "url": f"http://127.0.0.1:{port}", "models": [MODEL], **fields}
            for name, port in self.ports.items()
        ]

    def kill(self) -> None:
        """SIGKILL: a crash."""
        self._services.kill(self.service)
        if self.service.process.stdout is not None:
            self.service.process.stdout.close()

    def freeze(self) -> None:
        """SIGSTOP: it keeps its connections and says nothing."""
        self.service.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.service.process.send_signal(signal.SIGCONT)

    def order(self, name: str, **fault: Any) -> None:
        """Let a backend do wrong from now on: `order("a", kind="slow", factor=10)`."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.ports[name]}/emulator/fault",
            data=json.dumps(fault).encode(),
            headers={"content-type": "application/json"},
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10):
            pass

    def counter(self, metric: str) -> float:
        """The sum of a metric of vLLM over its backends: `num_requests_running`, `generation_tokens_total`."""
        total = 0.0
        for port in self.ports.values():
            page = get(f"http://127.0.0.1:{port}/metrics")
            found = re.findall(rf"^vllm:{metric}(?:{{.*?}})? (\S+)$", page, re.M)
            assert found, metric
            total += sum(map(float, found))
        return total
