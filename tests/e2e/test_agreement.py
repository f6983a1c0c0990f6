"""Law 10 of sim/README.md, briefly: simulator and emulator say the same, through the real proxy.

Without the engines' figures, so that nothing depends on when the proxy looks; with them
`python -m benchmarks.agreement` compares medians.
"""

from __future__ import annotations

import pytest

from benchmarks.agreement import BOUND, FIGURES, compare
from benchmarks.agreement_loads import FleetMember, Load
from sim.generator import generate
from sim.generator_spec import WorkloadSpec
from tests.patience import PATIENCE

HERE = FleetMember(name="here", profile="h20-2-32b", slots=6)
AWAY = FleetMember(name="away", site="nanjing", profile="l40-4-32b", slots=32, rtt=0.03)
OFFICE = {
    "name": "office",
    "rate": 3,
    "prompt": {"mean": 800, "p95": 2500, "min": 50},
    "output": {"mean": 100, "p95": 250},
}
QUEUE = """
rules:
  - name: all
    pick: least-load
    queue: {wait: 300s, depth: 1000}
"""


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("policy", "backends"),
    [("local-first", [HERE, AWAY]), (QUEUE, [HERE])],
    ids=["spilling over", "held in the queue"],
)
def test_simulator_and_emulator_agree(policy: str, backends: list[FleetMember]) -> None:
    trace = generate(WorkloadSpec.model_validate({"duration": 120, "unit_tokens": 0, "clients": [OFFICE]}))
    load = Load(name="short", requests=120, rate=2.5, policy=policy, backends=backends, metrics=False)
    found = compare(load, trace, 2.0, 1, lambda: None, repeats=0)
    assert found.rounds[0].outcome.decisions.total() == load.requests
    assert found.rounds[0].outcome.decisions.keys() == found.simulated[0].decisions.keys()
    for name in ("TTFT mean", "end to end mean"):
        assert found.ratio(FIGURES[name]).median == pytest.approx(1.0, abs=BOUND * PATIENCE), name
