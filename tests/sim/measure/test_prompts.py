"""Prompts: their length by any tokenizer, and what they share."""

from __future__ import annotations

import asyncio
from itertools import combinations

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from sim import tokens
from sim.measure.endpoint import Endpoint, MeasureError
from sim.measure.prompts import START, UNIQUE_WORDS, WORDS, Prefix, Prompts, make_prompts, one_token_words
from sim.measure.wire import Api
from tests.sim.emulated import client
from tests.sim.measure.fake_server import DONE, serving, stream, token, usage


@given(st.dictionaries(st.text("abc", min_size=1), st.integers(1, 3), min_size=1, max_size=30))
def test_words_of_one_token_are_found(sizes: dict[str, int]) -> None:
    asked = 0

    async def count(text: str) -> int:
        nonlocal asked
        asked += 1
        return 5 + sum(sizes[word] for word in text.removeprefix(START).split())

    found = asyncio.run(one_token_words(count, list(sizes), begins=5))
    assert found == [word for word, size in sizes.items() if size == 1]
    assert asked < 2 * len(sizes)


def test_an_ordinary_tokenizer_is_asked_once() -> None:
    asked = []

    async def count(text: str) -> int:
        asked.append(text)
        return len(text.split())

    assert asyncio.run(one_token_words(count, WORDS.split(), begins=1)) == WORDS.split()
    assert len(asked) == 1


def test_words_are_each_there_once() -> None:
    assert len(set(WORDS.split())) == len(WORDS.split())


def shared(one: str, other: str) -> int:
    """Words at the beginning that are the same."""
    pairs = zip(one.split(), other.split(), strict=True)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), len(one.split()))


@given(st.integers(UNIQUE_WORDS, 200), st.integers(0, 2**32 - 1))
def test_cold_prompts_share_nothing_and_warm_ones_all_but_their_end(length: int, seed: int) -> None:
    prompts = Prompts(WORDS.split(), length, seed)
    cold = [prompts.one(Prefix.COLD, number) for number in range(4)]
    warm = [prompts.one(Prefix.WARM, number) for number in range(4)]
    assert {len(prompt.split()) for prompt in cold + warm} == {length + 1}
    assert len({*cold, *warm}) == 8
    assert (
        max(shared(*pair) for pair in combinations(cold, 2)) < UNIQUE_WORDS
    )  # less than a block of KV cache
    least = 1 + length - min(UNIQUE_WORDS, length // 2)
    assert min(shared(*pair) for pair in combinations(warm, 2)) >= least
    assert prompts.one(Prefix.COLD, 3) == cold[3]


@pytest.mark.parametrize("api", Api)
async def test_prompts_have_the_length_that_the_server_counts(api: Api) -> None:
    async with client() as http, Endpoint(http.server.url, api=api) as endpoint:
        await endpoint.prepare()
        prompts = await make_prompts(endpoint, 77, seed=1)
        for prefix in Prefix:
            assert await endpoint.reported(prompts.one(prefix, 1)) == 77
            assert await endpoint.tokenize(prompts.one(prefix, 1)) == 77


async def test_without_a_tokenizer_requests_tell_the_length() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        text = (await request.json())["messages"][0]["content"]
        return await stream(request, token("a"), usage(3 + len(tokens.split(text)), 1), DONE)

    async with serving(answer, v1__models={"data": [{"id": "m"}]}) as url, Endpoint(url) as endpoint:
        await endpoint.prepare()
        prompts = await make_prompts(endpoint, 40, seed=1)
        assert await endpoint.reported(prompts.one(Prefix.COLD, 1)) == 40


async def test_a_prompt_shorter_than_its_template_is_refused() -> None:
    async with client() as http, Endpoint(http.server.url) as endpoint:
        await endpoint.prepare()
        with pytest.raises(MeasureError, match="at least here"):
            await make_prompts(endpoint, 5, seed=1)


async def test_a_tokenizer_without_words_is_refused() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        text = (await request.json())["messages"][0]["content"]
        return await stream(request, token("a"), usage(len(text.encode()), 1), DONE)

    async with serving(answer, v1__models={"data": [{"id": "m"}]}) as url, Endpoint(url) as endpoint:
        await endpoint.prepare()
        with pytest.raises(MeasureError, match="exact length"):
            await make_prompts(endpoint, 400, seed=1)
