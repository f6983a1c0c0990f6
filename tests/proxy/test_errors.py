"""Every error: a status, one culprit, OpenAI's shape, and the exception that the official client makes of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

import policies
import proxy
from policies.base import REJECT_CODES
from proxy.answers import answer, error_answer
from proxy.errors import (
    BACKEND_ERRORS,
    CLIENT_ERRORS,
    OUR_ERRORS,
    REASON_PHRASES,
    STATUS,
    RequestError,
    error_body,
    error_event,
)
from proxy.exchange import _GIVE_UP_CODES
from proxy.sse import EventReader
from tests.proxy.official_client import OfficialClient, official_client

EXCEPTIONS: dict[int, type[openai.APIStatusError]] = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
}
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "invalid_request_error",
    422: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "server_error",
    503: "server_error",
    504: "server_error",
}


@pytest.fixture(scope="module")
def official() -> Iterator[OfficialClient]:
    with official_client() as client:
        yield client


@pytest.mark.parametrize("code", STATUS)
def test_every_code(code: str, official: OfficialClient) -> None:
    status = STATUS[code]
    error = RequestError(code, "what is wrong", "field", retry_after_s=2.2)
    assert error.status == status
    client = official.reads(error_answer(error, fields=b"x-request-id: r-1\r\n", keep_alive=False))
    kind = EXCEPTIONS.get(status) or (openai.InternalServerError if status >= 500 else openai.APIStatusError)
    with pytest.raises(kind) as caught:
        client.chat.completions.create(model="m", messages=[])
    seen = caught.value
    assert type(seen) is kind
    assert (seen.status_code, seen.code, seen.param) == (status, code, "field")
    assert (seen.type, seen.request_id) == (TYPES.get(status, seen.type), "r-1")
    assert "what is wrong" in seen.message
    assert seen.response.headers["retry-after"] == "3"
    assert ("www-authenticate" in seen.response.headers) == (status == 401)


def test_whose_fault_it_is() -> None:
    assert len(STATUS) == len(CLIENT_ERRORS) + len(BACKEND_ERRORS) + len(OUR_ERRORS)
    assert {status for code, status in CLIENT_ERRORS.items() if status >= 500} == {501, 505}
    assert set(BACKEND_ERRORS.values()) == {502, 503, 504}
    assert set(OUR_ERRORS.values()) == {500, 503}
    for code in STATUS:
        kind = json.loads(error_body(code, ""))["error"]["type"]
        assert (kind == "server_error") == (code not in CLIENT_ERRORS)


def test_every_code_that_is_used_exists() -> None:
    used = set(_GIVE_UP_CODES.values())
    for package in (proxy, policies):
        for file in Path(package.__file__ or "").parent.rglob("*.py"):
            used |= set(
                re.findall(r'(?:RequestError|Reject|Refusal|error_event)\(\s*"([a-z_]+)"', file.read_text())
            )
    assert used <= set(STATUS)
    assert len(used) > 30


def test_every_refusal_of_a_policy_has_a_status() -> None:
    assert set(STATUS) >= REJECT_CODES
    for file in Path(policies.__file__ or "").parent.rglob("*.py"):
        assert set(re.findall(r'Reject\(\s*"([a-z_]+)"', file.read_text())) <= REJECT_CODES


def test_statuses_have_phrases() -> None:
    assert set(STATUS.values()) <= set(REASON_PHRASES)
    assert all(phrase.isascii() and phrase for phrase in REASON_PHRASES.values())


def test_the_shape() -> None:
    assert json.loads(error_body("missing_field", 'no "model"\n', "model")) == {
        "error": {
            "message": 'no "model"\n',
            "type": "invalid_request_error",
            "param": "model",
            "code": "missing_field",
        }
    }
    assert json.loads(error_body("no_backend", ""))["error"]["param"] is None


def test_an_error_in_a_stream(official: OfficialClient) -> None:
    stream = error_event("backend_reset", "it broke\n\ndata: [DONE]")
    (event,) = EventReader().feed(stream)
    assert event.raw == stream
    client = official.reads(
        answer(200, stream, keep_alive=False).replace(b"application/json", b"text/event-stream")
    )
    with pytest.raises(openai.APIError) as caught:
        list(client.chat.completions.create(model="m", messages=[], stream=True))
    assert (caught.value.code, caught.value.type) == ("backend_reset", "server_error")
    assert "it broke" in caught.value.message
