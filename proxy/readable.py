"""Errors whose text is meant for the person at the terminal."""

from __future__ import annotations

from sqlalchemy.exc import SQLAlchemyError

from policies.yamlfile import FileProblems
from proxy.access.pepper import PepperError
from proxy.database import OpenError
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
