"""A real vLLM as a process: started, asked for its figures, and ended in all the ways servers end.

Its environment and models are made by `install_vllm.py`. The flags are those that make a small vLLM on a CPU start
in seconds and stay small: by default its KV cache takes all memory that is free, its engine is a third process,
and the first request with `logprobs` compiles for ten seconds.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.processes import Service, Services, StartError, free_port
from tests.e2e.local_http import get, post

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".vllm" / "bin" / "python"
MODELS = ROOT / ".vllm" / "models"

KV_CACHE = {"tiny": "64M", "smollm2": "512M"}

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_SERVER_DEV_MODE": "1",  # control endpoints: /pause makes an engine silent, and none may be reachable
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "PYTHONDONTWRITEBYTECODE": "",  # the first start leaves bytecode for the others
}


@dataclass(frozen=True)
class Counters:
    """What an engine has counted since it started, tokens."""

    prompt: int
    generated: int

    def __sub__(self, earlier: Counters) -> Counters:
        return Counters(self.prompt - earlier.prompt, self.generated - earlier.generated)

    def __add__(self, other: Counters) -> Counters:
        return Counters(self.prompt + other.prompt, self.generated + other.generated)


class VllmServer:
    """One vLLM process, with the engine it started."""

    def __init__(
        self,
        services: Services,
        name: str,
        *,
        model: str = "tiny",
        served: str = "",
        drain_s: int | None = 20,
    ) -> None:
        """Begin to start it; `wait_ready` must follow.

        `name`: of its log. `served`: what the model is called, by default as `model`. `drain_s`: how long running
        requests may take to end after SIGTERM; None: they are abandoned, and their connections stay open.
        """
        self.name = name
        self.model = served or model
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._services = services
        self._started = time.monotonic()
        drain = () if drain_s is None else ("--shutdown-timeout", str(drain_s))
        command = [
            *(str(PYTHON), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(MODELS / model), "--served-model-name", self.model),
            *(
                "--host",
                "127.0.0.1",
                "--port",
                str(self.port),
                "--max-model-len",
                "2048",
                "--dtype",
                "bfloat16",
            ),
            *("--enforce-eager", "--distributed-executor-backend", "uni"),
            *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
            *("--kv-cache-memory-bytes", KV_CACHE[model], *drain),
        ]
        self.service: Service = services.start(name, command, environment=ENVIRONMENT)

    def wait_ready(self, timeout_s: float = 240.0) -> VllmServer:
        """Wait until it answers; raises StartError with the end of its log."""
        while time.monotonic() - self._started < timeout_s:
            if self.service.process.poll() is not None:
                break
            try:
                get(f"{self.url}/health")
            except OSError:
                time.sleep(0.1)
            else:
                return self
        raise StartError(f"{self.name} did not start:\n{self.service.log_tail(6000)}")

    def pause(self, *, abort: bool = False) -> None:
        """Freeze the engine: what comes waits, connections stay open.

        What runs stays as it is, or with `abort` is ended by the engine, as it does when it has to stop.
        """
        post(f"{self.url}/pause?mode={'abort' if abort else 'keep'}")

    def resume(self) -> None:
        """End of `pause`."""
        post(f"{self.url}/resume")

    @contextmanager
    def paused(self, *, abort: bool = False) -> Iterator[None]:
        """`pause`, then `resume` whatever happens."""
        self.pause(abort=abort)
        try:
            yield
        finally:
            self.resume()

    def figure(self, name: str) -> float:
        """Sum of a metric over its labels, 0 if there is none yet: `figure("vllm:num_requests_running")`."""
        return sum(
            sample.value
            for family in text_string_to_metric_families(get(f"{self.url}/metrics"))
            for sample in family.samples
            if sample.name == name
        )

    @property
    def running(self) -> int:
        """Requests that its engine works on or has waiting."""
        return int(self.figure("vllm:num_requests_running") + self.figure("vllm:num_requests_waiting"))

    def counters(self) -> Counters:
        """Tokens so far, as the engine itself counts them."""
        return Counters(
            int(self.figure("vllm:prompt_tokens_total")), int(self.figure("vllm:generation_tokens_total"))
        )

    def wait_idle(self, timeout_s: float) -> float:
        """Wait until it works on nothing; returns the seconds that took. Raises TimeoutError."""
        began = time.monotonic()
        while self.running:
            if time.monotonic() - began > timeout_s:
                raise TimeoutError(f"{self.name} still works on {self.running} requests after {timeout_s} s")
            time.sleep(0.02)
        return time.monotonic() - began

    def requests_logged(self) -> list[str]:
        """`METHOD path` of every request that has reached it, from its access log."""
        lines = self.service.log.read_text(errors="replace").splitlines()
        marked = (line.split('"')[1] for line in lines if ' - "' in line and "HTTP/1.1" in line)
        return [line.removesuffix(" HTTP/1.1") for line in marked]

    def terminate(self) -> None:
        """Ask it to stop, as an orchestrator does: SIGTERM to the server itself."""
        self.service.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End server and engine at once, as the machine's death would. Harmless if it is dead already."""
        if self.service.process.returncode is None:
            self._services.kill(self.service)
