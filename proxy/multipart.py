"""`multipart/form-data`: the fields of an upload, and the same upload with some of them changed.

Two parsers that disagree on where a part ends, or on what it is called, read two requests in one body. So only what
every parser reads in the same way is a form here (RFC 2046 5.1, RFC 7578): one boundary, at the beginning of the
body, at its end and in front of every part, each on a line of its own that ends in CRLF; nothing before and nothing
behind; parts that are called by a plain name, once. All else is refused, also where RFC 2046 would have it skipped.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final, NamedTuple

from proxy.errors import RequestError

MOST_PARTS: Final = 256
MOST_PART_HEAD: Final = 4096
"""Bytes of the header fields of one part."""
MOST_TEXT: Final = 1024 * 1024
"""Bytes of a field that is read as text."""

_TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
# The characters that RFC 2046 gives to a boundary, and of those the ones that need no quotes; no blanks.
_BOUNDARY: Final = rb"""(?i:boundary)=(?:"([0-9A-Za-z'()+_,\-./:=?]{1,70}+)"|([0-9A-Za-z'+_\-.]{1,70}+))"""
_PARAMETER: Final = rb'[ \t]*+;[ \t]*+(?:(?i:charset)=(?:(?i:utf-8)|"(?i:utf-8)")|' + _BOUNDARY + rb")"
_FORM_TYPE: Final = re.compile(rb"(?i:multipart/form-data)((?:" + _PARAMETER + rb")*+)[ \t]*+")
_find_boundaries: Final = re.compile(_PARAMETER).findall

_FIELD: Final = rb"(" + _TOKEN + rb"++):[ \t]*+([\t -~\x80-\xff]*+)\r\n"
_PART_HEAD: Final = re.compile(rb"(?:" + _FIELD + rb")++")
_find_fields: Final = re.compile(_FIELD).findall

# A backslash in front of a quote ends the string for some parsers and not for others. `filename*` is not to be used
# (RFC 7578 4.2), but is.
_DISPOSITION_PARAMETER: Final = (
    rb'[ \t]*+;[ \t]*+(?i:(name|filename\*?+))=(?:"((?:[^"\\]|\\(?!"))*+)"|(' + _TOKEN + rb"++))"
)
_DISPOSITION: Final = re.compile(rb"(?i:form-data)((?:" + _DISPOSITION_PARAMETER + rb")++)[ \t]*+")
_find_parameters: Final = re.compile(_DISPOSITION_PARAMETER).findall

_NAME: Final = re.compile(rb"[A-Za-z0-9_.\-]{1,64}+(?:\[[A-Za-z0-9_.\-]{0,64}+\])*+")
_PLAIN: Final = re.compile(
    rb'(?i:text/plain)(?:[ \t]*+;[ \t]*+(?i:charset)="?+(?i:utf-8|us-ascii)"?+)?+[ \t]*+'
)
_NESTED: Final = re.compile(rb"(?i:multipart|message)/")
_IDENTITIES: Final = (b"7bit", b"8bit", b"binary")


class Part(NamedTuple):
    """One part, as positions in the body."""

    name: str
    start: int
    """Of the boundary in front of it."""
    content: int
    end: int
    """Of its content."""
    is_file: bool
    """It has a file name."""
    plain: bool
    """Its type is text in UTF-8."""


class Form:
    """A whole upload."""

    __slots__ = ("_mark", "_parts", "_tail", "raw")

    def __init__(self, raw: bytes, content_type: bytes) -> None:
        """Parse `raw`, whose type has the value `content_type`. Raises RequestError."""
        self.raw = raw
        self._mark = b"--" + _boundary(content_type)
        self._parts: list[Part] = []
        self._tail = 0
        """Where the last boundary is."""
        self._read()

    def _read(self) -> None:
        raw, mark = self.raw, self._mark
        if not raw.startswith(mark):
            raise _malformed("it does not begin with its boundary")
        if raw.find(b"\r" + mark) >= 0:
            raise _malformed("a boundary stands behind a CR without LF")
        line = b"\n" + mark
        start = 0
        while True:
            behind = start + len(mark)
            if raw.startswith(b"--", behind):
                break
            if not raw.startswith(b"\r\n", behind):
                raise _malformed("something follows a boundary on its line")
            if len(self._parts) == MOST_PARTS:
                raise _malformed(f"more than {MOST_PARTS} parts")
            found = raw.find(line, behind + 2)
            if found < 0:
                raise _malformed("its last boundary is missing")
            if raw[found - 1] != 13:
                raise _malformed("a boundary stands behind an LF without CR")
            self._parts.append(_part(raw, start, behind + 2, found - 1))
            start = found + 1
        if not self._parts:
            raise _malformed("it has no part")
        self._tail = start
        rest = len(raw) - behind - 2
        if rest and not (rest == 2 and raw.endswith(b"\r\n")):
            raise _malformed("something follows its last boundary")

    @property
    def names(self) -> list[str]:
        """Of the parts, in their order."""
        return [part.name for part in self._parts]

    def text(self, name: str) -> str | None:
        """A field that may stand once; None: it is not there. Raises RequestError."""
        found = [part for part in self._parts if part.name == name]
        if len(found) > 1:
            raise RequestError("duplicate_key", f"the field {name!r} stands twice", name)
        return self._decoded(found[0]) if found else None

    def flag(self, name: str) -> bool:
        """True or false, the latter if it is not given. Raises RequestError."""
        value = self.text(name)
        if value is None:
            return False
        known = _FLAGS.get(value.lower())
        if known is None:
            raise RequestError("invalid_value", f"{name} must be true or false", name)
        return known

    def beginnings(self) -> list[tuple[str, bytes]]:
        """(name, its first bytes) of all parts that are no files."""
        raw = self.raw
        parts = [part for part in self._parts if not part.is_file]
        return [(part.name, raw[part.content : min(part.end, part.content + 16)]) for part in parts]

    def content(self) -> bytes:
        """What is the same for the same form, whatever its boundary."""
        return b"\n".join(self.raw[part.start + len(self._mark) : part.end] for part in self._parts)

    def changed(self, fields: Mapping[str, str], without: Collection[str] = ()) -> bytes:
        """The upload with these fields in place of those of their names, and without others."""
        raw = self.raw
        gone = {*fields, *without}
        view = memoryview(raw)
        pieces: list[bytes | memoryview] = []
        ends = [*(part.start for part in self._parts[1:]), self._tail]
        for part, end in zip(self._parts, ends, strict=True):
            if part.name not in gone:
                pieces.append(view[part.start : end])
        for name, value in fields.items():
            disposition = b'\r\nContent-Disposition: form-data; name="%b"\r\n\r\n' % name.encode()
            pieces += (self._mark, disposition, value.encode(), b"\r\n")
        pieces.append(view[self._tail :])
        return b"".join(pieces)

    def _decoded(self, part: Part) -> str:
        name = part.name
        if part.is_file or not part.plain:
            raise RequestError("invalid_value", f"{name} must be plain text in UTF-8, and no file", name)
        if part.end - part.content > MOST_TEXT:
            raise RequestError("invalid_value", f"{name} is longer than {MOST_TEXT} bytes", name)
        try:
            return self.raw[part.content : part.end].decode()
        except UnicodeDecodeError:
            raise RequestError("invalid_value", f"{name} is not UTF-8", name) from None


_FLAGS: Final = {"true": True, "1": True, "false": False, "0": False}


def _boundary(content_type: bytes) -> bytes:
    """The one boundary of a form. Raises RequestError."""
    if content_type[:19].lower() != b"multipart/form-data":
        raise RequestError("unsupported_media_type", "send this as multipart/form-data")
    match = _FORM_TYPE.fullmatch(content_type)
    found = (
        [] if match is None else [one or other for one, other in _find_boundaries(match[1]) if one or other]
    )
    if len(found) != 1:
        raise RequestError(
            "unsupported_media_type", "Content-Type must be multipart/form-data with one boundary"
        )
    boundary: bytes = found[0]
    return boundary


def _part(raw: bytes, start: int, begin: int, end: int) -> Part:
    """The part whose head begins at `begin` and whose content ends at `end`. Raises RequestError."""
    head_end = raw.find(b"\r\n\r\n", begin, min(end, begin + MOST_PART_HEAD))
    if head_end < 0:
        raise _malformed(f"a part has no head, none that ends, or one of more than {MOST_PART_HEAD} bytes")
    head = raw[begin : head_end + 2]
    if _PART_HEAD.fullmatch(head) is None:
        raise _malformed("the head of a part is malformed")
    fields: dict[bytes, bytes] = {}
    for field, value in _find_fields(head):
        field = field.lower()
        if field in fields:
            raise _malformed(f"a part has more than one {field[:32].decode()}")
        fields[field] = value
    name, is_file = _disposition(fields.get(b"content-disposition", b""))
    kind = fields.get(b"content-type")
    if kind is not None and _NESTED.match(kind) is not None:
        raise _malformed("a part is itself made of parts")
    if fields.get(b"content-transfer-encoding", b"binary").strip(b" \t").lower() not in _IDENTITIES:
        raise _malformed("a part is encoded (Content-Transfer-Encoding)")
    plain = kind is None or _PLAIN.fullmatch(kind) is not None
    return Part(name, start, head_end + 4, end, is_file, plain)


def _disposition(value: bytes) -> tuple[str, bool]:
    """-> (name, whether it is a file). Raises RequestError."""
    match = _DISPOSITION.fullmatch(value)
    if match is None:
        raise _malformed("a part has no Content-Disposition that is form-data with a name")
    given: dict[bytes, bytes] = {}
    for parameter, quoted, token in _find_parameters(match[1]):
        parameter = parameter.lower()
        if parameter in given:
            raise _malformed("a part has two names")
        given[parameter] = quoted or token
        if parameter != b"name" and not given[parameter]:
            raise _malformed("a part has an empty filename: a file for some, text for others")
    name = given.get(b"name", b"")
    if _NAME.fullmatch(name) is None or name == b"_charset_":
        raise _malformed("the name of a part is not made of letters, digits, `_`, `-`, `.` and `[]`")
    return name.decode("ascii"), b"filename" in given


def _malformed(message: str) -> RequestError:
    return RequestError("invalid_form", f"the upload is not valid multipart/form-data: {message}")
