from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.case_4_2 import cards
from benchmarks.case_4_2.plot import plot
from benchmarks.case_4_2.policies import LEVELS, NOT_PLAYED, POLICIES, QUICK, SLOTS, named
from benchmarks.case_4_2.runs import basis, simulate
from benchmarks.case_4_2.simulated import Figures, alone, cluster, play
from benchmarks.case_4_2.traffic import (
    TRAINING_SEED,
    WINDOW_S,
    Piece,
    _Drawn,
    _joined,
    day_windows,
    peak_spans,
)
from benchmarks.case_4_2.verdict import (
    CARD_HOUR,
    best,
    box_hour,
    cost_cut,
    most_token_factor,
    nearest,
    sensitivity,
    verdict,
    words,
)
from policies import names
from policies.files import read_policy
from sim.workload import Arrival

PIECE = Piece(
    200.0, tuple((number % 10 / 100, Arrival(number * 500_000, 300, 200)) for number in range(400)), 0.0
)
"""Two requests a second: more than the box serves with two slots."""

FIGURES = Figures(100, 1.0, 30.0, 60.0, 0.3, 0.8, 0.99, 0.0, 0.6, 1.0)
ALONE = replace(FIGURES, mean_s=600.0, met=0.0, spill=0.0, tokens_per_hour=0.0)
SERVED = replace(ALONE, mean_s=55.0, met=0.95)


def test_the_profiles_are_as_the_law_writes_them() -> None:
    folder = Path(cards.__file__).parent
    for name, text in cards.texts().items():
        assert (folder / name).read_text(encoding="utf-8") == text


def test_every_policy_can_be_read_and_has_a_name_of_its_own() -> None:
    for entry in POLICIES:
        assert read_policy(entry.text, entry.name, cluster(entry.slots).known).rules
    assert len({entry.name for entry in POLICIES}) == len(POLICIES)
    assert all(named(name) for name in QUICK)
    assert max(LEVELS) < SLOTS


def test_every_policy_of_the_registry_is_played_or_it_is_said_why_not() -> None:
    text = "".join(entry.text for entry in POLICIES)
    played = {name for name in names() if f"pick: {name}" in text or f"policy: {name}," in text}
    assert played | set(NOT_PLAYED) == set(names())
    assert not played & set(NOT_PLAYED)


