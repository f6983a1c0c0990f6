"""Emulated vLLMs as a library: OpenAI-compatible servers without a model or a card, any number in one event loop.

Behind each is an engine (`sim/engine.py`, in real time by `sim/realtime.py`) that is set up by a profile; the
endpoints, shapes, errors and metrics are those of vLLM 0.32 (`sim/openai_server.py`).

    async with emulator(EmulatorSettings(port=0)) as server:
        print(server.url)
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from math import isfinite

from aiohttp import web

from policies.profile import Limits, Origin, Profile, Source, Step
from sim.engine import EngineSettings
from sim.faults import Fault, Faults, reset
from sim.openai_server import Face, FaceSettings
from sim.profile import engine_settings
from sim.realtime import Driver, RealtimeEngine
from sim.vllm_metrics import VllmMetrics

log = logging.getLogger("tidegate")

BLOCK_TOKENS = 16
"""vLLM's default block on a card; prefixes are shared in whole blocks."""

KEEP_ALIVE_S = 5.0
"""How long an idle connection stays open: uvicorn's default, which clients of a vLLM meet."""

REBIND_S = 1.0
"""How long after a failure to listen again it is tried once more."""

PROMPT_TOKENS = 1000
"""Length of the prompt whose time to the first token `plain_profile` is told."""


