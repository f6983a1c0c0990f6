"""What scripts and endpoints answer when they are asked for the status of a standby."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from pydantic import Field, ValidationError

from policies.yamlfile import FileModel
from policies.yamlproblems import dotted, explain
from proxy.scaling.provider import Presence, ProviderError, Status

MOST_DETAIL: int = 500
"""Characters."""

Detail = Annotated[str, Field(max_length=MOST_DETAIL)]


class StatusBody(FileModel):
    """What there is of a standby."""

    presence: Literal["absent", "starting", "running"]
    """`absent`: nothing runs and nothing is paid."""
    run: str = ""
    """The run that it was started for, if that is known."""
    progress: float | None = Field(None, ge=0, le=1)
    """Of preparing or starting."""
    detail: Detail = ""
    """In words."""
    pending: Literal["prepare", "start", "stop"] | None = None
    """The operation that was accepted (202) and has not ended."""
    error: Detail = ""
    """Why the last operation failed; empty: it did not."""

    def status(self) -> Status:
        """As providers say it."""
        return Status(Presence(self.presence), self.run, self.progress, self.error or self.detail)


WORDS = ("absent", "starting", "running")


def read_status(text: str) -> StatusBody:
    """One word, or an object on one line. Raises ProviderError, which names the field."""
    text = text.strip()
    if text in WORDS:
        return StatusBody(presence=text)
    if not text:
        raise ProviderError("said nothing for a status: absent, starting or running, or an object")
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        raise ProviderError(
            f"a status is absent, starting or running, or one JSON object, not '{text[:60]}'"
        ) from None
    return status_of(value)


def status_of(value: Any) -> StatusBody:
    """Raises ProviderError, which names the field."""
    try:
        return StatusBody.model_validate(value)
    except ValidationError as error:
        finding = explain(error, StatusBody, value)[0]
        field = dotted(finding.path) or "status"
        raise ProviderError(f"{field}: {finding.message}") from None
