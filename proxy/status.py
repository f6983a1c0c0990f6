"""`tidegate status`: what `GET /state` says, on one screen of 80 columns or more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from policies.host import HOST_FIGURES_VALID_S
from proxy.levels import bar, called, condition, levels
from proxy.policy_failures import failure_in_words
from proxy.pressure import STAGES
from proxy.prices import amount

_LEAST_BAR_CELLS, _MOST_BAR_CELLS = 10, 30

_MANY_ROWS, _LONG_S = 1000, 5.0
"""So many rows on their way into the database, or for so long, are more than a moment's."""

State = Mapping[str, Any]


def screen(state: State, address: str, width: int = 80) -> RenderableType:
    """Everything for people, for a terminal of so many columns."""
    rows: Sequence[State] = state["backends"]
    return Group(_heading(state, address), _backends(rows, width), *map(Text, _lines(state)))


def line(state: State) -> str:
    """The same in one line, for a log."""
    opened = sum(entry["open"] for entry in state["spill"])
    requests = state["requests"]
    return (
        f"{levels(state['backends'])}  spill {'open' if opened else 'closed'}  {state['queue']['waiting']} held  "
        f"{requests['total']} requests, {requests['rejected']} turned away, {requests['failed']} failed"
    )


def _heading(state: State, address: str) -> Text:
    word = Text("ready", "green") if state["ready"] else Text(f"not ready: {state['unready_reason']}", "red")
    for_s = duration(state["uptime_s"])
    return Text.assemble(
        "proxy at ", address, ": ", word, f", running for {for_s}", f", policy {state['policy']['name']}"
    )


