"""Open files: as many as the system allows, and no level that needs more."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator

import pytest

from sim.measure import connections
from sim.measure.connections import OWN_FILES, check_room
from sim.measure.endpoint import MeasureError
from sim.measure.sweep import Plan, measure
from tests.sim.emulated import client

USERS = 150


@pytest.fixture
def few_files() -> Iterator[int]:
    """Forty more than are open, until the limit is raised -> how far it can be."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    next_one = os.dup(2)
    os.close(next_one)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_one + 40, before[1]))
    yield before[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_limit_is_raised_as_far_as_it_goes(few_files: int) -> None:
    check_room(1)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (few_files, few_files)


async def test_users_beyond_the_soft_limit_are_measured(few_files: int) -> None:
    """Client and server are one process here: two files for each user."""
    async with client(slots=USERS) as http:
        report = await measure(http.server.url, {}, Plan((USERS,), 32, 2, requests=USERS))
    (level,) = report.levels
    assert (level.completed, level.errors) == (USERS, {})


def test_users_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections.resource, "getrlimit", lambda _: (200, 200))
    check_room(200 - OWN_FILES)
    with pytest.raises(
        MeasureError, match=r"137 users need 201 open files, and 200 are allowed.*136 users at most"
    ):
        check_room(201 - OWN_FILES)


def test_no_limit_is_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(connections.resource, "getrlimit", lambda _: everything)
    check_room(10**6)


def test_a_system_that_raises_nothing_is_taken_at_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int, limits: tuple[int, int]) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(connections.resource, "getrlimit", lambda _: (100, 10_000))
    monkeypatch.setattr(connections.resource, "setrlimit", refuse)
    with pytest.raises(MeasureError, match="100 are allowed"):
        check_room(1000)
