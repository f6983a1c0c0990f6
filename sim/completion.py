"""One completion of the emulated server, from its plan to its last byte, or to the fault that it meets."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus

from aiohttp import web

from sim.faults import GARBAGE, Fault, FaultKind
from sim.generation import Engine, Generation, SequencePlan
from sim.openai_request import RequestError
from sim.openai_shapes import DONE, CacheUse, Shapes

_STATUSES = frozenset(HTTPStatus)


@dataclass(frozen=True, slots=True)
class Completion:
    """A request that is understood: what will be said, and how."""

    shapes: Shapes
    plans: Sequence[SequencePlan]
    """One for each choice."""
    stream: bool
    usage: bool
    """Whether the stream ends with a usage event."""
    cacheable: int
    """Tokens of the last prompt that fill blocks of the prefix cache."""
    prelude: tuple[bytes, ...] = ()
    """Events of a stream that come before the prompt is read."""
    end: bytes = DONE
    """What stands behind the last event."""

    async def serve(self, request: web.Request, engine: Engine, fault: Fault | None) -> web.StreamResponse:
        """Answer with what the engine gives, when it gives it."""
        if fault is not None and fault.kind is FaultKind.ERROR:
            return _error(fault)
        if fault is not None and fault.kind is FaultKind.GARBAGE:
            await _break(request, fault)
        generation = engine.submit(self.plans)
        try:
            if self.stream:
                return await self._stream(request, generation, fault)
            return await self._whole(request, generation, fault)
        finally:
            engine.cancel(generation)

    async def _whole(
        self, request: web.Request, generation: Generation, fault: Fault | None
    ) -> web.StreamResponse:
        left, half = self._tokens, self._tokens // 2
        async for step in generation:
            left -= sum(new for _, new in step)
            if fault is not None and left <= half:
                await _break(request, fault)
        return web.Response(body=self.shapes.body(self._cache(generation)), content_type="application/json")

    async def _stream(
        self, request: web.Request, generation: Generation, fault: Fault | None
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        shapes = self.shapes
        total = left = self._tokens
        done = [0] * len(self.plans)
        try:
            await response.prepare(request)
            for event in self.prelude:
                await response.write(event)
            async for step in generation:
                if left == total:
                    for event in shapes.first():
                        await response.write(event)
                for index, new in step:
                    left -= new
                    for event in shapes.step(index, done[index], new, last=left == 0):
                        await response.write(event)
                    done[index] += new
                if fault is not None and left <= total // 2:
                    await _break(request, fault)
            if self.usage:
                await response.write(shapes.usage_event(total, self._cache(generation)))
            if self.end:
                await response.write(self.end)
            await response.write_eof()
        except ConnectionError:
            pass  # the client left while we wrote
        return response

    @property
    def _tokens(self) -> int:
        return sum(plan.output_tokens for plan in self.plans)

    def _cache(self, generation: Generation) -> CacheUse:
        cached = generation.cached_tokens
        return CacheUse(cached, max(self.cacheable - cached, 0))


async def _break(request: web.Request, fault: Fault) -> None:
    """Do what the fault asks for; ends when the connection does."""
    transport = request.transport
    if transport is not None and fault.kind is FaultKind.CUT:
        transport.abort()
    elif transport is not None and fault.kind is FaultKind.GARBAGE:
        transport.write(GARBAGE)
        transport.close()
    await asyncio.Event().wait()


def _error(fault: Fault) -> web.Response:
    kind = HTTPStatus(fault.status).phrase.replace(" ", "") if fault.status in _STATUSES else "Error"
    error = RequestError(fault.status, kind, "The emulator was told to fail.", None)
    response = web.Response(status=fault.status, body=error.body(), content_type="application/json")
    if fault.retry_after is not None:
        response.headers["Retry-After"] = str(fault.retry_after)
    return response
