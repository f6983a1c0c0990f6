"""One standby and a provider that does as it should, fails, hangs or lies; time is virtual."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from policies.scaling import Step
from policies.standby import Event, Standby, State, pause_after
from policies.state import Backend
from proxy.scaling.hours import Hours
from proxy.scaling.journal import JOURNAL_FILE, Kept, StandbyJournal
from proxy.scaling.keeper import HUNG_S, LOOK_S, SILENT_S
from proxy.scaling.seams import NoGate, NotPossibleError, section_of
from proxy.scaling.shown import families, standbys
from proxy.tasks import Tasks
from tests.proxy.scaling.engines import Proxy, section
from tests.proxy.scaling.virtual import run

Case = Callable[[Proxy], Coroutine[Any, Any, None]]


def play(directory: Path, case: Case, *names: str, **options: Any) -> Proxy:
    proxy = Proxy(directory, *(names or ("a",)), **options)

    async def whole() -> None:
        proxy.start()
        await proxy.acting()
        await case(proxy)

    run(whole())
    for engine in proxy.engines.values():
        assert engine.most <= 1, "two engines for one standby"
        assert not engine.overlapped, "two operations at once"
    return proxy


def moves(proxy: Proxy) -> list[str]:
    journal = StandbyJournal(proxy.directory / JOURNAL_FILE)
    journal.read()
    journal.close()
    return [str(move.event) for move in journal.moves]


def test_from_zero_to_ready_and_back_to_zero(tmp_path: Path) -> None:
    async def case(proxy: Proxy) -> None:
        await asyncio.sleep(5)
        assert proxy.engines["a"].calls == [], "nobody wants it"
        assert proxy.scaling.condition("a") == "never started"
        proxy.around.held = 3
        proxy.scaling.wanted()
        await proxy.until("a", State.READY, 5.0)
        assert proxy.around.states["a"] is State.READY
        proxy.around.held = 0
        await proxy.until("a", State.STANDBY, 4.0)
        assert not proxy.engines["a"].runs
        assert proxy.scaling.condition("a").startswith("standby for ")

    proxy = play(tmp_path, case)
    assert moves(proxy) == ["start", "prepared", "started", "stop", "drained", "stopped"]
    assert [name for name, _ in proxy.engines["a"].calls] == ["prepare", "start", "stop"]
    assert len({run for _, run in proxy.engines["a"].calls}) == 1


def test_a_held_request_starts_it_at_once(tmp_path: Path) -> None:
    async def case(proxy: Proxy) -> None:
        await asyncio.sleep(5.3)
        proxy.around.held, before = 1, proxy.around.now()
        proxy.scaling.wanted()
        await proxy.until("a", State.PREPARING)
        assert proxy.around.now() - before < 0.1

    play(tmp_path, case)


@pytest.mark.parametrize("operation", ["prepare", "start"])
@pytest.mark.parametrize("mode", ["fail", "hang"])
def test_what_fails_is_stopped_first_and_tried_again_after_a_pause(
    tmp_path: Path, operation: str, mode: str
) -> None:
    async def case(proxy: Proxy) -> None:
        engine = proxy.engines["a"]
        engine.modes[operation] = mode
        proxy.around.held = 1
        await proxy.until("a", State.FAILED)
        failed_at = proxy.around.now()
        engine.modes.clear()
        await proxy.until("a", State.READY)
        assert proxy.around.now() - failed_at >= pause_after(1)
        assert [name for name, _ in engine.calls].count("stop") == 1

    play(tmp_path, case)


def test_the_pause_doubles_with_each_failure(tmp_path: Path) -> None:
    async def case(proxy: Proxy) -> None:
        proxy.engines["a"].modes["start"] = "fail"
        proxy.around.held = 1
        times = []
        for _ in range(4):
            await proxy.until("a", State.STARTING)
            await proxy.until("a", State.FAILED)
            times.append(proxy.around.now())
        gaps = [after - before for before, after in pairwise(times)]
        assert [round(gap / 5) for gap in gaps] == [1, 2, 4]

    play(tmp_path, case)


def test_one_that_never_answers_fails_and_leaves_nothing(tmp_path: Path) -> None:
    async def case(proxy: Proxy) -> None:
        proxy.engines["a"].loads_s = 1e9
        proxy.around.held = 1
        await proxy.until("a", State.FAILED)
        assert "did not answer within 20 s" in proxy.scaling.keepers["a"].standby.reason
        proxy.around.held = 0
        await proxy.until("a", State.STANDBY)
        assert not proxy.engines["a"].runs

    play(tmp_path, case)


def test_one_that_dies_while_it_starts_is_seen_before_its_time_is_over(tmp_path: Path) -> None:
    async def case(proxy: Proxy) -> None:
        engine = proxy.engines["a"]
        engine.loads_s = 1e9
        proxy.around.held = 1
        await proxy.until("a", State.STARTING)
        await asyncio.sleep(1)
        engine.dies()
        await proxy.until("a", State.FAILED, 12.0)
        assert proxy.scaling.keepers["a"].standby.reason == "it ended: exit code 1"

    play(tmp_path, case)


def test_a_stop_cuts_off_a_start(tmp_path: Path) -> None:
    async def case(proxy: Proxy) -> None:
        proxy.engines["a"].modes["start"] = "hang"
        await proxy.scaling.start("a")
        await proxy.until("a", State.STARTING)
        await asyncio.sleep(1)
        await proxy.scaling.stop_one("a")
        await proxy.until("a", State.STANDBY, 2.0)
        assert proxy.engines["a"].calls[-1][0] == "stop"

    play(tmp_path, case)


def test_one_that_died_is_replaced_as_long_as_it_is_wanted(tmp_path: Path) -> None:
    async def case(proxy: Proxy) -> None:
        proxy.around.held = 1
        await proxy.until("a", State.READY)
        proxy.engines["a"].dies()
        await proxy.until("a", State.FAILED, 12.0)
        await proxy.until("a", State.READY)

    play(tmp_path, case)


@pytest.mark.parametrize(("known", "seconds"), [(False, SILENT_S), (True, HUNG_S)])
def test_one_that_falls_silent_is_given_up_in_its_time(tmp_path: Path, known: bool, seconds: float) -> None:
    async def case(proxy: Proxy) -> None:
        await proxy.scaling.start("a")
        await proxy.until("a", State.READY)
        proxy.engines["a"].frozen, proxy.engines["a"].known = True, known
        since = proxy.around.now()
        await asyncio.sleep(3)
        assert proxy.scaling.condition("a").endswith("(it does not answer)")
        await proxy.until("a", State.FAILED, seconds + 20)
        assert proxy.around.now() - since >= seconds

    play(tmp_path, case)


def test_a_short_silence_is_none(tmp_path: Path) -> None:
    async def case(proxy: Proxy) -> None:
        engine = proxy.engines["a"]
        await proxy.scaling.start("a")
        await proxy.until("a", State.READY)
        for _ in range(3):
            engine.frozen, engine.known = True, False
            await asyncio.sleep(SILENT_S - 10)
            engine.frozen, engine.known = False, True
            await asyncio.sleep(30)
        assert proxy.state("a") is State.READY

    play(tmp_path, case)


@pytest.mark.parametrize("mode", ["fail", "hang", "lie"])
def test_a_stop_is_repeated_until_nothing_is_left(tmp_path: Path, mode: str) -> None:
    async def case(proxy: Proxy) -> None:
        engine = proxy.engines["a"]
        engine.modes["stop"] = mode
        await proxy.scaling.start("a")
        await proxy.until("a", State.READY)
        await proxy.scaling.stop_one("a")
        await asyncio.sleep(100)
        assert proxy.state("a") is State.STOPPING
        assert proxy.scaling.keepers["a"].trouble
        engine.modes.clear()
        await proxy.until("a", State.STANDBY, 40.0)
        assert not engine.runs

    play(tmp_path, case)


def test_what_drains_is_stopped_when_nothing_runs_on_it_or_its_time_is_over(tmp_path: Path) -> None:
    async def case(proxy: Proxy) -> None:
        backend = proxy.around.fleet["a"]
        for requests_end in (True, False):
            await proxy.scaling.start("a")
            await proxy.until("a", State.READY)
            backend.in_flight = 1
            await proxy.scaling.stop_one("a")
            await proxy.until("a", State.DRAINING)
            since = proxy.around.now()
            await asyncio.sleep(3)
            assert proxy.state("a") is State.DRAINING
            if requests_end:
                backend.in_flight = 0
            await proxy.until("a", State.STANDBY)
            assert (proxy.around.now() - since > 10) is not requests_end
            backend.in_flight = 0

    play(tmp_path, case)


def test_what_drains_is_taken_back(tmp_path: Path) -> None:
    async def case(proxy: Proxy) -> None:
        proxy.around.held = 1
        await proxy.until("a", State.READY)
        proxy.around.held, proxy.around.fleet["a"].in_flight = 0, 1
        await proxy.until("a", State.DRAINING)
        proxy.around.held = 1
        await proxy.until("a", State.READY, 2.0)

    proxy = play(tmp_path, case)
    assert [name for name, _ in proxy.engines["a"].calls] == ["prepare", "start"]


def test_what_runs_and_was_started_by_nobody_is_stopped(tmp_path: Path) -> None:
    async def case(proxy: Proxy) -> None:
        await proxy.crash()
        proxy.engines["a"].begins("unknown")
        proxy.start()
        await asyncio.sleep(2)
        assert not proxy.engines["a"].runs, "at the start"
        await proxy.until("a", State.STANDBY)
        proxy.engines["a"].begins("later")
        await asyncio.sleep(LOOK_S + 2)
        assert not proxy.engines["a"].runs, "and later"

    proxy = play(tmp_path, case)
    assert moves(proxy) == ["found", "stopped"] * 2


def test_a_start_that_comes_late_leaves_no_orphan(tmp_path: Path) -> None:
    async def case(proxy: Proxy) -> None:
        engine = proxy.engines["a"]
        engine.modes["start"] = "late"
        await proxy.scaling.start("a")
        await proxy.until("a", State.STARTING)
        await proxy.scaling.stop_one("a")
        await proxy.until("a", State.STANDBY)
        assert not engine.runs
        await asyncio.sleep(9)
        assert engine.runs
        await asyncio.sleep(LOOK_S + 2)
        assert not engine.runs

    play(tmp_path, case)


# Restarts


@pytest.mark.parametrize("state", [state for state in State if state is not State.STANDBY])
def test_a_crash_in_any_state_is_gone_on_from(tmp_path: Path, state: State) -> None:
    async def case(proxy: Proxy) -> None:
        engine = proxy.engines["a"]
        engine.loads_s = 3.0
        if state is State.FAILED:
            engine.modes["start"] = "half"
        proxy.around.held = 1
        if state in (State.DRAINING, State.STOPPING):
            await proxy.until("a", State.READY)
            proxy.around.held, proxy.around.fleet["a"].in_flight = 0, 1
        await proxy.until("a", state)
        await proxy.crash()
        engine.modes.clear()
        await asyncio.sleep(20)
        proxy.around.fleet["a"].in_flight = 0
        runs_before = {run for name, run in engine.calls if name == "start"}
        proxy.start()
        await proxy.until("a", State.READY if proxy.around.held else State.STANDBY, 30.0)
        runs_after = {run for name, run in engine.calls if name == "start"}
        if state in (State.PREPARING, State.STARTING, State.READY):
            assert len(runs_after) == 1, "the same run"
        assert runs_before <= runs_after
        proxy.around.held = 0
        await proxy.until("a", State.STANDBY, 30.0)
        assert not engine.runs

    play(tmp_path, case)


def test_one_that_ended_while_no_proxy_ran_is_seen_at_once(tmp_path: Path) -> None:
    async def case(proxy: Proxy) -> None:
        await proxy.scaling.start("a")
        await proxy.until("a", State.READY)
        await proxy.crash()
        proxy.engines["a"].dies()
        proxy.start()
        await proxy.until("a", State.FAILED, 1.0)
        assert "while the proxy did not run" in proxy.scaling.keepers["a"].standby.reason
        await proxy.until("a", State.READY)  # it was started by hand, to stay

    play(tmp_path, case)


def test_two_processes_never_act_at_once(tmp_path: Path) -> None:
    async def case(proxy: Proxy) -> None:
        first, engine = proxy.scaling, proxy.engines["a"]
        engine.modes["start"] = "hang"
        await first.start("a")
        await proxy.until("a", State.STARTING)
        second = proxy.start()
        await asyncio.sleep(5)
        assert first.acting
        assert not second.acting
        assert proxy.around.states["a"] is State.STARTING, "as the journal has it"
        engine.modes.clear()
        following = second.spawn(first.hand_over(), "hand over")
        await proxy.until("a", State.READY)
        assert not first.acting
        await asyncio.sleep(2)
        assert first.journal.kept["a"].standby.state is State.READY, "it follows"
        following.cancel()

    proxy = play(tmp_path, case)
    assert [name for name, _ in proxy.engines["a"].calls] == ["prepare", "start", "start"]


def test_what_was_asked_for_before_a_crash_is_not_taken_for_nothing(tmp_path: Path) -> None:
    async def case(proxy: Proxy) -> None:
        proxy.around.held = 1
        await proxy.until("a", State.READY)
        proxy.around.held = 0
        await asyncio.sleep(100)
        await proxy.crash()
        proxy.start()
        await asyncio.sleep(290)
        assert proxy.state("a") is State.READY, "nobody knows yet that nobody asks"
        await proxy.until("a", State.STANDBY, 30.0)

    play(tmp_path, case, settle_s=300.0)


class Counted(Hours):
    """Hours that count how often they are written."""

    written = 0

    async def write(self, wall: float, now: float) -> None:
        self.written += 1
        await super().write(wall, now)


@pytest.mark.parametrize("at_once", [False, True])
def test_hours_are_written_by_the_process_that_acts_alone(tmp_path: Path, at_once: bool) -> None:
    async def case(proxy: Proxy) -> None:
        first = proxy.scaling
        first.hours = hours = Counted(None)
        await first.start("a")
        await proxy.until("a", State.READY)
        tasks = Tasks()
        tasks.spawn(first.hand_over(), "hand over")
        await asyncio.sleep(0)
        if not at_once:
            proxy.start()
            await asyncio.sleep(3600)
        await first.stop(keep=False)
        await tasks.cancel_all()
        assert hours.written == 1, "what has become of its runs since then it does not know"
        if at_once:
            proxy.start()
        await proxy.until("a", State.READY)

    proxy = play(tmp_path, case)
    assert [name for name, _ in proxy.engines["a"].calls] == ["prepare", "start"]


def test_a_reload_of_a_process_that_has_handed_over_is_of_no_consequence(tmp_path: Path) -> None:
    async def case(proxy: Proxy) -> None:
        await proxy.scaling.start("a")
        await proxy.until("a", State.READY)
        tasks = Tasks()
        tasks.spawn(proxy.scaling.hand_over(), "hand over")
        await asyncio.sleep(1)
        del proxy.sections["b"]
        for command in ("true", "false"):
            proxy.sections["a"] = section("a", command={"command": [command]})
            proxy.reload()
            await asyncio.sleep(3)
        await tasks.cancel_all()
        assert proxy.engines["a"].runs

    play(tmp_path, case, "a", "b")


@pytest.mark.parametrize("command", ["true", "false"])
def test_a_reload_while_hours_are_read_forgets_nobody(tmp_path: Path, command: str) -> None:
    class Slow(Hours):
        async def begin(self, *args: Any, **kwargs: Any) -> None:
            await asyncio.sleep(10)

    async def case(proxy: Proxy) -> None:
        await proxy.crash()
        proxy.sections = {"a": section("a")}
        proxy.start()
        proxy.scaling.hours = Slow(None)
        await asyncio.sleep(1)
        proxy.sections = {"a": section("a", command={"command": [command]}), "b": section("b")}
        proxy.reload()
        proxy.around.held = 10_000
        await proxy.until("a", State.READY)
        await proxy.until("b", State.READY)

    play(tmp_path, case, "a", "b")


def test_who_cannot_look_at_its_lock_says_so_and_tries_again(tmp_path: Path) -> None:
    async def case(proxy: Proxy) -> None:
        await proxy.crash()
        scaling = proxy.start()
        path, scaling._lock._path = scaling._lock._path, tmp_path / "away" / "lock"
        await asyncio.sleep(5)
        assert scaling.trouble == f"{tmp_path}/away/lock cannot be written: No such file or directory"
        scaling._lock._path = path
        await asyncio.sleep(2)
        assert scaling.acting
        assert not scaling.trouble

    play(tmp_path, case)


@pytest.mark.parametrize("keep", [True, False])
def test_a_stop_of_the_proxy_stops_what_runs_unless_it_is_to_be_kept(tmp_path: Path, keep: bool) -> None:
    async def case(proxy: Proxy) -> None:
        await proxy.scaling.start("a")
        await proxy.until("a", State.READY)
        await proxy.scaling.stop(keep=keep)
        assert bool(proxy.engines["a"].runs) is keep
        assert all(provider.closed for provider in proxy.providers)
        proxy.start()
        await proxy.until("a", State.READY)  # it was started by hand, to stay

    proxy = play(tmp_path, case)
    assert [name for name, _ in proxy.engines["a"].calls].count("start") == (1 if keep else 2)


def test_a_stop_of_the_proxy_waits_for_no_longer_than_a_stop_may_take(tmp_path: Path) -> None:
    async def case(proxy: Proxy) -> None:
        proxy.engines["a"].modes["stop"] = "hang"
        await proxy.scaling.start("a")
        await proxy.until("a", State.READY)
        since = proxy.around.now()
        await proxy.scaling.stop(keep=False)
        assert proxy.around.now() - since < 21
        proxy.engines["a"].modes.clear()
        proxy.start()
        await proxy.until("a", State.READY)

    proxy = play(tmp_path, case)
    assert moves(proxy)[-6:] == ["stop", "drained", "stopped", "start", "prepared", "started"]


def test_lines_that_are_none_of_ours_are_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def case(proxy: Proxy) -> None:
        await proxy.scaling.start("a")
        await proxy.until("a", State.READY)
        await proxy.crash()
        with (tmp_path / JOURNAL_FILE).open("ab") as file:
            file.write(b'5\nnull\n[]\n"x"\n\0\0\n{}\n{"standby": 5}\n{"standby": {"name": "a"}}\nhalf a li')
        proxy.start()
        await proxy.until("a", State.READY)

    proxy = play(tmp_path, case)
    assert [name for name, _ in proxy.engines["a"].calls] == ["prepare", "start"]
    assert caplog.text.count("cannot be read, and is passed over") == 2 * 8, "to show them, and to act"


def test_what_a_run_was_started_by_is_not_shown_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    process = {"command": ["x"], "environment": {"TOKEN": ["hush-hush"]}}
    backend = {"name": "a", "url": "http://127.0.0.1:1", "models": ["m"], "standby": {"process": process}}
    assert section_of(Kept(Standby("a"), backend), "a") is None
    assert "standby.process.environment.TOKEN" in caplog.text
    assert "hush" not in caplog.text


# Configuration


def test_one_that_is_no_longer_configured_is_stopped_and_forgotten(tmp_path: Path) -> None:
    async def case(proxy: Proxy) -> None:
        await proxy.scaling.start("a")
        await proxy.until("a", State.READY)
        sections = dict(proxy.sections)
        del proxy.sections["a"]
        proxy.reload()
        await asyncio.sleep(2)
        assert not proxy.engines["a"].runs
        assert "a" not in proxy.scaling.keepers
        assert (proxy.scaling.moves, proxy.scaling.starts) == ({}, {})
        proxy.sections = sections
        proxy.reload()
        await proxy.scaling.start("a")
        await proxy.until("a", State.READY)
        await proxy.crash()
        del proxy.sections["a"]
        proxy.start()
        await asyncio.sleep(2)
        assert not proxy.engines["a"].runs, "also when that happened while no proxy ran"
        assert "a" not in proxy.scaling.keepers

    play(tmp_path, case)


@pytest.mark.parametrize("anew", [False, True])
def test_what_runs_on_one_that_is_taken_out_may_end(tmp_path: Path, anew: bool) -> None:
    async def case(proxy: Proxy) -> None:
        await proxy.scaling.start("a")
        await proxy.until("a", State.READY)
        backend = proxy.around.fleet["a"]
        backend.in_flight = 1
        if anew:
            proxy.sections["a"] = section("a", command={"command": ["false"]})
            proxy.around.fleet.replace([Backend("a", models=frozenset({"m"}), slots=4)])
        else:
            del proxy.sections["a"]
            proxy.around.fleet.replace([])
        proxy.reload()
        await asyncio.sleep(5)
        assert proxy.state("a") is State.DRAINING
        assert proxy.engines["a"].runs
        backend.in_flight = 0
        await asyncio.sleep(2)
        assert [name for name, _ in proxy.engines["a"].calls].count("stop") == 1

    play(tmp_path, case)


@pytest.mark.parametrize("restart", [False, True])
def test_one_that_was_configured_anew_is_stopped_by_its_old_section(tmp_path: Path, restart: bool) -> None:
    async def case(proxy: Proxy) -> None:
        await proxy.scaling.start("a")
        await proxy.until("a", State.READY)
        first = proxy.scaling.keepers["a"].provider
        proxy.sections["a"] = section("a", command={"command": ["false"]})
        if restart:
            await proxy.crash()
            proxy.start()
        else:
            proxy.reload()
        assert proxy.around.states["a"] is not State.READY
        await asyncio.sleep(1)
        await proxy.until("a", State.READY)
        assert [name for name, _ in proxy.engines["a"].calls] == [
            "prepare",
            "start",
            "stop",
            "prepare",
            "start",
        ]
        keeper = proxy.scaling.keepers["a"]
        assert keeper.provider is not first
        assert keeper.terms.command is not None
        assert keeper.terms.command.command == ["false"]

    play(tmp_path, case)


def test_other_figures_change_nothing_that_runs(tmp_path: Path) -> None:
    async def case(proxy: Proxy) -> None:
        await proxy.scaling.start("a")
        await proxy.until("a", State.READY)
        proxy.sections["a"] = section("a", cost_per_hour=1.0, drain=1.0)
        proxy.reload()
        await asyncio.sleep(5)
        assert proxy.state("a") is State.READY
        assert proxy.scaling.keepers["a"].terms.drain == 1.0

    play(tmp_path, case)


def test_figures_of_one_that_waits_for_another_to_end_are_taken_over(tmp_path: Path) -> None:
    async def case(proxy: Proxy) -> None:
        await proxy.scaling.start("a")
        await proxy.until("a", State.READY)
        backend = proxy.around.fleet["a"]
        backend.in_flight = 1
        for cost in (1.0, 2.0):
            proxy.sections["a"] = section("a", cost_per_hour=cost, command={"command": ["false"]})
            proxy.reload()
            await asyncio.sleep(1)
        keeper = proxy.scaling.keepers["a"]
        assert (keeper.state, keeper.terms.cost_per_hour) == (State.DRAINING, 36.0)
        backend.in_flight = 0
        await asyncio.sleep(1)
        await proxy.until("a", State.READY)
        assert keeper.terms.cost_per_hour == 2.0

    play(tmp_path, case)


def test_no_more_run_at_a_site_than_may(tmp_path: Path) -> None:
    async def case(proxy: Proxy) -> None:
        proxy.most = {"local": 1}
        proxy.reload()
        proxy.around.held = 10_000
        await asyncio.sleep(60)
        assert sorted(map(str, proxy.around.states.values())) == ["ready", "standby"]
        with pytest.raises(NotPossibleError, match="site local may have 1 run"):
            await proxy.scaling.start(next(name for name in "ab" if proxy.state(name) is State.STANDBY))

    play(tmp_path, case, "a", "b")


def test_one_that_failed_and_is_gone_leaves_its_place_to_another(tmp_path: Path) -> None:
    async def case(proxy: Proxy) -> None:
        proxy.most = {"local": 1}
        proxy.reload()
        proxy.engines["a"].modes["start"] = "half"
        proxy.around.held = 1
        await proxy.until("a", State.FAILED)
        await proxy.until("b", State.READY, 10.0)
        await asyncio.sleep(60)
        assert proxy.state("a") is State.STANDBY

    proxy = play(tmp_path, case, "a", "b")
    assert [name for name, _ in proxy.engines["a"].calls] == ["prepare", "start", "stop"]


def test_who_does_not_act_shows_what_was_written(tmp_path: Path) -> None:
    async def case(proxy: Proxy) -> None:
        await proxy.scaling.start("a")
        await proxy.until("a", State.READY)
        second = proxy.start()
        await asyncio.sleep(1)
        (row,) = standbys(second)
        assert (row["state"], row["pinned"], row["run"] != "") == ("ready", True, True)
        assert row["trouble"] == "another process starts and stops it"
        assert second.condition("a") == "ready (another process starts and stops it)"
        with pytest.raises(NotPossibleError, match="now: another process starts and stops it"):
            await second.start("a")
        states = {
            sample.labels["state"]: sample.value
            for metric in families(second)
            if metric.name == "tidegate_standby_state"
            for sample in metric.samples
        }
        assert [state for state, value in states.items() if value] == ["ready"]

    play(tmp_path, case)


# By hand


def test_one_that_was_started_by_hand_stays_until_it_is_stopped(tmp_path: Path) -> None:
    async def case(proxy: Proxy) -> None:
        await proxy.scaling.start("a")
        await proxy.until("a", State.READY)
        await asyncio.sleep(600)
        assert proxy.state("a") is State.READY, "although nobody needs it"
        await proxy.scaling.stop_one("a")
        await proxy.until("a", State.STANDBY)
        await asyncio.sleep(60)
        assert proxy.state("a") is State.STANDBY

    play(tmp_path, case)


@pytest.mark.parametrize("first", ["start", "stop"])
def test_a_stop_by_hand_takes_back_a_start_that_is_only_on_its_way(tmp_path: Path, first: str) -> None:
    async def case(proxy: Proxy) -> None:
        await asyncio.sleep(1)
        keeper = proxy.scaling.keepers["a"]
        assert keeper.ask(Event.START, "somebody wants it")
        assert keeper.ask(Event.STOP, "somebody else does not")
        assert not keeper.is_asked
        if first == "start":
            keeper.ask(Event.START, "somebody wants it")
        stopping = proxy.scaling.spawn(proxy.scaling.stop_one("a"), "stop")
        if first == "stop":
            keeper.ask(Event.START, "somebody wants it")
        await stopping
        await asyncio.sleep(5)
        assert proxy.state("a") is State.STANDBY

    proxy = play(tmp_path, case)
    assert "start" not in [name for name, _ in proxy.engines["a"].calls]


def test_no_second_one_starts_at_a_full_site_while_a_start_is_being_written(tmp_path: Path) -> None:
    async def case(proxy: Proxy) -> None:
        proxy.most = {"local": 1}
        proxy.reload()
        await asyncio.sleep(1)
        keeper = proxy.scaling.keepers["a"]
        await keeper._writing.acquire()
        keeper.ask(Event.START, "somebody wants it")
        await asyncio.sleep(0.01)
        with pytest.raises(NotPossibleError, match="site local may have 1 run"):
            await proxy.scaling.start("b")
        proxy.around.held = 1
        keeper._writing.release()
        await proxy.until("a", State.READY)

    proxy = play(tmp_path, case, "a", "b")
    assert proxy.engines["b"].calls == []


@pytest.mark.parametrize("jump_s", [0.0, 86_400.0, -86_400.0])
def test_for_a_time_whatever_is_done_to_the_clock(tmp_path: Path, jump_s: float) -> None:
    async def case(proxy: Proxy) -> None:
        await proxy.scaling.start("a", 120.0)
        await proxy.until("a", State.READY)
        await asyncio.sleep(50)
        proxy.around.clock_set = jump_s
        await asyncio.sleep(50)
        assert proxy.state("a") is State.READY
        await proxy.until("a", State.STANDBY, 40.0)

    play(tmp_path, case)


def test_what_is_not_possible_says_why(tmp_path: Path) -> None:
    async def case(proxy: Proxy) -> None:
        with pytest.raises(NotPossibleError, match="a is standby"):
            await proxy.scaling.stop_one("a")
        with pytest.raises(KeyError):
            await proxy.scaling.start("b")
        proxy.engines["a"].modes["start"] = "fail"
        proxy.around.held = 1
        await proxy.until("a", State.FAILED)
        with pytest.raises(NotPossibleError, match="a is failed: start cannot be done"):
            await proxy.scaling.start("a")

    play(tmp_path, case)


# What may not be


def test_nothing_is_started_that_could_not_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def case(proxy: Proxy) -> None:
        await asyncio.sleep(2)
        proxy.disk(full=True)
        proxy.around.held = 1
        await asyncio.sleep(30)
        assert proxy.engines["a"].calls == []
        assert "No space left on device" in proxy.scaling.trouble
        proxy.disk(full=False)
        await proxy.until("a", State.READY, 10.0)
        assert not proxy.scaling.trouble
        assert not proxy.scaling.keepers["a"].trouble

    play(tmp_path, case)
    assert caplog.text.count("no standby is started or stopped") == 1, "told once"


def test_a_start_that_no_plan_pays_for_is_not_made(tmp_path: Path) -> None:
    class Forbids(NoGate):
        plan: str | None = None

        def may_start(self, name: str, step: Step) -> str | None:
            assert step.event is Event.START
            return self.plan

    gate = Forbids()

    async def case(proxy: Proxy) -> None:
        proxy.around.held = 1
        await asyncio.sleep(30)
        assert proxy.state("a") is State.STANDBY
        gate.plan = "p1"
        await proxy.until("a", State.READY)
        assert proxy.scaling.keepers["a"].standby.plan == "p1"

    play(tmp_path, case, gate=gate)


def test_one_that_is_started_by_its_plan_while_it_is_pinned_stays_pinned(tmp_path: Path) -> None:
    class Hasty(NoGate):
        proxy: Proxy

        async def by_hand(self, name: str, by: str) -> str:
            self.proxy.scaling.keepers[name].ask(Event.START, "its plan says so", "p1")
            return "p1"

    gate = Hasty()

    async def case(proxy: Proxy) -> None:
        gate.proxy = proxy
        await proxy.scaling.start("a")
        await proxy.until("a", State.READY)
        await asyncio.sleep(30)
        assert proxy.state("a") is State.READY
        await proxy.crash()
        proxy.start()
        await asyncio.sleep(30)
        assert proxy.state("a") is State.READY, "it is in the journal too"

    play(tmp_path, case, gate=gate)


def test_a_pause_is_no_longer_than_the_longest_after_the_clock_was_set_back(tmp_path: Path) -> None:
    async def case(proxy: Proxy) -> None:
        proxy.engines["a"].modes["start"] = "fail"
        proxy.around.held = 1
        await proxy.until("a", State.FAILED)
        await proxy.crash()
        proxy.engines["a"].modes.clear()
        proxy.around.clock_set = -1e6
        proxy.start()
        await proxy.until("a", State.READY, 20.0)

    play(tmp_path, case)
