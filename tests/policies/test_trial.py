"""A policy of somebody else's is tried before requests are: what fails at once is said by `tidegate check`."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest

from policies import POLICIES, PolicyError, load
from policies.base import BackendView, Decision, Finished, Hold, Policy, RequestFacts, Send
from policies.filechecks import KnownNames
from policies.files import read_policy
from policies.trial import failure

HERE = __name__


class Fails(Policy):
    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        raise TypeError("no such thing")

    def __init__(self, rng: Random) -> None: ...


class SendsNowhere(Fails):
    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        return Send("nowhere")


class ForgetsWhatItSent(Fails):
    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        return Send(backends[0].name)

    def finished(self, finished: Finished) -> None:
        raise KeyError(finished.request.id)


class GoesByLabel(ForgetsWhatItSent):
    """Works with a fleet that has the label."""

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        return Send(min(backends, key=lambda backend: backend.labels["card"]).name)

    finished = Policy.finished


class MadeTwiceOnly(ForgetsWhatItSent):
    """Whatever it takes is not free a third time."""

    made = 0

    def __init__(self, rng: Random) -> None:
        MadeTwiceOnly.made += 1
        if MadeTwiceOnly.made > 2:
            raise OSError("port in use")


class Waits(Fails):
    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        return Hold(now + 1.0)


def warnings(name: str, known: KnownNames | None = None) -> list[tuple[str, str]]:
    text = f"rules: [{{name: all, pick: '{HERE}:{name}'}}]"
    assert read_policy(text, "p.yaml", known).warnings == [], "only who checks a file tries what is in it"
    read = read_policy(text, "p.yaml", known, tried=True)
    return [(warning.path, warning.message) for warning in read.warnings]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Fails", "TypeError: no such thing"),
        ("SendsNowhere", "not an answer here: Send(backend='nowhere', "),
        ("ForgetsWhatItSent", "finished: KeyError: 'trial'"),
        ("GoesByLabel", "KeyError: 'card'"),
    ],
)
def test_a_policy_that_fails_at_once_is_warned_of(name: str, said: str) -> None:
    ((path, message),) = warnings(name)
    assert path == "rules[0].pick"
    assert message.startswith(f"policy {HERE}:{name} fails when it is tried: {said}")
    assert message.endswith("; the least loaded backend is chosen instead")


def test_one_that_cannot_be_made_again_is_warned_of() -> None:
    ((_, message),) = warnings("MadeTwiceOnly")
    assert message == f"policy {HERE}:MadeTwiceOnly: OSError: port in use"


def test_it_is_tried_with_the_fleet_that_is_configured() -> None:
    fleet = [BackendView("x", labels={"card": "a"}), BackendView("y", labels={"card": "b"}, in_flight=3)]
    assert warnings("GoesByLabel", KnownNames(fleet)) == []
    assert [backend.in_flight for backend in fleet] == [0, 3], "and leaves it as it is"


def test_one_that_works_is_not_warned_of() -> None:
    assert warnings("Waits") == []
    for name in POLICIES:
        assert failure(load(name, Random(0)), name) == ""


def test_a_module_that_is_not_found_is_told_how_to_be_found() -> None:
    with pytest.raises(PolicyError, match=r"No module named 'nowhere'; install its package .* PYTHONPATH"):
        load("nowhere.at_all:X", Random(0))
    with pytest.raises(PolicyError, match=r"has no attribute 'Nothing'$"):
        load("policies.simple:Nothing", Random(0))
