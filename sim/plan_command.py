"""The command `tidegate plan`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from math import inf, isfinite
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from policies.profile import Profile
    from sim.plan import Option, Plan

SHOWN_NEAREST = 3


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
    carbon: Annotated[
        float | None, typer.Option(help="gCO2e per kWh of the grid (China 2023: 582).", min=0)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """Say which resources meet a service level, the cheapest first; if none does, what is nearest.

    Example: tidegate plan --model 32B --concurrency 32 --ttft 2 --tpot 0.1 --price H20=1.9
    """
    from policies.yamlfile import FileProblems
    from sim.plan import Demand
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
        profiles = list(_priced(profiles, price or []))
    except (ValueError, OSError, FileProblems) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    if not any(model.lower() in one.model.lower() for one in profiles):
        models = ", ".join(sorted({one.model for one in profiles}))
        typer.echo(f"no profile is of a model like {model!r}; there are {models}", err=True)
        raise typer.Exit(2)
    try:
        found = make_plan(demand, profiles)
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(json.dumps(_as_json(found), indent=2))
    else:
        _show(found)
    if not found.options:
        raise typer.Exit(1)


def _priced(profiles: Iterable[Profile], prices: list[str]) -> Iterable[Profile]:
    """The profiles with the prices that the user gave for their cards. Raises ValueError."""
    from policies.profile import Origin, Price, Source

    by_card: dict[str, tuple[float, str]] = {}
    for text in prices:
        card, _, amount = text.partition("=")
        number, currency = amount.rstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), amount[-3:]
        if not amount[-3:].isalpha():
            number, currency = amount, "USD"
        try:
            by_card[card.lower()] = (float(number), currency)
        except ValueError:
            raise ValueError(f"a price is CARD=NUMBER or CARD=NUMBER with a currency, not {text!r}") from None
    known = {one.card.lower() for one in profiles}
    for card in by_card.keys() - known:
        raise ValueError(f"no profile has the card {card!r}; there are {', '.join(sorted(known))}")
    for one in profiles:
        if one.card.lower() in by_card:
            amount_each, currency = by_card[one.card.lower()]
            given = Price(
                per_hour=amount_each * one.cards,
                currency=currency,
                source=Source(origin=Origin.PUBLISHED, text="given by --price"),
            )
            yield one.model_copy(update={"price": given})
        else:
            yield one


def _show(found: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    rows = found.options or found.nearest[:SHOWN_NEAREST]
    if not found.options:
        console.print("Nothing meets this. Nearest:")
    table = Table(box=None, pad_edge=False)
    table.add_column("resources", no_wrap=True)
    titles = ["cards", "TTFT s", "TPOT ms", "tok/s", "margin", "an hour", "1M tokens"]
    carbon = any(one.gco2_per_hour is not None for one in rows)
    for title in [*titles, "gCO2e/h"] if carbon else titles:
        table.add_column(title, justify="right", no_wrap=True)
    for one in rows:
        cells = _cells(one)
        table.add_row(*cells if carbon else cells[:-1])
    console.print(table)
    if any(one.per_hour is None for one in rows):
        console.print("unknown: nobody has published what these cards cost; --price CARD=NUMBER says it")


def _cells(one: Option) -> list[str]:
    figures = one.figures
    name = one.profile.name if one.copies == 1 else f"{one.copies} x {one.profile.name}"
    per_hour, per_million = one.per_hour, one.per_million_tokens
    return [
        name,
        str(one.cards),
        f"{figures.ttft_mean:.2f}",
        f"{figures.tpot_mean * 1e3:.1f}",
        f"{one.tokens_per_s:.0f}",
        f"{one.margin:+.0%}",
        "unknown" if per_hour is None else f"{per_hour:.2f} {one.currency}",
        "unknown" if per_million is None else f"{per_million:.2f} {one.currency}",
        "unknown" if one.gco2_per_hour is None else f"{one.gco2_per_hour:.0f}",
    ]


def _as_json(found: Plan) -> dict[str, Any]:
    def row(one: Option) -> dict[str, Any]:
        return {
            "profile": one.profile.name,
            "model": one.profile.model,
            "copies": one.copies,
            "cards": one.cards,
            "meets": one.meets,
            "users_per_copy": one.figures.users,
            "figures": asdict(one.figures),
            "tokens_per_s": one.tokens_per_s,
            "most_users": one.most,
            "margin": one.margin,
            "price_per_hour": one.per_hour,
            "price_per_million_output_tokens": one.per_million_tokens,
            "currency": one.currency or None,
            "watts": one.watts,
            "gco2_per_hour": one.gco2_per_hour,
            "shortfall": one.shortfall if isfinite(one.shortfall) else None,
            "source": one.profile.step.source.model_dump(mode="json"),
        }

    return {
        "options": [row(one) for one in found.options],
        "nearest": [row(one) for one in found.nearest],
    }
