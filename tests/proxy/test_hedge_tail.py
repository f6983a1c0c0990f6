"""What hedging is for: one backend of four is slow now and then, and few clients notice. In virtual time."""

from __future__ import annotations

from math import ceil
from random import Random

from proxy.exchange import State
from proxy.upstream import BackendConnection
from tests.proxy.fakes import DONE, LAST_CHUNK, STREAM_HEAD, World, chunked, event

NAMES = ("a", "b", "c", "d")
SLOW_S = 3.0
STEP_S = 0.01
REQUESTS = 1500
ANSWER = STREAM_HEAD + chunked(event("x", completion=1), DONE) + LAST_CHUNK


class Engine:
    """Answers each request after a time; notices who leaves."""

    def __init__(self, world: World, slow: str, seed: int) -> None:
        self.world = world
        self.slow = slow
        self.random = Random(seed)
        self.seen: dict[BackendConnection, int] = {}
        self.requests = 0
        self.left = 0

    def look(self) -> None:
        """Take the requests that have come."""
        for name, endpoint in self.world.endpoints.items():
            for connection in endpoint.connections:
                if connection.requests > self.seen.get(connection, 0):
                    self.seen[connection] = connection.requests
                    self.requests += 1
                    stuck = name == self.slow and self.random.random() < 0.03
                    seconds = SLOW_S if stuck else self.random.uniform(0.1, 0.3)
                    self.world.loop.call_later(seconds, self.answer, connection)

    def answer(self, connection: BackendConnection) -> None:
        if connection.closed:
            self.left += 1
        else:
            connection.data_received(ANSWER)


def run(after: str, seed: int) -> tuple[float, Engine, World]:
    """-> 99th percentile of the time to the first token, seconds."""
    world = World(*NAMES, slots=12, hedging={"after": after}, recent=0)
    # The fake looks every row up among all others.
    world.journal.close = world.journal.closed.append  # type: ignore[method-assign]
    engine = Engine(world, "a", seed)
    for number in range(REQUESTS + int(10 / STEP_S)):
        if number < REQUESTS:
            world.start()
        for name in world.dialled():
            world.connects(name)
        engine.look()
        world.loop.now += STEP_S
        world.loop.run_due()
    assert all(exchange.state is State.ENDED for exchange in world.all)
    times = sorted(e.row.ttft_s for e in world.all if e.row.ttft_s is not None)
    assert len(times) == REQUESTS
    return times[ceil(0.99 * REQUESTS) - 1], engine, world


def test_the_tail_is_cut_for_a_share_of_the_load_that_is_bounded() -> None:
    without, plain, _ = run("off", 1)
    with_it, engine, world = run("p95", 1)
    assert plain.requests == REQUESTS
    assert without >= SLOW_S
    assert with_it < 1.0
    hedged = [exchange.row for exchange in world.all if exchange.row.attempts > 1]
    assert 0 < len(hedged) <= 0.05 * REQUESTS
    # What came to backends besides was aborted, and they have seen it; each winner is billed once.
    wasted = [row for row in hedged if row.overhead_prompt_tokens]
    assert engine.requests - REQUESTS == engine.left == len(wasted) > 0
    assert all(row.overhead_prompt_tokens == row.prompt_tokens for row in wasted)
    assert sum(row.completion_tokens for row in world.journal.closed) == REQUESTS
    assert all(backend.in_flight == 0 for backend in world.runtime.fleet)
