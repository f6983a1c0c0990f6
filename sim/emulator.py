"""`tidegate emulate`: an OpenAI-compatible server that behaves like a vLLM, without a model or a card.

The engine behind it keeps fixed rates (`sim/fixed_rate.py`); the endpoints, shapes, errors and metrics are those
of vLLM 0.32 (`sim/openai_server.py`). The same from Python:

    async with emulator(EmulatorSettings(port=0)) as server:
        print(server.url)
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from math import isfinite
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sim.generation import Engine

KEEP_ALIVE_S = 5.0
"""How long an idle connection stays open: uvicorn's default, which clients of a vLLM meet."""


class Fault(StrEnum):
    """What happens to a request that goes wrong."""

    ERROR = "error"
    """A 500 before the first byte."""
    RESET = "reset"
    """The connection is cut half way through."""
    STALL = "stall"
    """Nothing more comes half way through."""


@dataclass(frozen=True, slots=True)
class EmulatorSettings:
    """All there is to set. Times are seconds of emulated time, see `speed`. Raises ValueError."""

    host: str = "127.0.0.1"
    port: int = 0
    """0: any free port."""
    models: tuple[str, ...] = ("demo",)
    """Served names, the first one being the model's own. Names ending in `-reasoning` reason first."""
    slots: int = 8
    """Sequences served at once; the rest wait in order of arrival."""
    ttft_s: float = 0.2
    """From leaving the queue to the first token."""
    tpot_s: float = 0.02
    """From each token to the next, for a sequence alone."""
    slowdown: float = 0.0
    """Each further running sequence makes tokens slower by this share of `tpot_s`."""
    rtt_s: float = 0.0
    """Network round trip, added before every reply."""
    speed: float = 1.0
    """How many emulated seconds pass in a second: 10 divides every time above by ten."""
    max_model_len: int = 8192
    """Longest prompt plus answer, tokens."""
    api_keys: tuple[str, ...] = ()
    """Keys to accept; none: everybody is let in."""
    seed: int = 0
    fail_rate: float = 0.0
    """Share of completions that go wrong, 0 to 1."""
    fault: Fault = Fault.ERROR
    shutdown_timeout_s: float = 5.0
    """How long open streams may go on after the request to stop; not scaled by `speed`."""

    def __post_init__(self) -> None:
        if not self.models or not all(self.models):
            raise ValueError("at least one model name is needed, and none may be empty")
        for name in ("slots", "max_model_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        for name in ("ttft_s", "tpot_s", "slowdown", "rtt_s", "shutdown_timeout_s"):
            if not (isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be zero or more")
        if not (isfinite(self.speed) and self.speed > 0):
            raise ValueError("speed must be above zero")
        if not 0 <= self.fail_rate <= 1:
            raise ValueError("fail_rate must be between 0 and 1")

    @property
    def kv_tokens(self) -> int:
        """Size of the KV cache: as many longest sequences as there are slots."""
        return self.slots * self.max_model_len


@dataclass(frozen=True, slots=True)
class Emulator:
    """A server that is running."""

    host: str
    port: int
    engine: Engine

    @property
    def url(self) -> str:
        """Its address, without a path."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"


@asynccontextmanager
async def emulator(settings: EmulatorSettings) -> AsyncIterator[Emulator]:
    """Serve until the block is left; open streams then have `shutdown_timeout_s`. Raises OSError (port taken)."""
    # Imported here: a command line that only reads this module's options stays fast.
    from aiohttp import web

    from sim.fixed_rate import FixedRateEngine
    from sim.openai_server import Face, FaceSettings
    from sim.vllm_metrics import VllmMetrics

    metrics = VllmMetrics(settings.models[0], settings.kv_tokens, settings.max_model_len)
    engine = FixedRateEngine(
        asyncio.get_running_loop(),
        slots=settings.slots,
        ttft_s=settings.ttft_s / settings.speed,
        tpot_s=settings.tpot_s / settings.speed,
        slowdown=settings.slowdown,
        kv_tokens=settings.kv_tokens,
        observer=metrics,
    )
    metrics.watch(engine.figures)
    face = Face(
        FaceSettings(
            models=settings.models,
            max_model_len=settings.max_model_len,
            api_keys=settings.api_keys,
            seed=settings.seed,
            rtt_s=settings.rtt_s / settings.speed,
            fail_rate=settings.fail_rate,
            fault=settings.fault.value,
        ),
        engine,
        metrics,
    )
    runner = web.AppRunner(
        face.application(),
        access_log=None,
        handler_cancellation=True,
        keepalive_timeout=KEEP_ALIVE_S,
        shutdown_timeout=settings.shutdown_timeout_s,
    )
    try:
        await runner.setup()
        await web.TCPSite(runner, settings.host, settings.port).start()
        host, port = runner.addresses[0][:2]
        yield Emulator(host, port, engine)
    finally:
        await runner.cleanup()


async def serve_emulator(settings: EmulatorSettings, ready: Callable[[str, int], None] | None = None) -> None:
    """Serve until cancelled. `ready` is told host and port once connections are accepted. Raises OSError."""
    async with emulator(settings) as server:
        if ready is not None:
            ready(server.host, server.port)
        await asyncio.Event().wait()


def run(settings: EmulatorSettings) -> None:
    """Serve until SIGINT or SIGTERM, saying where on standard output. Raises OSError (port taken)."""
    import uvloop

    def ready(host: str, port: int) -> None:
        shown = f"[{host}]" if ":" in host else host
        typer.echo(f"listening on http://{shown}:{port} as {', '.join(settings.models)}")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        # The second signal cancels the wait for open streams.
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        try:
            await serve_emulator(settings, ready)
        except asyncio.CancelledError:
            pass

    uvloop.run(main())


def emulate(
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 takes a free one and prints it.", min=0, max=65535)
    ] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    model: Annotated[
        list[str] | None,
        typer.Option(help="Served model name; repeat for aliases. NAME-reasoning reasons first."),
    ] = None,
    slots: Annotated[
        int, typer.Option(help="Requests served at once; the rest wait in order of arrival.")
    ] = 8,
    ttft: Annotated[float, typer.Option(help="Seconds to the first token.")] = 0.2,
    tpot: Annotated[float, typer.Option(help="Seconds per further token, for a request alone.")] = 0.02,
    slowdown: Annotated[
        float, typer.Option(help="Share by which each further running request slows tokens down.")
    ] = 0.0,
    rtt: Annotated[
        float, typer.Option(help="Seconds of network round trip, added before every reply.")
    ] = 0.0,
    speed: Annotated[float, typer.Option(help="Run this many times faster than real time.")] = 1.0,
    max_model_len: Annotated[int, typer.Option(help="Longest prompt plus answer, tokens.")] = 8192,
    api_key: Annotated[list[str] | None, typer.Option(help="Key to accept; repeat for several.")] = None,
    seed: Annotated[int, typer.Option(help="Changes the answers and which requests fail.")] = 0,
    fail_rate: Annotated[float, typer.Option(help="Share of completions that go wrong, 0 to 1.")] = 0.0,
    fault: Annotated[Fault, typer.Option(help="How they go wrong.")] = Fault.ERROR,
    shutdown_timeout: Annotated[
        float, typer.Option(help="Seconds that open streams have when stopped.")
    ] = 5.0,
) -> None:
    """Serve an emulated vLLM: its API, errors and metrics at fixed rates, without a model or a card.

    Example: tidegate emulate --port 8000 --model demo --slots 4 --ttft 0.3 --tpot 0.02
    """
    try:
        settings = EmulatorSettings(
            host=host,
            port=port,
            models=tuple(model or ("demo",)),
            slots=slots,
            ttft_s=ttft,
            tpot_s=tpot,
            slowdown=slowdown,
            rtt_s=rtt,
            speed=speed,
            max_model_len=max_model_len,
            api_keys=tuple(api_key or ()),
            seed=seed,
            fail_rate=fail_rate,
            fault=fault,
            shutdown_timeout_s=shutdown_timeout,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    try:
        run(settings)
    except OSError as error:
        typer.echo(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another with --port", err=True
        )
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(emulate)
