"""What a seed plays: blocks of a trace, sessions whole, prefixes of copies apart; open and closed loops."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sim.traffic import (
    BLOCKS,
    Loop,
    Traffic,
    _session_starts,
    by_sessions,
    cut,
    faster,
    of_users,
    period,
    read_traffic,
    resampled,
)
from sim.workload import Arrival, Workload
from tests.pages import ROOT

SECOND = 1_000_000


def trace(count: int = 240, gap: int = SECOND) -> Workload:
    """Requests that are told apart by their prompts."""
    return Workload("trace", [Arrival(index * gap, index + 1, 10) for index in range(count)])


# Blocks


def test_blocks_are_stretches_of_the_trace_as_they_were() -> None:
    found = resampled(trace(), seed=1)
    length = period(trace()) // BLOCKS
    for block in range(BLOCKS):
        prompts = [one.prompt_tokens for one in found if one.at // length == block]
        assert prompts == list(range(prompts[0], prompts[0] + len(prompts)))
        assert len(prompts) == 20
    assert len({one.prompt_tokens for one in found}) < 240  # some came twice


def test_one_seed_is_one_sample_and_another_is_another() -> None:
    assert resampled(trace(), 1).arrivals == resampled(trace(), 1).arrivals
    assert resampled(trace(), 1).arrivals != resampled(trace(), 2).arrivals


def test_every_stretch_is_as_likely() -> None:
    """A request in the middle comes once on average; the very first and last are in few stretches."""
    seeds = 400
    seen = Counter(one.prompt_tokens for seed in range(seeds) for one in resampled(trace(60), seed))
    middle = [seen[prompt] / seeds for prompt in range(10, 50)]
    assert all(abs(times - BLOCKS / 56 * 5) < 0.3 for times in middle)


@given(
    st.lists(
        st.tuples(st.integers(0, 100), st.sampled_from(["", "s", "t", "u"]), st.sampled_from(["a", "b"])),
        min_size=1,
        max_size=30,
    ),
    st.integers(0, 5),
)
def test_sessions_move_as_a_whole(drawn: list[tuple[int, str, str]], seed: int) -> None:
    arrivals = [
        Arrival(at * SECOND, index + 1, 1, session=session, tenant=tenant)
        for index, (at, session, tenant) in enumerate(sorted(drawn))
    ]
    assume(len(set(_session_starts(Workload("w", arrivals)))) > 1)
    before = [(one.tenant, one.session, one.at) for one in arrivals]
    found = resampled(Workload("w", arrivals), seed)
    assert [one.at for one in found] == sorted(one.at for one in found)
    copies: dict[tuple[str, str], list[Arrival]] = {}
    for one in found:
        if one.session:
            copies.setdefault((one.tenant, one.session), []).append(one)
    for (tenant, session), copy in copies.items():
        times = [
            at for its_tenant, its, at in before if (its_tenant, its) == (tenant, session.partition("~")[0])
        ]
        assert sorted(one.at - copy[0].at for one in copy) == [at - times[0] for at in times]


def test_a_copy_shares_with_others_what_is_everywhere_and_nothing_of_its_own() -> None:
    """Hash 1 is a system prompt; each request has one of its own; two that follow each other share a third."""
    arrivals = [
        Arrival(index * SECOND, 2000, 1, (1, 1000 + index // 2, 5000 + index)) for index in range(240)
    ]
    found = resampled(Workload("w", arrivals, 512), seed=3)
    own = Counter(one.hashes[2] for one in found)
    assert set(own.values()) == {1}
    assert {one.hashes[0] for one in found} == {1}
    pairs = Counter(one.hashes[1] for one in found if one.hashes[1] > 1 << 64)
    assert set(pairs.values()) <= {1, 2}
    assert 2 in pairs.values()


@pytest.mark.parametrize(
    "arrivals",
    [
        [Arrival(5, 10, 10)],
        [Arrival(0, prompt, 10) for prompt in range(1, 21)],
        [Arrival(at * SECOND, 10, 10, session="s") for at in range(20)],
    ],
)
def test_what_begins_at_one_time_has_no_blocks(arrivals: list[Arrival]) -> None:
    with pytest.raises(ValueError, match=r"begin at the same time.* --seeds 1"):
        resampled(Workload("w", arrivals), 3)
    assert list(Traffic(Workload("w", arrivals), resamples=False).workload(3)) == arrivals


def test_the_period_of_one_request() -> None:
    assert period(trace(1)) == 1


# What is played


def test_a_piece_begins_at_zero() -> None:
    found = cut(trace(), 10.0, 5.0)
    assert [(one.at // SECOND, one.prompt_tokens) for one in found] == [(n, n + 11) for n in range(5)]
    assert len(cut(trace(), 200.0, None)) == 40
    with pytest.raises(ValueError, match="it has 239 s in all"):
        cut(trace(), 300.0, 1.0)


def test_speed_shortens_times_and_thinking() -> None:
    arrivals = [Arrival(0, 1, 1, session="s"), Arrival(9 * SECOND, 1, 1, session="s", think=6 * SECOND)]
    found = faster(Workload("w", arrivals), 3.0).arrivals
    assert [(one.at, one.think) for one in found] == [(0, -1), (3 * SECOND, 2 * SECOND)]
    assert faster(trace(), 1.0).arrivals == trace().arrivals


def test_every_request_asks_for_the_model_of_the_cluster() -> None:
    named = Workload("w", [Arrival(0, 1, 1, model="gpt-4")])
    assert Traffic(named, resamples=False).workload(0).arrivals[0].model == ""


def test_an_open_loop_waits_for_no_answer() -> None:
    arrivals = [Arrival(0, 1, 1, session="s"), Arrival(9, 1, 1, session="s", think=6)]
    traffic = Traffic(Workload("w", arrivals), resamples=False)
    assert [one.think for one in traffic.workload(0)] == [-1, 6]
    traffic.loop = Loop.OPEN
    assert [one.think for one in traffic.workload(0)] == [-1, -1]


def test_in_a_closed_loop_what_an_answer_takes_was_not_thought() -> None:
    arrivals = [
        Arrival(0, 1, 11, session="s"),
        Arrival(5 * SECOND, 1, 11, session="s"),
        Arrival(6 * SECOND, 1, 11, session="s"),
        Arrival(7 * SECOND, 1, 1),
        Arrival(8 * SECOND, 1, 1, session="s", think=123),
    ]
    found = by_sessions(Workload("w", arrivals), ttft_s=1.0, tpot_s=0.1)
    assert [one.think for one in found] == [-1, 3 * SECOND, 0, -1, 123]
    with pytest.raises(ValueError, match="say how many --users ask"):
        by_sessions(trace(), 1.0, 0.1)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=60), st.integers(3, 9))
def test_users_ask_what_the_trace_asks_in_its_order(tenants: list[str], users: int) -> None:
    arrivals = [Arrival(index, index + 1, 1, tenant=tenant) for index, tenant in enumerate(tenants)]
    found = of_users(Workload("w", arrivals), users)
    assert [one.prompt_tokens for one in found] == [one.prompt_tokens for one in arrivals]
    asking = {(one.tenant, one.session) for one in found}
    assert len(asking) <= users
    assert len(asking) == min(users, len(tenants)) or len(set(tenants)) > 1
    first = [one for one in found if one.think < 0]
    assert {(one.tenant, one.session) for one in first} == asking
    assert len(first) == len(asking)


def test_fewer_users_than_tenants_are_refused() -> None:
    both = Workload("w", [Arrival(0, 1, 1, tenant="a"), Arrival(0, 1, 1, tenant="b")])
    with pytest.raises(ValueError, match="1 users are fewer than the 2 tenants"):
        of_users(both, 1)


# Where it comes from


def test_what_is_made_up_is_made_up_anew_with_each_seed(tmp_path: Path) -> None:
    traffic = read_traffic(ROOT / "examples" / "workload.yaml")
    assert traffic.seeds_in_words == "requests drawn anew"
    with pytest.raises(ValueError, match="has its own duration"):
        read_traffic(ROOT / "examples" / "workload.yaml", duration_s=5.0)
    spec = tmp_path / "spec.yaml"
    spec.write_text("duration: 1m\nclients: [{name: a, rate: 2, prompt: 100, output: 10}]\n")
    one, two = (read_traffic(spec).workload(seed).arrivals for seed in (1, 2))
    assert one == read_traffic(spec).workload(1).arrivals
    assert one != two


def test_a_trace_is_read_in_its_form(tmp_path: Path) -> None:
    rows = "".join(f"2023-11-16 18:15:{second:02},374,44\n" for second in range(60))
    file = tmp_path / "trace.csv"
    file.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}")
    traffic = read_traffic(file, start_s=10.0, duration_s=20.0)
    assert len(traffic.workload(0)) > 0
    traffic.resamples = False
    assert [one.at for one in traffic.workload(7)] == [second * SECOND for second in range(20)]
    assert traffic.seeds_in_words == "the trace as it is"


def test_servegen_is_drawn_anew_with_each_seed(tmp_path: Path) -> None:
    rates = tmp_path / "x_rates.csv"
    rates.write_text("client,window_start_s,rate_rps,cv,pattern,p1,p2\n1,0,0.5,1,Gamma,1,2\n")
    (tmp_path / "x_lengths.jsonl").write_text(
        '{"quantiles": [0, 1]}\n{"c": 1, "t": 0, "input_tokens": [10, 20], "output_tokens": [5, 9]}\n'
    )
    traffic = read_traffic(rates, duration_s=300.0)
    one, two = (traffic.workload(seed).arrivals for seed in (1, 2))
    assert one == traffic.workload(1).arrivals
    assert one != two
    assert max(arrival.at for arrival in one) < 300 * SECOND
