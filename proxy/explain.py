"""`tidegate explain`: why one request went where it went, asked of the running proxy."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote


class ExplainError(Exception):
    """The proxy could not be asked, or does not know the request."""


def fetch(request_id: str, admin: str, state: Path | None = None) -> dict[str, Any]:
    """The record of a request from the admin port; with a state directory, the port is read from there."""
    if state is not None and (ports := state / "ports.json").is_file():
        admin = json.loads(ports.read_text())["admin"]
    connection = http.client.HTTPConnection(admin, timeout=5)
    try:
        connection.request("GET", f"/explain/{quote(request_id, safe='')}")
        response = connection.getresponse()
        answer: dict[str, Any] = json.loads(response.read())
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ExplainError(f"no proxy answers at {admin}: {error}") from None
    finally:
        connection.close()
    if response.status != 200:
        raise ExplainError(answer.get("error", {}).get("message", f"the proxy answered {response.status}"))
    return answer


def render(record: dict[str, Any]) -> str:
    """The record in plain words."""
    return "\n".join(_lines(record))


def _lines(record: dict[str, Any]) -> Iterator[str]:
    where = f"{record['backend']} ({record['site']})" if record["backend"] else "no backend"
    code = f" ({record['code']})" if record["code"] else ""
    yield f"request {record['request_id']}: {record['status']} {record['outcome']}{code}, {where}"
    yield f"  tenant {record['tenant']}, model {record['model']}, data class {record['data_class']}"
    for number, decision in enumerate(record["decisions"], 1):
        yield from _decision(number, decision)
    forecast, happened = record["forecast"], record["happened"]
    yield "  forecast against what happened:"
    yield f"    first token after {_seconds(forecast['ttft_s'])}; it came after {_seconds(happened['ttft_s'])}"
    yield f"    {forecast['completion_tokens']} tokens; there were {happened['completion_tokens']}"
    yield (
        f"    held {_seconds(happened['queue_s'])}, total {_seconds(happened['total_s'])}, "
        f"our own part {happened['overhead_s'] * 1000:.2f} ms"
    )


def _decision(number: int, decision: dict[str, Any]) -> Iterator[str]:
    what = decision["decision"] + (f" to {decision['backend']}" if decision["backend"] else "")
    yield f"  decision {number}: {what}, by {decision['decided_by']} under the rule '{decision['rule']}'"
    if decision["reason"]:
        yield f"    because: {decision['reason']}"
    for name, reason in decision["removed"].items():
        yield f"    {name} was out: {reason}"
    for candidate in decision["candidates"]:
        score = decision["scores"].get(candidate["name"])
        yield (
            f"    {candidate['name']}: {candidate['in_flight']} of {candidate['slots']} slots in use, "
            f"saturation {candidate['saturation']:.2f}"
            + (f", score {score:.4g}" if score is not None else "")
        )
    if decision["tiers_passed"]:
        full = ", ".join(
            "down" if value is None else f"{value:.0%} full" for value in decision["tiers_passed"]
        )
        yield f"    tiers before that did not take it: {full}"
    if decision["fallbacks"]:
        yield f"    fallbacks: {', '.join(decision['fallbacks'])}"


def _seconds(value: float | None) -> str:
    return "an unknown time" if value is None else f"{value:.3f} s"
