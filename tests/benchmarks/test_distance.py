from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import distance
from benchmarks.distance import (
    CASES,
    FAR,
    HOME,
    LOADS,
    NEAR,
    POLICIES,
    Figures,
    Job,
    broken_promises,
    cluster_of,
    play,
    workload_of,
)
from policies.geo import distance_km
from sim.traffic import period
from sim.workload import Arrival, Workload

PIECE = Workload("made up", [Arrival(second * 1_000_000, 500, 50) for second in range(120)])

FIGURES = Figures(100, 0.5, 1.0, 5.0, 0.5, 0.9, 0.0, 0.0, 1.0, 1.0)


def kept() -> dict[Job, Figures]:
    """Figures of a world in which all promises are kept."""
    found = {
        Job(case, load, policy, seed): FIGURES
        for case in CASES
        for load in LOADS
        for policy in POLICIES
        for seed in (1, 2)
    }
    for job in found:
        if job.case == "disagree" and job.policy == "geo":
            found[job] = replace(FIGURES, ttft_p50_s=0.6, ttft_p95_s=1.1)
    return found


def test_the_sites_are_as_far_away_as_is_said_and_light_is_no_slower() -> None:
    cluster = cluster_of(CASES["disagree"])
    km = {one.name: distance_km(HOME, one.site.location or HOME) for one in cluster.backends}
    assert km == {NEAR: 157, FAR: 1322}
    assert "157 km" in (distance.__doc__ or "")
    assert "1,322 km" in (distance.__doc__ or "")
    for case in CASES.values():
        for name, rtt_ms in ((NEAR, case.near_ms), (FAR, case.far_ms)):
            assert rtt_ms >= 2 * km[name] / 200  # light in fibre goes 200 km in a millisecond


def test_both_loads_have_the_same_requests_and_the_rates_they_say() -> None:
    light, heavy = (workload_of(PIECE, load, seed=3) for load in LOADS)
    assert [one._replace(at=0) for one in light] == [one._replace(at=0) for one in heavy]
    for load, workload in (("light", light), ("heavy", heavy)):
        assert len(workload) / (period(workload) / 1e6) == pytest.approx(LOADS[load], rel=0.02)
    assert {one.data_class for one in light} == {"public", "restricted"}


def test_geo_goes_by_the_map_and_the_law_keeps_what_is_restricted_near() -> None:
    by_map = play(PIECE, Job("disagree", "light", "geo", 1))
    by_way = play(PIECE, Job("disagree", "light", "shortest-path", 1))
    by_law = play(PIECE, Job("disagree", "heavy", "law", 1))
    assert by_map.near == 1.0
    assert by_way.near < 0.9
    assert by_way.ttft_p50_s < by_map.ttft_p50_s
    assert by_way.left > 0.0
    assert by_law.left == 0.0
    assert by_map.lost == by_way.lost == by_law.lost == 0.0


def test_all_promises_can_be_kept_and_each_can_be_broken() -> None:
    found = kept()
    assert not broken_promises(found)
    slow = replace(FIGURES, ttft_p50_s=0.7, ttft_p95_s=1.2)
    for job, figures, said in (
        (Job("disagree", "heavy", "shortest-path", 2), slow, "shortest-path is not faster"),
        (Job("slow near", "heavy", "law", 1), replace(FIGURES, left=0.01), "left under law"),
        (Job("agree", "light", "geo", 1), slow, "geo costs more"),
    ):
        assert any(said in line for line in broken_promises({**found, job: figures}))


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    distance.plot(kept(), tmp_path / "distance.png")
    assert (tmp_path / "distance.png").read_bytes().startswith(b"\x89PNG")
