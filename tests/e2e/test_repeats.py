"""Requests that are sent more than once, by the proxy or by its clients, on real sockets."""

from __future__ import annotations

import asyncio

import openai
import pytest

from tests.e2e import backends as b
from tests.e2e.backends import answers, status
from tests.e2e.faults.figures import Figure
from tests.e2e.proxy_fixtures import HELLO, MakeKey, StartBackend, StartProxy, chat, eventually

pytestmark = pytest.mark.e2e

KEY = "idempotency-key: order-7"


# Hedging


@pytest.mark.parametrize("fault", [b.stalls, b.stalls_after_head])
async def test_a_late_first_token_is_had_elsewhere_and_the_late_backend_is_told(
    fault: b.Behaviour, start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    slow, quick = await start_backend(fault), await start_backend(then=answers(4))
    proxy = await start_proxy(slow, quick, hedging={"after": "50ms", "ratio": 1.0})
    answer = await proxy.chat(stream=True)
    assert (answer.text, answer.done, answer.backend) == ("xxxx", True, "b")
    assert "first token late" in answer.fields["x-tidegate-reason"]
    await eventually(lambda: not slow.running)  # the disconnect has reached it
    row = await proxy.row(answer)
    assert (row.attempts, row.hedge, row.completion_tokens) == (2, "won at b", 4)
    assert (row.overhead_prompt_tokens, row.cost_nano) == (7, 7 * 1000 + 4 * 2000)
    assert (len(slow.received), len(quick.received)) == (1, 1)
    assert slow.received[0].body == quick.received[0].body
    _, metrics = await proxy.get("/metrics")
    assert b'tidegate_hedges_total{outcome="won"} 1.0' in metrics
    await proxy.idle()


async def test_the_attempt_that_lost_is_told_too(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    gate = asyncio.Event()

    async def behave(wire: b.Wire) -> None:
        await gate.wait()
        await answers(2)(wire)

    first, second = await start_backend(behave), await start_backend(b.stalls)
    proxy = await start_proxy(first, second, hedging={"after": "20ms", "ratio": 1.0})
    client = await proxy.connect()
    await client.send(chat(stream=True))
    await eventually(lambda: second.received)
    gate.set()
    answer = await client.answer()
    assert (answer.text, answer.backend) == ("xx", "a")
    assert (await proxy.row(answer)).hedge == "lost at b"
    await eventually(lambda: not second.running)
    assert (proxy.backend("a").failed, proxy.backend("b").failed) == (0, 0)
    await proxy.idle()


async def test_a_client_that_leaves_is_told_to_both(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    first, second = await start_backend(b.stalls), await start_backend(b.stalls)
    proxy = await start_proxy(first, second, hedging={"after": "20ms", "ratio": 1.0})
    client = await proxy.connect()
    await client.send(chat(stream=True))
    await eventually(lambda: first.received and second.received)
    client.close()
    await eventually(lambda: not first.running and not second.running)
    await proxy.idle()


# Sending again


async def test_a_backend_that_has_read_a_generation_is_the_only_one_if_that_is_declared(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    bad, good = await start_backend(status(500)), await start_backend()
    proxy = await start_proxy(bad, good, retries={"idempotent": False})
    answer = await proxy.chat()
    assert (answer.status, answer.backend) == (500, "a")
    assert good.received == []


# Idempotency-Key


async def test_a_client_that_asks_again_pays_once(
    start_backend: StartBackend, start_proxy: StartProxy, make_key: MakeKey, figure: Figure
) -> None:
    credential = make_key()
    gate = asyncio.Event()
    backend = await start_backend(b.waits(gate), then=answers(4))
    proxy = await start_proxy(backend)
    client = await proxy.connect()
    await client.send(chat(None, credential, KEY))
    await eventually(lambda: backend.received)
    assert (await proxy.chat(credential, KEY)).code == "idempotency_running"
    gate.set()
    first = await client.answer()
    again = await proxy.chat(credential, KEY)
    assert (first.status, again.status, again.body) == (200, 200, first.body)
    assert again.fields["idempotent-replayed"] == "true"
    mismatch = await proxy.chat(credential, KEY, temperature=0)
    assert (mismatch.status, mismatch.code) == (422, "idempotency_mismatch")
    rows = [record.row for record in proxy.runtime.observer.recent]
    assert sorted(row.cost_nano for row in rows) == [0, 0, 0, (await proxy.row(first)).cost_nano]
    assert len(backend.received) == 1
    await proxy.idle()
    figure("F29", sum(row.cost_nano > 0 for row in rows), f"charge for {len(rows)} requests with one key")


async def test_a_key_is_known_after_a_restart(start_backend: StartBackend, start_proxy: StartProxy) -> None:
    backend = await start_backend(then=answers(4))
    proxy = await start_proxy(backend)
    first = await proxy.chat(KEY)
    operation = (await proxy.row(first)).op
    await proxy.service.stop()
    proxy = await start_proxy(backend)
    again = await proxy.chat(KEY)
    assert (again.status, again.code) == (409, "idempotency_spent")
    assert operation in again.json["error"]["message"]
    assert len(backend.received) == 1


async def test_the_official_client_waits_for_the_first_and_gives_up_on_what_is_done(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend(then=answers(4))
    proxy = await start_proxy(backend)
    async with openai.AsyncOpenAI(base_url=proxy.url + "/v1", api_key="-") as client:
        stream = await client.chat.completions.create(
            model="m",
            messages=HELLO,
            stream=True,
            extra_headers={"Idempotency-Key": "k"},  # type: ignore[arg-type]
        )
        assert [event async for event in stream]
        with pytest.raises(openai.ConflictError, match="was done as"):
            await client.chat.completions.create(
                model="m",
                messages=HELLO,
                stream=True,
                extra_headers={"Idempotency-Key": "k"},  # type: ignore[arg-type]
            )
    assert len(proxy.runtime.observer.recent) == 2  # it did not try again
