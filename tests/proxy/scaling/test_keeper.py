"""Whatever happens in whatever order: never two engines for one standby, nothing that nobody wants runs a minute
later, and what is wanted is there in the end."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from policies.standby import LONGEST_PAUSE_S, State
from proxy.scaling.keeper import HUNG_S, LOOK_S
from proxy.scaling.seams import NotPossibleError
from tests.patience import examples
from tests.proxy.scaling.engines import Proxy, section
from tests.proxy.scaling.virtual import run

Happening = tuple[str, Any]
OPERATIONS = st.sampled_from(["prepare", "start", "stop"])
HAPPENINGS: st.SearchStrategy[Happening] = st.one_of(
    st.tuples(st.just("time"), st.sampled_from([0.05, 0.15, 1.0, 3.5, 7.0, 25.0, 70.0])),
    st.tuples(st.just("held"), st.booleans()),
    st.tuples(st.just("in flight"), st.booleans()),
    st.tuples(
        st.just("provider"),
        st.tuples(OPERATIONS, st.sampled_from(["", "fail", "hang", "lie", "half", "late"])),
    ),
    st.tuples(st.just("known"), st.booleans()),
    st.tuples(st.just("frozen"), st.booleans()),
    st.tuples(st.just("dies"), st.none()),
    st.tuples(st.just("crash"), st.sampled_from([0.0, 1.0, 100.0])),
    st.tuples(st.just("stop and start"), st.booleans()),
    st.tuples(st.just("disk full"), st.booleans()),
    st.tuples(st.just("clock"), st.sampled_from([-1e6, -100.0, 100.0, 1e6])),
    st.tuples(st.just("configured"), st.sampled_from(["not", "as it was", "anew"])),
    st.tuples(st.just("start by hand"), st.sampled_from([5.0, 60.0])),
    st.tuples(st.just("stop by hand"), st.none()),
)
SHARED = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where a sync costs nothing: what is tested is not the disk."""
SETTLED_S = 60.0
"""After the worst has ended, and the times are over that it is configured with."""


async def happens(proxy: Proxy, what: str, how: Any) -> None:
    engine, around = proxy.engines["a"], proxy.around
    if what == "time":
        await asyncio.sleep(how)
    elif what == "held":
        around.held = int(how)
        proxy.scaling.wanted()
    elif what == "in flight":
        around.fleet["a"].in_flight = int(how)
    elif what == "provider":
        engine.modes[how[0]] = how[1]
    elif what in ("known", "frozen"):
        setattr(engine, what, how)
    elif what == "dies":
        engine.dies()
    elif what == "crash":
        await proxy.crash()
        await asyncio.sleep(how)
        proxy.start()
    elif what == "stop and start":
        await proxy.scaling.stop(keep=how)
        proxy.start()
    elif what == "disk full":
        proxy.disk(full=how)
    elif what == "clock":
        around.clock_set += how
    elif what == "configured":
        proxy.sections.pop("a", None)
        if how != "not":
            word = "true" if how == "as it was" else "false"
            proxy.sections["a"] = section("a", command={"command": [word]})
        proxy.reload()
    else:
        try:
            if what == "start by hand":
                await proxy.scaling.start("a", how)
            else:
                await proxy.scaling.stop_one("a")
        except (NotPossibleError, KeyError, OSError):
            pass


def heals(proxy: Proxy) -> None:
    engine = proxy.engines["a"]
    engine.modes.clear()
    engine.known, engine.frozen = True, False
    proxy.disk(full=False)
    proxy.around.fleet["a"].in_flight = 0


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(HAPPENINGS, max_size=14), st.booleans())
def test_never_two_nothing_left_nobody_forgotten(happenings: list[Happening], wanted: bool) -> None:
    async def whole(directory: Path) -> None:
        proxy = Proxy(directory, "a")
        proxy.start()
        for what, how in happenings:
            await happens(proxy, what, how)
        heals(proxy)
        engine = proxy.engines["a"]
        if "a" not in proxy.sections:
            await happens(proxy, "configured", "as it was")
        proxy.around.held = int(wanted)
        # The longest pause, an operation that hangs, a pin, and what is found later only.
        await asyncio.sleep(LONGEST_PAUSE_S + HUNG_S + LOOK_S + SETTLED_S)
        assert engine.most <= 1, "two engines for one standby"
        assert not engine.overlapped, "two operations at once"
        if wanted:
            assert proxy.state("a") is State.READY
            assert engine.runs == [proxy.scaling.keepers["a"].standby.run]
            assert proxy.around.states["a"] is State.READY
        else:
            assert proxy.state("a") is State.STANDBY
            assert engine.runs == []
        await proxy.crash()

    with tempfile.TemporaryDirectory(dir=SHARED) as directory:
        run(whole(Path(directory)))


@settings(max_examples=examples(60), deadline=None)
@given(
    st.sampled_from(list(State)),
    st.sampled_from(["", "fail", "hang", "half", "late"]),
    st.floats(0.0, 0.3),
)
def test_a_minute_after_a_crash_nothing_runs_that_nobody_wants(
    state: State, mode: str, later_s: float
) -> None:
    """Whatever it was doing, with a provider that does as it should from then on."""

    async def whole(directory: Path) -> None:
        proxy = Proxy(directory, "a")
        proxy.start()
        await proxy.acting()
        proxy.engines["a"].modes["start"] = mode
        proxy.around.held = 1
        try:
            await proxy.until("a", state, 40.0)
        except TimeoutError:
            pass  # it does not come there in this way
        proxy.around.held = 0
        await asyncio.sleep(later_s)
        await proxy.crash()
        heals(proxy)
        proxy.start()
        await asyncio.sleep(60.0)
        assert proxy.engines["a"].runs == []
        assert proxy.engines["a"].most <= 1
        await proxy.crash()

    with tempfile.TemporaryDirectory(dir=SHARED) as directory:
        run(whole(Path(directory)))