def _backends(rows: Sequence[State], width: int) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("backend", overflow="fold")
    table.add_column("water level", no_wrap=True)
    for name in ("load", "queued"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for name in ("TTFT", "attempts", "tokens out"):
        table.add_column(name, justify="right", no_wrap=True)
    cells = max(_LEAST_BAR_CELLS, min(_MOST_BAR_CELLS, width - 80 + _LEAST_BAR_CELLS))
    for row in rows:
        table.add_row(
            Text(called(row)),
            bar(row["saturation"], cells),
            f"{row['in_flight']}/{row['slots']}",
            str(row["waiting"]),
            condition(row),
            f"{row['ttft_s']:.2f} s" if row["ttft_s"] else "-",
            f"{row['ok'] + row['failed'] + row['ignored']:,}",
            f"{row['completion_tokens']:,}",
        )
    return table


def _lines(state: State) -> Iterator[str]:
    if not state["reload_ok"]:
        yield "! the last reload was refused: what was configured before goes on (the log says why)"
    if names := state.get("restart_for"):
        yield f"! a restart is owed: what the file says of {', '.join(names)} is not in force yet"
    for found in state["policy"].get("failing", ()):
        yield f"! {failure_in_words(*found.values())}"
    if reason := state.get("keys", {}).get("trouble"):
        yield f"! keys cannot be read, no new or revoked one is seen: {reason}"
    for certificate in (*state.get("certificates", ()), *state.get("backend_certificates", ())):
        if certificate["warning"]:
            yield f"! {certificate['warning']}"
    if reason := (state.get("plans") or {}).get("trouble"):
        yield f"! plans: {reason.splitlines()[0]}"
    memory = state.get("memory")
    if memory and memory["shedding"]:
        yield f"! {STAGES[memory['shedding']]} ({memory['use']:.0%} of its bound)"
    for row in state["backends"]:
        yield from _complaints(row)
    yield ""
    yield f"queue     {_queue(state['queue'])}"
    yield from _standbys(state)
    yield from _plans(state.get("plans"))
    yield from _spill(state["spill"])
    yield from _hosts(state["hosts"])
    yield from _adaptive(state["backends"])
    if hedging := state.get("hedging"):
        counts = ", ".join(f"{hedging[how]:,} {how}" for how in ("won", "lost", "failed"))
        yield f"hedges    {counts}, {hedging['refused']:,} not made for want of budget"
    requests, tokens = state["requests"], state["tokens"]
    yield (
        f"requests  {requests['total']:,}: {requests['ok']:,} ok, {requests['rejected']:,} turned away, "
        f"{requests['failed']:,} failed,"
    )
    yield (
        f"          {requests['client_gone']:,} left by their client, "
        f"{requests['client_error']:,} with errors of their client"
    )
    if state["errors"]:
        most = sorted(state["errors"].items(), key=lambda item: -item[1])[:4]
        yield f"errors    {', '.join(f'{code} {count:,}' for code, count in most)}"
    yield f"tokens    {tokens['prompt']:,} in ({tokens['cached']:,} cached), {tokens['completion']:,} out"
    yield f"cost      {_cost(state)}"
    yield from _ledger(state["ledger"])


def _ledger(ledger: State) -> Iterator[str]:
    rows, trouble, oldest_s = ledger["lag_rows"], ledger.get("trouble", ""), ledger.get("oldest_s", 0.0)
    if ledger["failed"]:
        yield f"ledger    FAILED: {ledger['failed']}"
    elif rows and (trouble or rows > _MANY_ROWS or oldest_s > _LONG_S):
        are = "1 row is" if rows == 1 else f"{rows:,} rows are"
        why = f": {trouble}" if trouble else ""
        yield f"ledger    {are} not in the database yet, the oldest for {duration(oldest_s)}{why}"


def _complaints(row: State) -> Iterator[str]:
    """What is wrong with a backend."""
    probe = row["probe"] or {}
    if row["unavailable"] and not row.get("asleep"):
        since = probe.get("since_s")
        is_down = since is not None and not row["draining"] and not row["probed_up"]
        yield f"! {row['name']}: {row['unavailable']}" + (
            f", for {duration(since or 0.0)}" if is_down else ""
        )
    for complaint in probe.get("misconfigured", ()):
        if complaint in row["unavailable"]:
            continue  # said already
        yield f"! {row['name']}: {complaint}"


def _cost(state: State) -> str:
    cost = sum(row["cost"] for row in state["backends"])
    unpriced = state.get("unpriced_tokens", 0)
    besides = f", and {unpriced:,} tokens without a price" if unpriced else ""
    if cost:
        return f"{amount(round(cost * 1e9))} {state['currency']}{besides}"
    tokens = state["tokens"]["prompt"] + state["tokens"]["completion"]
    if not tokens:
        return "nothing yet"
    return "unpriced" if unpriced >= tokens else f"free, at a price of 0{besides}"


def _queue(queue: State) -> str:
    if not queue["waiting"]:
        return "nobody waits"
    tenants = ", ".join(f"{tenant} {count}" for tenant, count in queue["by_tenant"].items())
    return f"{queue['waiting']} held, the first for {duration(queue['oldest_s'])} ({tenants})"


def _standbys(state: State) -> Iterator[str]:
    rows = state.get("standbys", ())
    for row in rows:
        yield f"standby   {row['name']}: {_standby(row)}"
    known = {row["name"] for row in rows}
    for row in state["backends"]:
        if row.get("asleep") and row["name"] not in known:
            yield f"standby   {row['name']}: {row['unavailable'].removeprefix('a standby, ')}"
    for queue in state["queue"].get("for_standbys", ()):
        yield f"          {queue['waiting']} held for {' or '.join(queue['standbys'])}"


def _standby(row: State) -> str:
    words = f"{row['state']} for {duration(row['since_s'])}" if row["run"] else "never started"
    if row["pinned"]:
        words += ", by hand"
    if row["pause_s"] and row["state"] == "failed":
        words += f", tried again in {duration(row['pause_s'])}"
    why = (row["trouble"] or row["reason"]).partition("\n")[0]  # the rest is what its engine has said
    return f"{words}: {why}" if why else words


def _plans(plans: State | None) -> Iterator[str]:
    if plans is None:
        return
    if waiting := plans["waiting"]:
        are = "1 waits" if waiting == 1 else f"{waiting} wait"
        yield f"plans     {are}: tidegate plans list"
    for budget in plans["budgets"]:
        of = f"{budget['scope']} {budget['name']}".rstrip()
        yield (
            f"budget    {of}: {budget['used']:,.2f} of {budget['budget']:,.2f} {budget['currency']} used, "
            f"{budget['ratio']:.0%}"
        )


def _spill(entries: Sequence[State]) -> Iterator[str]:
    if not entries:
        yield "spill     no request has met a tier with thresholds yet"
    for entry in entries:
        moved = entry["moved_s_ago"]
        since = "" if moved is None else f" for {duration(moved)}"
        openings = entry["openings"]
        yield (
            f"spill     {'OPEN' if entry['open'] else 'closed'}{since}, opened {openings} "
            f"time{'' if openings == 1 else 's'}: {', '.join(entry['backends'])} (tier {entry['tier'] + 1} "
            f"of '{entry['rule']}')"
        )


_FIGURES = (
    ("gpu_utilisation", "GPU {:.0%}"),
    ("gpu_memory", "GPU memory {:.0%}"),
    ("gpu_temperature", "{:.0f} °C"),
    ("gpu_power", "{:.0f} W"),
    ("cpu", "CPU {:.0%}"),
    ("memory", "memory {:.0%}"),
)


def _hosts(hosts: Mapping[str, State]) -> Iterator[str]:
    for site, host in hosts.items():
        words = [form.format(host[name]) for name, form in _FIGURES if name in host]
        age_s = host["age_s"]
        said = ", ".join(words) or "nothing yet"
        if age_s is not None and age_s > HOST_FIGURES_VALID_S:
            said += f" ({duration(age_s)} ago, ignored)"
        yield f"host      {site}: {said}"
        for exporter, reason in host["reasons"].items():
            yield f"          ! {exporter}: {reason}"


def _adaptive(rows: Sequence[State]) -> Iterator[str]:
    for row in rows:
        if (found := row.get("adaptive")) is None:
            continue
        least = found["minimum_ttft_s"]
        said = f"{found['slots']} of {row['full_slots']} slots"
        said += f", first token after {least:.2f} s at the least" if least else ""
        said += ", measures that now with few in flight" if found["measuring"] else ""
        yield f"adaptive  {row['name']}: {said}"


def duration(seconds: float) -> str:
    """`0.3 s`, `35 s`, `2 min`, `3 h 5 min`, `4 d 2 h`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours < 1:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
