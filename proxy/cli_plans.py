"""`tidegate plans`, `tidegate templates` and `tidegate images`: the admin in control of what is started."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from proxy.cli_ask import AdminOption, RunningStateOption, admin_port
from proxy.cli_common import (
    CONTEXT,
    ByOption,
    ConfigOption,
    JsonOption,
    config_path,
    console,
    fail,
    load,
    person,
    readable_errors,
)

if TYPE_CHECKING:
    from proxy.scaling.images import Entry, Images

plans_app = typer.Typer(
    help="Plans to start standbys: list, show, approve, refuse. (`tidegate plan` works out resources for a SLA.)",
    no_args_is_help=True,
    context_settings=CONTEXT,
)
templates_app = typer.Typer(
    help="Templates of plans: list, show, save, run, delete. (`tidegate plan` works out resources for a SLA.)",
    no_args_is_help=True,
    context_settings=CONTEXT,
)
ReasonOption = Annotated[str, typer.Option("--reason", help="Why, for the record.")]
PlanArgument = Annotated[str, typer.Argument(help="Id of the plan, or its first four characters or more.")]
NameArgument = Annotated[str, typer.Argument(help="Name of the template.")]


def _ask(
    path: str,
    content: dict[str, Any] | None,
    admin: str | None,
    config: Path | None,
    state: Path | None,
    method: str = "",
) -> dict[str, Any]:
    from proxy.ask import AskError, ask

    try:
        body = None if content is None else json.dumps(content).encode()
        return ask(admin_port(admin, config, state), path, body, method)
    except AskError as error:
        fail(str(error), 1)


# Plans


@plans_app.command("list")
def plans_list(
    everything: Annotated[bool, typer.Option("--all", "-a", help="Those too that have ended.")] = False,
    last: Annotated[int, typer.Option(help="How many at most, the newest first.", min=1)] = 100,
    admin: AdminOption = None,
    config: ConfigOption = None,
    state: RunningStateOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show the plans that are open: those that wait, and those that are being executed.

    Example: tidegate plans list --all
    """
    query = f"?limit={last}" + ("" if everything else "&state=open")
    shown = _ask(f"/plans{query}", None, admin, config, state)
    if json_output:
        typer.echo(json.dumps(shown, indent=2))
        return
    if not shown["plans"]:
        typer.echo("no plans" if everything else "no open plans (--all shows those that have ended)")
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("id", "state", "starts", f"{shown['currency']}/h", "waits for", "since"):
        table.add_column(name, overflow="fold")
    for plan in shown["plans"]:
        cost = plan["cost_per_hour"]
        cells = [
            plan["id"],
            plan["state"],
            ", ".join(plan["standbys"]),
            "unknown" if cost is None else f"{cost:,.2f}",
            plan["waits_for"],
            plan["reason"],
        ]
        table.add_row(*map(Text, cells))
    console().print(table)
    if (more := shown["of"] - len(shown["plans"])) > 0:
        typer.echo(f"and {more} older ones (--last shows more)")


