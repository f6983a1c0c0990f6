"""The processes of `tidegate demo`: three emulated backends and the proxy.

Each runs in a process group of its own, so that a Ctrl-C reaches only the demo, which then ends them in order;
Linux kills them should the demo vanish without doing so.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib.util
import os
import signal
import socket
import sys
import textwrap
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL = "demo"
CURRENCY = "CNY"
HOST = "127.0.0.1"
CONFIG = "demo.yaml"
"""The configuration in a directory that is kept: one of the usual name there would be somebody's own."""
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 5.0
"""From asking a process to end until it is killed."""
_PR_SET_PDEATHSIG = 1  # prctl(2)


class DemoError(Exception):
    """The demo cannot go on; the message is for the person at the terminal."""


@dataclass(frozen=True, slots=True)
class EmulatedSite:
    """One emulated backend. Speeds, prices and carbon figures are for illustration."""

    name: str
    site: str
    slots: int
    ttft_s: float
    """Of a prompt of 1000 tokens; the demo's are much shorter."""
    tpot_s: float
    slowdown: float
    rtt_s: float
    """Added before every reply; connecting, which is what the probes measure, is as fast as on one machine."""
    weight: float
    price_input: float
    """Per million tokens, as the output's."""
    price_output: float
    labels: dict[str, str]

    def capacity(self, answer_tokens: float) -> float:
        """Requests a second when all slots are busy with answers of so many tokens to short prompts."""
        tpot_s = self.tpot_s * (1.0 + self.slowdown * (self.slots - 1))
        return self.slots / (tpot_s * answer_tokens)


FLEET = (
    EmulatedSite("appliance", "local", 4, 0.15, 0.02, 0.02, 0.0, 1, 0, 0, {"card": "emulated"}),
    EmulatedSite("nanjing", "nanjing", 12, 0.2, 0.02, 0.01, 0.02, 2, 2.0, 8.0, {"card": "emulated"}),
    EmulatedSite("xian", "xian", 8, 0.2, 0.025, 0.01, 0.03, 1, 1.5, 6.0, {"card": "emulated"}),
)
SITES: dict[str, dict[str, Any]] = {
    "nanjing": {"operator": "njcloud", "location": [32.06, 118.79], "carbon_gco2_kwh": 520},
    "xian": {"operator": "xacloud", "location": [34.34, 108.94], "carbon_gco2_kwh": 560},
}


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """All there is to set."""

    port: int = 8080
    """Of the API; 0: any free port."""
    admin_port: int = 8081
    """Of the admin pages; 0: any free port."""
    state: Path | None = None
    """Where the ledger is kept, and the proxy's configuration; None: a directory that goes away with the demo."""
    traffic: bool = False
    """Send a rush hour and end with a summary; else serve until stopped."""
    duration_s: float = 60.0
    """Of the rush hour."""
    seed: int = 0
    emulate: tuple[str, ...] = (sys.executable, "-m", "proxy.cli", "emulate")
    serve: tuple[str, ...] = (sys.executable, "-m", "proxy.cli", "serve")


class Child:
    """A process of the demo's, in a process group of its own; it writes into a log file."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.log = log
        self._process = process

    @classmethod
    async def start(
        cls, name: str, command: Sequence[str], directory: Path, pipe_stdout: bool = False
    ) -> Child:
        """Start a command. `pipe_stdout`: its standard output is for `first_line`, not for the log."""
        path = directory / f"{name}.log"
        with path.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if pipe_stdout else log,
                stderr=log,
                process_group=0,
                preexec_fn=_die_with_parent(),
            )
        return cls(name, process, path)

    async def first_line(self) -> str:
        """The first line of standard output. Raises DemoError if it ends without one."""
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            await self._process.wait()
            raise self.failure()
        return line.decode().rstrip()

    @property
    def has_ended(self) -> bool:
        """Whether it is over."""
        return self._process.returncode is not None

    async def ended(self) -> None:
        """Wait until it ends."""
        await self._process.wait()

    def failure(self) -> DemoError:
        """It ended and should not have: what it said last."""
        last = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
        return DemoError(
            f"{self.name} ended with code {self._process.returncode}:\n{textwrap.indent(last, '  ')}"
        )

    async def stop(self) -> None:
        """Ask it to end, then make it end."""
        try:
            if not self.has_ended:
                os.killpg(self._process.pid, signal.SIGTERM)
                await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S)
        except (TimeoutError, ProcessLookupError):
            pass
        finally:
            if not self.has_ended:
                os.killpg(self._process.pid, signal.SIGKILL)
                await self._process.wait()


def _die_with_parent() -> Any:
    """What a child does before it becomes its program: ask Linux to kill it when this process is gone."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)  # it was gone before we asked

    return ask


