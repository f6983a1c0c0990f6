"""One completion of the emulated server, from its plan to its last byte, or to the fault that it meets."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus

from aiohttp import web

from sim.faults import GARBAGE, Fault, FaultKind, reset
from sim.generation import Engine, Generation, SequencePlan
from sim.openai_request import RequestError, engine_error, own_error
from sim.openai_shapes import DONE, CacheUse, Shapes

log = logging.getLogger("tidegate")

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
        left, half = self._tokens, self._half
        async for step in generation:
            left -= sum(new for _, new in step)
            if fault is not None and left <= half:
                await _break(request, fault)
        return web.Response(body=self.shapes.body(self._cache(generation)), content_type="application/json")

    async def _stream(
        self, request: web.Request, generation: Generation, fault: Fault | None
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        try:
            await response.prepare(request)
            for event in self.prelude:
                await response.write(event)
            try:
                await self._events(request, response, generation, fault)
            except ConnectionError:
                raise
            except RequestError as error:
                await response.write(error.event())
            except Exception:
                log.exception("an answer has failed half way")
                # Status and headers are out: all that is left to do is what vLLM does.
                await response.write(own_error().event())
            if self.end:
                await response.write(self.end)
            await response.write_eof()
        except ConnectionError:
            pass  # the client left while we wrote
        return response

    async def _events(
        self, request: web.Request, response: web.StreamResponse, generation: Generation, fault: Fault | None
    ) -> None:
        """All but the last, `[DONE]`. Raises RequestError for a stream that is to end with an error."""
        shapes = self.shapes
        total = left = self._tokens
        half = self._half
        done = [0] * len(self.plans)
        async for step in generation:
            if left == total:
                for event in shapes.first():
                    await response.write(event)
            for index, ready in step:
                new = ready if fault is None else min(ready, left - half)
                if new == 0:
                    break
                left -= new
                for event in shapes.step(index, done[index], new, last=left == 0):
                    await response.write(event)
                done[index] += new
            if fault is not None and left == half:
                await _break(request, fault)
        if self.usage:
            await response.write(shapes.usage_event(total, self._cache(generation)))

    @property
    def _tokens(self) -> int:
        return sum(plan.output_tokens for plan in self.plans)

    @property
    def _half(self) -> int:
        """Tokens left when a fault comes: at least one, so that no answer that meets one is complete."""
        return max(self._tokens // 2, 1)

    def _cache(self, generation: Generation) -> CacheUse:
        cached = generation.cached_tokens
        return CacheUse(cached, max(self.cacheable - cached, 0))


async def _break(request: web.Request, fault: Fault) -> None:
    """Do what the fault asks for; ends when the connection does. Raises RequestError for an error to tell."""
    if fault.kind is FaultKind.ERROR_EVENT:
        raise engine_error()
    transport = request.transport
    if transport is not None and fault.kind is FaultKind.CUT:
        reset(transport)
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
