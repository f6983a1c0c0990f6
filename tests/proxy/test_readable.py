from __future__ import annotations

import socket
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from proxy.database import OpenError
from proxy.readable import in_words


def caught(path: str) -> OSError:
    with pytest.raises(OSError) as found:
        Path(path).read_text()
    return found.value


def test_the_systems_errors_are_told_without_numbers() -> None:
    assert in_words(caught("/nowhere/x")) == "/nowhere/x: no such file or directory"
    assert in_words(caught("/")) == "/: is a directory"
    assert in_words(ConnectionRefusedError(111, "Connection refused")) == "connection refused"
    assert in_words(socket.gaierror(-2, "Name or service not known")) == "name or service not known"
    assert in_words(TimeoutError()) == "TimeoutError"
    assert in_words(OSError("SSL is off")) == "SSL is off"


def test_an_error_that_quotes_one_quotes_it_in_words() -> None:
    def opened() -> None:
        try:
            raise caught("/nowhere/x")
        except OSError as error:
            raise OpenError(f"database: {error}") from None

    with pytest.raises(OpenError) as found:
        opened()
    assert in_words(found.value) == "database: /nowhere/x: no such file or directory"


def test_a_databases_error_comes_without_its_statement() -> None:
    with create_engine("sqlite://").connect() as connection, pytest.raises(SQLAlchemyError) as found:
        connection.execute(text("SELECT x FROM elsewhere"))
    assert in_words(found.value) == "no such table: elsewhere"


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(UnicodeDecodeError) as found:
        b"\xff".decode()
    assert in_words(found.value) == "the file is not UTF-8 text"
