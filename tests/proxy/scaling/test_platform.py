"""What a platform pushes, over a real port: taken once, kept, and never more than the configuration allows."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies.asking import Ask
from policies.state import Backend
from proxy.build import ConfigError, build
from proxy.check import check_file
from proxy.config import load_config
from proxy.scaling.messages import MOST_BODY_BYTES, ScaleRequest
from proxy.scaling.overlay import judges
from proxy.scaling.signing import TOLERANCE_S, verify
from proxy.tasks import Tasks
from tests.patience import examples
from tests.proxy.scaling.endpoint import endpoint
from tests.proxy.scaling.served import BODY, CONFIG, SECRET, Serving, pushing


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK", SECRET.decode())


async def test_a_placement_comes_is_renewed_and_goes(tmp_path: Path) -> None:
    serving = Serving(CONFIG, tmp_path)
    async with pushing(serving) as push:
        assert await push.put() == (201, {"id": "a", "ttl_s": 30.0})
        assert serving.names == ["appliance", "nj-1"]
        section = serving.served.backends[1]
        assert section.standby is not None
        assert section.standby.scheduler is not None
        assert section.standby.scheduler.placement == "a"
        serving.clock += 20
        assert (await push.put(state="ready", progress=1.0))[0] == 200
        assert serving.swaps == 1, "a renewal builds nothing"
        serving.clock += 20
        await serving.platform.expired()
        assert serving.names == ["appliance", "nj-1"]
        serving.clock += 10
        await serving.platform.expired()
        assert serving.names == ["appliance"]
        assert (await push("DELETE", "/platform/placements/a"))[0] == 404


async def test_what_it_says_becomes_the_section(tmp_path: Path) -> None:
    serving = Serving({**CONFIG, "currency": "CNY"}, tmp_path)
    async with pushing(serving) as push:
        status, said = await push.put(
            slots=12,
            card="h20",
            count=2,
            cost_per_hour=40.5,
            cold_start_s=90,
            price={"input": 0.27, "output": 1.1},
            labels={"contract": "spot"},
            route={"rtt_ms": 12, "bandwidth": 1e9},
            engine="openai",
        )
    assert status == 201, said
    section = serving.served.backends[1]
    assert (section.slots, section.bandwidth, section.engine) == (12, 10**9, "openai")
    assert section.labels == {"contract": "spot", "card": "h20"}
    assert section.price is not None
    assert section.price.input == "0.27"
    assert section.standby is not None
    assert (section.standby.cost_per_hour, section.standby.cold_start) == (40.5, 90.0)
    assert section.standby.cards == 2
    backend = Backend("nj-1", "nanjing", 12)
    serving.platform.seen_from({"nj-1": backend}, 0.0)
    assert backend.rtt_s == pytest.approx(0.012)
    backend.observe_rtt(0.5, 1000.0)
    measured = backend.rtt_s
    serving.platform.seen_from({"nj-1": backend}, 1001.0)
    assert backend.rtt_s == measured


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"site": "beijing"}, "site", "not in the configuration, where there is nanjing, suzhou"),
        ({"site": "local"}, "site", "may see every class of data"),
        ({"name": "appliance"}, "name", "is called 'appliance' already"),
        ({"url": "http://127.0.0.1:8000"}, "url", "not public"),
        ({"url": "http://10.0.0.7:8000"}, "url", "not public"),
        ({"url": "http://169.254.169.254"}, "url", "not public"),
        ({"url": "http://10.0.0.7.at.test:8000"}, "url", "not public"),
        ({"url": "http://metadata.google.internal"}, "url", "metadata"),
        ({"url": "http://93.184.215.14:22"}, "url", "port 22"),
        ({"url": "unix:/run/vllm.sock"}, "url", "a URL is http"),
        ({"models": []}, "models", "needs at least 1 entry"),
        ({"ttl_s": 0}, "ttl_s", "must be more than 0"),
        ({"ttl": 30}, "ttl", "unknown key"),
        ({"slots": "many"}, "slots", "expected a whole number"),
        ({"id": "p1", "name": "b"}, "id", "it is backend 'pinned' of the configuration"),
        ({"site": "suzhou"}, "cost_per_hour", "scaling.budgets.sites.suzhou cannot be kept without it"),
        ({"price": {"input": -1, "output": 1}}, "price.input", "at least 0"),
        ({"price": {"input": 1e-17, "output": 1}}, "price.input", "more than 12 decimals"),
        ({"price": {"input": 1, "output": 1, "currency": "EUR"}}, "price.currency", "counts in USD"),
        ({"api_key_env": "HOME"}, "api_key_env", "unknown key"),
    ],
)
async def test_what_does_not_fit_names_its_field_and_changes_nothing(
    tmp_path: Path, fields: dict[str, Any], field: str, message: str
) -> None:
    place = {"name": "pinned", "url": "http://93.184.215.15:8000", "site": "nanjing", "models": ["m"]}
    pinned = {**place, "standby": {"scheduler": {"placement": "p1"}}}
    scaling = {**CONFIG["scaling"], "budgets": {"sites": {"suzhou": 10}}}
    backends = [*CONFIG["backends"], pinned]
    serving = Serving({**CONFIG, "backends": backends, "scaling": scaling}, tmp_path)
    async with pushing(serving) as push:
        status, said = await push.put(**fields)
    assert status == 422, said
    assert said["error"]["field"] == field
    assert message in said["error"]["message"]
    assert serving.names == ["appliance", "pinned"]
    assert serving.platform.placements.all(serving.clock) == []


async def test_networks_of_the_admin_are_allowed(tmp_path: Path) -> None:
    scheduler = {**CONFIG["scaling"]["scheduler"], "networks": ["10.0.0.0/24"]}
    serving = Serving({**CONFIG, "scaling": {"scheduler": scheduler}}, tmp_path)
    async with pushing(serving) as push:
        assert (await push.put(url="http://10.0.0.7:8000"))[0] == 201
        assert (await push.put(id="b", name="b", url="http://10.0.1.7:8000"))[0] == 422


async def test_a_name_that_moves_inside_is_not_followed(tmp_path: Path) -> None:
    serving = Serving(CONFIG, tmp_path)
    async with pushing(serving) as push:
        await push.put(url="http://engine.example:8000")
    found = judges(serving.served)
    assert set(found) == {"engine.example"}
    assert found["engine.example"]("93.184.215.14")
    assert not found["engine.example"]("10.0.0.7")


async def test_what_cannot_be_served_from_now_may_come_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    serving = Serving(CONFIG, tmp_path)
    async with pushing(serving) as push:
        await push.put()
        serving.broken = "no such certificate"
        status, said = await push.put(id="b", name="b")
        assert status == 503, "that is not the fault of the message"
        assert "no such certificate" in caplog.text
        assert "certificate" not in str(said), "what is wrong with the configuration is the admin's"
        serving.broken = ""
        assert (await push.put(id="c", name="c"))[0] == 201
    assert serving.names == ["appliance", "nj-1", "c"]


async def test_what_cannot_be_taken_out_is_stopped(tmp_path: Path) -> None:
    serving = Serving(CONFIG, tmp_path)
    async with pushing(serving) as push:
        await push.put()
        serving.broken = "half a policy file"
        serving.clock += 31
        await serving.platform.expired()
    assert serving.drained == ["nj-1"]


async def test_it_is_there_after_a_restart_for_the_time_it_has_left(tmp_path: Path) -> None:
    serving = Serving(CONFIG, tmp_path)
    async with pushing(serving) as push:
        await push.put()
    again = Serving(CONFIG, tmp_path)
    again.serve_placements()
    assert again.names == ["appliance", "nj-1"]
    assert 0 < again.platform.placements.left_s("a", again.clock) <= 30
    other = Serving({**CONFIG, "sites": {"suzhou": {}}}, tmp_path)  # the admin has taken the site out
    other.serve_placements()
    assert other.names == ["appliance"]
    assert "not in the configuration" in other.platform.shown()["placements"][0]["left_out"]
    scaling = {**CONFIG["scaling"], "budgets": {"sites": {"nanjing": 10}}}
    limited = Serving({**CONFIG, "scaling": scaling}, tmp_path)  # nobody knows what it costs
    limited.serve_placements()
    assert limited.names == ["appliance"]


async def test_a_damaged_file_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "placements.json").write_text('{"placements": [')
    serving = Serving(CONFIG, tmp_path)
    assert "the platform has to send its placements again" in caplog.text
    async with pushing(serving) as push:
        assert (await push.put())[0] == 201


async def test_who_is_not_the_platform(tmp_path: Path) -> None:
    serving = Serving(CONFIG, tmp_path)
    path = "/platform/placements/a"
    async with pushing(serving) as push:
        assert (await push("PUT", path, BODY, secret=b"some-other-secret"))[0] == 401
        assert (await push("PUT", path, BODY, webhook_timestamp="1"))[0] == 401
        assert (await push("PUT", path, BODY, webhook_signature=""))[0] == 401
        await push.put()
        # What was signed for one route is not taken at another.
        old = push.serving.clock
        status, said = await push("PUT", "/platform/placements/b", {**BODY, "id": "a"})
        assert (status, said["error"]["field"]) == (422, "id")
        serving.clock = old + TOLERANCE_S + 1
        assert (await push("PUT", path, BODY, webhook_timestamp=str(int(serving.wall))))[0] == 401
    assert serving.names == ["appliance", "nj-1"]


async def test_a_message_is_taken_once_also_over_a_restart(tmp_path: Path) -> None:
    serving = Serving(CONFIG, tmp_path)
    path = "/platform/placements/a"
    async with pushing(serving) as push:
        first = await push("PUT", path, BODY, id="msg_x")
        assert (await push("DELETE", path))[0] == 200
        assert await push("PUT", path, BODY, id="msg_x") == first
        assert serving.names == ["appliance"], "answered as before, and nothing done"
        assert (await push("PUT", path, {**BODY, "slots": 4}, id="msg_x"))[0] == 409
    again = Serving(CONFIG, tmp_path)
    async with pushing(again) as push:
        assert await push("PUT", path, BODY, id="msg_x") == first
    assert again.platform.placements.all(again.clock) == []


async def test_pushes_at_the_same_time_are_taken_one_by_one(tmp_path: Path) -> None:
    serving = Serving(CONFIG, tmp_path)
    async with pushing(serving) as push:
        answers = await asyncio.gather(*(push.put(id=f"p{n}", name="same") for n in range(5)))
    assert sorted(status for status, _ in answers) == [201, 422, 422, 422, 422]
    assert serving.names == ["appliance", "same"]


async def test_resources_and_progress(tmp_path: Path) -> None:
    serving = Serving(CONFIG, tmp_path)
    resources = {"site": "suzhou", "cards": [{"card": "h20", "total": 8, "free": 3}], "ttl_s": 60}
    async with pushing(serving) as push:
        assert (await push("PUT", "/platform/sites/suzhou/resources", resources))[0] == 200
        assert (await push("PUT", "/platform/sites/nanjing/resources", resources))[0] == 422
        assert (await push("PUT", "/platform/sites/x/resources", {**resources, "site": "x"}))[0] == 422
        progress = {"placement": "a", "state": "starting", "progress": 0.5, "detail": "weights"}
        assert (await push("POST", "/platform/progress", progress))[0] == 404
        await push.put()
        assert (await push("POST", "/platform/progress", progress))[0] == 200
        async with push.session.get(push.url + "/platform") as answer:
            shown = await answer.json()
    assert shown["resources"][0]["cards"] == resources["cards"]
    found = shown["placements"][0]
    assert (found["state"], found["progress"], found["detail"]) == ("starting", 0.5, "weights")


@pytest.mark.parametrize(
    ("variable", "fields", "at"),
    [("HOOK", {}, "secret_env"), ("KEY", {"api_key_env": "KEY"}, "api_key_env")],
)
async def test_a_configuration_without_its_secrets_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, fields: dict[str, str], at: str
) -> None:
    file = tmp_path / "tidegate.yaml"
    scheduler = {**CONFIG["scaling"]["scheduler"], **fields}
    file.write_text(json.dumps({**CONFIG, "scaling": {"scheduler": scheduler}}))
    monkeypatch.setenv("KEY", "k")
    build(load_config(file), asyncio.get_running_loop(), 1, path=file)
    monkeypatch.delenv(variable)
    with pytest.raises(ConfigError, match=rf"tidegate.yaml:1:\d+: scaling.scheduler.{at}: .*not set"):
        build(load_config(file), asyncio.get_running_loop(), 1, path=file)
    assert [found.path for _, found in check_file(file, None).problems] == [f"scaling.scheduler.{at}"]


def test_a_platform_needs_a_site_and_no_backend_besides(tmp_path: Path) -> None:
    file = tmp_path / "tidegate.yaml"
    alone = {**CONFIG, "backends": []}
    file.write_text(json.dumps(alone))
    report = check_file(file, None)
    assert (report.ok, report.warnings) == (True, [])
    file.write_text(json.dumps({**alone, "probing": {"enabled": False}}))
    assert "without probes" in check_file(file, None).text
    file.write_text(json.dumps({**alone, "sites": {"local": {}}}))
    assert [found.path for _, found in check_file(file, None).problems] == ["scaling.scheduler"]
    file.write_text(json.dumps({**alone, "scaling": {}}))
    assert "needs at least 1 entry" in check_file(file, None).text


async def test_a_process_that_was_replaced_leaves_the_file_alone(tmp_path: Path) -> None:
    old = Serving(CONFIG, tmp_path)
    async with pushing(old) as push:
        await push.put()
        old.platform.leave()
        new = Serving(CONFIG, tmp_path)
        async with pushing(new) as other:
            await other.put(id="b", name="b")
        old.clock += 31
        await old.platform.expired()
    again = Serving(CONFIG, tmp_path)
    assert {one.id for one in again.platform.placements.all(again.clock)} == {"a", "b"}


async def test_without_a_scheduler_nothing_is_taken(tmp_path: Path) -> None:
    serving = Serving({**CONFIG, "scaling": {}}, tmp_path)
    async with pushing(serving) as push:
        assert (await push.put())[0] == 404


async def test_a_secret_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = Serving(CONFIG, tmp_path)
    monkeypatch.delenv("HOOK")
    async with pushing(serving) as push:
        assert (await push.put())[0] == 503


async def test_a_message_is_small(tmp_path: Path) -> None:
    serving = Serving(CONFIG, tmp_path)
    async with pushing(serving) as push:
        assert (await push("PUT", "/platform/placements/a", b"x" * (MOST_BODY_BYTES + 1)))[0] == 413


async def test_a_disk_that_is_full_is_not_kept_from_the_platform(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    serving = Serving(CONFIG, tmp_path)
    with monkeypatch.context() as amid:
        amid.setattr("proxy.scaling.platform._write", full)
        async with pushing(serving) as push:
            assert (await push.put())[0] == 503
            assert (await push("PUT", "/platform/placements/a", BODY, id="m"))[0] == 503
    async with pushing(serving) as push:
        assert (await push("PUT", "/platform/placements/a", BODY, id="m"))[0] == 200, "as senders do it"
    again = Serving(CONFIG, tmp_path)
    assert [one.id for one in again.platform.placements.all(again.clock)] == ["a"]


async def test_renewals_are_written_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A platform that renews many placements does not keep the disk busy, nor the loop."""
    written: list[bytes] = []
    monkeypatch.setattr("proxy.scaling.platform._write", lambda path, data: written.append(data))
    serving = Serving(CONFIG, tmp_path)
    async with pushing(serving) as push:
        await push.put()
        for _ in range(3):
            await push.put(state="ready")
        assert len(written) == 1
        await serving.platform.expired()
        await serving.platform.expired()
        assert len(written) == 2
        await push.put(state="starting")
        await serving.platform.close()
        assert b"starting" in written[2]
        await push("DELETE", "/platform/placements/a")
    assert len(written) == 4


