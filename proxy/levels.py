"""Water levels of backends as a terminal shows them: for `tidegate status` and `tidegate demo`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text


def bar(saturation: float, cells: int) -> Text:
    """A water level: full at 1, red from there on."""
    filled = min(cells, round(saturation * cells))
    colour = "green" if saturation < 0.7 else "yellow" if saturation < 1.0 else "red"
    return Text.assemble(("█" * filled, colour), ("░" * (cells - filled), "dim"), f" {saturation:4.2f}")


def called(row: Mapping[str, Any]) -> str:
    """A backend by name, and by its site where that has another one."""
    return row["name"] if row["name"] == row["site"] else f"{row['name']} ({row['site']})"


def condition(row: Mapping[str, Any]) -> Text:
    """One word on whether requests go there."""
    if row.get("asleep"):
        return Text("draining" if row["draining"] else "standby", "yellow" if row["draining"] else "dim")
    if row["draining"]:
        return Text("draining", "yellow")
    if row["in_spite"]:
        return Text("used in spite", "red")
    if not row["probed_up"]:
        return Text("down", "red")
    if row["breaker"] != "closed":
        return Text(f"breaker {row['breaker']}", "red")
    if not row["models"]:
        return Text("no models", "red")
    if not row["available"]:
        return Text("away", "red")
    return Text("slow start", "yellow") if row["slow_start"] else Text("up", "green")


def levels(rows: Sequence[Mapping[str, Any]]) -> str:
    """All backends in one line, for a log."""
    return "  ".join(
        f"{row['name']} {row['saturation']:.2f} ({row['in_flight']}/{row['slots']})" for row in rows
    )
