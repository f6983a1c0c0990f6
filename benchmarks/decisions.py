"""How long each policy takes to decide, and what deciding costs a request in all.

    python -m benchmarks.decisions
    python -m benchmarks.decisions --check --policy lmetric

Every policy of the registry before 8 and before 64 backends that are half busy, with sessions, prompts of 24 blocks
of which beginnings are cached here and there, and speeds and lengths that were learnt on the way.

* `choose`: the policy alone, with the look at what is cached where it needs that; promised.
* `request`: admission, decision, lease, first token and release, with all that is learnt there.

CPU time of the process, the median over rounds of a thousand decisions. Plain Python, unless what runs is compiled.

Takes about three minutes of CPU, by an estimate.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from random import Random
from typing import Any, Final

import policies
from benchmarks.summary import Spread, facts_line, print_table, write_result
from policies import state
from policies.base import Outcome, RequestFacts, Send
from policies.rule import Queue, Rule
from policies.rules import RuleSet
from policies.state import Backend, Fleet, Lease
from policies.valve import Valve

PROMISED_US: Final = {8: 30.0, 64: 150.0}
"""A decision, by number of backends, at most."""
SLOTS: Final = 32
ROUND: Final = 1000
BLOCKS: Final = 24
BLOCK_TOKENS: Final = 512
SESSIONS: Final = 400


class World:
    """A router with half of its slots taken, and requests of sessions that come back."""

    def __init__(self, policy: str, backends: int) -> None:
        models = frozenset({"m"})
        members = []
        for index in range(backends):
            backend = Backend(f"b{index}", site="local" if index < 2 else f"site{index % 4}", models=models)
            backend.slots = backend.full_slots = SLOTS
            backend.kv_tokens, backend.rtt_s = 400_000, 0.005 * (index % 7)
            backend.price_input, backend.price_output = 0.2 + 0.1 * (index % 3), 0.8
            backend.carbon_gco2_kwh, backend.location = 100.0 * (index % 5), (30.0 + index, 110.0)
            members.append(backend)
        self.fleet = Fleet(members)
        self.rule = Rule("all", policies.load(policy, Random(1)), policy, queue=Queue(depth=10**6))
        self.rules = RuleSet([self.rule])
        self.valve = Valve(self.rules, self.fleet)
        self.rng = Random(2)
        self.now = 1000.0
        self.count = 0
        self.running: deque[Lease] = deque()
        self.most = backends * SLOTS // 2
        for _ in range(4 * self.most):
            self.request()

    def facts(self) -> RequestFacts:
        """One more turn of some session."""
        self.count += 1
        session = self.rng.randrange(SESSIONS)
        length = self.rng.randint(4, BLOCKS)
        prefix = tuple(hash((session, block)) for block in range(length))
        prompt = length * BLOCK_TOKENS + 100
        return RequestFacts(
            str(self.count),
            "m",
            tenant=f"t{session % 20}",
            arrived=self.now,
            deadline=self.now + 3600.0,
            stream=True,
            body_bytes=4 * prompt,
            prompt_tokens=prompt,
            expected_tokens=256,
            session=f"t\0{session}",
            prefix=prefix,
            prefix_tokens=BLOCK_TOKENS,
            labels={"location": "31.2,121.5"},
        )

    def request(self) -> None:
        """One arrives; the one that came first ends; one in the middle has its first token."""
        self.now += 0.01
        routing = self.valve.submit(self.facts(), self.now)
        if routing.lease is not None:
            self.running.append(routing.lease)
        elif type(routing.decision) is not Send:
            self.valve.cancel(routing.request.id, self.now)
        if len(self.running) > self.most:
            lease = self.running.popleft()
            self.fleet.release(lease, Outcome.OK, self.now, (lease.request.prompt_tokens, 0, 200))
        if len(self.running) > 8:
            self.fleet.first_token(self.running[-8], self.now)

    def choose_us(self) -> float:
        """CPU of one decision, microseconds: the mean of a round."""
        requests = [self.facts() for _ in range(ROUND)]
        chooser, now = self.rule.guarded, self.now
        backends = self.candidates()
        began = time.process_time()
        for request in requests:
            if chooser.by_prefix:
                request.cached = state.cached_in(backends, request)
            chooser.decide(request, backends, now)
        spent = time.process_time() - began
        for backend in backends:
            backend.slots = SLOTS
        return spent / ROUND * 1e6

    def candidates(self) -> list[Backend]:
        """All backends: those that the policy has filled get one more slot, so that it decides among as many as
        are promised."""
        backends = list(self.fleet)
        for backend in backends:
            backend.slots = max(SLOTS, backend.in_flight + 1)
        return backends

    def request_us(self) -> float:
        """CPU of a request's deciding from its arrival to its release; the making of its facts is in it."""
        began = time.process_time()
        for _ in range(ROUND):
            self.request()
        return (time.process_time() - began) / ROUND * 1e6


def measure(policy: str, backends: int, rounds: int) -> dict[str, Any]:
    world = World(policy, backends)
    choose, request = [], []
    for _ in range(rounds):
        choose.append(world.choose_us())
        request.append(world.request_us())
    failures = world.rule.guarded.failures
    if failures:
        raise RuntimeError(f"policy {policy} failed {failures} times: {world.rule.guarded.last_failure}")
    return {"policy": policy, "backends": backends, "choose_us": choose, "request_us": request}


def main() -> int:
    """The command line; returns 1 with `--check` if a promise is not kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--policy", action="append", choices=policies.names(), help="default: all; repeat it")
    parser.add_argument("--check", action="store_true", help="fail unless the promise is kept by all")
    parser.add_argument("--no-result", action="store_true", help="write no file into benchmarks/results")
    options = parser.parse_args()
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for policy in options.policy or policies.names():
        print(f"{policy} ...", end="\r", file=sys.stderr)
        found[policy] = {count: measure(policy, count, options.rounds) for count in PROMISED_US}
    print(" " * 40, end="\r", file=sys.stderr)
    rows, late = [], []
    for policy, by_count in found.items():
        cells = [policy]
        for count, promised in PROMISED_US.items():
            choose = Spread.of(by_count[count]["choose_us"])
            cells += [choose.text(), Spread.of(by_count[count]["request_us"]).text()]
            if choose.median > promised:
                late.append(
                    f"{policy} takes {choose.median:.1f} us at {count} backends, promised are {promised:g}"
                )
        rows.append(cells)
    columns = ("policy", "choose, 8", "request, 8", "choose, 64", "request, 64")
    compiled = "plain Python" if str(state.__file__).endswith(".py") else "compiled"
    print_table(
        f"Microseconds of CPU, {compiled}: median and quartiles of {options.rounds} rounds", columns, rows
    )
    print(f"\n{facts_line()}")
    if not options.no_result:
        runs = [run for by_count in found.values() for run in by_count.values()]
        print(f"written to {write_result('decisions', {'runs': runs}).name} in benchmarks/results")
    for line in late:
        print(line, file=sys.stderr)
    return 1 if options.check and late else 0


if __name__ == "__main__":
    sys.exit(main())