async def test_one_that_was_left_out_is_told_so_when_it_is_renewed(tmp_path: Path) -> None:
    serving = Serving(CONFIG, tmp_path)
    before = serving.config
    async with pushing(serving) as push:
        await push.put()
        serving.config = before.model_copy(update={"sites": {}})
        serving.serve_placements()
        status, said = await push.put()
        assert (status, said["error"]["field"]) == (422, "site")
        serving.config = before
        assert (await push.put())[0] == 200
        assert serving.names == ["appliance", "nj-1"]
        swaps = serving.swaps
        assert (await push.put())[0] == 200
    assert serving.swaps == swaps


async def test_a_lookup_that_hangs_holds_up_no_other_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def hangs(host: str) -> list[str]:
        asked.set()
        await go_on.wait()
        return ["93.184.215.14"]

    monkeypatch.setattr("proxy.scaling.platform.LOOK_UP_S", 3600.0)
    monkeypatch.setattr("tests.proxy.scaling.served.public", hangs)
    async with pushing(Serving(CONFIG, tmp_path)) as push:
        tasks = Tasks()
        first = tasks.spawn(push.put(url="http://engine.example:8000"), "a push")
        await asked.wait()
        assert (await push.put(id="b", name="b"))[0] == 201
        assert not first.done()
        go_on.set()
        assert (await first)[0] == 201
        go_on.clear()
        monkeypatch.setattr("proxy.scaling.platform.LOOK_UP_S", 0.01)
        status, said = await push.put(id="c", name="c", url="http://other.example:8000")
        assert (status, said["error"]["message"]) == (422, "its host cannot be resolved")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
