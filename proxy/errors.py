"""Every error we answer with, sorted by whose fault it is, in OpenAI's shape.

`{"error": {"message", "type", "param", "code"}}`; the status follows from the code. 429 means the client
should slow down (limits, budgets, a full queue), 503 that capacity is missing now, and its code tells overload
(`overloaded`, `queue_timeout`) from down (`no_backend`). 502 and 504 are the backend's fault.
"""

from __future__ import annotations

from typing import Final

import orjson

CLIENT_ERRORS: Final[dict[str, int]] = {
    # HTTP that is malformed or ambiguous: answered, then the connection is closed
    "malformed_request": 400,
    "malformed_body": 400,
    "ambiguous_framing": 400,
    "bad_host": 400,
    "request_timeout": 408,
    "body_too_large": 413,
    "target_too_long": 414,
    "unsupported_media_type": 415,
    "expectation_failed": 417,
    "upgrade_required": 426,
    "header_too_large": 431,
    "unsupported_transfer_coding": 501,
    "unsupported_method": 501,
    "unsupported_version": 505,
    # the API
    "invalid_json": 400,
    "invalid_form": 400,
    "duplicate_key": 400,
    "invalid_value": 400,
    "missing_field": 400,
    "media_url": 400,
    "context_length": 400,
    "invalid_api_key": 401,
    "data_class": 403,
    "model_not_allowed": 403,
    "origin_refused": 403,
    "not_found": 404,
    "endpoint_not_served": 404,
    "model_not_found": 404,
    "response_not_found": 404,
    "method_not_allowed": 405,
    "idempotency_running": 409,
    "idempotency_spent": 409,
    "idempotency_mismatch": 422,
    "rate_limit_requests": 429,
    "rate_limit_tokens": 429,
    "concurrency": 429,
    "budget": 429,
    "auth_rate_limit": 429,
    "queue_full": 429,
}
BACKEND_ERRORS: Final[dict[str, int]] = {
    "backend_unreachable": 502,
    "backend_reset": 502,
    "backend_protocol": 502,
    "backend_error": 502,
    "backend_auth": 502,
    "backend_timeout": 504,
    "no_backend": 503,
    "overloaded": 503,
    "queue_timeout": 503,
}
OUR_ERRORS: Final[dict[str, int]] = {
    "ledger_unavailable": 503,
    "shutting_down": 503,
    "internal": 500,
}
STATUS: Final[dict[str, int]] = {**CLIENT_ERRORS, **BACKEND_ERRORS, **OUR_ERRORS}

REASON_PHRASES: Final[dict[int, str]] = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    413: "Content Too Large",
    414: "URI Too Long",
    415: "Unsupported Media Type",
    417: "Expectation Failed",
    422: "Unprocessable Content",
    426: "Upgrade Required",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
    505: "HTTP Version Not Supported",
    529: "Overloaded",
}

_TYPES: Final[dict[int, str]] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class RequestError(Exception):
    """A request that is refused: `code` decides the status, `param` names the field at fault."""

    def __init__(
        self,
        code: str,
        message: str,
        param: str | None = None,
        retry_after_s: float | None = None,
        allow: str = "",
    ) -> None:
        """`retry_after_s`: sent as `Retry-After`; `allow`: the methods that a path takes, for 405."""
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.allow = allow

    @property
    def status(self) -> int:
        return STATUS[self.code]


def error_body(code: str, message: str, param: str | None = None) -> bytes:
    """The JSON body of an error answer."""
    status = STATUS[code]
    kind = _TYPES.get(status) or ("invalid_request_error" if code in CLIENT_ERRORS else "server_error")
    return orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})


def error_event(code: str, message: str) -> bytes:
    """The server-sent event that ends a stream which cannot go on; no `[DONE]` follows it."""
    return b"data: " + error_body(code, message) + b"\n\n"
