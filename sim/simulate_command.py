"""`tidegate simulate`: what the last week would have been under another policy file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from sim.command_errors import fail
from sim.evaluate_options import policies_of, readable_errors, show_warnings

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

    from policies.files import KnownNames
    from policies.state import Backend
    from sim.evaluate import PolicyText, Quantiles
    from sim.from_ledger import LedgerRow, Past, Served
    from sim.simulate import Figures, Hardware
    from sim.workload import Workload

DEFAULT_SLOTS = 32
"""As the proxy has it, of a backend that has not said how many."""


class Installation(Protocol):
    """What the command line knows of a configuration and its ledger (`proxy/past.py`)."""

    currency: str
    aliases: Mapping[str, str]
    profiles: Mapping[str, Path | None]

    def backends(self) -> list[Backend]: ...

    def policy(self) -> tuple[str, str]: ...

    def policy_changed(self) -> float: ...

    def known(self) -> KnownNames: ...

    def cluster_options(self) -> dict[str, Any]: ...

    def cost(self, backend: str, model: str, prompt: int, cached: int, completion: int) -> int | None: ...

    def keys(self) -> Mapping[str, tuple[int, Mapping[str, str]]]: ...

    def rows(
        self, since: float | None, until: float | None, progress: Callable[[int, int], None]
    ) -> Iterable[LedgerRow]: ...


class Doors(Protocol):
    """What the command line hands in, behind a call of `context.obj`."""

    def installation(self, config: Path | None) -> Installation: ...

    def span(self, text: str, until: str | None, now: float) -> tuple[float, float | None]: ...


@dataclass(slots=True)
class Column:
    """One column of the table: what was, or one policy file."""

    title: str
    kind: str
    """`ledger`, `present` or `new`."""
    policy: str
    served: list[Served]
    requests_per_s: float | None = None


def simulate(
    context: typer.Context,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="A policy file, a name of the library, or a policy's own name: it chooses among all backends. "
            "Several: --policy a b c."
        ),
    ] = None,
    policies: Annotated[list[str] | None, typer.Argument(help="Further policies.")] = None,
    from_ledger: Annotated[
        str | None, typer.Option(help="Requests of the ledger since: `7d`, `24h`, `2026-11-01`.")
    ] = None,
    until: Annotated[str | None, typer.Option(help="And before, in the same forms.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="A trace in place of the ledger, as for `workload`.", dir_okay=False)
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            help="Configuration file with the backends. Default: tidegate.yaml, if it is there.",
            dir_okay=False,
        ),
    ] = None,
    ttft: Annotated[
        float | None, typer.Option(help="Seconds to the first token at most, for goodput.", min=0)
    ] = None,
    tpot: Annotated[
        float | None, typer.Option(help="Seconds per further token at most, for goodput.", min=0)
    ] = None,
    by: Annotated[str | None, typer.Option(help="`day`: a table for each, UTC.")] = None,
    autoscale: Annotated[
        Path | None,
        typer.Option(
            help="A cluster file with standbys: they are started and stopped as it says under `scaling`, and each "
            "day's hours, costs and answers within its SLA are shown. With --trace.",
            dir_okay=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="With --autoscale: a picture of capacity against demand. Needs matplotlib."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of policies that draw lots.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Play one's own traffic of the past under another policy file, beside what was and the present file.

    Example: tidegate simulate --from-ledger 7d --policy new.yaml --ttft 2 --tpot 0.1
    With standbys: tidegate simulate --trace week.csv --autoscale examples/autoscale.yaml --plot week.png
    """
    from rich.console import Console
    from rich.progress import Progress

    from sim.evaluate import PolicyText

    asked_policies = [*(policy or []), *(policies or [])]
    if autoscale is not None:
        from sim.autoscale_command import show

        wrong = {
            "--from-ledger": from_ledger,
            "--until": until,
            "--config": config,
            "--by": by,
            "--ttft": ttft,
            "--tpot": tpot,
        }
        if trace is None or (given := next((name for name, value in wrong.items() if value is not None), "")):
            fail(
                "--autoscale FILE goes with --trace FILE"
                + (
                    ""
                    if trace is None
                    else f", and without {given}: SLA and backends stand in its cluster file"
                )
            )
        if len(asked_policies) > 1:
            fail("--autoscale goes with one policy")
        show(autoscale, trace, (asked_policies or ["local-first"])[0], seed, plot, as_json=as_json)
        return
    if plot is not None:
        fail("--plot goes with --autoscale")
    if not asked_policies:
        fail("say which --policy is tried")
    if (from_ledger is None) == (trace is None):
        fail("give --from-ledger 7d or --trace FILE" + ("" if trace is None else ", not both"))
    if trace is not None and until is not None:
        fail("--until is for --from-ledger: a trace is played whole")
    if by not in (None, "day"):
        fail(f"--by is day, not {by!r}")
    doors: Doors = context.obj()
    home = doors.installation(config)
    console = Console(stderr=True)
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    with readable_errors(), bar:
        present, new = PolicyText(*home.policy()), policies_of(asked_policies)
        show_warnings(new, home.known())
        asked = (from_ledger, until)
        past = _from_trace(trace) if trace else _from_ledger(doors, home, present, *asked, bar)
        found = _Simulation(home, past, trace is None, seed, bar)
        columns = found.columns([present, *new])
    level = inf if ttft is None else ttft, inf if tpot is None else tpot
    if as_json:
        typer.echo(json.dumps(_as_json(found, columns, level, by), indent=2, allow_nan=False))
    else:
        _show(found, columns, level, by)