FIELDS = st.sampled_from([*BODY, "price", "route", "labels", "slots", "engine", "state", "progress", "cards"])
ROUTES = st.sampled_from(
    [
        ("PUT", "/platform/placements/a"),
        ("PUT", "/platform/placements/%C3%A9?x=1"),
        ("DELETE", "/platform/placements/b"),
        ("PUT", "/platform/sites/nanjing/resources"),
        ("POST", "/platform/progress"),
    ]
)


async def test_no_body_makes_it_fail(tmp_path: Path) -> None:
    """Signed by the platform itself: whatever it says is taken or refused in words."""
    serving = Serving(CONFIG, tmp_path)
    loop = asyncio.get_running_loop()
    async with pushing(serving) as push:

        @settings(max_examples=examples(200), deadline=None, suppress_health_check=list(HealthCheck))
        @given(ROUTES, st.dictionaries(FIELDS, JSON, max_size=4), st.none() | JSON | st.binary(max_size=30))
        def fuzz(route: tuple[str, str], fields: dict[str, Any], instead: Any) -> None:
            body = {**BODY, **fields} if instead is None else instead
            raw = body if isinstance(body, bytes) else json.dumps(body).encode("utf-8", "replace")
            status, said = asyncio.run_coroutine_threadsafe(push(*route, raw), loop).result(20)
            assert status < 300 or (status in (401, 404, 422) and said["error"]["message"])

        await asyncio.to_thread(fuzz)


