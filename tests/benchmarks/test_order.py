from __future__ import annotations

from collections import Counter
from math import inf, isinf
from pathlib import Path

import pytest

from benchmarks import order as command
from benchmarks.agreement import LATE_MS, Round
from benchmarks.agreement_loads import Outcome, read_loads, simulate
from benchmarks.conversations import LONGEST, OUTPUT_TOKENS, conversations
from benchmarks.order import (
    LOADS,
    POLICIES,
    Played,
    ahead,
    complaints,
    in_turn,
    of_measured,
    of_simulated,
    order,
    pairs,
    plot,
    report,
)
from sim.evaluate import named_policy

REQUESTS = 2


def outcome(*ttft_s: float) -> Outcome:
    return Outcome(list(ttft_s), [1.0] * len(ttft_s), Counter(), 1.0, [0.01] * len(ttft_s))


def measured(*ttft_s: float, late_ms: float = 0.0) -> Round:
    return Round(outcome(*ttft_s), 1, late_ms, {"proxy": 0.1, "emulators": 0.1, "client": 0.1, "others": 0.0})


def policy(name: str, simulated: list[float], seen: list[float]) -> Played:
    """With these times in each round, the same for both requests."""
    return Played(
        name,
        [[outcome(value, value), outcome(value, value)] for value in simulated],
        [measured(value, value) for value in seen],
    )


def test_the_five_differ_clearly_in_the_simulator() -> None:
    """In the mean and in p95, with arrivals that the benchmark does not play."""
    (load,) = read_loads(LOADS)
    asked = conversations(load.requests, command.RATE, seed=51)
    played = []
    for name in POLICIES:
        one = Played(name)
        chosen = load.model_copy(update={"policy": named_policy(name).text})
        one.simulated.append([simulate(chosen, asked.workload, 1.0)])
        played.append(one)
    for figure in command.FIGURES:
        assert order(played, figure, load.requests, measured=False) == list(reversed(POLICIES))


def test_every_backend_takes_every_request() -> None:
    (load,) = read_loads(LOADS)
    longest = LONGEST + command.quantile_of([OUTPUT_TOKENS[1]], 1) + 512
    assert all(member.load().limits.max_model_len >= longest for member in load.backends)
    assert all(member.load().limits.prefix_cache for member in load.backends)


@pytest.mark.parametrize(
    ("first", "second", "share", "expected"),
    [
        ([1.0, 2.0], [3.0, 4.0], 1.0, -1),
        ([3.0, 4.0], [1.0, 2.0], 1.0, 1),
        ([1.0, 4.0], [3.0, 2.0], 1.0, 0),
        ([1.0] * 19 + [3.0], [2.0] * 20, 0.95, -1),
        ([1.0] * 18 + [3.0] * 2, [2.0] * 20, 0.95, 0),
        ([1.0], [1.0], 1.0, 0),
    ],
)
def test_who_is_ahead(first: list[float], second: list[float], share: float, expected: int) -> None:
    assert ahead(first, second, share) == expected


def test_an_unanswered_request_has_a_first_token_that_never_came() -> None:
    one = Played("a", [[outcome(1.0)]], [measured(1.0)])
    assert of_measured(one, "mean TTFT", REQUESTS) == [inf]
    assert isinf(of_simulated(one, "p95 TTFT", REQUESTS)[0][0])


def test_the_same_order_is_no_complaint() -> None:
    played = [policy("a", [1.0, 1.1], [1.2, 1.0]), policy("b", [2.0, 2.1], [2.2, 2.0])]
    assert complaints(played, pairs(played, REQUESTS)) == []


def test_another_order_is_one() -> None:
    played = [policy("a", [1.0, 1.1], [2.2, 2.0]), policy("b", [2.0, 2.1], [1.2, 1.0])]
    said = complaints(played, pairs(played, REQUESTS))
    assert said == [
        f"{name}: a is below b in the simulator, and above it in the proxy" for name in command.FIGURES
    ]


def test_a_tie_is_named_and_too_many_are_a_complaint(capsys: pytest.CaptureFixture[str]) -> None:
    played = [policy("a", [1.0, 1.1], [1.2, 2.1]), policy("b", [2.0, 2.1], [2.2, 2.0])]
    found = pairs(played, REQUESTS)
    assert not any(pair.contradicts or pair.decided for pair in found)
    assert "mean TTFT: 0 of 1 pairs are decided, fewer than 80%" in complaints(played, found)
    report(played, found, REQUESTS, 1.0)
    assert "mean TTFT, ties: a and b (measured)" in capsys.readouterr().out


def test_a_spoiled_round_is_a_complaint() -> None:
    played = [policy("a", [1.0], [1.0]), policy("b", [2.0], [2.0])]
    played[1].measured[0].late_ms = LATE_MS + 1
    (said,) = complaints(played, pairs(played, REQUESTS))
    assert said.startswith("b, round 1 is spoiled: the client was")


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="NOT RUN: needs the extra `plot`")
    path = tmp_path / "order.png"
    plot([policy("a", [1.0], [1.0]), policy("b", [2.0], [2.0])], REQUESTS, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["order", "--policies", "least-loud,forecast"])
    assert command.main() == 2
    assert "did you mean 'least-load'" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["order", "--rate", "0"])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert "above zero" in capsys.readouterr().err
    for policies in ("forecast", "forecast,forecast"):
        monkeypatch.setattr("sys.argv", ["order", "--policies", policies])
        with pytest.raises(SystemExit, match="2"):
            command.main()
        assert "one alone has no order" in capsys.readouterr().err


def test_each_begins_a_round_in_its_turn() -> None:
    rounds = [in_turn(3, seed) for seed in range(1, 5)]
    assert rounds == [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]