def _from_ledger(
    doors: Doors, home: Installation, present: PolicyText, since: str | None, until: str | None, bar: Progress
) -> Past:
    from policies.files import read_policy
    from sim.from_ledger import InForce, read_past

    assert since is not None
    begin, end = doors.span(since, until, time.time())
    task = bar.add_task("reading the ledger", total=None)
    rows = home.rows(begin, end, lambda done, total: bar.update(task, completed=done, total=total))
    rules = read_policy(present.text, present.name, home.known()).rules.rules
    in_force = InForce(frozenset(rule.name for rule in rules), home.policy_changed())
    return read_past(rows, home.aliases, home.keys(), in_force)


def _from_trace(trace: Path) -> Past:
    from sim.from_ledger import Past
    from sim.traces import read_workload

    workload = read_workload(trace)
    left = f"{workload.left_out:,} lines of the trace could not be read"
    return Past(workload, [], 0.0, {}, [left] if workload.left_out else [])


class _Simulation:
    """The backends of an installation, ready for each policy file to be tried on them."""

    def __init__(self, home: Installation, past: Past, ledger: bool, seed: int, bar: Progress) -> None:
        """`ledger`: the past is that of a ledger. Raises ValueError: a backend cannot be simulated."""
        self.home, self.past, self.ledger, self.seed, self.bar = home, past, ledger, seed, bar
        self.notes = list(past.notes)
        self.workload: Workload = past.workload
        self.told: dict[str, str] = {}
        """By backend: where its speed comes from."""
        self._models(home.backends())
        self.hardware = self._hardware(home.backends())

    def _models(self, backends: list[Backend]) -> None:
        """Which models each serves, where the configuration lets the engine say it."""
        asked = {arrival.model for arrival in self.workload} - {""}
        listed = {model for backend in backends for model in backend.models}
        unlisted = [backend.name for backend in backends if not backend.models]
        if not self.ledger and not unlisted and not asked & listed:
            if asked:
                self.notes.append("no backend serves a model of the trace: each request may go anywhere")
            self.workload.arrivals = [arrival._replace(model="") for arrival in self.workload]
            asked = set()
        self.models: dict[str, frozenset[str]] = {}
        for name in unlisted:
            seen = self.past.backends.get(name)
            self.models[name] = frozenset(seen.models if seen and seen.models else asked or {"model"})
            if not (seen and seen.models):
                self.notes.append(f"{name}: no request shows which models it serves: taken to serve all")

    def _backends(self) -> list[Backend]:
        """New ones."""
        backends = self.home.backends()
        for backend in backends:
            if backend.name in self.models:
                backend.models = self.models[backend.name]
                backend.models_unknown, backend.models_awaited = "", False
            seen = self.past.backends.get(backend.name)
            backend.slots = backend.full_slots = backend.slots or (seen and seen.slots) or DEFAULT_SLOTS
        return backends

    def _hardware(self, backends: list[Backend]) -> dict[str, Hardware]:
        from sim.from_ledger import Seen
        from sim.ledger_speed import SEARCH, profile_from, unfit
        from sim.profile import load_profile
        from sim.simulate import Hardware

        hardware: dict[str, Hardware] = {}
        known = {name: seen.timings for name, seen in self.past.backends.items()}
        without = [
            f"{backend.name} ({wrong})"
            for backend in backends
            if self.home.profiles[backend.name] is None
            and (
                wrong := unfit(known.get(backend.name, ()))
                if self.ledger
                else "with --trace no ledger is read"
            )
        ]
        if without:  # before any is fitted, which takes long
            raise ValueError(_unknown_speed(without))
        for backend in backends:
            name, path = backend.name, self.home.profiles[backend.name]
            seen: Seen = self.past.backends.get(name) or Seen()
            if not seen.rtts and backend.site != "local":
                self.notes.append(f"{name}: no round trip was measured: taken to be 0")
            if path is not None:
                hardware[name], self.told[name] = Hardware(load_profile(path), seen.rtt_s), f"profile {path}"
                continue
            task = self.bar.add_task(f"fitting {name}", total=SEARCH.simulations)
            try:
                profile, told = profile_from(
                    name,
                    list(seen.timings),
                    seen.rtt_s,
                    backend.slots,
                    lambda done, task=task: self.bar.update(task, completed=done),  # type: ignore[misc]
                )
            except ValueError as error:
                raise ValueError(_unknown_speed([f"{name} ({error})"])) from None
            hardware[name], self.told[name] = Hardware(profile, seen.rtt_s), told
            self.notes.append(f"{name}: no `profile:`, so {told}; its KV cache is taken to be never full")
        return hardware

    def columns(self, policies: list[PolicyText]) -> list[Column]:
        """What was, and each policy file. Raises FileProblems."""
        from sim.simulate import simulate as run

        columns = []
        if self.ledger:
            columns.append(Column("was", "ledger", "", self.past.served))
        for place, policy in enumerate(policies):
            task = self.bar.add_task(f"simulating {policy.name}", total=len(self.workload))
            found = run(
                self.workload,
                self._backends(),
                self.hardware,
                policy,
                self.home.known(),
                self.home.cost,
                epoch=self.past.epoch,
                seed=self.seed,
                options=self.home.cluster_options(),
                progress=lambda done, task=task: self.bar.update(task, completed=done),  # type: ignore[misc]
            )
            title = f"{'present, simulated' if place == 0 else 'simulated'}\n{Path(policy.name).name}"
            kind = "present" if place == 0 else "new"
            columns.append(Column(title, kind, policy.name, found.served, found.requests_per_s))
            if found.policy_failures:
                self.notes.append(
                    f"{policy.name} failed in {found.policy_failures:,} calls, and the least loaded backend was "
                    f"taken instead: {found.last_failure}"
                )
        return columns


