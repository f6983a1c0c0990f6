"""From sweeps to profiles: levels that were computed from known coefficients are said by those that come back."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from policies.profile import read_profile
from sim.calibrate import Search, loop_times
from sim.closed_loop import closed_loop
from sim.engine import EngineSettings, StepCost
from sim.measure import fit
from sim.measure.endpoint import Facts, MeasureError
from sim.measure.fit import doubts, queues, to_profile, to_sweep
from sim.measure.level import Level
from sim.measure.prompts import Prefix
from sim.measure.sweep import Plan, Report, Series
from sim.measure.verdict import Sla, capacity
from sim.measure.wire import Api
from sim.profile import dump_profile, engine_settings
from sim.timings import Level as SweepLevel
from tests.sim.measure.fake_server import record

PROMPT, OUTPUT, ROUNDS = 100, 10, 4
COST = StepCost(14_000, 600, 0.5, 50)


@pytest.fixture(autouse=True)
def short_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for what these tests ask."""
    monkeypatch.setattr(fit, "SEARCH", Search(starts=1, evaluations=200, overhead=True))


def report(levels: list[Level], prefix: Prefix = Prefix.COLD, facts: Facts | None = None) -> Report:
    plan = Plan((1, 2, 4), PROMPT, OUTPUT)
    made = Report(
        "http://x", "Org/Model-7B", Api.CHAT, True, facts or Facts(), plan, began="2026-11-27T00:00:00+00:00"
    )
    made.series = [Series(prefix, levels)]
    return made


def level(users: int, interrupted: bool = False) -> Level:
    return Level.of(users, [record(ttft=0.1, e2e=0.1 + 0.9 * users)], 1.0, interrupted=interrupted)


def test_a_sweep_has_what_was_measured_cold_and_to_the_end() -> None:
    failed = Level.of(8, [record(error="timeout")], 1.0)
    partly = Level.of(4, [*level(4).requests, record(error="timeout")], 1.0)
    rows = to_sweep(report([level(1), level(2), partly, failed, level(16, interrupted=True)]))
    assert [(row.concurrency, row.prompt_tokens, row.output_tokens) for row in rows] == [
        (1, 100, 10),
        (2, 100, 10),
    ]
    assert [row.tpot for row in rows] == pytest.approx([100_000, 200_000])
    assert to_sweep(report([level(1)], Prefix.WARM)) == []


def levels_of(cost: StepCost, overhead_us: float, *levels: int, slots: int = 256) -> list[Level]:
    """As an engine of this cost, and a server before it, would be measured: the first requests all at once."""
    made = []
    for users in levels:
        figures = closed_loop(
            EngineSettings(cost, max_num_seqs=slots),
            users,
            PROMPT,
            OUTPUT,
            overhead_us=overhead_us,
            rounds=ROUNDS,
        )
        answer = record(ttft=figures.ttft_mean, e2e=figures.total_mean, tokens=OUTPUT, prompt=PROMPT)
        made.append(Level.of(users, [answer] * (ROUNDS * users), 1.0))
    return made


def test_a_profile_says_of_an_engine_what_was_measured() -> None:
    profile = to_profile(report(levels_of(COST, 5_000, 1, 2, 4, 8)), "H20", 1)
    settings = engine_settings(profile)
    for users in (3, 6):
        level = SweepLevel(users, PROMPT, OUTPUT, 1, 1)
        guessed = loop_times(settings, level, profile.overhead_us)
        assert guessed == pytest.approx(loop_times(EngineSettings(COST), level, 5_000), rel=0.1)


def test_users_who_only_wait_are_told_unless_it_is_known_how_many_run() -> None:
    full = report(levels_of(COST, 5_000, 1, 2, 4, 8, 16, slots=4))
    told: list[str] = []
    profile = to_profile(full, "H20", 1, warn=told.append)
    assert told[0].startswith("from 4 to 8 users throughput and TPOT stay while TTFT grows")
    assert "says that 256 run at once; say with --max-num-seqs" in told[0]
    assert profile.limits.max_num_seqs == 256
    told.clear()
    profile = to_profile(full, "H20", 1, max_num_seqs=4, warn=told.append)
    assert not told
    assert profile.limits.max_num_seqs == 4
    assert profile.limits.source.text.startswith("max_num_seqs: as given; ")


