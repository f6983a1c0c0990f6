"""The client over real sockets: an emulated vLLM, and servers that misbehave."""

from __future__ import annotations

import pytest
from aiohttp import web

from sim.faults import Fault, FaultKind
from sim.measure import endpoint as module
from sim.measure.endpoint import Endpoint, Facts, MeasureError
from sim.measure.level import RequestRecord
from sim.measure.wire import Api
from tests.sim.emulated import client
from tests.sim.measure.fake_server import DONE, Handler, event, serving, stream, token, usage

MODELS = {"data": [{"id": "m", "max_model_len": 512}]}


async def asked(handler: Handler, **settings: float) -> RequestRecord:
    """What one request to such a server becomes."""
    async with serving(handler) as url, Endpoint(url, model="m", **settings) as endpoint:
        return await endpoint.ask(endpoint.body("Hello", 5))


@pytest.mark.parametrize("api", Api)
@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
async def test_a_vllm_gives_exactly_what_is_asked_for(api: Api, path: str) -> None:
    async with (
        client(models=("first", "second")) as http,
        Endpoint(http.server.url + path, api=api) as endpoint,
    ):
        facts = await endpoint.prepare()
        assert facts == Facts("0.32.0", 8192, kv_tokens=8 * 8192, prefix_cache=True)
        assert (endpoint.model, endpoint.exact_length) == ("first", True)
        found = await endpoint.ask(endpoint.body("Hello", 300))
        assert (found.error, found.output_tokens) == ("", 300)
        assert found.ttft_s is not None
        assert found.e2e_s is not None
        assert found.tpot_s == pytest.approx((found.e2e_s - found.ttft_s) / 299)


async def test_tokens_are_those_of_the_usage_however_many_events_there_are() -> None:
    found = await asked(lambda request: stream(request, token("a b c"), token("d e"), usage(9, 5), DONE))
    assert (found.error, found.prompt_tokens, found.output_tokens) == ("", 9, 5)


@pytest.mark.parametrize(
    ("handler", "error"),
    [
        (lambda request: stream(request, token("a"), cut=True), "the stream was cut"),
        (lambda request: stream(request, cut=True), "the connection was cut"),
        (lambda request: stream(request, token("a"), DONE), "the server reported no usage"),
        (lambda request: stream(request, event({"error": {"message": "died"}})), "error event: died"),
    ],
)
async def test_streams_that_go_wrong_are_errors(handler: Handler, error: str) -> None:
    assert (await asked(handler)).error == error


async def test_refusals_say_why() -> None:
    async def busy(request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "too many"}}, status=429)

    async def page(request: web.Request) -> web.StreamResponse:
        return web.Response(status=502, text="<h1>Bad gateway</h1>")

    async def whole(request: web.Request) -> web.StreamResponse:
        return web.json_response({"choices": []})

    assert (await asked(busy)).error == "status 429: too many"
    assert (await asked(page)).error == "status 502: <h1>Bad gateway</h1>"
    assert (await asked(whole)).error == "the answer is no stream but application/json"


async def test_a_server_that_stalls_is_given_up() -> None:
    stalling = client(faults=(Fault(kind=FaultKind.STALL),))
    async with stalling as http, Endpoint(http.server.url, model="demo", timeout_s=0.05) as endpoint:
        assert (await endpoint.ask(endpoint.body("Hello", 8))).error == "timeout"


async def test_a_port_where_nobody_listens() -> None:
    async with serving(lambda request: stream(request)) as url:
        pass
    async with Endpoint(url, model="m") as endpoint:
        assert (await endpoint.ask(endpoint.body("Hello", 1))).error.startswith("cannot connect: ")
        with pytest.raises(MeasureError, match="cannot connect to"):
            await endpoint.prepare()


async def test_a_request_that_everything_hangs_on_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = [500, 429, 503, 200]
    pauses = []

    async def answer(request: web.Request) -> web.StreamResponse:
        status = statuses.pop(0)
        if status != 200:
            return web.json_response({"error": "busy"}, status=status, headers={"Retry-After": "0"})
        return await stream(request, token("a"), usage(7, 1), DONE)

    def pause(tried: int, retry_after: str) -> float:
        pauses.append((tried, retry_after))
        return 0.0

    monkeypatch.setattr(module, "pause_s", pause)
    async with serving(answer) as url, Endpoint(url, model="m") as endpoint:
        assert await endpoint.reported("Hello") == 7
        assert pauses == [(1, "0"), (2, "0"), (3, "0")]
        statuses.extend([503] * 4)
        with pytest.raises(MeasureError, match="status 503: busy"):
            await endpoint.reported("Hello")
        statuses.append(404)  # which would be the same again
        with pytest.raises(MeasureError, match="status 404: busy"):
            await endpoint.reported("Hello")
    assert not statuses


def test_a_server_says_how_long_to_wait_within_bounds() -> None:
    assert [module.pause_s(1, text) for text in ("7", "0", "3600")] == [7.0, 0.0, 30.0]
    for text in ("", "soon", "-1", "Wed, 21 Oct 2026 07:28:00 GMT", "²"):
        assert [module.pause_s(tried, text) for tried in (1, 2, 3)] == [0.5, 1.0, 2.0]


async def test_what_is_no_url_is_said_so() -> None:
    async with Endpoint("nonsense") as endpoint:
        with pytest.raises(MeasureError, match="is no URL"):
            await endpoint.prepare()


async def test_a_key_is_sent_and_one_that_is_missing_is_asked_for() -> None:
    async with client(api_keys=("secret",)) as http:
        async with Endpoint(http.server.url, key="secret") as endpoint:
            await endpoint.prepare()
        async with Endpoint(http.server.url) as endpoint:
            with pytest.raises(MeasureError, match="--key"):
                await endpoint.prepare()
        async with Endpoint(http.server.url, model="demo") as endpoint:
            with pytest.raises(MeasureError, match="status 401: Unauthorized"):
                await endpoint.prepare()


async def test_a_server_that_knows_no_ignore_eos_is_not_asked_for_it() -> None:
    seen = []

    async def strict(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        seen.append("ignore_eos" in body)
        if "ignore_eos" in body:
            return web.json_response({"error": {"message": "Unrecognized argument"}}, status=400)
        return await stream(request, token("a"), usage(1, 1), DONE)

    async with serving(strict, v1__models=MODELS) as url, Endpoint(url) as endpoint:
        assert await endpoint.prepare() == Facts(max_model_len=512)
        assert not endpoint.exact_length
        await endpoint.ask(endpoint.body("Hello", 5))
    assert seen == [True, False, False]


@pytest.mark.parametrize(
    ("labels", "kv_tokens", "prefix_cache"),
    [
        ('num_gpu_blocks="10",block_size="16",enable_prefix_caching="True"', 160, True),
        ('kv_cache_size_tokens="500",enable_prefix_caching="False"', 500, False),
        ('num_gpu_blocks="None",block_size="16"', None, None),
        ('num_gpu_blocks="10"', None, None),
    ],
)
async def test_the_size_of_the_kv_cache(
    labels: str, kv_tokens: int | None, prefix_cache: bool | None
) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return await stream(request, token("a"), usage(1, 2), DONE)

    page = f"# TYPE vllm:cache_config_info gauge\nvllm:cache_config_info{{{labels}}} 1.0\n"
    async with serving(answer, v1__models=MODELS, metrics=page) as url, Endpoint(url) as endpoint:
        assert await endpoint.prepare() == Facts(None, 512, kv_tokens, prefix_cache)