def _unknown_speed(backends: list[str]) -> str:
    return (
        f"how fast is {', '.join(backends)}? Give these backends a `profile:` in the configuration "
        "(`tidegate bench --profile` and `tidegate calibrate` make one)"
    )


def _days(columns: list[Column]) -> Iterator[tuple[str, list[list[Served]]]]:
    from sim.simulate import by_day

    days = [by_day(column.served) for column in columns]
    for day in sorted(set[str]().union(*days)):
        yield day, [one.get(day, []) for one in days]


# Output


def _as_json(
    found: _Simulation, columns: list[Column], level: tuple[float, float], by: str | None
) -> dict[str, Any]:
    from sim.simulate import figures

    runs: list[dict[str, Any]] = [
        {
            "kind": column.kind,
            "policy": column.policy or None,
            **figures(column.served, *level).as_dict(),
            "simulated_requests_per_second": column.requests_per_s,
        }
        for column in columns
    ]
    if by == "day":
        for run in runs:
            run["by_day"] = {}
        for day, parts in _days(columns):
            for run, part in zip(runs, parts, strict=True):
                run["by_day"][day] = figures(part, *level).as_dict()
    return {
        "requests": len(found.workload),
        "currency": found.home.currency,
        "backends": [
            {"name": name, "rtt_s": one.rtt_s, "speed": found.told[name]}
            for name, one in found.hardware.items()
        ],
        "runs": runs,
        "notes": found.notes,
    }


def _show(found: _Simulation, columns: list[Column], level: tuple[float, float], by: str | None) -> None:
    from rich.console import Console
    from rich.text import Text

    from sim.simulate import figures

    console = Console()
    titles = [column.title for column in columns]
    currency = found.home.currency
    parts = [("", [column.served for column in columns]), *(_days(columns) if by == "day" else ())]
    for day, served in parts:
        console.print(_table(day, titles, [figures(one, *level) for one in served], currency))
    for note in found.notes:
        console.print(Text(f"note: {note}"))


def _table(day: str, titles: list[str], columns: list[Figures], currency: str) -> Table:
    from rich import box
    from rich.table import Table

    from sim.evaluate import Quantiles

    table = Table(title=day or None, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("", no_wrap=True)
    for title in titles:
        table.add_column(title, justify="right")

    def row(name: str, cell: Callable[[Figures], str]) -> None:
        table.add_row(name, *map(cell, columns))

    row("requests", lambda one: f"{one.requests:,}")
    if any(one.goodput is not None for one in columns):
        row("goodput", lambda one: _share(one.goodput))
    for place, name in enumerate(Quantiles._fields):
        row(f"TTFT {name} s", lambda one, at=place: _at(one.ttft_s, at, 1.0))  # type: ignore[misc]
    for place, name in enumerate(Quantiles._fields):
        row(f"TPOT {name} ms", lambda one, at=place: _at(one.tpot_s, at, 1e3))  # type: ignore[misc]
    for site in sorted(set[str]().union(*(one.sites for one in columns))):
        row(f"at {site}", lambda one, site=site: _share(one.sites.get(site, 0.0)))  # type: ignore[misc]
    row("spill", lambda one: _share(one.spill))
    row("rejected", lambda one: f"{one.rejected:,}")
    row("failed", lambda one: f"{one.failed:,}")
    row(f"cost {currency}", lambda one: f"{one.cost_nano / 1e9:,.4f}")
    if any(one.unpriced for one in columns):
        row("without a price", lambda one: f"{one.unpriced:,}")
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _at(times: Quantiles | None, place: int, scale: float) -> str:
    from sim.leaderboard_table import NEVER

    if times is None:
        return "-"
    return f"{times[place] * scale:.3g}" if isfinite(times[place]) else NEVER
