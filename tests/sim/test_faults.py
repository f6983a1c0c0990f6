from __future__ import annotations

from collections.abc import Callable

import pytest

from sim.faults import Fault, FaultKind, Faults, parse_fault


class Later:
    """`call_later`, remembered."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, Callable[[], object]]] = []

    def __call__(self, delay: float, callback: Callable[[Fault], object], fault: Fault, /) -> None:
        self.calls.append((delay, lambda: callback(fault)))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("die", Fault(kind=FaultKind.DIE)),
        ("cut,share=0.25,seconds=30", Fault(kind=FaultKind.CUT, share=0.25, seconds=30)),
        ("error,status=429,retry_after=5", Fault(kind=FaultKind.ERROR, status=429, retry_after=5)),
        ("slow,factor=3", Fault(kind=FaultKind.SLOW, factor=3)),
        ("error_event,share=0.5", Fault(kind=FaultKind.ERROR_EVENT, share=0.5)),
    ],
)
def test_faults_as_text(text: str, fault: Fault) -> None:
    assert parse_fault(text) == fault


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("explode", "kind: expected 'error', 'garbage'"),
        ("cut,share=2", "share: must be at most 1, got '2'"),
        ("cut,share", "share: expected a number, got"),
        ("cut,often=1", "often: unknown key; known here: kind, share"),
        ("cut,shar=1", r"shar: unknown key \(did you mean 'share'\?\)"),
        ("cutt", r"kind: expected .*\(did you mean 'cut'\?\)"),
        ("slow,share=0.5", "slow has no share"),
        ("stall,factor=2", "stall has no factor"),
        ("error,status=200", "status"),
    ],
)
def test_wrong_faults_are_told_in_one_line(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        parse_fault(text)
    assert "\n" not in str(caught.value)


def test_a_share_of_requests_meets_a_fault_and_one_seed_decides_which() -> None:
    def drawn(seed: int) -> list[bool]:
        faults = Faults(Later(), seed=seed)
        faults.order(Fault(kind=FaultKind.STALL, share=0.3))
        return [faults.draw() is not None for _ in range(1000)]

    assert 250 < sum(drawn(1)) < 350
    assert drawn(1) == drawn(1) != drawn(2)


def test_a_fault_ends_after_its_time() -> None:
    later, changes = Later(), []
    faults = Faults(later, speed=10.0)
    faults.changed = lambda: changes.append(list(faults.active))
    slow, slower = (Fault(kind=FaultKind.SLOW, factor=2.0, seconds=30) for _ in range(2))
    faults.order(slow)
    faults.order(slower)
    assert faults.factor == 4.0
    assert [delay for delay, _ in later.calls] == [3.0, 3.0]
    later.calls[1][1]()
    assert faults.factor == 2.0
    assert faults.active[0] is slow
    faults.take_back()
    later.calls[0][1]()  # taken back before
    assert changes == [[slow], [slow, slower], [slow], []]


def test_faults_of_the_whole_backend_are_not_drawn() -> None:
    faults = Faults(Later())
    assert (faults.healthy, faults.dead, faults.factor, faults.draw()) == (True, False, 1.0, None)
    for kind in (FaultKind.DIE, FaultKind.UNHEALTHY, FaultKind.SLOW):
        faults.order(Fault(kind=kind))
    assert (faults.healthy, faults.dead, faults.factor, faults.draw()) == (False, True, 2.0, None)


def test_the_first_fault_that_meets_a_request_decides() -> None:
    faults = Faults(Later())
    faults.order(Fault(kind=FaultKind.CUT, share=1e-9))
    faults.order(Fault(kind=FaultKind.ERROR))
    drawn = faults.draw()
    assert drawn is not None
    assert drawn.kind is FaultKind.ERROR
