"""Made-up workloads obey their specification: rates, gaps, lengths, days, bursts, sessions, loops.

Bounds are five standard deviations, and seeds are fixed: a failure means a change.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from math import exp, gamma, inf, log, pi, sqrt
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.yamlfile import FileProblems, read_yaml
from sim import generator
from sim.arrival_process import Process, Rate, arrival_times, weibull_shape
from sim.engine import Engine, EngineSettings, Sequence, StepCost
from sim.generator import day_factor, generate, mean_hashes, mean_turns, rate_of
from sim.generator_spec import Client, Day, Distribution, Sessions, Users, WorkloadSpec, load_spec
from sim.streams import stream
from sim.workload import Arrival
from sim.workload_summary import prefix_share, summarize
from tests.pages import ROOT, page

FIRST_OF_A = 7614887988169683383
LEVELS = (np.arange(1 << 14) + 0.5) / (1 << 14)


def spec(*clients: dict[str, Any], **keys: Any) -> WorkloadSpec:
    """Of clients that have short prompts and answers unless they say otherwise."""
    return WorkloadSpec.model_validate(
        {
            "duration": "1h",
            "clients": [
                {"name": f"c{index}", "prompt": 100, "output": 10, **client}
                for index, client in enumerate(clients)
            ],
            **keys,
        }
    )


def sessions_of(arrivals: list[Arrival]) -> dict[str, list[Arrival]]:
    found = defaultdict(list)
    for arrival in arrivals:
        found[arrival.session].append(arrival)
    return found


# Arrivals

PROCESSES = [
    (Process.POISSON, 1.0),
    (Process.GAMMA, 0.3),
    (Process.GAMMA, 3.0),
    (Process.WEIBULL, 0.3),
    (Process.WEIBULL, 3.0),
]
each_process = pytest.mark.parametrize(("process", "cv"), PROCESSES)


def constant(rate: float, duration: float) -> Rate:
    return Rate(np.array([0.0, duration]), np.array([rate]))


@each_process
def test_rate_and_cv_are_those_that_were_asked_for(process: Process, cv: float) -> None:
    expected = 100_000
    times = arrival_times(stream(1, process), process, cv, constant(20.0, expected / 20.0))
    assert abs(len(times) - expected) < 5 * cv * sqrt(expected)
    assert (times >= 0).all()
    assert (times < expected / 20.0).all()
    assert (np.diff(times) >= 0).all()
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(1 / 20, rel=5 * cv / sqrt(expected))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


@each_process
def test_the_expected_number_is_exact_from_the_beginning(process: Process, cv: float) -> None:
    """A process that began with a whole gap would have (cv**2 - 1) / 2 more or fewer."""
    runs = 2000
    counts = [len(arrival_times(stream(seed), process, cv, constant(1.0, 3.0))) for seed in range(runs)]
    assert abs(np.mean(counts) - 3.0) < 5 * np.std(counts) / sqrt(runs)


@pytest.mark.parametrize("process", [Process.GAMMA, Process.WEIBULL])
def test_gaps_of_cv_1_are_exponential(process: Process) -> None:
    gaps = np.diff(arrival_times(stream(3), process, 1.0, constant(1.0, 20_000.0)))
    for level in (0.1, 0.5, 2.0, 4.0):
        share = exp(-level)
        assert abs((gaps > level).mean() - share) < 5 * sqrt(share * (1 - share) / len(gaps))


def test_gamma_and_weibull_differ_in_their_short_gaps() -> None:
    """Cumulative distributions at a hundredth of the mean, of cv 2: gamma of shape 1/4, Weibull of shape k."""
    shape = weibull_shape(2.0)
    expected = {
        Process.GAMMA: 0.25**0.25 * 0.01**0.25 / gamma(1.25),  # leading term; the next is 0.2 % of it
        Process.WEIBULL: 1 - exp(-((0.01 * gamma(1 + 1 / shape)) ** shape)),
    }
    for process, share in expected.items():
        gaps = np.diff(arrival_times(stream(4), process, 2.0, constant(1.0, 50_000.0)))
        assert abs((gaps < 0.01).mean() - share) < 5 * sqrt(share / len(gaps)) + 0.002


@given(st.floats(0.05, 20.0))
def test_weibull_shape_has_the_cv(cv: float) -> None:
    shape = weibull_shape(cv)
    mean, square = gamma(1 + 1 / shape), gamma(1 + 2 / shape)
    assert sqrt(square / mean**2 - 1) == pytest.approx(cv, rel=1e-4)


def test_nothing_comes_while_the_rate_is_zero() -> None:
    rate = Rate(np.array([0.0, 100.0, 200.0, 300.0]), np.array([1.0, 0.0, 3.0]))
    times = arrival_times(stream(5), Process.POISSON, 1.0, rate)
    counts, _ = np.histogram(times, rate.edges)
    assert counts[1] == 0
    assert abs(counts[0] - 100) < 50
    assert abs(counts[2] - 300) < 5 * sqrt(300)


# Days and bursts


def test_hours_have_their_shares() -> None:
    factors = [0.0] * 6 + [1.0] * 12 + [3.0] * 6
    workload = generate(spec({"rate": 0.5, "day": {"hours": factors}}, duration="2d", unit_tokens=0), 1)
    hours = np.array([arrival.at for arrival in workload]) // 3_600_000_000 % 24
    counts = np.bincount(hours, minlength=24)
    assert not counts[:6].any()
    expected = 0.5 * 2 * 3600 * np.array(factors) / np.mean(factors)
    assert (np.abs(counts - expected) <= 5 * np.sqrt(expected)).all()


@pytest.mark.parametrize("start_hour", [0, 9.5])
def test_a_sine_has_its_mean_its_peak_and_its_amplitude(start_hour: float) -> None:
    client = {"rate": 0.5, "day": {"peak_hour": 15, "amplitude": 0.8}}
    workload = generate(spec(client, duration="2d", start_hour=start_hour, unit_tokens=0), 2)
    expected = 0.5 * 2 * 86_400
    assert abs(len(workload) - expected) < 5 * sqrt(expected)
    hours = np.array([arrival.at for arrival in workload]) / 3.6e9 + start_hour
    first = np.exp(2j * pi * hours / 24).mean()  # first Fourier coefficient: amplitude / 2 at the peak
    assert np.angle(first * np.exp(-2j * pi * 15 / 24)) == pytest.approx(0, abs=0.05)
    assert 2 * abs(first) == pytest.approx(0.8, abs=0.03)


@given(st.lists(st.floats(0, 100), min_size=24, max_size=24).filter(lambda hours: sum(hours) > 1))
def test_a_day_has_a_mean_of_1(hours: list[float]) -> None:
    assert day_factor(Day(hours=hours), np.arange(24.0) + 0.5).mean() == pytest.approx(1)


def test_bursts_multiply_the_rate_for_their_length() -> None:
    made = spec({"rate": 2, "bursts": {"every": "10m", "length": "1m", "factor": 5}}, duration="30d")
    rate = rate_of(made.clients[0], made, 1)
    assert set(rate.levels.tolist()) == {2.0, 10.0}
    runs = np.split(np.diff(rate.edges), np.flatnonzero(np.diff(rate.levels)) + 1)
    high = rate.levels[0] == 10.0
    lengths = [run.sum() for run in runs[(not high) :: 2]][1:-1]
    assert min(lengths) == pytest.approx(60)
    # Begun at random, so that a share of exp(-length/every) of the time is without.
    share = np.diff(rate.edges)[rate.levels == 10.0].sum() / made.duration
    assert share == pytest.approx(1 - exp(-0.1), abs=0.01)
    assert rate.expected == pytest.approx(2 * made.duration * (1 + 4 * share))


def test_bursts_may_be_under_way_at_the_beginning() -> None:
    made = spec({"rate": 1, "bursts": {"every": "2m", "length": "1m", "factor": 2}}, duration="1s")
    begun = [rate_of(made.clients[0], made, seed).levels[0] == 2 for seed in range(1000)]
    share = 1 - exp(-0.5)
    assert abs(np.mean(begun) - share) < 5 * sqrt(share * (1 - share) / 1000)


def test_hours_change_on_the_hour() -> None:
    made = spec({"rate": 1, "day": {"hours": list(range(24))}}, duration="2h", start_hour=22.75)
    rate = rate_of(made.clients[0], made, 1)
    assert rate.edges.tolist() == [0, 900, 4500, 7200]
    assert rate.levels.tolist() == [22 / 11.5, 23 / 11.5, 0]


def test_requests_come_in_bursts() -> None:
    made = spec({"rate": 1, "bursts": {"every": "5m", "length": "1m", "factor": 8}}, duration="6h")
    rate = rate_of(made.clients[0], made, 3)
    seconds = np.array([arrival.at for arrival in generate(made, 3)]) / 1e6
    level = rate.levels[np.searchsorted(rate.edges, seconds, "right") - 1]
    for height in (1.0, 8.0):
        expected = height * np.diff(rate.edges)[rate.levels == height].sum()
        assert abs((level == height).sum() - expected) < 5 * sqrt(expected)


# Lengths


@given(st.floats(1, 1e4), st.floats(1.01, 3.8))
def test_lognormal_has_its_mean_and_its_percentile(mean: float, ratio: float) -> None:
    distribution = Distribution(mean=mean, p95=mean * ratio)
    assert distribution.at(np.array([0.95]))[0] == pytest.approx(mean * ratio)
    assert distribution.at(LEVELS).mean() == pytest.approx(mean, rel=0.02)


def test_other_distributions() -> None:
    assert Distribution(mean=30).at(LEVELS).mean() == pytest.approx(30, rel=0.001)
    assert Distribution(mean=30).at(np.array([0.5]))[0] == pytest.approx(30 * log(2))
    assert Distribution.model_validate(7).at(LEVELS[:3]).tolist() == [7, 7, 7]
    quantiles = Distribution(quantiles=[(0, 10), (0.5, 20), (1, 100)])
    assert quantiles.at(np.array([0.0, 0.25, 0.5, 0.75])).tolist() == [10, 15, 20, 60]
    bounded = Distribution(mean=30, min=10, max=50).at(LEVELS)
    assert (bounded.min(), bounded.max()) == (10, 50)
    assert Distribution(constant=0).whole(LEVELS[:2]).tolist() == [1, 1]
    assert Distribution(quantiles=[(0, 1), (1, 2)]).whole(np.array([0.4, 0.6])).tolist() == [1, 2]
    assert np.isfinite(Distribution(mean=10, p95=30).at(np.array([0.0]))).all()


def test_prompts_and_answers_have_their_means() -> None:
    client = {"rate": 5, "prompt": {"mean": 1155, "p95": 4083}, "output": {"mean": 211}}
    workload = generate(spec(client, unit_tokens=0), 4)
    for column, mean in (("prompt_tokens", 1155), ("output_tokens", 211)):
        lengths = np.array([getattr(arrival, column) for arrival in workload])
        assert abs(lengths.mean() - mean) < 5 * lengths.std() / sqrt(len(lengths))
    prompts = np.array([arrival.prompt_tokens for arrival in workload])
    assert abs((prompts > 4083).mean() - 0.05) < 5 * sqrt(0.05 * 0.95 / len(prompts))
    assert all(not arrival.hashes for arrival in workload)


# Sessions

TALK = {
    "rate": 1,
    "prompt": {"mean": 100},
    "output": {"mean": 60},
    "sessions": {"turns": {"mean": 4}, "think": {"mean": 20}, "system_tokens": 1000},
}


def test_a_session_counts_all_its_turns_in_the_rate() -> None:
    made = spec(TALK, duration="1d")
    workload = generate(made, 1)
    sizes = np.array([len(turns) for turns in sessions_of(workload.arrivals).values()])
    mean = mean_turns(made.clients[0].sessions)
    assert mean == pytest.approx(1 / (1 - exp(-1 / 4)) - 0.5 + 0.1, abs=0.2)
    assert abs(sizes.mean() - mean) < 5 * sizes.std() / sqrt(len(sizes)) + 0.01
    # A Poisson number of sessions: its variance is the sum of the squares.
    assert abs(len(workload) - 86_400) < 5 * sqrt((sizes**2).sum()) + 200


@given(
    st.integers(0, 300),
    st.sampled_from([16, 64]),
    st.integers(2, 6),
    st.sampled_from(["open", "closed"]),
    st.integers(0, 100),
)
@settings(max_examples=20)
def test_a_turn_continues_the_one_before_it(system: int, unit: int, turns: int, loop: str, seed: int) -> None:
    sessions = {"turns": turns, "think": 1, "system_tokens": system, "loop": loop, "max_tokens": 900}
    client = {**TALK, "sessions": sessions, "rate": 0.5}
    made = spec(client, {**client, "name": "other"}, duration="2m", unit_tokens=unit)
    found = sessions_of(generate(made, seed).arrivals)
    for said in found.values():
        assert len(said) <= turns
        for turn in said:
            assert len(turn.hashes) >= turn.prompt_tokens // unit
            assert len(set(turn.hashes)) == len(turn.hashes)
        for before, after in pairwise(said):
            length = before.prompt_tokens + before.output_tokens
            assert after.prompt_tokens > length
            assert after.prompt_tokens + after.output_tokens <= 900
            assert len(before.hashes) == length // unit
            assert after.hashes[: len(before.hashes)] == before.hashes
    units = system // unit
    beginnings = defaultdict(set)
    seen: set[int] = set()
    for name, said in found.items():
        longest = max(said, key=lambda turn: len(turn.hashes)).hashes
        beginnings[name.split("/")[0]].add(longest[:units])
        assert seen.isdisjoint(longest[units:])
        seen.update(longest[units:])
    assert all(len(one) == 1 for one in beginnings.values()), "one system prompt for each client"
    system_units = [one for sets in beginnings.values() for beginning in sets for one in beginning]
    assert len(set(system_units)) == len(system_units)
    assert seen.isdisjoint(system_units)


def test_the_engine_finds_what_the_hashes_say() -> None:
    """Played one after the other, with room for all."""
    made = spec({**TALK, "rate": 0.2}, duration="20m", unit_tokens=16)
    workload = generate(made, 1)
    engine = Engine(EngineSettings(StepCost(1.0, 0.0, 0.0, 0.0), prefix_unit_tokens=16))
    cached = 0
    for number, arrival in enumerate(workload):
        now = number * 10**9
        engine.advance(now)
        sequence = Sequence(arrival.prompt_tokens, arrival.output_tokens, arrival.hashes)
        engine.submit(sequence, now)
        while engine.next_at < inf:
            engine.advance(engine.next_at)
        cached += sequence.cached_tokens
    prompts = sum(arrival.prompt_tokens for arrival in workload)
    share = prefix_share(workload).tokens
    assert share > 0.5
    # An engine computes the last token always, and with it a unit that ends there.
    assert share - 16 * len(workload) / prompts <= cached / prompts <= share


def test_open_and_closed_loops_wait_for_different_things() -> None:
    for loop, think in (("open", -1), ("closed", 20_000_000)):
        sessions = {"turns": 3, "think": 20, "loop": loop}
        found = sessions_of(generate(spec({"rate": 1, "sessions": sessions}), 1).arrivals)
        assert len(found) > 1000
        for said in found.values():
            assert [turn.think for turn in said] == [-1, think, think][: len(said)]
            assert [turn.at - said[0].at for turn in said] == [0, 20_000_000, 40_000_000][: len(said)]


def test_single_requests_have_no_session() -> None:
    workload = generate(spec({"rate": 1}), 1)
    assert {arrival.session for arrival in workload} == {""}
    hashes = [one for arrival in workload for one in arrival.hashes]
    assert len(hashes) == len(set(hashes)) == len(workload)


def test_users_send_one_request_after_the_other() -> None:
    client = {
        "users": {"count": 5, "requests": 7},
        "sessions": {"turns": 2, "think": {"quantiles": [[0, 1], [1, 3]]}},
    }
    found = sessions_of(generate(spec(client), 1).arrivals)
    assert set(found) == {f"c0/{user}" for user in range(5)}
    for sent in found.values():
        assert len(sent) == 7
        assert sent[0].think == -1
        assert 1_000_000 <= sent[0].at <= 3_000_000
        for before, after in pairwise(sent):
            assert after.at - before.at == after.think
            assert 1_000_000 <= after.think <= 3_000_000
        assert [turn.prompt_tokens for turn in sent] == [100, 210, 100, 210, 100, 210, 100]
        assert sent[2].hashes[0] not in sent[1].hashes, "a new conversation"


def test_users_stop_with_the_workload() -> None:
    client = {"users": {"count": 2, "requests": 100}, "sessions": {"think": 60}}
    workload = generate(spec(client, duration="10m"), 1)
    assert len(workload) == 2 * 9
    assert max(arrival.at for arrival in workload) < 600_000_000


# Streams


def test_the_same_seed_gives_the_same_and_another_one_does_not() -> None:
    made = spec(TALK, {"rate": 2, "process": "gamma", "cv": 2}, duration="5m")
    assert generate(made, 1) == generate(made, 1)
    assert generate(made, 1).arrivals != generate(made, 2).arrivals


def test_a_stream_depends_on_its_name_alone() -> None:
    assert stream(1, "a").bit_generator.random_raw() == stream(1, "a").bit_generator.random_raw()
    names = [(1, "a"), (2, "a"), (1, "b"), (1, "a", "b"), (1, "ab"), (11, ""), (1, "1")]
    first = {stream(*name).bit_generator.random_raw() for name in names}  # type: ignore[arg-type]
    assert len(first) == len(names)
    # Over processes, machines and releases of numpy, which keeps what a bit generator gives.
    assert stream(1, "a").bit_generator.random_raw() == FIRST_OF_A


def test_a_client_more_changes_no_other() -> None:
    busy = {"rate": 3, "day": {"peak_hour": 3}, "bursts": {"every": "2m", "length": "5s", "factor": 3}}
    alone = generate(spec(TALK, busy), 1)
    more = generate(spec(TALK, busy, {"rate": 9}), 1)
    assert [arrival for arrival in more if arrival.tenant != "c2"] == alone.arrivals
    assert len(more) > len(alone)


def test_other_lengths_change_no_arrival() -> None:
    changed = {**TALK, "output": {"mean": 300}}
    before, after = (generate(spec(client, duration="10m"), 1).arrivals for client in (TALK, changed))
    assert [(one.at, one.session) for one in before] == [(one.at, one.session) for one in after]
    assert [one.output_tokens for one in before] != [one.output_tokens for one in after]


def test_arrivals_are_in_order_and_say_whose_they_are() -> None:
    client = {"tenant": "acme", "model": "m", "data_class": "internal", "priority": 3, "rate": 2}
    workload = generate(spec(client, {"rate": 2}), 1)
    assert [arrival.at for arrival in workload] == sorted(arrival.at for arrival in workload)
    assert {(one.tenant, one.model, one.data_class, one.priority) for one in workload} == {
        ("acme", "m", "internal", 3),
        ("c1", "", "public", 0),
    }


def test_progress_is_told_by_client() -> None:
    told = []
    generate(spec({"rate": 1}, {"rate": 1}), 1, lambda done, of: told.append((done, of)))
    assert told == [(1, 2), (2, 2)]


@pytest.mark.parametrize("client", [{"rate": 30}, {"users": {"count": 100, "requests": 1001}}])
def test_too_many_requests_are_refused_before_they_are_drawn(
    client: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator, "MOST_REQUESTS", 100_000)
    with pytest.raises(
        ValueError, match=r"^about 10\d{4} requests, more than 100000, 10\d{4} of them from c0: "
    ):
        generate(spec(client))


@pytest.mark.parametrize(
    "clients",
    [[{"rate": 20}, {"rate": 21}], [{"rate": 20}, {"users": {"count": 100, "requests": 900}}]],
)
def test_requests_of_all_clients_are_counted_before_the_first_is_drawn(
    clients: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator, "MOST_REQUESTS", 100_000)
    monkeypatch.setattr(generator, "_requests", None)
    with pytest.raises(ValueError, match=r"^about 1\d{5} requests, more than 100000, .* of them from c1: "):
        generate(spec(*clients))


def test_hashes_are_counted_before_the_first_request_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "MOST_HASHES", 100_000)
    monkeypatch.setattr(generator, "_requests", None)
    long = {"rate": 1, "prompt": 2000}
    with pytest.raises(
        ValueError, match=r"^about 11\d{4} hashes, more than 100000, 11\d{4} of them from c0: "
    ):
        generate(spec(long))


@pytest.mark.parametrize("unit", [0, 16, 64])
def test_so_many_hashes_as_are_foretold(unit: int) -> None:
    """About: the workload ends before its last sessions do."""
    made = spec(TALK, {**TALK, "sessions": {}}, duration="6h", unit_tokens=unit)
    workload = generate(made, 1)
    for client in made.clients:
        counts = [len(one.hashes) for one in workload if one.tenant == client.name]
        assert mean_hashes(client, unit) == pytest.approx(np.mean(counts), rel=0.1)


# The file

OFFICE = """
duration: 1h
clients:
  - name: office
    rate: 2
    prompt: 100
    output: {mean: 211, p95: 451}
