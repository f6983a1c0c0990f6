"""`tidegate explain`: why one request went where it went, in plain words.

The figures come from the admin port of the running proxy (`proxy/admin/explain.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

from proxy.ask import AdminPort, ask


def fetch(request_id: str, admin: AdminPort | str) -> dict[str, Any]:
    """What an admin port, or the one at HOST:PORT, knows of a request. Raises AskError."""
    return ask(admin, f"/explain/{quote(request_id, safe='')}")


def fetch_what_if(asked: list[tuple[str, str]], request: bytes, admin: AdminPort | str) -> dict[str, Any]:
    """What the proxy of an admin port, or of the one at HOST:PORT, would do with a request now. Raises AskError."""
    return ask(admin, f"/explain?{urlencode(asked)}", request)


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
        yield f"  decision {number}: {_what(decision)}"
        yield from _decision(decision, PAST)
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


class Tense(NamedTuple):
    """The words for what was, and for what would be."""

    is_out: str
    is_none: str
    takes: str
    takes_not: str
    nobody: str


PAST = Tense("was out", "was no candidate", "took it", "did not take it", "had no backend that was available")
PRESENT = Tense(
    "is out", "is no candidate", "takes it", "does not take it", "has no backend that is available"
)


def _what(decision: dict[str, Any]) -> str:
    where = f" to {decision['backend']}" if decision["backend"] else ""
    part = f", part '{decision['part']}'" if decision["part"] else ""
    return f"{decision['decision']}{where}, by {decision['decided_by']} under the rule '{decision['rule']}'{part}"


def _decision(decision: dict[str, Any], words: Tense) -> Iterator[str]:
    if decision["reason"]:
        yield f"    because: {decision['reason']}"
    for name, reason in decision["removed"].items():
        yield f"    {name} {words.is_out}: {reason}"
    yield from _tiers(decision["tiers"], words)
    for candidate in decision["candidates"]:
        score = decision["scores"].get(candidate["name"])
        yield (
            f"    {candidate['name']}: {candidate['in_flight']} of {candidate['slots']} slots in use, "
            f"saturation {candidate['saturation']:.2f}"
            + (f", score {score:.4g}" if score is not None else "")
        )
    for name, reason in decision["others"].items():
        yield f"    {name} {words.is_none}: {reason}"
    if decision["failure"]:
        yield f"    this attempt failed: {decision['failure']}"
    if decision["fallbacks"]:
        yield f"    fallbacks: {', '.join(decision['fallbacks'])}"


def _tiers(tiers: list[dict[str, Any]], words: Tense) -> Iterator[str]:
    for tier in tiers:
        backends = f" ({tier['backends']})" if tier["backends"] else ""
        if tier["took_it"]:
            how = words.takes
        elif tier["saturation"] is None:
            how = words.nobody
        else:
            how = f"{words.takes_not}: {tier['saturation']:.0%} full"
        yield f"    tier {tier['tier'] + 1}{backends} {how}"


def render_what_if(record: dict[str, Any]) -> str:
    """The answer to `fetch_what_if` in plain words."""
    return "\n".join(_what_if_lines(record))


def _what_if_lines(record: dict[str, Any]) -> Iterator[str]:
    (decision,), asked, answer = record["decisions"], record["request"], record["answer"]
    if answer is not None:
        yield f"now: refused with {answer['status']} {answer['code']}: {answer['message']}"
        if answer["why"]:
            yield f"  why: {answer['why']}"
    elif (queue := record["queue"]) is not None:
        others = queue["waiting"]
        before = "nobody waits yet" if not others else f"{others} wait{'s' if others == 1 else ''} already"
        yield f"now: held for up to {queue['until_s']:g} s; {before}"
        for name, how in queue["standbys"].items():
            yield f"  no backend runs that may serve it; standby {name}: {how}"
    else:
        yield f"now: sent to {decision['backend']}"
    for note in record["notes"]:
        yield f"  note: {note}"
    for part in record["parts"]:
        yield f"  {100 * part['share']:g}% of such requests, part '{part['part']}': {_outcome(part)}"
    labels = "".join(f", {name}={value}" for name, value in asked["labels"].items())
    served = "" if asked["served_model"] == asked["model"] else f" (served as {asked['served_model']})"
    yield f"  tenant {asked['tenant']}, model {asked['model']}{served}, data class {asked['data_class']}{labels}"
    limit = f", at most {asked['max_tokens']}" if asked["max_tokens"] else ""
    kind = "a stream" if asked["stream"] else "no stream"
    yield (
        f"  {asked['endpoint']}, {kind}, prompt of about {asked['prompt_tokens']} tokens, "
        f"answer of about {asked['expected_tokens']}{limit}; priority {asked['priority']}, at {asked['at']}"
    )
    for rule in record["rules"]:
        yield f"  rule '{rule['rule']}' {'matches' if rule['matches'] else 'does not: ' + rule['why_not']}"
    yield f"  decision: {_what(decision)}"
    yield from _decision(decision, PRESENT)
    if decision["backend"]:
        yield f"  forecast: {_forecast_now(record['forecast']['ttft_s'])}"


def _outcome(part: dict[str, Any]) -> str:
    if part["code"]:
        return f"refused with {part['code']}"
    return f"sent to {part['backend']}" if part["backend"] else "held"


def _forecast_now(value: float | None) -> str:
    return "none, for none has been measured" if value is None else f"first token after {value:.3f} s"


def _forecast(value: float | None) -> str:
    return "no forecast, for none had been measured" if value is None else f"expected after {value:.3f} s"


def _came(value: float | None) -> str:
    return "no first token came" if value is None else f"first token after {value:.3f} s"


def _seconds(value: float) -> str:
    return f"{value:.3f} s"
