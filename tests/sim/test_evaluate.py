"""The figures of a run against trips made by hand, and what every policy of the registry makes of a workload."""

from __future__ import annotations

import pickle
from math import inf
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import policies
from policies.base import RequestFacts
from sim.cluster_file import ClusterFile, read_cluster
from sim.engine import Sequence
from sim.evaluate import PolicyText, cdf, evaluate, figures_of, jain, named_policy, quantiles
from sim.router import End
from sim.trips import Trip
from sim.workload import Arrival, Workload

CLUSTER = """
model: m
sla: {ttft: 1s, tpot: 100ms}
backends:
  - {name: here, profile: l40-2-32b, slots: 4, watts: 1000, prefix_cache: true}
  - name: there
    site: away
    profile: h20-4-32b
    slots: 8
    rtt: 20ms
    watts: 2000
    prefix_cache: true
    price: {input: 2, cached_input: 1, output: 10}
sites:
  local: {carbon_gco2_kwh: 500, location: [31, 121]}
  away: {carbon_gco2_kwh: 100, location: [50, 8]}
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> ClusterFile:
    file = tmp_path_factory.mktemp("cluster") / "cluster.yaml"
    file.write_text(CLUSTER)
    return read_cluster(file)


def trip(
    at: float,
    ttft: float | None,
    total: float,
    backend: str = "here",
    end: End = End.OK,
    tokens: int = 11,
    tenant: str = "a",
    cached: int = 0,
) -> Trip:
    arrival = Arrival(round(at * 1e6), 1000, tokens, tenant=tenant)
    made = Trip(0, arrival, RequestFacts("0", "m", tenant=tenant, arrived=at))
    made.first_token = at + ttft if ttft is not None else -1.0
    made.ended, made.end, made.backend, made.cached_tokens = at + total, end, backend, cached
    if end is End.OK:
        made.sequence = Sequence(1000, tokens)
        made.sequence.finished = 1
    return made


HAND_MADE = [
    trip(0.0, 0.5, 1.0),  # TPOT 0.05
    trip(10.0, 1.5, 2.0),  # first token too late
    trip(20.0, 0.5, 3.5, tenant="b"),  # TPOT 0.3: too slow
    trip(30.0, 0.25, 0.25, "there", tokens=1, cached=400),  # no TPOT to miss
    trip(40.0, 0.5, 1.0, "there", tenant="b"),
    trip(50.0, None, 10.0, "", End.REJECTED),
    trip(60.0, 0.5, 5.0, "there", End.CUT),  # came in time, and broke off
    trip(70.0, None, 4.0, "here", End.FAILED),
]


def test_figures_of_trips_made_by_hand(cluster: ClusterFile) -> None:
    found = figures_of(HAND_MADE, cluster, 100.0, 2)
    assert (found.requests, found.seconds, found.policy_failures) == (8, 100.0, 2)
    assert found.goodput_rps == pytest.approx(0.03)
    assert found.met == pytest.approx(3 / 8)
    assert found.rejected == pytest.approx(1 / 8)
    assert found.failed == pytest.approx(2 / 8)
    # 0.25, 0.5, 0.5, 0.5, 1.5, and three that never came: the cut one has no answer either.
    assert found.ttft_s == pytest.approx((0.5, inf, inf))
    assert found.tpot_s == pytest.approx((0.05, 0.3, 0.3))  # 0.05, 0.05, 0.05, 0.3
    assert found.total_s == pytest.approx((2.0, inf, inf))  # 0.25, 1, 1, 2, 3.5
    assert found.spill == pytest.approx(3 / 7)  # of those that were sent
    # One answer with 600 new tokens, 400 cached ones and one of output; one with 1000 and 11.
    assert found.cost == pytest.approx((600 * 2 + 400 * 1 + 10 + 1000 * 2 + 11 * 10) / 1e6)
    assert found.unpriced == pytest.approx(3 / 5)
    assert found.cached == pytest.approx(400 / 5000)
    here, there = 1.0 + 2.0 + 3.5 + 4.0, 0.25 + 1.0 + 5.0
    assert found.gco2 == pytest.approx(here * 1000 / 3.6e6 * 500 + there * 2000 / 3.6e6 * 100)
    assert found.fairness == pytest.approx(jain([2 / 6, 1 / 2]))


def test_time_in_which_a_backend_serves_several_counts_once(cluster: ClusterFile) -> None:
    overlapping = [trip(0.0, 0.5, 4.0), trip(1.0, 0.5, 1.0), trip(3.0, 0.5, 3.0), trip(10.0, 0.5, 1.0)]
    found = figures_of(overlapping, cluster, 10.0)
    assert found.gco2 == pytest.approx(7.0 * 1000 / 3.6e6 * 500)
    held = trip(0.0, 3.0, 4.0)
    held.held_s = 2.5  # in the router, where no card works
    assert figures_of([held], cluster, 1.0).gco2 == pytest.approx(1.5 * 1000 / 3.6e6 * 500)


@pytest.mark.parametrize("without", ["watts: 1000", "carbon_gco2_kwh: 500"])
def test_carbon_that_nobody_knows_is_not_made_up(tmp_path: Path, without: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(CLUSTER.replace(f"{without}, ", ""))
    unknown = read_cluster(file)
    assert figures_of([trip(0.0, 0.5, 1.0)], unknown, 1.0).gco2 is None
    assert figures_of([trip(0.0, 0.5, 1.0, "there")], unknown, 1.0).gco2 is not None


def test_nothing_answered_is_the_worst_and_not_an_error(cluster: ClusterFile) -> None:
    found = figures_of([trip(0.0, None, 1.0, "", End.REJECTED)], cluster, 1.0)
    assert (found.goodput_rps, found.met, found.rejected, found.spill) == (0.0, 0.0, 1.0, 0.0)
    assert found.ttft_s == found.tpot_s == found.total_s == (inf, inf, inf)
    assert found.fairness is None


def test_a_first_token_is_worth_nothing_without_an_answer(cluster: ClusterFile) -> None:
    for end in (End.CUT, End.GONE):
        assert figures_of([trip(0.0, 0.5, 5.0, "there", end)], cluster, 1.0).ttft_s.p50 == inf


def test_refusing_makes_nothing_faster(cluster: ClusterFile) -> None:
    slow = [trip(float(at), 0.5 + at, 60.0) for at in range(10)]
    refused = [*slow[:5], *(trip(float(at), None, 0.0, "", End.REJECTED) for at in range(5, 10))]
    for name in ("ttft_s", "total_s"):
        with_all, with_half = (getattr(figures_of(trips, cluster, 1.0), name) for trips in (slow, refused))
        assert all(less >= more for less, more in zip(with_half, with_all, strict=True))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300))
def test_quantiles_are_numpys(values: list[float]) -> None:
    expected = np.quantile(values, [0.5, 0.95, 0.99], method="inverted_cdf")
    assert list(quantiles(values)) == expected.tolist()
    points = cdf(values)
    assert (points[0], points[50], points[-1]) == (min(values), expected[0], max(values))


def test_jains_index() -> None:
    assert jain([1.0, 1.0, 1.0]) == pytest.approx(1.0)
    assert jain([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain([0.0, 0.0]) is None


# Runs


def rush(count: int = 60) -> Workload:
    return Workload(
        "rush",
        [
            Arrival(
                index * 100_000,
                600 + 17 * (index % 7),
                5 + index % 30,
                (index % 3,),
                session=f"s{index % 5}",
                tenant="ab"[index % 2],
            )
            for index in range(count)
        ],
        512,
    )


@pytest.mark.parametrize("name", policies.names())
def test_every_policy_of_the_registry_runs(cluster: ClusterFile, name: str) -> None:
    run = evaluate(cluster, named_policy(name), rush(), seed=1)
    assert run.figures.policy_failures == 0, run.last_failure
    assert run.figures.requests == 60
    assert run.figures.met > 0.0


@pytest.mark.parametrize("name", ["power-of-two", "local-first"])
def test_the_same_seed_gives_the_same_bytes(cluster: ClusterFile, name: str) -> None:
    one, two = (evaluate(cluster, named_policy(name), rush(), seed=4) for _ in range(2))
    assert pickle.dumps((one.figures, one.ttft_cdf)) == pickle.dumps((two.figures, two.ttft_cdf))


def test_a_policy_draws_other_numbers_with_another_seed(cluster: ClusterFile) -> None:
    one, two = (evaluate(cluster, named_policy("random"), rush(), seed=seed) for seed in (1, 2))
    assert one.figures != two.figures


def test_load_comes_over_its_time_and_closed_loops_end_with_their_answers(cluster: ClusterFile) -> None:
    opened = evaluate(cluster, named_policy("least-load"), rush()).figures
    assert opened.seconds == pytest.approx(6.0)  # 60 arrivals, a tenth of a second apart
    chained = [one._replace(think=0 if index >= 10 else -1) for index, one in enumerate(rush().arrivals)]
    closed = evaluate(cluster, named_policy("least-load"), Workload("w", chained, 512)).figures
    assert closed.seconds > 1.0
    assert closed.goodput_rps * closed.seconds == pytest.approx(closed.met * 60)


def test_a_policy_that_fails_is_counted(cluster: ClusterFile) -> None:
    run = evaluate(cluster, named_policy("tests.sim.test_evaluate:Broken"), rush())
    assert run.figures.policy_failures == 60
    assert "out of order" in run.last_failure


class Broken(policies.Policy):
    """Raises."""

    def __init__(self, rng: object) -> None:
        pass

    def choose(self, *_: object) -> policies.base.Decision:  # type: ignore[override]
        raise RuntimeError("out of order")


def test_a_policy_is_a_file_a_library_name_or_a_registry_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("rules: [{name: r}]\n")
    assert named_policy(str(file)) == PolicyText(str(file), "rules: [{name: r}]\n")
    assert "prefer:" in named_policy("local-first").text
    assert named_policy("least-load").text == 'rules:\n  - name: "least-load"\n    pick: "least-load"\n'
    with pytest.raises(ValueError, match=r"no policy is called 'lest-load'; did you mean 'least-load'\?"):
        named_policy("lest-load")
    with pytest.raises(FileNotFoundError):
        named_policy("gone.yaml")