async def test_what_was_decided_is_sent(tmp_path: Path) -> None:
    async with endpoint((202, {}), (404, {}), (422, {"error": "no cards"})) as server:
        scaling = {
            "scheduler": {**CONFIG["scaling"]["scheduler"], "url": server.url},
            "objective": {"ttft": "2s"},
            "budgets": {"month": 500},
        }
        serving = Serving({**CONFIG, "scaling": scaling}, tmp_path)
        platform = serving.platform
        assert await platform.ask(Ask("org/m", 8000.0, "short"), 1000.0, 500.0, ["suzhou"], ["public"])
        assert await platform.ask(Ask("org/m", 0.0, "enough")), "it has forgotten it already"
        assert not await platform.ask(Ask("org/m", 8000.0, "short"))
        await platform.close()
    wanted = ScaleRequest.model_validate(server.asked[0].body)
    assert (wanted.demand.requests, wanted.demand.tokens) == (8.0, 8000.0)
    assert wanted.demand.prompt_tokens + wanted.demand.output_tokens == 1000
    assert (wanted.sla.ttft_s, wanted.budget.month_left) == (2.0, 500.0)
    assert (wanted.sites, wanted.data_classes) == (["suzhou"], ["public"])
    assert server.asked[1].path == f"/v1/scale-requests/{wanted.id}"
    assert server.asked[2].body["id"] == wanted.id


async def test_capacity_is_asked_for_and_given_back(tmp_path: Path) -> None:
    wanted = ScaleRequest.model_validate(
        {"id": "r1", "model": "m", "demand": {"requests": 40, "tokens": 80_000}, "expires": 2e9}
    )
    async with endpoint() as server:
        scheduler = {**CONFIG["scaling"]["scheduler"], "url": server.url}
        serving = Serving({**CONFIG, "scaling": {"scheduler": scheduler}}, tmp_path)
        await serving.platform.request(wanted)
        await serving.platform.release("r1")
        await serving.platform.close()
    asked, released = server.asked
    assert (asked.method, asked.path) == ("POST", "/v1/scale-requests")
    assert asked.body["demand"]["tokens"] == 80_000
    assert (released.method, released.path) == ("DELETE", "/v1/scale-requests/r1")
    now = serving.wall
    verify([SECRET], asked.headers, asked.raw, now)
    verify([SECRET], released.headers, b"DELETE /v1/scale-requests/r1", now)
