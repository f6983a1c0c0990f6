"""Errors in the shape that a client of each API expects.

OpenAI's: `{"error": {"message", "type", "param", "code"}}`; Anthropic's: `{"type": "error", "error": {"type",
"message"}}`, with statuses of its own (https://docs.anthropic.com/en/api/errors). `proxy/errors.py` has the codes.

A stream ends in an event of the same dialect. That of `/v1/responses` is OpenAI's `error` event with the error
object of its other endpoints inside, by which the official client raises and does not take it for one more event.
"""

from __future__ import annotations

from typing import Any, Final

import orjson

from proxy.endpoints import ANTHROPIC, RESPONSES, Route
from proxy.errors import CLIENT_ERRORS, STATUS, error_body, error_event
from proxy.http1 import RequestHead, ResponseHead

_STATUSES: Final = {500: 500, 502: 500, 503: 529}
"""Anthropic's own for those of ours that it does not have; all others stay."""

_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def status_in(dialect: str, code: str) -> int:
    """HTTP status of an error of ours."""
    status = STATUS[code]
    return _STATUSES.get(status, status) if dialect == ANTHROPIC else status


def body_in(dialect: str, code: str, message: str, param: str | None = None) -> bytes:
    """The JSON body of an error of ours."""
    if dialect != ANTHROPIC:
        return error_body(code, message, param)
    return _anthropic(status_in(dialect, code), message, client=code in CLIENT_ERRORS)


def event_of(route: Route, code: str, message: str, sequence: int) -> bytes:
    """The event that ends a stream which cannot go on. `sequence`: number of the event, where they are numbered."""
    if route.dialect == ANTHROPIC:
        return b"event: error\ndata: %b\n\n" % body_in(ANTHROPIC, code, message)
    if route.metering == RESPONSES:
        return _numbered(orjson.loads(error_body(code, message))["error"], sequence)
    return error_event(code, message)


def event_of_answer(route: Route, status: int, body: bytes, sequence: int) -> bytes:
    """The same for an error that a backend has answered: what the body says, in the shape of the dialect."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        document = None
    if not isinstance(document, dict):
        document = {"detail": f"the backend answered {status}"}
    said = _message(document)
    if route.dialect == ANTHROPIC:
        return b"event: error\ndata: %b\n\n" % _anthropic(status, said, client=status < 500)
    given = document.get("error")
    kind = given.get("type") if isinstance(given, dict) else None
    if not isinstance(kind, str):
        kind = "invalid_request_error" if status < 500 else "server_error"
    param = given.get("param") if isinstance(given, dict) else None
    error = {
        "message": said,
        "type": kind,
        "param": param if isinstance(param, str) else None,
        "code": status,
    }
    if route.metering == RESPONSES:
        return _numbered(error, sequence)
    return b"data: %b\n\n" % orjson.dumps({"error": error})


def _numbered(error: dict[str, Any], sequence: int) -> bytes:
    """The error event of `/v1/responses`."""
    document = {**error, "type": "error", "sequence_number": sequence, "error": error}
    return b"event: error\ndata: %b\n\n" % orjson.dumps(document)


def translated(dialect: str, status: int, body: bytes) -> bytes:
    """A backend's own error in the dialect of its client; what has that shape already, or none at all, stays."""
    if dialect != ANTHROPIC:
        return body
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body
    if not isinstance(document, dict) or document.get("type") == "error":
        return body
    return _anthropic(status, _message(document), client=status < 500)


def not_served(
    dialect: str, reply: ResponseHead, body: bytes, model: str, request: RequestHead
) -> tuple[ResponseHead, bytes]:
    """A backend's 404 or 405 for its client. If it says no more than that it does not know the path, it is put into
    words: the path is one of ours, so it is the backend that lacks it. The status stays."""
    if reply.content_encoding not in (b"", b"identity") or not _says_nothing(body):
        return reply, body
    lines = reply.fields.split(b"\r\n")[:-1]
    kept = [line for line in lines if line[:13].lower() != b"content-type:"]
    fields = b"\r\n".join([*kept, b"content-type: application/json", b""])
    path = request.target.partition(b"?")[0].decode("latin-1")
    message = f"the backend of {model[:128]!r} has no {path}"
    head = ResponseHead(reply.status, reply.phrase, fields, content_type=b"application/json")
    return head, body_in(dialect, "endpoint_not_served", message)


def _says_nothing(body: bytes) -> bool:
    """Whether an error has only the words of FastAPI for an unknown path, or none that a client of ours reads."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return True
    if not isinstance(document, dict):
        return True
    if "error" in document or isinstance(document.get("message"), str):
        return False
    return document.get("detail") in (None, "Not Found", "Method Not Allowed")


def _message(document: dict[str, Any]) -> str:
    """What an error says, in any of the shapes that vLLM has."""
    error = document.get("error")
    if isinstance(error, dict):
        error = error.get("message")
    for said in (error, document.get("detail")):
        if isinstance(said, str):
            return said
    try:
        return orjson.dumps(document).decode()
    except orjson.JSONEncodeError:  # it reads deeper nesting than it writes
        return "the backend's error cannot be shown"


def _anthropic(status: int, message: str, *, client: bool) -> bytes:
    kind = _TYPES.get(status) or ("invalid_request_error" if client else "api_error")
    return orjson.dumps({"type": "error", "error": {"type": kind, "message": message}})
