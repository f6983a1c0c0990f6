"""Coefficients from sweeps: of levels that were computed from known ones, the same come back."""

from __future__ import annotations

import csv
import gzip
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sim.engine import StepCost
from sim.measure.endpoint import Facts, MeasureError
from sim.measure.fit import SweepRow, fit, not_negative_least_squares, to_profile, to_sweep
from sim.measure.level import Level
from sim.measure.prompts import Prefix
from sim.measure.sweep import Plan, Report, Series
from sim.measure.wire import Api
from sim.profile import Profile, dump_profile
from tests.sim.measure.fake_server import record


def steady(cost: StepCost, users: int, prompt: int, output: int) -> SweepRow:
    """A level of the steady state in which a user decodes all the time but for one step, its TTFT."""
    decodes = users * (output - 1) / output
    step = cost.alpha + decodes * (cost.beta + cost.gamma * (prompt + output / 2))
    tpot = (step + cost.delta * users * prompt / output) / 1e6
    return SweepRow(users, prompt, output, tpot, tpot)


costs = st.builds(StepCost, st.floats(5_000, 30_000), st.floats(20, 100), st.floats(0.02, 0.1), st.just(0.0))


@given(costs)
def test_without_prompts_to_compute_the_coefficients_come_back(cost: StepCost) -> None:
    lengths = [(128, 256), (1024, 128), (4096, 1024)]
    rows = [steady(cost, users, *length) for users in (1, 4, 16, 64) for length in lengths]
    found = fit(rows)
    assert found.error < 1e-6
    assert found.cost.alpha == pytest.approx(cost.alpha, rel=1e-3)
    assert found.cost.beta == pytest.approx(cost.beta, rel=1e-2)
    assert found.cost.gamma == pytest.approx(cost.gamma, rel=1e-2)
    assert found.cost.delta == 0


def test_the_cost_of_prompts_is_found_too() -> None:
    cost = StepCost(14_000, 40, 0.06, 50)
    lengths = [(128, 256), (1024, 128), (4096, 1024)]
    found = fit(steady(cost, users, *length) for users in (1, 4, 16, 64) for length in lengths)
    assert found.error < 0.005
    assert found.cost.alpha == pytest.approx(14_000, rel=0.02)
    assert found.cost.delta == pytest.approx(50, rel=0.03)


def test_levels_of_one_length_put_all_growth_into_gamma() -> None:
    cost = StepCost(14_000, 40, 0.06, 0)
    found = fit([steady(cost, users, 1000, 1000) for users in (1, 4, 16, 64)])
    assert found.cost.beta == 0
    assert found.cost.gamma == pytest.approx(0.06 + 40 / 1500, rel=1e-3)


def test_two_levels_are_too_few() -> None:
    rows = [steady(StepCost(14_000, 40, 0.06, 0), users, 1000, 1000) for users in (1, 4, 4)]
    with pytest.raises(MeasureError, match="three levels"):
        fit(rows)


@given(st.lists(st.tuples(*[st.floats(0.1, 10)] * 4), min_size=3, max_size=8))
def test_least_squares_below_which_nothing_is(rows: list[tuple[float, ...]]) -> None:
    """No small step inside the allowed region makes it better."""
    table = np.array(rows)
    matrix, wanted = table[:, :3], table[:, 3]
    assume(np.linalg.cond(matrix) < 1e4)
    found = not_negative_least_squares(matrix, wanted[:, None])[:, 0]
    assert found.min() >= 0
    least = np.sum((matrix @ found - wanted) ** 2)
    for column in range(3):
        for step in (1e-3, -1e-3):
            other = found.copy()
            other[column] = max(other[column] + step, 0.0)
            assert np.sum((matrix @ other - wanted) ** 2) >= least - 1e-9


def report(levels: list[Level], prefix: Prefix = Prefix.COLD, facts: Facts | None = None) -> Report:
    plan = Plan((1, 2, 4), 100, 10)
    made = Report(
        "http://x", "Org/Model-7B", Api.CHAT, True, facts or Facts(), plan, began="2026-11-27T00:00:00+00:00"
    )
    made.series = [Series(prefix, levels)]
    return made


def level(users: int, interrupted: bool = False) -> Level:
    return Level.of(users, [record(ttft=0.1, e2e=0.1 + 0.9 * users)], 1.0, interrupted=interrupted)


def test_a_sweep_has_what_was_measured_cold_and_to_the_end() -> None:
    failed = Level.of(8, [record(error="timeout")], 1.0)
    rows = to_sweep(report([level(1), level(2), failed, level(16, interrupted=True)]))
    assert [(row.concurrency, row.prompt_tokens, row.output_tokens) for row in rows] == [
        (1, 100, 10),
        (2, 100, 10),
    ]
    assert [row.tpot_s for row in rows] == pytest.approx([0.1, 0.2])
    assert to_sweep(report([level(1)], Prefix.WARM)) == []


def test_a_profile_says_what_was_measured_and_what_the_server_told(tmp_path: Path) -> None:
    levels = [level(1), level(2), level(4)]
    made = to_profile(report(levels, facts=Facts("0.32.0", 5000, 65536, None)), "H20", 2)
    assert (made.name, made.card, made.cards, made.model) == ("org-model-7b-h20x2", "H20", 2, "Org/Model-7B")
    assert (made.limits.kv_tokens, made.limits.max_model_len) == (65536, 5000)
    assert "kv_tokens, max_model_len;" in made.limits.source.text
    assert "vLLM 0.32.0: 3 levels of 1 to 4 users" in made.step.source.text
    from sim.profile import load_profile

    (tmp_path / "p.yaml").write_text(dump_profile(made))
    read = load_profile(tmp_path / "p.yaml")
    assert read == made
    assert isinstance(read, Profile)


@pytest.mark.shared
def test_published_measurements_are_said_within_four_per_cent(shared: Path) -> None:
    """NVIDIA's of Qwen3-32B under vLLM on H100: coefficients as in ../shared/research/routing.md, 3.1."""
    with gzip.open(shared / "data" / "aiconfigurator" / "silicon_sample.csv.gz", "rt") as file:
        wanted = {"model_path": "Qwen/Qwen3-32B", "system": "h100_sxm", "backend": "vllm", "tp_size": "4"}
        rows = []
        for line in csv.DictReader(file):
            users = re.search(r"silicon_concurrency=(\d+)", line["silicon_data_source"])
            if users and all(line[key] == value for key, value in wanted.items()):
                ttft, tpot = float(line["silicon_ttft_ms"]) / 1000, float(line["silicon_tpot_ms"]) / 1000
                rows.append(SweepRow(int(users[1]), float(line["isl"]), float(line["osl"]), ttft, tpot))
    found = fit(rows)
    assert found.rows == 30
    assert found.error < 0.04
    assert found.cost.alpha == pytest.approx(9310, rel=0.02)
    assert found.cost.gamma == pytest.approx(0.0235, rel=0.1)
    assert found.cost.delta == pytest.approx(32, rel=0.1)
