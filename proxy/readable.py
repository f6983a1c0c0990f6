"""Errors whose text is meant for the person at the terminal."""

from __future__ import annotations

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from policies.yamlfile import FileProblems
from proxy.access.pepper import PepperError
from proxy.database import OpenError, said
from proxy.segments import JournalError

READABLE_ERRORS = (
    FileProblems,
    JournalError,
    OSError,
    OpenError,
    PepperError,
    SQLAlchemyError,
)
"""What a command reports in one line; anything else is a bug and shows its traceback."""


def in_words(error: BaseException) -> str:
    """What an error says, without the system's numbers: `/etc/x.yaml: permission denied`.

    An error that quotes another one, as those that are raised because of it do, quotes it in words.
    """
    if isinstance(error, OSError):
        reason = _lower(error.strerror) if error.strerror else str(error) or type(error).__name__
        return f"{error.filename}: {reason}" if error.filename else reason
    if isinstance(error, UnicodeDecodeError):
        return "the file is not UTF-8 text"
    if isinstance(error, DBAPIError) and error.orig is not None:
        return said(error)
    text = str(error) or type(error).__name__
    cause = error.__cause__ or error.__context__
    while cause is not None:
        if isinstance(cause, OSError):
            text = text.replace(str(cause), in_words(cause))
        cause = cause.__cause__ or cause.__context__
    return text


def _lower(reason: str) -> str:
    """`No such file or directory` goes into the middle of a sentence; `SSL …` stays."""
    return reason[:1].lower() + reason[1:] if reason[1:2].islower() else reason
