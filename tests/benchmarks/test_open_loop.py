from __future__ import annotations

import asyncio
import time
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.open_loop import LEAST_PROMPT, Answer, _Connection, _connection, body, play
from benchmarks.processes import free_port
from proxy.openai import read_body
from sim.emulator import EmulatorSettings, emulator
from sim.faults import parse_fault
from sim.tokens import chat_pieces
from sim.workload import Arrival

FAST = {"speed": 100.0, "shutdown_timeout_s": 0.1}


def pieces(asking: bytes) -> list[str]:
    message = orjson.loads(asking)["messages"][0]
    return chat_pieces([(message["role"], message["content"])])


@given(st.integers(0, 10**6), st.integers(LEAST_PROMPT, 6000), st.integers(1, 2000))
def test_a_prompt_has_exactly_its_tokens(number: int, prompt: int, output: int) -> None:
    asking = body(number, prompt, output)
    assert len(pieces(asking)) == prompt
    assert orjson.loads(asking)["max_tokens"] == output
    if prompt >= 120:  # room for the rest of the body
        assert read_body("chat", asking).prompt_tokens == prompt


@given(st.lists(st.integers(0, 26**5 - 1), min_size=2, max_size=2, unique=True), st.integers(16, 200))
def test_no_two_prompts_begin_alike(numbers: list[int], prompt: int) -> None:
    one, other = (pieces(body(number, prompt, 1))[:16] for number in numbers)
    assert one != other


async def played(port: int, *requests: Arrival) -> list[Answer]:
    heard: list[int] = []
    answers = await play(port, requests, lambda: heard.append(1))
    assert len(heard) == len(requests)
    return answers


async def test_answers_are_as_long_as_asked_for_and_come_in_order() -> None:
    requests = [Arrival(at, 40 + at // 1000, 1 + at // 1000) for at in range(0, 60_000, 3_000)]
    async with emulator(EmulatorSettings(**FAST)) as server:
        answers = await played(server.port, *requests)
    for answer, request in zip(answers, requests, strict=True):
        assert answer.failure == ""
        assert answer.due_at <= answer.began_at + 0.001
        assert answer.began_at <= answer.sent_at < answer.first_at <= answer.ended_at
        assert 1 <= answer.events <= request.output_tokens + 2  # a role and a usage besides
    due = [answer.due_at - answers[0].due_at for answer in answers]
    assert due == pytest.approx([request.at / 1e6 for request in requests])


async def test_connecting_is_no_lateness_of_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    connect, connecting = loop.create_connection, []

    async def noted(*arguments: Any) -> Any:
        connecting.append(time.monotonic())
        return await connect(*arguments)

    async with emulator(EmulatorSettings(**FAST)) as server:
        monkeypatch.setattr(loop, "create_connection", noted)
        (answer,) = await played(server.port, Arrival(0, 100, 2))
    assert answer.began_at <= connecting[0] < answer.sent_at


async def test_a_connection_that_was_lost_meanwhile_is_not_used_again() -> None:
    lost = _Connection()
    async with emulator(EmulatorSettings(**FAST)) as server:
        one = await _connection([lost], server.port)
        assert one is not lost
        assert one.usable
        assert await _connection([lost, one], server.port) is one
        one.close()


async def test_what_goes_wrong_is_told() -> None:
    request = Arrival(0, 100, 20)
    (refused,) = await played(free_port(), request)
    assert refused.failure.startswith("cannot connect")
    async with emulator(EmulatorSettings(models=("another",), **FAST)) as server:
        (unknown,) = await played(server.port, request)
    assert unknown.failure == "status 404"
    async with emulator(EmulatorSettings(faults=(parse_fault("cut"),), **FAST)) as server:
        (cut,) = await played(server.port, request)
    assert cut.failure == "connection lost"
