"""Whether policies stand in the same order in the real proxy and in the simulator.

    python -m benchmarks.order --check
    python -m benchmarks.order --policies round-robin,session-affinity,gorgo --rate 3.5
    python -m benchmarks.order --quick

Load: 400 turns of conversations that share prefixes (`conversations.py`; prompts of 1,000 to 8,000 tokens, 4,000
on average, of which somebody has most; answers of 30 to 170), at 4 a second, an open loop. They meet five backends
that differ in speed, distance and cache, with contexts of 16,000 tokens (`conversations.yaml`). The five policies
were chosen in the simulator, before anything was measured, since they differ clearly there.

Each round has arrivals of its own (its number is the seed), the same for all policies and for both sides. The real
side is `tidegate serve` before one `tidegate emulate` for each backend, all started anew, with an open-loop
client. The simulator plays the same arrivals several times, with other moments of probing. Times count from when a
request is due, and both sides play at `--speed`, as `agreement.py` says. A request without a whole answer has a
first token that never came.

Compared are pairs of policies inside each round. A pair is decided in the simulator when one is ahead of the other
in 95 % of its runs, and measured when one is ahead in every round; else it is a tie, and named. `--check` fails
when a pair is decided one way here and the other way there, when fewer than eight of ten pairs are decided on both
sides, or when a round is spoiled (`agreement.py`) after it was repeated.

Takes about 15 minutes, as it plays in half of real time; 2 of them are simulations.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import combinations
from math import inf, isfinite
from pathlib import Path
from typing import Any, Final

from rich.progress import Progress

from benchmarks.agreement import REPEATS, Round, emulate
from benchmarks.agreement_loads import Load, Outcome, read_loads, simulate
from benchmarks.conversations import Conversations, conversations
from benchmarks.processes import StartError, raise_open_files
from benchmarks.summary import RESULTS, Spread, facts_line, print_table, quantile, write_result
from policies.yamlfile import FileProblems
from sim.evaluate import named_policy

LOADS: Final = Path(__file__).with_name("conversations.yaml")
POLICIES: Final = ("round-robin", "power-of-two", "least-load", "lmetric", "forecast")
RATE: Final = 4.0
SPEED: Final = 2.0
ROUNDS: Final = 3
SIMULATIONS: Final = 9
"""Of each round, with other moments of probing."""
SURE: Final = 0.95
"""Of the simulations of a pair have to agree on who is ahead."""
DECIDED: Final = 0.8
"""Of the pairs, on both sides."""
QUICK_REQUESTS: Final = 24


@dataclass
class Played:
    """One policy, round by round."""

    policy: str
    simulated: list[list[Outcome]] = field(default_factory=list)
    """By round: several."""
    measured: list[Round] = field(default_factory=list)
    repeated: int = 0
    """Rounds that were, since they were spoiled."""


@dataclass(frozen=True)
class Pair:
    """Two policies by one figure."""

    figure: str
    first: str
    second: str
    simulated: int
    """-1: the first has less; 1: the second has; 0: a tie."""
    measured: int

    @property
    def decided(self) -> bool:
        """On both sides."""
        return self.simulated != 0 != self.measured

    @property
    def contradicts(self) -> bool:
        """One way in the simulator, the other way measured."""
        return self.simulated * self.measured < 0


def ttfts(outcome: Outcome, requests: int) -> list[float]:
    """Of all requests; infinite: there was no whole answer."""
    return [*outcome.ttft_s, *[inf] * (requests - len(outcome.ttft_s))]


FIGURES: Final[Mapping[str, Callable[[Sequence[float]], float]]] = {
    "mean TTFT": lambda values: sum(values) / len(values),
    "p95 TTFT": lambda values: quantile_of(values, 0.95),
}
"""Emulated seconds, of all requests."""


def quantile_of(values: Sequence[float], part: float) -> float:
    """`quantile`, also where some are infinite."""
    found = quantile([min(value, 1e12) for value in values], part)
    return found if found < 1e9 else inf


def ahead(firsts: Sequence[float], seconds: Sequence[float], share: float) -> int:
    """-1: so large a share of the firsts is below the seconds of the same place; 1: above; 0: neither."""
    below = sum(a < b for a, b in zip(firsts, seconds, strict=True))
    above = sum(a > b for a, b in zip(firsts, seconds, strict=True))
    return -1 if below >= share * len(firsts) else int(above >= share * len(firsts))


def pairs(played: Sequence[Played], requests: int) -> list[Pair]:
    """All, by both figures."""
    found = []
    for name in FIGURES:
        simulated = {
            one.policy: [v for values in of_simulated(one, name, requests) for v in values] for one in played
        }
        measured = {one.policy: of_measured(one, name, requests) for one in played}
        found += [
            Pair(
                name,
                first.policy,
                second.policy,
                ahead(simulated[first.policy], simulated[second.policy], SURE),
                ahead(measured[first.policy], measured[second.policy], 1.0),
            )
            for first, second in combinations(played, 2)
        ]
    return found


def of_simulated(one: Played, figure: str, requests: int) -> list[list[float]]:
    """A figure of each simulation, by round."""
    return [[FIGURES[figure](ttfts(outcome, requests)) for outcome in outcomes] for outcomes in one.simulated]


def of_measured(one: Played, figure: str, requests: int) -> list[float]:
    """A figure by round."""
    return [FIGURES[figure](ttfts(each.outcome, requests)) for each in one.measured]


def order(played: Sequence[Played], figure: str, requests: int, measured: bool) -> list[str]:
    """Policies, the one with the least median first."""

    def median(one: Played) -> float:
        simulated = [quantile_of(values, 0.5) for values in of_simulated(one, figure, requests)]
        return quantile_of(of_measured(one, figure, requests) if measured else simulated, 0.5)

    return [one.policy for one in sorted(played, key=median)]


def play(
    load: Load,
    policy: str,
    one: Played,
    asked: Conversations,
    seed: int,
    speed: float,
    heard: Callable[[], object],
    quick: bool = False,
) -> None:
    """One round of a policy, on both sides. `quick`: one simulation, and whatever is spoiled stays.

    Raises StartError, OSError, FileProblems and ValueError.
    """
    load = load.model_copy(update={"policy": named_policy(policy).text})
    fast = asked.faster(speed)
    one.simulated.append(
        [
            simulate(load, fast.workload, speed, SIMULATIONS * seed + n)
            for n in range(1 if quick else SIMULATIONS)
        ]
    )
    bodies = fast.bodies()
    while True:
        found = emulate(load, fast.workload, speed, heard, bodies=bodies)
        if not found.spoiled_by or one.repeated >= REPEATS or quick:
            one.measured.append(found)
            return
        one.repeated += 1


def complaints(played: Sequence[Played], found: Sequence[Pair]) -> list[str]:
    """What `--check` fails on, a line each."""
    lines = [
        f"{one.policy}, round {number} is spoiled: {why}"
        for one in played
        for number, each in enumerate(one.measured, 1)
        for why in each.spoiled_by
    ]
    for pair in found:
        if pair.contradicts:
            less, more = (pair.first, pair.second) if pair.simulated < 0 else (pair.second, pair.first)
            lines.append(f"{pair.figure}: {less} is below {more} in the simulator, and above it in the proxy")
    for name in FIGURES:
        of_figure = [pair for pair in found if pair.figure == name]
        decided = sum(pair.decided for pair in of_figure)
        if decided < DECIDED * len(of_figure):
            lines.append(f"{name}: {decided} of {len(of_figure)} pairs are decided, fewer than {DECIDED:.0%}")
    return lines


def report(played: Sequence[Played], found: Sequence[Pair], requests: int, speed: float) -> None:
    """Print both sides of every policy, the orders, the ties, and what the machine did."""
    rows = []
    for one in played:
        row = [one.policy]
        for name in FIGURES:
            simulated = [quantile_of(values, 0.5) for values in of_simulated(one, name, requests)]
            row += [spread_text(simulated, 3), spread_text(of_measured(one, name, requests), 3)]
        missing = max(requests - len(each.outcome.ttft_s) for each in one.measured)
        rows.append([*row, str(missing)])
    columns = [
        "policy",
        *(f"{name} {side}" for name in FIGURES for side in ("simulated", "measured")),
        "unanswered",
    ]
    print_table(f"Emulated seconds at speed {speed:g}: median and quartiles over rounds", columns, rows)
    for name in FIGURES:
        print(f"{name}, simulated: {' < '.join(order(played, name, requests, measured=False))}")
        print(f"{name}, measured:  {' < '.join(order(played, name, requests, measured=True))}")
        ties = [pair for pair in found if pair.figure == name and not pair.decided]
        said = ", ".join(f"{pair.first} and {pair.second} ({_where(pair)})" for pair in ties) or "none"
        print(f"{name}, ties: {said}")
    rows = [
        [
            f"{one.policy}, {number}",
            *(f"{each.cores[part]:.2f}" for part in ("proxy", "emulators", "client", "others")),
            f"{each.late_ms:.1f}",
            f"{each.tokens_per_s:,.0f}",
        ]
        for one in played
        for number, each in enumerate(one.measured, 1)
    ]
    columns = ["round", "proxy", "emulators", "client", "others", "late ms", "tokens/s"]
    print_table("Rounds: cores used; how late the client was, p99", columns, rows)


def spread_text(values: Sequence[float], digits: int) -> str:
    """Median and quartiles, if every value is a number."""
    return Spread.of(values).text(digits) if all(map(isfinite, values)) else "not all were answered"


def _where(pair: Pair) -> str:
    if pair.simulated == pair.measured == 0:
        return "on both sides"
    return "measured" if pair.simulated else "simulated"


def plot(played: Sequence[Played], requests: int, path: Path) -> None:
    """Both figures of every policy on both sides. Raises OSError; ModuleNotFoundError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(FIGURES)), FIGURES, strict=True):
        for place, one in enumerate(played):
            simulated = [value for values in of_simulated(one, name, requests) for value in values]
            for values, shift, colour, side in (
                (simulated, -0.12, "tab:blue", "simulated"),
                (of_measured(one, name, requests), 0.12, "tab:orange", "measured"),
            ):
                label = side if not place else None
                axes.plot([place + shift] * len(values), values, "o", color=colour, alpha=0.5, label=label)
        axes.set_xticks(range(len(played)), [one.policy for one in played], rotation=20)
        axes.set(title=f"{name}, emulated seconds", yscale="log")
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    """The command line; returns 1 with `--check` if there are complaints, 2 for bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--policies", default=",".join(POLICIES), help="names, with commas between (default: five)"
    )
    parser.add_argument(
        "--rate", type=float, default=RATE, help=f"requests in an emulated second (default {RATE:g})"
    )
    parser.add_argument("--speed", type=float, default=SPEED, help=f"(default {SPEED:g})")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"(default {ROUNDS})")
    parser.add_argument("--quick", action="store_true", help="one round of few requests: does it run?")
    parser.add_argument(
        "--check", action="store_true", help="fail if the orders differ, or a round is spoiled"
    )
    parser.add_argument("--no-result", action="store_true", help="write no files into benchmarks/results")
    options = parser.parse_args()
    if options.speed <= 0 or options.rate <= 0 or options.rounds < 1:
        parser.error("--speed, --rate and --rounds are above zero")
    names = options.policies.split(",")
    if len(names) < 2 or len(set(names)) < len(names):
        parser.error("--policies are two or more, each once: one alone has no order")
    raise_open_files(20_000)
    rounds = 1 if options.quick else options.rounds
    played = [Played(name) for name in names]
    try:
        (load,) = read_loads(LOADS)
        requests = QUICK_REQUESTS if options.quick else load.requests
        with Progress(refresh_per_second=1) as progress:
            tasks = [progress.add_task(name, total=requests * rounds) for name in names]
            for seed in range(1, rounds + 1):
                asked = conversations(requests, options.rate, seed)
                for place in in_turn(len(played), seed):
                    heard = partial(progress.advance, tasks[place])
                    play(load, names[place], played[place], asked, seed, options.speed, heard, options.quick)
    except (StartError, OSError, ValueError, FileProblems) as error:
        print(error, file=sys.stderr)
        return 2
    found = pairs(played, requests)
    report(played, found, requests, options.speed)
    print(facts_line())
    if not options.no_result and not options.quick:
        path = write_result("order", _document(played, found, requests, options))
        plot(played, requests, path.with_suffix(".png"))
        print(f"written to {path.name} and {path.with_suffix('.png').name} in {RESULTS.name}")
    wrong = complaints(played, found)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if options.check and wrong else 0


def _document(
    played: Sequence[Played], found: Sequence[Pair], requests: int, options: argparse.Namespace
) -> dict[str, Any]:
    return {
        "benchmark": "order",
        "speed": options.speed,
        "rate": options.rate,
        "requests": requests,
        "policies": [
            {
                "policy": one.policy,
                "repeated_rounds": one.repeated,
                "figures": {
                    name: {
                        "simulated": [
                            [finite(v) for v in values] for values in of_simulated(one, name, requests)
                        ],
                        "measured": [finite(v) for v in of_measured(one, name, requests)],
                    }
                    for name in FIGURES
                },
                "rounds": [
                    {
                        "decisions": dict(each.outcome.decisions),
                        "cores": each.cores,
                        "late_ms": each.late_ms,
                        "tokens_per_s": each.tokens_per_s,
                    }
                    for each in one.measured
                ],
            }
            for one in played
        ],
        "pairs": [asdict(pair) | {"decided": pair.decided} for pair in found],
    }


def in_turn(count: int, seed: int) -> list[int]:
    """In which order so many are played in the round of a seed (1, 2, ...): those that come early have another
    machine than those that come late, so another one begins each."""
    return [(seed - 1 + place) % count for place in range(count)]


def finite(value: float) -> float | None:
    """For JSON: None where a request has no answer, and its time no end."""
    return value if isfinite(value) else None


if __name__ == "__main__":
    sys.exit(main())