def plain_profile(
    slots: int = 8,
    ttft_s: float = 0.2,
    tpot_s: float = 0.02,
    slowdown: float = 0.0,
    max_model_len: int = 8192,
) -> Profile:
    """An engine by four figures. Raises ValueError.

    `slots` sequences are served at once. A sequence alone has a token each `tpot_s`, and each further one
    stretches that by the share `slowdown`: a step takes `tpot_s * (1 + slowdown * (decodes - 1))`, which is alpha
    and beta. An empty engine gives the first token of a prompt of 1000 tokens after `ttft_s`: what that is above
    alpha is a thousand deltas. The KV cache holds as many longest sequences as there are slots.
    """
    for name, number in (("slots", slots), ("max_model_len", max_model_len)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1")
    for name, value in (("ttft", ttft_s), ("tpot", tpot_s)):
        if not (isfinite(value) and value > 0):
            raise ValueError(f"{name} must be above zero: no step is free")
    if not 0 <= slowdown < 1:
        raise ValueError("slowdown must be between 0 and 1")
    alpha_us = tpot_s * (1 - slowdown) * 1e6
    source = Source(origin=Origin.DERIVED, text="from slots, ttft, tpot and slowdown, as they were given")
    return Profile(
        name="plain",
        card="emulated",
        model="demo",
        step=Step(
            alpha_us=alpha_us,
            beta_us=tpot_s * slowdown * 1e6,
            gamma_us=0.0,
            delta_us=max(ttft_s * 1e6 - alpha_us, 0.0) / PROMPT_TOKENS,
            source=source,
        ),
        limits=Limits(
            max_num_batched_tokens=max(2048, slots),
            max_num_seqs=slots,
            max_model_len=max_model_len,
            source=source,
        ),
    )


@dataclass(frozen=True, slots=True)
class EmulatorSettings:
    """One emulated backend. Times are seconds of emulated time, see `speed`. Raises ValueError."""

    host: str = "127.0.0.1"
    port: int = 0
    """0: any free port."""
    models: tuple[str, ...] = ("demo",)
    """Served names, the first one being the model's own. Names ending in `-reasoning` reason first."""
    profile: Profile = field(default_factory=plain_profile)
    """What the engine can do, and how it is set up."""
    rtt_s: float = 0.0
    """Network round trip, added before every reply."""
    speed: float = 1.0
    """How many emulated seconds pass in a second: 10 divides every time above by ten."""
    api_keys: tuple[str, ...] = ()
    """Keys to accept; none: everybody is let in."""
    seed: int = 0
    prompt_tokens_details: bool = False
    """vLLM's `--enable-prompt-tokens-details`."""
    max_num_queued_reqs: int | None = None
    """vLLM's `--max-num-queued-reqs`: sequences running and waiting at most; None: no limit."""
    pooling: bool = False
    """vLLM's `--runner pooling`: embeddings and scores, no text."""
    media: bool = False
    """Sound and pictures, no text."""
    faults: tuple[Fault, ...] = ()
    """In force from the start."""
    control: bool = False
    """Whether `/emulator/fault` takes faults while it runs."""
    shutdown_timeout_s: float = 5.0
    """How long open streams may go on after the request to stop; not scaled by `speed`."""

    def __post_init__(self) -> None:
        if not self.models or not all(self.models):
            raise ValueError("at least one model name is needed, and none may be empty")
        for name in ("rtt_s", "shutdown_timeout_s"):
            if not (isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be zero or more")
        if not (isfinite(self.speed) and self.speed > 0):
            raise ValueError("speed must be above zero")
        if self.max_num_queued_reqs is not None and self.max_num_queued_reqs < 1:
            raise ValueError("max_num_queued_reqs must be at least 1")
        longest, engine = self.profile.limits.max_model_len, self.engine()
        if engine.kv_tokens is None or longest > engine.kv_tokens:  # a vLLM does not start then
            raise ValueError(
                f"max_model_len: a sequence of {longest} tokens does not fit into a KV cache of {engine.kv_tokens}"
            )

    def engine(self) -> EngineSettings:
        """That of the profile; a KV cache of unknown size holds as many longest sequences as may run."""
        engine, limits = engine_settings(self.profile, BLOCK_TOKENS), self.profile.limits
        tokens = (
            limits.kv_tokens or limits.max_num_seqs * -(-limits.max_model_len // BLOCK_TOKENS) * BLOCK_TOKENS
        )
        return replace(engine, kv_tokens=tokens // BLOCK_TOKENS * BLOCK_TOKENS)


class Emulator:
    """A server: its engine, its face, and the address where it listens, unless it is told to be dead."""

    def __init__(self, settings: EmulatorSettings, driver: Driver) -> None:
        """Raises OSError: the port is taken."""
        loop = asyncio.get_running_loop()
        self._settings = settings
        engine, speed = settings.engine(), settings.speed
        self.engine = RealtimeEngine(driver, engine, overhead_us=settings.profile.overhead_us, speed=speed)
        self.faults = Faults(loop.call_later, seed=settings.seed, speed=speed)
        metrics = self._metrics()
        self.engine.restart(metrics)
        self._face = Face(
            FaceSettings(
                models=settings.models,
                max_model_len=settings.profile.limits.max_model_len,
                api_keys=settings.api_keys,
                seed=settings.seed,
                rtt_s=settings.rtt_s / speed,
                prefix_unit_tokens=engine.prefix_unit_tokens,
                prompt_tokens_details=settings.prompt_tokens_details,
                max_num_queued_reqs=settings.max_num_queued_reqs,
                pooling=settings.pooling,
                media=settings.media,
                control=settings.control,
            ),
            self.engine,
            metrics,
            self.faults,
        )
        self._runner = web.AppRunner(
            self._face.application(),
            access_log=None,
            handler_cancellation=True,
            keepalive_timeout=KEEP_ALIVE_S,
            shutdown_timeout=settings.shutdown_timeout_s,
        )
        self._address = _bind(settings.host, settings.port)
        """Never listens: it keeps the port ours while nobody does."""
        self.host, self.port = self._address.getsockname()[:2]
        self._site: web.SockSite | None = None
        self._changed = asyncio.Event()
        self._obeying: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Its address, without a path."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    async def start(self) -> None:
        """Serve from now on. Raises OSError."""
        await self._runner.setup()
        for fault in self._settings.faults:
            self.faults.order(fault)
        await self._obey()
        self.faults.changed = self._changed.set
        self._obeying = asyncio.get_running_loop().create_task(self._keep_obeying())

    async def stop(self) -> None:
        """Stop listening, let open streams end, and cut those that do not within `shutdown_timeout_s`."""
        if self._obeying is not None:
            self._obeying.cancel()
            await asyncio.gather(self._obeying, return_exceptions=True)
        await self._runner.cleanup()
        self._address.close()

    async def _keep_obeying(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                await self._obey()
            except OSError as error:
                log.warning("cannot listen on %s again: %s; trying every %g s", self.url, error, REBIND_S)
                asyncio.get_running_loop().call_later(REBIND_S, self._changed.set)

    def _metrics(self) -> VllmMetrics:
        """A page of this engine that has counted nothing yet."""
        settings = self._settings
        metrics = VllmMetrics(settings.models[0], settings.engine(), settings.profile.limits.max_model_len)
        metrics.watch(self.engine.figures)
        return metrics

    async def _obey(self) -> None:
        """Be as slow and as dead as the faults in force say."""
        self.engine.slow_down(self.faults.factor)
        if self.faults.dead and self._site is not None:
            site, self._site = self._site, None
            await site.stop()
            assert self._runner.server is not None
            for connection in self._runner.server.connections:
                if connection.transport is not None:
                    reset(connection.transport)
            metrics = self._metrics()
            self.engine.restart(metrics)
            self._face.restart(metrics)
        elif not self.faults.dead and self._site is None:
            bound = _bind(self.host, self.port)
            site = web.SockSite(self._runner, bound, backlog=1024)
            try:
                await site.start()
            except OSError:
                await site.stop()
                bound.close()
                raise
            self._site = site


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        error.filename = f"{host} port {port}"  # which of several it was
        raise
    return bound


@asynccontextmanager
async def emulators(many: Iterable[EmulatorSettings]) -> AsyncIterator[list[Emulator]]:
    """Serve until the block is left; open streams then have `shutdown_timeout_s`. Raises OSError (port taken)."""
    driver = Driver(time.monotonic, asyncio.get_running_loop().call_later)
    servers: list[Emulator] = []
    try:
        for settings in many:
            servers.append(Emulator(settings, driver))
            await servers[-1].start()
        yield servers
    finally:
        await asyncio.gather(*(server.stop() for server in servers))


@asynccontextmanager
async def emulator(settings: EmulatorSettings) -> AsyncIterator[Emulator]:
    """`emulators` for one."""
    async with emulators([settings]) as servers:
        yield servers[0]


async def serve_emulators(
    many: Iterable[EmulatorSettings], ready: Callable[[list[Emulator]], None] | None = None
) -> None:
    """Serve until cancelled. `ready` is called once connections are accepted. Raises OSError."""
    async with emulators(many) as servers:
        if ready is not None:
            ready(servers)
        await asyncio.Event().wait()
