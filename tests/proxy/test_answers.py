"""Answers of our own, read by h11."""

from __future__ import annotations

import re
from email.utils import parsedate_to_datetime
from typing import Any

import h11
import pytest

from proxy.answers import answer, error_answer
from proxy.errors import RequestError


def read(data: bytes, method: str = "POST") -> tuple[int, dict[str, str], bytes, bool]:
    """Status, fields, body, and whether the connection can serve another request."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method=method, target="/", headers=[("host", "a"), ("content-length", "0")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(data)
    head = connection.next_event()
    assert isinstance(head, h11.Response)
    body = b""
    while isinstance(event := connection.next_event(), h11.Data):
        body += bytes(event.data)
    assert isinstance(event, h11.EndOfMessage)
    assert connection.trailing_data == (b"", False)
    fields = {name.decode(): value.decode() for name, value in head.headers}
    assert len(fields) == len(list(head.headers)), "a field stands twice"
    return head.status_code, fields, body, connection.their_state is h11.DONE


def test_an_answer() -> None:
    status, fields, body, kept = read(answer(200, b'{"a":1}', fields=b"x-own: y\r\n"))
    assert (status, body, kept) == (200, b'{"a":1}', True)
    assert fields.pop("date")
    assert fields == {"content-type": "application/json", "content-length": "7", "x-own": "y"}


def test_the_date() -> None:
    date = read(answer(200, b"{}"))[1]["date"]
    assert re.fullmatch(r"[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT", date)
    assert parsedate_to_datetime(date).tzinfo is not None


@pytest.mark.parametrize(
    ("version", "keep_alive", "connection"),
    [(1, True, None), (1, False, "close"), (0, True, "keep-alive"), (0, False, "close")],
)
def test_whether_the_connection_is_kept(version: int, keep_alive: bool, connection: str | None) -> None:
    for data in (
        answer(200, b"{}", keep_alive=keep_alive, version=version),
        error_answer(RequestError("not_found", "x"), keep_alive=keep_alive, version=version),
    ):
        _, fields, _, kept = read(data)
        assert fields.get("connection") == connection
        assert kept == (connection != "close")


def test_head_gets_the_head() -> None:
    for whole, head in (
        (answer(200, b"{}"), answer(200, b"{}", without_body=True)),
        (
            error_answer(RequestError("not_found", "x")),
            error_answer(RequestError("not_found", "x"), without_body=True),
        ),
    ):
        _, fields, body, _ = read(whole)
        _, head_fields, no_body, _ = read(head, "HEAD")
        assert body
        assert no_body == b""
        assert head_fields["content-length"] == fields["content-length"] == str(len(body))


@pytest.mark.parametrize(
    ("error", "fields"),
    [
        ({"code": "rate_limit_tokens", "retry_after_s": 0.0}, {"retry-after": "1"}),
        ({"code": "rate_limit_tokens", "retry_after_s": 1.0}, {"retry-after": "1"}),
        ({"code": "queue_full", "retry_after_s": 1.01}, {"retry-after": "2"}),
        ({"code": "budget", "retry_after_s": 2_600_000.0}, {"retry-after": "2600000"}),
        ({"code": "invalid_api_key"}, {"www-authenticate": "Bearer"}),
        ({"code": "not_found"}, {}),
    ],
)
def test_what_comes_with_an_error(error: dict[str, Any], fields: dict[str, str]) -> None:
    _, seen, _, _ = read(error_answer(RequestError(message="x", **error)))
    for name in ("date", "content-type", "content-length"):
        del seen[name]
    assert seen == fields


def test_which_methods_are_allowed() -> None:
    error = RequestError("method_not_allowed", "x", allow="GET, HEAD")
    assert read(error_answer(error))[1]["allow"] == "GET, HEAD"
