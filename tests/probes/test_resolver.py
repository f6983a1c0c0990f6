"""Names of backends: followed when they move, never lost to a fault of the resolver."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.base import Target, ask
from probes.network import Connect
from probes.resolver import MOST_ADDRESSES, Resolver
from tests.probes.fake import FakeBackend

FAILS: list[str] = ["fails"]


class Stub:
    """A resolver that says what the test wants."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        """One after the other; the last one stays."""
        self.asked: list[str] = []

    async def __call__(self, host: str) -> Sequence[str]:
        self.asked.append(host)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is FAILS:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return answer


async def test_whoever_connects_waits_for_the_first_answer_only() -> None:
    stub = Stub(["10.0.0.1"])
    resolver = Resolver(stub)
    assert await resolver.addresses("a.test") == ("10.0.0.1",)
    assert await resolver.addresses("a.test") == ("10.0.0.1",)
    assert stub.asked == ["a.test"]


async def test_an_address_is_its_own_and_nobody_is_asked() -> None:
    stub = Stub(FAILS)
    resolver = Resolver(stub)
    for address in ("10.0.0.1", "::1"):
        assert await resolver.addresses(address) == (address,)
        await resolver.refresh([address])
    assert stub.asked == []


@given(st.lists(st.one_of(st.just(FAILS), st.lists(st.ip_addresses(v=4).map(str), max_size=4)), max_size=8))
def test_law_the_last_good_answer_is_what_is_known(answers: list[list[str]]) -> None:
    async def run() -> None:
        moves: list[tuple[str, frozenset[str]]] = []
        resolver = Resolver(Stub(["10.0.0.1"], *answers, FAILS), changed=lambda *move: moves.append(move))
        good, moved = ("10.0.0.1",), 0
        assert await resolver.addresses("a.test") == good
        for answer in answers:
            await resolver.refresh(["a.test"])
            if answer is not FAILS and answer:
                fresh = tuple(dict.fromkeys(answer))
                moved += set(fresh) != set(good)
                good = fresh
            assert await resolver.addresses("a.test") == good
            assert len(moves) == moved
            assert not moves or moves[-1][0] == "a.test"

    asyncio.run(run())


async def test_a_name_that_was_never_known_fails_each_time(caplog: pytest.LogCaptureFixture) -> None:
    resolver = Resolver(Stub(FAILS, FAILS, ["10.0.0.1"]))
    for _ in range(2):
        with pytest.raises(socket.gaierror):
            await resolver.addresses("a.test")
    assert caplog.text.count("a.test cannot be resolved") == 1
    assert await resolver.addresses("a.test") == ("10.0.0.1",)


async def test_names_that_nobody_uses_are_forgotten() -> None:
    stub = Stub(["10.0.0.1"])
    resolver = Resolver(stub)
    await resolver.refresh(["a.test", "b.test"])
    await resolver.refresh(["b.test"])
    await resolver.addresses("a.test")
    assert sorted(stub.asked) == ["a.test", "a.test", "b.test", "b.test"]


async def test_addresses_that_are_not_allowed_are_left_out() -> None:
    resolver = Resolver(
        Stub(["169.254.169.254", "10.0.0.1"], ["169.254.169.254"]),
        allowed=lambda address: not address.startswith("169.254."),
    )
    assert await resolver.addresses("a.test") == ("10.0.0.1",)
    await resolver.refresh(["a.test"])
    assert await resolver.addresses("a.test") == ("10.0.0.1",)
    with pytest.raises(socket.gaierror):
        await resolver.addresses("b.test")


async def test_many_addresses_are_bounded() -> None:
    many = [f"10.0.1.{number}" for number in range(100)]
    assert await Resolver(Stub(many)).addresses("a.test") == tuple(many[:MOST_ADDRESSES])


async def test_a_lookup_that_hangs_is_the_only_one_however_often_it_is_asked() -> None:
    answer, asked = asyncio.Event(), []

    async def slow(host: str) -> Sequence[str]:
        asked.append(host)
        await answer.wait()
        return ["10.0.0.1"]

    resolver = Resolver(slow)
    for _ in range(5):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await resolver.addresses("a.test")
    waiting = resolver.addresses("a.test")
    answer.set()
    assert await waiting == ("10.0.0.1",)
    assert asked == ["a.test"]


async def test_closing_waits_for_nobody() -> None:
    async def never(host: str) -> Sequence[str]:
        await asyncio.Event().wait()
        return []

    resolver = Resolver(never)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await resolver.addresses("a.test")
    await resolver.close()


async def test_the_system_knows_localhost() -> None:
    assert {"127.0.0.1", "::1"} & set(await Resolver().addresses("localhost"))


async def test_a_label_that_is_too_long_is_no_name() -> None:
    with pytest.raises(socket.gaierror):
        await Resolver().addresses("a" * 64 + ".test")


async def test_a_probe_goes_where_the_resolver_says_and_tries_the_next() -> None:
    async with FakeBackend() as backend:
        target = Target("a", f"http://a.test:{backend.port}")
        result = await ask(Connect(Resolver(Stub(["127.0.0.9", "127.0.0.1"]))), target, 10.0)
        assert result.ok
        result = await ask(Connect(Resolver(Stub(FAILS))), target, 10.0)
        assert result.reason == "TCP connect: name not resolved"


async def test_some_names_are_judged_by_themselves() -> None:
    """What was known of such a name is asked again, and an address that is not for it is not used."""
    resolver = Resolver(Stub(["10.0.0.1"], ["10.0.0.1", "93.184.215.14"], ["10.0.0.1"], ["10.0.0.1"]))
    assert await resolver.addresses("a.test") == ("10.0.0.1",)
    resolver.judge({"a.test": lambda address: not address.startswith("10.")})
    assert await resolver.addresses("a.test") == ("93.184.215.14",)
    await resolver.refresh(["a.test"])
    assert await resolver.addresses("a.test") == ("93.184.215.14",), "it has moved inside: the last good one"
    assert await resolver.addresses("b.test") == ("10.0.0.1",)
