"""How many requests a second the simulator plays, on one core.

    python -m benchmarks.simulator
    python -m benchmarks.simulator --check --no-result

* `engine`: the Azure conversation trace of 2023 (19,366 requests, 58 minutes) in turn over eight engines with a KV
  cache of 280,000 tokens each (Qwen3-32B on two H100, routing.md 3.1), at once, four and eight times its rate;
* `cluster`: the same through the router's state, valve, breakers and `least-load`, with probes and sweeps;
* `prefixes`: Mooncake's conversation trace (12,031 requests of 12,035 prompt tokens on average) with prefix caches,
  through `session-affinity`.

CPU time of the process, best of the rounds: whatever else runs only takes away. `--pure` measures plain Python,
else what is compiled is used (`python -m benchmarks.install_peers tidegate`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.install_peers import installed_tidegate
from benchmarks.summary import facts_line, print_table, write_result

if TYPE_CHECKING:
    from sim.engine import EngineSettings
    from sim.workload import Workload

DATA = Path(__file__).parents[2] / "shared" / "data"
PROMISED = {"engine": 60_000, "cluster": 15_000, "prefixes": 8_000}
"""Requests a second, at least."""
BACKENDS = 8
ROUNDS = 3


def play(rounds: int) -> list[dict[str, Any]]:
    """Measure, in this process."""
    from policies.files import KnownNames, read_policy
    from policies.state import Backend
    from sim import engine
    from sim.cluster import Cluster
    from sim.engine import Engine, EngineSettings, Sequence, StepCost
    from sim.members import Member
    from sim.traces import read_workload

    cost = StepCost(alpha=13_850, beta=40, gamma=0.0618, delta=54.5)
    azure = read_workload(DATA / "azure" / "AzureLLMInferenceTrace_2023_conv.csv.gz")
    mooncake = read_workload(DATA / "mooncake" / "conversation_trace.jsonl.gz")
    plain = EngineSettings(cost, kv_tokens=280_000)
    large = EngineSettings(cost, max_num_batched_tokens=8192, kv_tokens=1_000_000, prefix_unit_tokens=512)

    def engines(workload: Workload) -> int:
        nodes = [Engine(plain) for _ in range(BACKENDS)]
        for number, arrival in enumerate(workload):
            node = nodes[number % BACKENDS]
            node.advance(arrival.at)
            node.submit(Sequence(arrival.prompt_tokens, arrival.output_tokens), arrival.at)
        for node in nodes:
            while node.next_at < inf:
                node.advance(node.next_at)
        return len(workload)

    def cluster(workload: Workload, settings: EngineSettings, pick: str) -> int:
        models = frozenset({"m"})
        members = [
            Member(Backend(f"b{number}", slots=64, models=models), settings) for number in range(BACKENDS)
        ]
        text = f"rules:\n  - name: all\n    pick: {pick}\n    queue: {{wait: 600s, depth: 10000}}\n"
        known = KnownNames([member.backend for member in members], frozenset({"local"}))
        result = Cluster(members, read_policy(text, "benchmark", known, 1).rules, seed=1).run(workload)
        assert all(trip.end is not None and trip.end.value == "ok" for trip in result.trips)
        return len(result.trips)

    loads: list[tuple[str, str, Callable[[], int]]] = []
    for factor in (1, 4, 8):
        loads.append(("engine", f"Azure x{factor}", partial(engines, azure.scaled(factor))))
    for factor in (1, 4, 8):
        load = azure.scaled(factor)
        loads.append(("cluster", f"Azure x{factor}", partial(cluster, load, plain, "least-load")))
    loads.append(("prefixes", "Mooncake x1", partial(cluster, mooncake, large, "session-affinity")))
    compiled = not str(engine.__file__).endswith(".py")
    found = []
    for name, load, run in loads:
        best = 0.0
        for _ in range(rounds):
            began = time.process_time()
            count = run()
            best = max(best, count / (time.process_time() - began))
        found.append({"name": name, "load": load, "compiled": compiled, "requests_per_s": best})
    return found


def played(command: list[str]) -> list[dict[str, Any]]:
    """What a process that plays has found; its complaints are shown. Raises ChildProcessError if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ChildProcessError(f"the process that plays failed with {done.returncode}")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def main() -> int:
    """The command line; returns 1 with `--check` if a promise is not kept, 2 if nothing could be measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--pure", action="store_true", help="plain Python, nothing compiled")
    parser.add_argument("--check", action="store_true", help="fail unless all promises are kept")
    parser.add_argument("--no-result", action="store_true", help="write no file into benchmarks/results")
    parser.add_argument("--play", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.play:
        print(json.dumps(play(options.rounds)))
        return 0
    if not DATA.is_dir():
        print(f"the traces are not at {DATA}", file=sys.stderr)
        return 2
    python = Path(sys.executable)
    compiled = None if options.pure else installed_tidegate()
    if compiled is not None:
        python = compiled.with_name("python")
    elif not options.pure:
        print("nothing is compiled: python -m benchmarks.install_peers tidegate", file=sys.stderr)
    # Its own modules from its installation, the benchmark's from here.
    root = str(Path(__file__).parents[1])
    script = f"import sys; sys.path.append({root!r}); from benchmarks.simulator import main; main()"
    command = [str(python), "-P", "-c", script, "--play", "--rounds", str(options.rounds)]
    try:
        found = played(command)
    except ChildProcessError as error:
        print(error, file=sys.stderr)
        return 2
    rows = [
        (
            one["name"],
            one["load"],
            "compiled" if one["compiled"] else "plain Python",
            f"{one['requests_per_s']:,.0f}",
            f"{PROMISED[one['name']]:,}",
        )
        for one in found
    ]
    print_table(
        "Simulated requests a second of CPU", ("what", "load", "code", "requests/s", "promised"), rows
    )
    print(f"\n{facts_line()}")
    if not options.no_result:
        print(f"written to {write_result('simulator', {'loads': found}).name} in benchmarks/results")
    kept = all(one["requests_per_s"] >= PROMISED[one["name"]] for one in found)
    return 1 if options.check and not kept else 0


if __name__ == "__main__":
    sys.exit(main())