def test_no_day_that_is_shown_has_a_window_of_the_training_day() -> None:
    def windows(seed: int) -> set[int]:
        peaks = peak_spans(seed)
        inside = {start + at for start, length in peaks for at in range(0, int(length), WINDOW_S)}
        return {int(one) // WINDOW_S for one in (*inside, *day_windows(seed))}

    training = windows(TRAINING_SEED)
    assert len(training) >= 24
    assert all(len(day_windows(seed)) == 24 for seed in range(1, 30))
    assert not training & set().union(*(windows(seed) for seed in range(1, 30)))


def test_a_smaller_share_is_a_part_of_a_greater_one() -> None:
    few, many = PIECE.workload(0.02), PIECE.workload(0.05)
    assert 0 < len(few) < len(many)
    assert set(few) < set(many)
    assert PIECE.rate(0.05) == pytest.approx(len(many) / 200)
    with pytest.raises(ValueError, match="at most"):
        PIECE.workload(0.9)


def test_pieces_follow_one_another() -> None:
    part = _Drawn(10.0, [(0.2, Arrival(9_000_000, 1, 1)), (0.1, Arrival(0, 2, 2))], 4, 3)
    whole = _joined([part, part])
    assert whole.seconds == 20.0
    assert [one.at for _, one in whole.drawn] == [0, 9_000_000, 10_000_000, 19_000_000]
    assert [number for number, _ in whole.drawn] == [0.1, 0.2, 0.1, 0.2]
    assert whole.left_out == 0.25


def test_fewer_slots_spill_more_and_only_what_the_cloud_computes_is_paid() -> None:
    workload = PIECE.workload(0.3)
    little, much = (play(named(f"local-first {slots}"), workload, 200.0, 1) for slots in (4, 16))
    assert little.spill > much.spill > 0
    assert little.tokens_per_hour > much.tokens_per_hour > 0
    box = alone(workload, 200.0, 1)
    assert (box.spill, box.tokens_per_hour, box.lost) == (0.0, 0.0, 0.0)
    assert alone(workload, 200.0, 1, boxes=3).mean_s < box.mean_s


def test_other_cards_in_the_cloud_change_its_profile_only() -> None:
    known, derived = cluster(SLOTS), cluster(SLOTS, remote="mlu370-4-32b")
    assert [one.profile.card for one in known.backends] == ["L20", *["E"] * 4]
    assert [one.profile.card for one in derived.backends] == ["L20", *["MLU370-X8"] * 4]
    assert {one.profile.limits.max_model_len for one in derived.backends} == {5000}


def test_what_a_box_and_tokens_cost_against_boxes() -> None:
    assert box_hour() == 2 * CARD_HOUR
    assert cost_cut(0.0, 3) == pytest.approx(2 / 3)
    assert cost_cut(box_hour(), 3) == pytest.approx(1 / 3)
    factor = most_token_factor(1.0, 3)
    assert cost_cut(factor, 3) == pytest.approx(0.5)
    assert most_token_factor(1.0, 1) < 0
    table = sensitivity(1.0, 3)
    assert all(row == sorted(row, reverse=True) for row in table)


def test_the_best_keeps_all_claims_and_spills_least() -> None:
    dear = verdict("dear", [FIGURES], [replace(FIGURES, tokens_per_hour=2.0)], [3], [ALONE], [SERVED])
    slow = verdict("slow", [replace(FIGURES, met=0.9)], [replace(FIGURES, spill=0.1)], [3], [ALONE], [SERVED])
    good = verdict("good", [FIGURES], [FIGURES], [3], [ALONE], [SERVED])
    less = verdict("less", [FIGURES], [replace(FIGURES, spill=0.5)], [3], [ALONE], [SERVED])
    assert good.keeps_all
    assert not dear.keeps_cost
    assert not slow.keeps_throughput
    assert good.latency_cut == pytest.approx(0.95)
    assert good.at_capacity_cut == pytest.approx(1 - 30 / 55)
    assert best([dear, slow, good, less]) is less
    late = [replace(FIGURES, mean_s=40.0)]
    lax = verdict("lax", late, [replace(FIGURES, spill=0.1)], [3], [ALONE], [SERVED])
    full = verdict("full", [FIGURES], [replace(FIGURES, spill=0.1, met=0.9)], [3], [ALONE], [SERVED])
    assert lax.keeps_all
    assert full.keeps_all
    assert best([lax, less, full]) is less, (
        "by the stricter reading and over the whole day, if somebody keeps that"
    )
    assert best([lax, dear]) is lax
    assert best([dear, slow]) is None
    assert nearest([slow, dear]).policy in ("slow", "dear")
    assert (slow.missed, dear.missed) == (["throughput"], ["cost"])


def test_what_is_said_of_the_chosen_one_may_be_either() -> None:
    good = verdict("good", [FIGURES], [FIGURES], [3], [ALONE], [SERVED])
    dear = verdict(
        "dear",
        [replace(FIGURES, mean_s=40.0)],
        [replace(FIGURES, tokens_per_hour=2.0)],
        [3],
        [ALONE],
        [SERVED],
    )
    kept, missed = words(good, [good, dear]), words(dear, [good, dear])
    assert kept[0].startswith("good, chosen on the training day, keeps all three claims")
    assert "falls by 45%: by that reading 40% are reached" in kept[1]
    assert missed[0].startswith("dear, chosen on the training day, does not keep the claim of cost")
    assert "falls by 27%: by that reading 40% are not reached" in missed[1]
    assert kept[2] == missed[2] == "All three claims on the days that are shown: 1 of 2 policies (good)."
    assert kept[3] == "By the stricter reading, and with the SLA kept over the day: 1 (good)."


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = verdict("good", [FIGURES], [FIGURES], [3], [ALONE], [SERVED])
    plot([found], 3.0, 600.0, {"box alone": {1.0: 55.0}, "good": {1.0: 30.0}}, tmp_path / "case.png")
    assert (tmp_path / "case.png").read_bytes().startswith(b"\x89PNG")


def test_a_spawned_process_finds_what_it_is_to_play() -> None:
    """It does not, where that is in a `__main__` of a package."""
    for one in (basis, simulate):
        assert pickle.loads(pickle.dumps(one)) is one
        assert not one.__module__.endswith("__main__")