def choose_port(port: int, flag: str) -> int:
    """The port, or a free one for 0. Raises DemoError, naming the port and the flag, if it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            problem = f"port {port} on {HOST} cannot be used ({error.strerror}); choose another with {flag}"
            raise DemoError(problem) from error
        chosen: int = probe.getsockname()[1]
        return chosen


def configuration(listen: int, admin: int, state: Path, urls: dict[str, str]) -> dict[str, Any]:
    """The proxy's configuration: `urls` by name of backend."""
    return {
        "listen": f"{HOST}:{listen}",
        "admin": f"{HOST}:{admin}",
        "state": str(state),
        "policy": "local-first",
        "timeouts": {"drain": "1s"},  # Ctrl-C is meant
        "backends": [
            {
                "name": backend.name,
                "url": urls[backend.name],
                "site": backend.site,
                "slots": backend.slots,
                "weight": backend.weight,
                "price": {"input": backend.price_input, "output": backend.price_output, "currency": CURRENCY},
                "labels": backend.labels,
            }
            for backend in FLEET
        ],
        "sites": SITES,
    }


def emulate_arguments(backend: EmulatedSite, seed: int) -> list[str]:
    """Arguments of `tidegate emulate` for one backend."""
    options = {
        "port": 0,
        "model": MODEL,
        "slots": backend.slots,
        "ttft": backend.ttft_s,
        "tpot": backend.tpot_s,
        "slowdown": backend.slowdown,
        "rtt": backend.rtt_s,
        "seed": seed,
    }
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def greeting(url: str, admin: str, config: Path) -> str:
    """How to talk to the running demo; everything in it works as printed."""
    python = _shown(Path(sys.executable))
    backends = "\n".join(
        f"  {backend.name:<10} {backend.slots:>2} slots   "
        + ("local" if backend.site == "local" else f"remote, every reply {backend.rtt_s * 1000:.0f} ms late")
        for backend in FLEET
    )
    needs = "" if importlib.util.find_spec("openai") else f"\n{python} -m pip install openai"
    return f"""\
Tidegate is running at {url}, in front of three emulated backends:

{backends}

Ask it something:

curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{{"model": "{MODEL}", "stream": true, "messages": [{{"role": "user", "content": "What is a tide?"}}]}}'

or from Python:
{needs}
{python} - <<'END'
from openai import OpenAI

client = OpenAI(base_url="{url}/v1", api_key="none")
stream = client.chat.completions.create(
    model="{MODEL}", messages=[{{"role": "user", "content": "What is a tide?"}}], stream=True
)
for event in stream:
    print(event.choices[0].delta.content or "", end="", flush=True)
print()
END

See how it is doing, and what was used:

curl -s {admin}/state
{_command()} usage --by backend --config {config}

Ctrl-C ends everything.
"""


def afterwards(config: Path) -> str:
    """What can be done with a ledger that is kept."""
    return f"""\

What these requests would have been under another policy:

{_command()} simulate --from-ledger 1h --config {config} --policy least-load --ttft 0.2
"""


def _command() -> str:
    """Ourselves, as one would type it here."""
    script = Path(sys.executable).with_name("tidegate")
    return _shown(script) if script.exists() else f"{_shown(Path(sys.executable))} -m proxy.cli"


def _shown(path: Path) -> str:
    """A path as one would type it here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


@dataclass(frozen=True, slots=True)
class Fleet:
    """The demo's processes, running."""

    url: str
    admin: str
    config: Path
    children: Sequence[Child]


async def start_fleet(settings: DemoSettings, stack: AsyncExitStack, directory: Path) -> Fleet:
    """Start everything and wait until the proxy is ready; `stack` stops it. Raises DemoError."""
    from ruamel.yaml import YAML

    listen = choose_port(settings.port, "--port")
    admin = choose_port(settings.admin_port, "--admin-port")
    children = []
    for backend in FLEET:
        command = [*settings.emulate, *emulate_arguments(backend, settings.seed)]
        children.append(await Child.start(backend.name, command, directory, pipe_stdout=True))
        stack.push_async_callback(children[-1].stop)
    urls = {}
    for child in children:
        async with _start_timeout(child.name):
            urls[child.name] = (await child.first_line()).split()[2]
    config = (settings.state or directory) / CONFIG
    state = (settings.state or directory / "state").absolute()
    try:
        config.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with config.open("w") as file:
            YAML(typ="safe").dump(configuration(listen, admin, state, urls), file)
    except OSError as error:
        raise DemoError(f"{config} cannot be written ({error.strerror}); choose another --state") from error
    proxy = await Child.start("proxy", [*settings.serve, "--config", str(config)], directory)
    stack.push_async_callback(proxy.stop)
    fleet = Fleet(f"http://{HOST}:{listen}", f"http://{HOST}:{admin}", config, [*children, proxy])
    async with _start_timeout(proxy.name):
        await _until_ready(fleet)
    return fleet


@asynccontextmanager
async def _start_timeout(name: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            yield
    except TimeoutError as error:
        raise DemoError(f"{name} was not ready within {START_TIMEOUT_S:.0f} s") from error


async def _until_ready(fleet: Fleet) -> None:
    """Wait until the proxy says it is ready. Raises DemoError if it ends first."""
    import aiohttp

    proxy = fleet.children[-1]
    async with aiohttp.ClientSession() as session:
        while not proxy.has_ended:
            try:
                async with session.get(f"{fleet.admin}/readyz") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass  # not listening yet
            await asyncio.sleep(0.05)
    raise proxy.failure()