@plans_app.command("show")
def plans_show(
    id: PlanArgument,
    admin: AdminOption = None,
    config: ConfigOption = None,
    state: RunningStateOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show one plan: what it takes, what it costs, what it promises, and who decided what.

    Example: tidegate plans show 3f9c21ab
    """
    shown = _ask(f"/plans/{quote(id, safe='')}", None, admin, config, state)
    typer.echo(json.dumps(shown, indent=2) if json_output else "\n".join(_plan_lines(shown)))


def _plan_lines(shown: dict[str, Any]) -> Iterable[str]:
    from policies.plans import plan_from
    from proxy.scaling.planwords import forecast_in_words

    plan = plan_from(shown)
    resources = plan.resources
    cost = "unknown" if plan.cost_per_hour is None else f"{plan.cost_per_hour:,.2f} {shown['currency']}"
    card = (
        f"{resources.count * resources.cards} × {resources.card}"
        if resources.card
        else "a card that nobody named"
    )
    waits = f", waits for {plan.waits_for}" if plan.waits_for else ""
    yield f"plan {plan.id}: {plan.state}{waits}"
    yield f"starts    {', '.join(plan.standbys)} at {resources.site}"
    yield f"for       {resources.model} ({resources.task}), on {card}"
    if resources.image:
        yield f"image     {resources.image}"
    yield f"costs     {cost} an hour"
    if plan.budget_left is not None:
        yield f"budget    {plan.budget_left:,.2f} {shown['currency']} were left"
    yield f"promises  {forecast_in_words(plan.forecast) or 'unknown: no profile says it'}"
    yield f"since     {plan.reason}"
    if plan.waiting:
        yield f"until     {_when(plan.due)} ({plan.mode})"
    for made in plan.decisions:
        yield f"{_when(made.wall)}  {made.after}, by {made.by}" + (f": {made.reason}" if made.reason else "")


def _when(wall: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(wall))


@plans_app.command("approve")
def plans_approve(
    id: PlanArgument,
    by: ByOption = None,
    reason: ReasonOption = "",
    admin: AdminOption = None,
    config: ConfigOption = None,
    state: RunningStateOption = None,
    json_output: JsonOption = False,
) -> None:
    """Have a plan executed. One over its budget stays where it is: raise the ceiling first.

    Example: tidegate plans approve 3f9c21ab --by ada --reason "exam week"
    """
    _decide(id, "approve", person(by), reason, (admin, config, state), json_output=json_output)


@plans_app.command("refuse")
def plans_refuse(
    id: PlanArgument,
    by: ByOption = None,
    reason: ReasonOption = "",
    admin: AdminOption = None,
    config: ConfigOption = None,
    state: RunningStateOption = None,
    json_output: JsonOption = False,
) -> None:
    """Have a plan not executed; its standbys are left alone for a while (`scaling.approval`).

    Example: tidegate plans refuse 3f9c21ab --reason "too dear"
    """
    _decide(id, "refuse", person(by), reason, (admin, config, state), json_output=json_output)


def _decide(
    id: str,
    what: str,
    by: str,
    reason: str,
    where: tuple[str | None, Path | None, Path | None],
    *,
    json_output: bool,
) -> None:
    shown = _ask(f"/plans/{quote(id, safe='')}/{what}", {"by": by, "reason": reason}, *where)
    if json_output:
        typer.echo(json.dumps(shown, indent=2))
    else:
        typer.echo(f"plan {shown['id']} is {shown['state']}, by {by}")


# Templates


@templates_app.command("list")
def templates_list(
    admin: AdminOption = None,
    config: ConfigOption = None,
    state: RunningStateOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show the templates that there are.

    Example: tidegate templates list
    """
    shown = _ask("/templates", None, admin, config, state)
    if json_output:
        typer.echo(json.dumps(shown, indent=2))
        return
    if shown["trouble"]:
        typer.echo(
            f"warning: the file cannot be used as it is, the old templates go on:\n{shown['trouble']}",
            err=True,
        )
    if shown["unworkable"]:
        typer.echo(f"warning: some cannot work as things are:\n{shown['unworkable']}", err=True)
    if not shown["templates"]:
        typer.echo(f"no templates in {shown['file']}")
    for name, template in shown["templates"].items():
        typer.echo(f"{name}: {_template_in_words(template)}")


def _template_in_words(template: dict[str, Any]) -> str:
    of = template.get("standbys") or [f"{template.get('count', 1)} of those that fit"]
    said = [f"{template['model']} on {', '.join(of)}"]
    said += [f"at {' or '.join(template['sites'])}"] if template.get("sites") else []
    said += [f"with {' or '.join(template['cards'])}"] if template.get("cards") else []
    said += [f"at most {template['budget']} a month"] if template.get("budget") is not None else []
    said += [template["mode"]] if template.get("mode") else []
    said += ["fires by itself"] if template.get("automatic") else []
    return ", ".join(said)


@templates_app.command("show")
def templates_show(
    name: NameArgument,
    admin: AdminOption = None,
    config: ConfigOption = None,
    state: RunningStateOption = None,
) -> None:
    """Show one template, as JSON.

    Example: tidegate templates show rush-hour
    """
    typer.echo(json.dumps(_ask(f"/templates/{quote(name, safe='')}", None, admin, config, state), indent=2))


@templates_app.command("save")
def templates_save(
    name: NameArgument,
    model: Annotated[str | None, typer.Option(help="Model to serve.")] = None,
    task: Annotated[
        str | None, typer.Option(help="generate, embed, classify, score or transcribe. Default: generate.")
    ] = None,
    mode: Annotated[str | None, typer.Option(help="auto or confirm. Default: that of `scaling`.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="Most money a month, in the ledger's currency.")
    ] = None,
    ttft: Annotated[str | None, typer.Option(help="Mean time to the first token, at most: 2s.")] = None,
    tpot: Annotated[str | None, typer.Option(help="Mean time per further token, at most: 100ms.")] = None,
    site: Annotated[list[str] | None, typer.Option(help="Where (repeatable). Default: anywhere.")] = None,
    card: Annotated[list[str] | None, typer.Option(help="On which card (repeatable). Default: any.")] = None,
    count: Annotated[int | None, typer.Option(help="How many standbys. Default: one.")] = None,
    standby: Annotated[list[str] | None, typer.Option(help="Just this one (repeatable).")] = None,
    when_spilling: Annotated[
        str | None, typer.Option(help="Fire when a tier has been too full for so long: 30s.")
    ] = None,
    when_queue: Annotated[int | None, typer.Option(help="Fire when so many requests wait.")] = None,
    when_oldest: Annotated[
        str | None, typer.Option(help="Fire when one has waited for so long: 10s.")
    ] = None,
    when_saturation: Annotated[
        str | None, typer.Option(help="Fire when local backends are as full as this: 90%.")
    ] = None,
    plan: Annotated[str | None, typer.Option(help="Take model, standbys and mode from this plan.")] = None,
    admin: AdminOption = None,
    config: ConfigOption = None,
    state: RunningStateOption = None,
    json_output: JsonOption = False,
) -> None:
    """Save a template, in place of the one of this name. One that cannot work is refused, with the reason.

    Example: tidegate templates save rush-hour --model qwen3-32b --site nanjing --budget 200 --when-queue 20
    """
    if model is None and plan is None:
        fail("say what it is to serve (--model), or take that from a plan (--plan ID)")
    whens = {
        "spilling": when_spilling,
        "queue": when_queue,
        "oldest": when_oldest,
        "saturation": when_saturation,
    }
    given: dict[str, Any] = {
        "model": model,
        "task": task,
        "mode": mode,
        "budget": budget,
        "sla": {key: value for key, value in (("ttft", ttft), ("tpot", tpot)) if value is not None},
        "sites": site,
        "cards": card,
        "count": count,
        "standbys": standby,
        "automatic": {key: value for key, value in whens.items() if value is not None},
        "plan": plan,
    }
    content = {key: value for key, value in given.items() if value not in (None, {}, [])}
    shown = _ask(f"/templates/{quote(name, safe='')}", content, admin, config, state, "PUT")
    if json_output:
        typer.echo(json.dumps(shown, indent=2))
    else:
        typer.echo(f"template {name} is saved: {_template_in_words(shown)}")


@templates_app.command("run")
def templates_run(
    name: NameArgument,
    by: ByOption = None,
    admin: AdminOption = None,
    config: ConfigOption = None,
    state: RunningStateOption = None,
    json_output: JsonOption = False,
) -> None:
    """Make a plan of a template now.

    Example: tidegate templates run rush-hour
    """
    shown = _ask(f"/templates/{quote(name, safe='')}/run", {"by": person(by)}, admin, config, state)
    if json_output:
        typer.echo(json.dumps(shown, indent=2))
        return
    typer.echo("\n".join(_plan_lines(shown)))
    if shown["state"] == "proposed":
        typer.echo(f"approve it: tidegate plans approve {shown['id']}")


@templates_app.command("delete")
def templates_delete(
    name: NameArgument,
    admin: AdminOption = None,
    config: ConfigOption = None,
    state: RunningStateOption = None,
) -> None:
    """Delete a template. Plans that were made of it go on.

    Example: tidegate templates delete rush-hour
    """
    _ask(f"/templates/{quote(name, safe='')}", None, admin, config, state, "DELETE")
    typer.echo(f"template {name} is deleted")


# Images


def images(
    model: Annotated[str, typer.Option(help="Model. Default: whatever.")] = "",
    card: Annotated[str, typer.Option(help="Card, such as H20. Default: whatever.")] = "",
    task: Annotated[
        str, typer.Option(help="generate, embed, classify, score or transcribe. Default: whatever.")
    ] = "",
    protocol: Annotated[str, typer.Option(help="openai or anthropic. Default: whatever.")] = "",
    cards: Annotated[int, typer.Option(help="How many cards.", min=1)] = 1,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show which image runs a model on a card; with --model and --card, the one that is taken, or what is nearest.

    Example: tidegate images --model Qwen/Qwen3-32B --card H20
    """
    from proxy.scaling.images import PROTOCOLS, TASKS, Missing, Wanted

    if task and task not in TASKS:
        fail(f"--task: {', '.join(TASKS)}; not '{task}'")
    if protocol and protocol not in PROTOCOLS:
        fail(f"--protocol: {', '.join(PROTOCOLS)}; not '{protocol}'")
    known = _images(config)
    if model and card:
        found = known.launch(Wanted(model, card, task or "generate", protocol or "openai"), cards)
        if isinstance(found, Missing):
            if json_output:
                typer.echo(json.dumps({"found": None, "message": str(found)}, indent=2))
            fail(str(found), 1)
        shown = {
            "image": found.image or None,
            "command": list(found.command) or None,
            "arguments": list(found.arguments),
            "environment": dict(found.environment),
            "source": found.source,
        }
        if json_output:
            typer.echo(json.dumps({"found": shown}, indent=2))
            return
        typer.echo(found)
        typer.echo(f"  arguments    {' '.join(found.arguments)}")
        for name, value in found.environment.items():
            typer.echo(f"  environment  {name}={value}")
        typer.echo(f"  source       {found.source}")
        return
    entries = list(known.matching(model, card, task, protocol))
    if json_output:
        typer.echo(json.dumps([entry.model_dump(mode="json") for entry in entries], indent=2))
    elif not entries:
        fail("no entry is for that: leave an option out to see more", 1)
    else:
        for entry in entries:
            typer.echo(_entry_in_words(entry))


def _entry_in_words(entry: Entry) -> str:
    what = entry.image or " ".join(entry.command or ())
    models = "" if entry.models == ["*"] else f"{', '.join(entry.models)} on "
    return f"{what}\n  {models}{', '.join(entry.cards)}; {', '.join(entry.tasks)}"


def _images(config: Path | None) -> Images:
    from proxy.scaling.images import load_images

    path = config_path(config)
    own = load(path).scaling.images if path is not None else None
    with readable_errors():
        return load_images(own)
