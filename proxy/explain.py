"""`tidegate explain`: why one request went where it went, in plain words.

The figures come from the admin port of the running proxy (`proxy/admin/explain.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from proxy.ask import AdminPort, ask


def fetch(request_id: str, admin: AdminPort | str) -> dict[str, Any]:
    """What an admin port, or the one at HOST:PORT, knows of a request. Raises AskError."""
    return ask(admin, f"/explain/{quote(request_id, safe='')}")


def render(record: dict[str, Any]) -> str:
    """The record in plain words."""
    return "\n".join(_lines(record))


def _lines(record: dict[str, Any]) -> Iterator[str]:
    where = f"{record['backend']} ({record['site']})" if record["backend"] else "no backend"
    code = f" ({record['code']})" if record["code"] else ""
    yield f"request {record['request_id']}: {record['status']} {record['outcome']}{code}, {where}"
    if record["why"]:
        yield f"  why: {record['why']}"
    yield f"  tenant {record['tenant']}, model {record['model']}, data class {record['data_class']}"
    if record["hedge"]:
        yield f"  its first token was late; a second attempt {record['hedge']}"
    if overhead := record["overhead_prompt_tokens"] + record["overhead_completion_tokens"]:
        yield f"  overhead: {overhead} tokens of attempts that failed or lost"
    for number, decision in enumerate(record["decisions"], 1):
        yield from _decision(number, decision)
    happened = record["happened"]
    if not record["attempts"]:
        yield f"  it reached no backend; held {_seconds(happened['queue_s'])}"
        return
    forecast = record["forecast"]
    yield "  what happened against the forecast:"
    if record["stream"]:
        yield f"    {_came(happened['ttft_s'])}; {_forecast(forecast['ttft_s'])}"
    else:
        yield "    not a stream: the answer came whole, so nobody saw its first token"
    yield f"    {happened['completion_tokens']} tokens; expected were {forecast['completion_tokens']}"
    yield (
        f"    held {_seconds(happened['queue_s'])}, total {_seconds(happened['total_s'])}, "
        f"our own part {happened['overhead_s'] * 1000:.2f} ms"
    )


def _decision(number: int, decision: dict[str, Any]) -> Iterator[str]:
    what = decision["decision"] + (f" to {decision['backend']}" if decision["backend"] else "")
    part = f", part '{decision['part']}'" if decision["part"] else ""
    yield f"  decision {number}: {what}, by {decision['decided_by']} under the rule '{decision['rule']}'{part}"
    if decision["reason"]:
        yield f"    because: {decision['reason']}"
    for name, reason in decision["removed"].items():
        yield f"    {name} was out: {reason}"
    yield from _tiers(decision["tiers"])
    for candidate in decision["candidates"]:
        score = decision["scores"].get(candidate["name"])
        yield (
            f"    {candidate['name']}: {candidate['in_flight']} of {candidate['slots']} slots in use, "
            f"saturation {candidate['saturation']:.2f}"
            + (f", score {score:.4g}" if score is not None else "")
        )
    for name, reason in decision["others"].items():
        yield f"    {name} was no candidate: {reason}"
    if decision["failure"]:
        yield f"    this attempt failed: {decision['failure']}"
    if decision["fallbacks"]:
        yield f"    fallbacks: {', '.join(decision['fallbacks'])}"


def _tiers(tiers: list[dict[str, Any]]) -> Iterator[str]:
    for tier in tiers:
        words = f" ({tier['backends']})" if tier["backends"] else ""
        if tier["took_it"]:
            how = "took it"
        elif tier["saturation"] is None:
            how = "had no backend that was available"
        else:
            how = f"did not take it: {tier['saturation']:.0%} full"
        yield f"    tier {tier['tier'] + 1}{words} {how}"


def _forecast(value: float | None) -> str:
    return "no forecast, for none had been measured" if value is None else f"expected after {value:.3f} s"


def _came(value: float | None) -> str:
    return "no first token came" if value is None else f"first token after {value:.3f} s"


def _seconds(value: float) -> str:
    return f"{value:.3f} s"