"""


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("rate: 2", "rate: 0", "x.yaml:5:11: clients[0].rate: "),
        ("rate: 2", "cv: 2", "expected either rate or users"),
        ("rate: 2", "rate: 2\n    users: {count: 1, requests: 1}", "expected either rate or users"),
        ("rate: 2", "users: {count: 1, requests: 1}\n    cv: 2", "6:9: clients[0].cv: users come when"),
        ("rate: 2", "rate: 2\n    cv: 2", "clients[0].cv: poisson has a cv of 1"),
        ("rate: 2", "rate: 2\n    process: gamma", "clients[0].process: gamma needs a cv"),
        ("rate: 2", "rate: 2\n    day: {}", "clients[0].day: expected either hours or peak_hour"),
        ("rate: 2", "rate: 2\n    day: {hours: [1, 2]}", "needs at least 24 entries"),
        (
            "p95: 451",
            "p95: 2110",
            "clients[0].output.p95: expected a 95th percentile above the mean and at most",
        ),
        ("p95: 451", "p95: 200", "clients[0].output.p95: expected a 95th percentile above the mean"),
        ("mean: 211, p95", "p95", "expected one of constant, mean and quantiles, got none"),
        ("p95: 451", "constant: 3", "expected one of constant, mean and quantiles, got constant and mean"),
        ("mean: 211, p95: 451", "quantiles: [[0, 3], [1, 2]]", "levels must rise from 0 to 1"),
        ("mean: 211, p95: 451", "quantiles: [[0, 3], [0.9, 4]]", "levels must rise from 0 to 1"),
        ("p95: 451", "min: 9, max: 8", "clients[0].output.min: min is above max, 8"),
        ("prompt: 100", "prompt: many", "clients[0].prompt: expected"),
        ("prompt: 100", "promt: 100", "(did you mean 'prompt'?)"),
        ("1h", "forever", "duration: expected a duration"),
        ("1h", "1h\nunit_tokens: 100", "unit_tokens: expected a multiple of 16"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_where_it_is(old: str, new: str, problem: str) -> None:
    assert read_yaml(OFFICE, "x.yaml", WorkloadSpec).clients[0].rate == 2
    with pytest.raises(FileProblems) as found:
        read_yaml(OFFICE.replace(old, new), "x.yaml", WorkloadSpec)
    assert problem in str(found.value)


def test_names_of_clients_are_unique() -> None:
    with pytest.raises(ValueError, match="another client has this name"):
        spec({"rate": 1}, {"rate": 1, "name": "c0"})


def test_the_example_is_one() -> None:
    example = load_spec(ROOT / "examples" / "workload.yaml")
    figures = summarize(generate(example.model_copy(update={"duration": 1800.0}), 1))
    assert set(figures.tenants) == {"office", "service", "batch"}
    assert figures.prefix.tokens > 0.3
    assert figures.closed_loop > 1000


def test_the_one_in_the_documentation_is_one() -> None:
    block = next(block for block in page("workloads").blocks if block.file)
    assert len(read_yaml(block.text, block.file, WorkloadSpec).clients) == 2


@pytest.mark.parametrize("model", [WorkloadSpec, Client, Sessions, Users, Distribution, Day])
def test_every_key_is_documented(model: type[WorkloadSpec]) -> None:
    text = page("workloads").text
    assert not [name for name in model.model_fields if f"`{name}`" not in text]