@pytest.mark.parametrize("cost", [COST, StepCost(2_000, 20, 0.5, 500), StepCost(20_000, 1, 0, 1)])
def test_an_engine_with_room_has_no_queue(cost: StepCost) -> None:
    """Also where prompts are most of the work, so that first tokens are ever later."""
    assert not queues(to_sweep(report(levels_of(cost, 5_000, 1, 2, 4, 8, 16, 32))))


def test_a_cache_that_is_known_to_be_full_explains_a_queue() -> None:
    levels = to_sweep(report(levels_of(COST, 5_000, 1, 2, 4, 8, slots=4)))
    limits = to_profile(report([level(1), level(2), level(4)]), "H20", 1).limits
    assert doubts(levels, limits, [0.0])
    assert not doubts(levels, limits.model_copy(update={"kv_tokens": 4 * (PROMPT + OUTPUT)}), [0.0])


def test_a_poor_fit_is_told() -> None:
    limits = to_profile(report([level(1), level(2), level(4)]), "H20", 1).limits
    (said,) = doubts([], limits, [0.1, -0.31, 0.2])
    assert said.startswith(
        "the fit is poor: at worst 31% off; if the engine was full, --max-num-seqs, or --kv"
    )
    assert not doubts([], limits, [0.19, -0.19])


def test_its_capacity_is_what_the_sla_allows() -> None:
    levels = [level(1), level(2), level(4)]
    assert to_profile(report(levels), "H20", 1).capacity is None
    asked = report(levels)
    asked.plan = replace(asked.plan, sla=Sla(tpot_s=0.25))
    asked.series[0].capacity = capacity(levels, Sla(tpot_s=0.25))
    found = to_profile(asked, "H20", 1).capacity
    assert found is not None
    assert (found.users, found.prompt_tokens, found.output_tokens) == (2, PROMPT, OUTPUT)
    assert (found.tokens_per_s, found.ttft_s, found.tpot_s) == (None, None, 0.25)
    assert "4 are too many" in found.source.text


def test_levels_with_failures_are_left_out_and_named() -> None:
    partly = [Level.of(users, [*level(users).requests, record(error="timeout")], 1.0) for users in (8, 16)]
    made = to_profile(report([level(1), level(2), level(4), *partly]), "H20", 1)
    said = made.step.source.text
    assert "3 levels of 1 to 4 users" in said
    assert "without those of 8, 16 users, where requests failed" in said


def test_its_source_says_how_far_off_a_level_is() -> None:
    """Of levels that no engine has: four users are served as fast as one, two half as fast."""
    levels = [level(1), level(2), Level.of(4, [record(ttft=0.1, e2e=1.0)], 1.0)]
    said = to_profile(report(levels), "H20", 1).step.source.text
    found = re.search(
        r"error of a level on average \(at worst\): TTFT .*, TPOT ([\d.]+)% \(([\d.]+)%\), E2E", said
    )
    assert found is not None
    mean, worst = float(found[1]), float(found[2])
    assert 5 < mean < worst


def test_two_levels_are_too_few() -> None:
    with pytest.raises(MeasureError, match="three levels"):
        to_profile(report([level(1), level(2)]), "H20", 1)


def test_levels_that_its_own_cache_could_not_hold_are_refused() -> None:
    levels = [level(1), level(2), level(4)]
    with pytest.raises(MeasureError, match="no profile says these levels: a sequence"):
        to_profile(report(levels, facts=Facts("0.32.0", 5000, 64, None)), "H20", 1)


def test_a_profile_says_what_was_measured_and_what_the_server_told() -> None:
    levels = [level(1), level(2), level(4)]
    made = to_profile(report(levels, facts=Facts("0.32.0", 5000, 65536, None)), "H20", 2)
    assert (made.name, made.card, made.cards, made.model) == ("org-model-7b-h20x2", "H20", 2, "Org/Model-7B")
    assert (made.limits.kv_tokens, made.limits.max_model_len) == (65536, 5000)
    assert "kv_tokens, max_model_len: as the server says;" in made.limits.source.text
    assert (
        "max_num_batched_tokens, max_num_seqs, prefix_cache: vLLM's default, not" in made.limits.source.text
    )
    assert "vLLM 0.32.0: 3 levels of 1 to 4 users" in made.step.source.text
    assert "failed" not in made.step.source.text
    assert read_profile(dump_profile(made), "p.yaml") == made
