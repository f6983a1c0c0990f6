"""Who may decide in case 4.2, as policy files."""

from __future__ import annotations

from typing import Final, NamedTuple

SLOTS: Final = 48
"""Requests that the box serves at once, at most."""
LEVELS: Final = (4, 8, 16, 24, 32, 40)


class Entry(NamedTuple):
    """One policy."""

    name: str
    text: str
    slots: int = SLOTS
    """Of the box, as the configuration gives them: from so many requests on it spills."""
    family: str = ""
    """Of the same policy with another figure; empty: there is one only."""


_QUEUE: Final = "queue: {wait: 10s, depth: 200}"


def _free(name: str, pick: str, family: str = "") -> Entry:
    """Chooses among all backends."""
    return Entry(name, f"rules:\n  - {{name: all, pick: {pick}, {_QUEUE}}}\n", family=family)


def _local_first(
    name: str, slots: int, spill: str = "{enter: 85%, leave: 70%}", then: str = '{site: "*"}'
) -> Entry:
    text = (
        "rules:\n"
        "  - name: local first\n"
        f"    prefer: [{{site: local, spill: {spill}}}, {then}]\n"
        "    pick: least-load\n"
        f"    {_QUEUE}\n"
    )
    return Entry(name, text, slots, "local-first")


_CHEAP: Final = '{price: {max: 0.3}}, {site: "*"}'
"""Input and output together: guiyang's."""


BOX_ALONE: Final = Entry(
    "box alone", "rules:\n  - {name: all, require: {site: local}, pick: least-load}\n", 100_000
)
"""Nothing is held or refused, nor is the engine asked how full it is: its own queue is all there is."""

POLICIES: Final = (
    *(_local_first(f"local-first {slots}", slots) for slots in (*LEVELS, SLOTS)),
    _local_first("local-first +50%", SLOTS, "{enter: 150%, leave: 120%}"),
    *(_local_first(f"local-first {slots}, cheapest", slots, then=_CHEAP) for slots in (8, 24, SLOTS)),
    *(
        _free(
            f"kv-threshold {threshold:g}",
            f"{{policy: kv-threshold, threshold: {threshold:g}, prefer: [local]}}",
            "kv-threshold",
        )
        for threshold in (0.2, 0.4, 0.7, 0.9)
    ),
    *(
        _free(f"cost {money:g}", f"{{policy: cost, money: {money:g}, ttft: 2, tpot: 0.1}}", "cost")
        for money in (1e3, 1e4, 1e5, 1e6)
    ),
    *(
        _free(name, name)
        for name in (
            "least-load",
            "shortest-path",
            "peak-ewma",
            "prequal",
            "skylb",
            "weighted-scores",
            "lmetric",
            "gorgo",
            "mooncake",
            "forecast",
            "nash",
            "wardrop",
        )
    ),
    Entry("cloud only", "rules:\n  - {name: all, require: {site: remote}, pick: least-load}\n"),
)
"""`local-first N`: the library's file, with N slots. It spills while all are taken; `+50%` lets half as many again
queue in the box's engine before that. `cheapest`: then to the cheaper site before the dearer one. `cost M`: a
dollar is worth M seconds."""

NOT_PLAYED: Final = {
    "cache-aware": "prefixes, which the trace does not know",
    "prefix-affinity": "prefixes",
    "session-affinity": "sessions, which the trace does not know",
    "geo": "the map, on which the box is always nearest",
    "power-of-two": "chance, whatever it costs",
    "random": "chance",
    "round-robin": "turns, whatever it costs",
    "weighted-qps": "turns by weight",
}
"""Policies of the registry that are not here, and by what they choose."""

QUICK: Final = ("local-first 24", "local-first 48", "local-first 48, cheapest", "cost 10000", "forecast")
"""To see whether it runs: each kind once, and a second level."""


def named(name: str) -> Entry:
    """A policy by its name. Raises StopIteration."""
    return next(entry for entry in POLICIES if entry.name == name)
