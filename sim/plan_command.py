"""The command `tidegate plan`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from math import inf, isfinite
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from sim.command_errors import error_text, fail

if TYPE_CHECKING:
    from rich.table import Table

    from policies.profile import Profile
    from sim.plan import Demand, Option, Plan

SHOWN_NEAREST = 3
MISSED = "!"
"""Behind a figure that misses the service level."""
WIDTH = 110
"""Columns of the table at least: no figure is cut off."""


def plan(
    concurrency: Annotated[int, typer.Option(help="Users at once.", min=1)],
    model: Annotated[
        str, typer.Option(help="Model, as profiles name it or a part of that: 32B. Empty: any.")
    ] = "",
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 1024,
    output_tokens: Annotated[int, typer.Option(help="Tokens of each answer.", min=1)] = 1024,
    ttft: Annotated[float | None, typer.Option(help="Mean seconds to the first token, at most.")] = None,
    tpot: Annotated[
        float | None, typer.Option(help="Mean seconds per further output token, at most.")
    ] = None,
    tokens_per_s: Annotated[
        float, typer.Option(help="Output tokens a second and user, at least.", min=0)
    ] = 0.0,
    profile: Annotated[
        list[str] | None, typer.Option(help="Profile, by name or .yaml file; repeat. Default: all there are.")
    ] = None,
    price: Annotated[
        list[str] | None,
        typer.Option(help="What one card costs an hour: CARD=2.50 or CARD=18CNY; repeat for several."),
    ] = None,
    watts: Annotated[
        list[str] | None, typer.Option(help="What one card draws under load: CARD=400; repeat for several.")
    ] = None,
    carbon: Annotated[
        float | None, typer.Option(help="gCO2e per kWh of the grid (China 2023: 582).", min=0)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """Say which resources meet a service level, the cheapest first; if none does, what is nearest.

    Nothing is started. Plans of a running proxy to start standbys are another thing: `tidegate plans`.

    Example: tidegate plan --model 32B --concurrency 32 --ttft 2 --tpot 0.1 --price H20=1.9
    """
    from rich.console import Console

    from policies.yamlfile import FileProblems
    from sim.plan import Demand, DemandError
    from sim.plan import plan as make_plan
    from sim.profile import load_profile, profile_names

    try:
        demand = Demand(
            concurrency,
            prompt_tokens,
            output_tokens,
            inf if ttft is None else ttft,
            inf if tpot is None else tpot,
            tokens_per_s,
            model,
            carbon,
        )
        profiles = [load_profile(name) for name in profile or profile_names()]
        profiles = list(_with_given(profiles, price or [], watts or []))
    except DemandError as error:
        fail(f"{_OPTIONS.get(error.field) or '--' + error.field.replace('_', '-')} {error.message}")
    except (ValueError, OSError, FileProblems) as error:
        fail(error_text(error))
    if not any(model.lower() in one.model.lower() for one in profiles):
        models = ", ".join(sorted({one.model for one in profiles}))
        fail(f"no profile is of a model like {model!r}; there are {models}")
    try:
        with Console(stderr=True).status("simulating ..."):
            found = make_plan(demand, profiles)
    except ValueError as error:
        fail(str(error))
    if as_json:
        typer.echo(json.dumps(_as_json(found), indent=2))
    else:
        _show(found, demand)
    if not found.options:
        raise typer.Exit(1)


_OPTIONS = {"ttft_s": "--ttft", "tpot_s": "--tpot", "carbon_gco2_kwh": "--carbon"}
"""Where an option is not named as the field of a demand is."""


class _Given(NamedTuple):
    """What the user says of one card."""

    number: float
    unit: str
    said: str
    """The option as it was written."""


def _with_given(profiles: list[Profile], prices: list[str], watts: list[str]) -> Iterable[Profile]:
    """The profiles with what the user says of their cards. Raises ValueError."""
    from policies.profile import Origin, Power, Price, Source

    cards = {one.card for one in profiles}
    price_of = _by_card("--price", prices, cards, "or CARD=NUMBER and a currency: H20=2.50, H20=18CNY")
    watts_of = _by_card("--watts", watts, cards, "as in H20=400")
    for one in profiles:
        changes: dict[str, Price | Power] = {}
        if given := price_of.get(one.card.lower()):
            source = Source(origin=Origin.GIVEN, text=given.said)
            currency = given.unit or "USD"
            changes["price"] = Price(per_hour=given.number * one.cards, currency=currency, source=source)
        if given := watts_of.get(one.card.lower()):
            source = Source(origin=Origin.GIVEN, text=given.said)
            changes["power"] = Power(watts=given.number * one.cards, source=source)
        yield one.model_copy(update=changes)


_CARD_IS = re.compile(r"(.+)=([0-9]{1,12}(?:\.[0-9]{1,12})?)([A-Z]{3})?")


def _by_card(option: str, texts: list[str], cards: Iterable[str], form: str) -> dict[str, _Given]:
    """What an option says of each card, by its name in small letters. Raises ValueError.

    All such options are `CARD=NUMBER`, a price may have a currency behind it; `form` says so in messages.
    """
    known = {card.lower(): card for card in cards}
    found: dict[str, _Given] = {}
    for text in texts:
        match = _CARD_IS.fullmatch(text)
        if match is None or (match[3] and option != "--price"):
            raise ValueError(f"{option} is CARD=NUMBER, {form}; not {text!r}")
        card = match[1].lower()
        if card not in known:
            names = ", ".join(sorted(known.values()))
            raise ValueError(f"{option} {text}: no profile has the card {match[1]!r}; there are {names}")
        if card in found:
            raise ValueError(
                f"{option} is given twice for {known[card]}: {found[card].said}, {option} {text}"
            )
        found[card] = _Given(float(match[2]), match[3] or "", f"{option} {text}")
    return found


def _show(found: Plan, demand: Demand) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    console = Console(width=max(console.width, WIDTH))
    rows = found.options or found.nearest[:SHOWN_NEAREST]
    if rows and not demand.has_level:
        said = "no service level was given, so any speed will do: --ttft, --tpot and --tokens-per-s say one"
        console.print(said)
    if not found.options:
        nearest = f"Nothing meets this. Nearest ({MISSED} misses the service level):"
        console.print(nearest if rows else "Nothing meets this.")
    if rows:
        console.print(_table(rows))
    carbon = demand.carbon_gco2_kwh is not None
    for line in (*_unknown(found, rows, carbon), *_left_out(found)):
        console.print(Text(line))


def _table(rows: list[Option]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("resources", no_wrap=True)
    titles = ["cards", "slots", "TTFT s", "TPOT ms", "tok/s", "margin", "an hour", "1M tokens"]
    columns = [_cells(one) for one in rows]
    if any(one.watts is not None for one in rows):
        titles.append("watts")
        for cells, one in zip(columns, rows, strict=True):
            cells.append("unknown" if one.watts is None else f"{one.watts:.0f}")
    if any(one.gco2_per_hour is not None for one in rows):
        titles.append("gCO2e/h")
        for cells, one in zip(columns, rows, strict=True):
            cells.append("unknown" if one.gco2_per_hour is None else f"{one.gco2_per_hour:.0f}")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for cells in columns:
        table.add_row(*cells)
    return table


def _cells(one: Option) -> list[str]:
    figures = one.figures
    name = one.profile.name if one.copies == 1 else f"{one.copies} x {one.profile.name}"
    least = ">=" if one.at_least else ""
    marks = {name: MISSED if name in one.missed else "" for name in ("ttft_s", "tpot_s", "tokens_per_s")}
    per_hour, per_million = one.per_hour, one.per_million_tokens
    return [
        name,
        str(one.cards),
        f"{least}{one.slots}",
        f"{figures.ttft_mean:.2f}{marks['ttft_s']}",
        f"{figures.tpot_mean * 1e3:.1f}{marks['tpot_s']}",
        f"{one.tokens_per_s:.0f}{marks['tokens_per_s']}",
        f"{least}{one.margin:+.0%}",
        "unknown" if per_hour is None else f"{per_hour:.2f} {one.currency}",
        "unknown" if per_million is None else f"{per_million:.2f} {one.currency}",
    ]


def _unknown(found: Plan, rows: list[Option], carbon: bool) -> Iterable[str]:
    """What nobody knows of the rows that are shown, and how to say it."""
    if any(one.per_hour is None for one in rows):
        yield "price unknown: nobody has published what these cards cost; --price CARD=NUMBER says it"
    if carbon and any(one.watts is None for one in rows):
        known = any(one.watts is not None for one in (*found.options, *found.nearest))
        who = (
            "some profiles do not say what their cards draw"
            if known
            else "no profile says what its cards draw"
        )
        yield f"carbon unknown: {who}; --watts CARD=NUMBER says it"


def _left_out(found: Plan) -> Iterable[str]:
    """The profiles that cannot serve such a request, by the reason."""
    by_reason: dict[str, list[str]] = {}
    for profile, reason in found.left_out:
        by_reason.setdefault(reason, []).append(profile.name)
    for reason, names in by_reason.items():
        yield f"left out: {', '.join(names)}: {reason}"


def _as_json(found: Plan) -> dict[str, Any]:
    def row(one: Option) -> dict[str, Any]:
        price, power = one.profile.price, one.profile.power
        return {
            "profile": one.profile.name,
            "model": one.profile.model,
            "copies": one.copies,
            "cards": one.cards,
            "meets": one.meets,
            "missed": sorted(one.missed),
            "users_per_copy": one.figures.users,
            "figures": asdict(one.figures),
            "tokens_per_s": one.tokens_per_s,
            "slots": one.slots,
            "most_users": one.most,
            "margin": one.margin,
            "at_least": one.at_least,
            "price_per_hour": one.per_hour,
            "price_per_million_output_tokens": one.per_million_tokens,
            "currency": one.currency or None,
            "watts": one.watts,
            "gco2_per_hour": one.gco2_per_hour,
            "shortfall": one.shortfall if isfinite(one.shortfall) else None,
            "source": one.profile.step.source.model_dump(mode="json"),
            "price_source": None if price is None else price.source.model_dump(mode="json"),
            "power_source": None if power is None else power.source.model_dump(mode="json"),
        }

    return {
        "options": [row(one) for one in found.options],
        "nearest": [row(one) for one in found.nearest],
        "left_out": [{"profile": one.profile.name, "reason": one.reason} for one in found.left_out],
    }
