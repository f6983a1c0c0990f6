"""Keeps secrets out of what is shown: of excerpts of files, and of URLs.

An admin who pastes a key into the wrong place makes a mistake in the file, and mistakes are shown with their
line, on terminals and in logs. What stands behind a key that sounds like a secret is masked there, right or wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from policies.yamlfile import FileProblems, Problem

if TYPE_CHECKING:
    from sqlalchemy import URL

_COUNTED = ("prompt", "output", "context", "system", "unit", "max", "batched", "kv")
"""Before `_tokens`: those of a model, which are no secrets. One `system_token` may be."""
_COUNTS = "|".join(f"(?<={word}_)" for word in _COUNTED)
_TOKEN = rf"(?<!first_)(?<!between_)(?<!per_)(?!(?:{_COUNTS})tokens)token(?!s_per_)"
_NAME = rf"(?:key|passwo?r?d|{_TOKEN}|secret|database|authorization|credential)"
_SENSITIVE = re.compile(_NAME, re.IGNORECASE)
_FILE = r"""["']?[\w./-]{1,200}\.(?:pem|key|crt)["']?\s*(?:[,}]|$)"""
"""The path of a certificate or key is none, and what is wrong with it has to be seen."""
_VALUE = re.compile(
    rf"""({_NAME}[\w.-]{{0,64}}["']?\s*:\s*+)(?!{_FILE})"""
    rf"""(.+?)(?=,\s*["']?[\w.-]{{1,64}}["']?\s*:\s|$)""",
    re.IGNORECASE,
)
"""A key that sounds like a secret, and its value: up to the next key of a mapping in braces, or the line's end."""
_USER = re.compile(r"(?<=://)(?!USER:PASSWORD@)[^\s\"']+(?=@)")
"""User and password in a URL, also where the password holds what it should not; not those of our own example."""
_BREAK = re.compile("(\r\n|[\r\n\x85\u2028\u2029])")
_GOT = re.compile(r", got .*", re.DOTALL)


def without_secrets(error: FileProblems) -> FileProblems:
    """The same problems; lines and values that may hold a secret are masked."""
    pieces = _BREAK.split(error.text)  # lines, and the breaks between them
    for index in range(0, len(pieces), 2):
        pieces[index] = _masked(pieces[index])
    problems = []
    for problem in error.problems:
        at = 2 * (problem.line - 1)
        if _SENSITIVE.search(problem.path) and at < len(pieces):
            if not _SENSITIVE.search(pieces[at]):  # the value stands in a line of its own
                pieces[at] = re.sub(r"\S", "*", pieces[at])
            problem = _silent(problem)
        problems.append(problem._replace(message=_USER.sub("***", problem.message)))
    return FileProblems(error.name, problems, "".join(pieces))


_ASSIGNED = re.compile(rf"((?:[\w.-]{{0,64}}{_NAME}[\w.-]{{0,64}})=)(\S+)", re.IGNORECASE)
_BEARER = re.compile(r"\b(Bearer|Basic|whsec_)(\s*)([\w.~+/=-]+)", re.IGNORECASE)


def masked_output(text: str, secrets: Iterable[str] = ()) -> str:
    """What a command has said, for a message: values that sound like secrets, and these `secrets`, are masked."""
    for secret in secrets:
        if len(secret) >= 6:  # shorter ones are words of every text
            text = text.replace(secret, "***")
    text = _BEARER.sub(r"\1\2***", _ASSIGNED.sub(r"\1***", text))
    return "".join(_masked(piece) for piece in _BREAK.split(text))


def secret_values(environment: Mapping[str, str]) -> list[str]:
    """Values of environment variables whose names sound like secrets."""
    return [value for name, value in environment.items() if _SENSITIVE.search(name) and value]


def database_shown(target: str | Path | URL) -> str:
    """A database's URL without password and parameters, or the path it stands at."""
    # Imported here: whoever reads a configuration needs no database.
    from sqlalchemy import URL, make_url
    from sqlalchemy.exc import ArgumentError

    if not isinstance(target, URL):
        text = str(target)
        if "://" not in text:
            return text
        try:
            target = make_url(text)
        except (ArgumentError, ValueError):  # the latter: of a port that is no number
            return f"{text.partition('://')[0]}://***"
    return target.set(query={}).render_as_string(hide_password=True)


def _masked(line: str) -> str:
    """As long as before: a caret below it points where it did."""
    line = _VALUE.sub(lambda match: match[1] + re.sub(r"\S", "*", match[2]), line)
    return _USER.sub(lambda match: "*" * len(match[0]), line)


def _silent(problem: Problem) -> Problem:
    """Without what the file says."""
    if _GOT.search(problem.message) is None:
        return problem
    return problem._replace(message=_GOT.sub("", problem.message), suggestion=None)
