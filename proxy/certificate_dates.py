"""When the certificates in the `tls` of a backend end: the one that we show it, and those of its authorities.

Python's `ssl` tells the dates of a peer's certificate, and here there is no peer. So the two dates are read out of
the file: a certificate is nested DER (RFC 5280 4.1), in which they stand at a fixed place.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from typing import Final

SOON_S: Final = 21 * 86400.0
"""A certificate that ends sooner than this is warned of: what renews them by itself does so a month before."""

_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.S)
_SEQUENCE, _VERSION, _UTC_TIME = 0x30, 0xA0, 0x17


def words_on(what: str, not_before: float, not_after: float, wall: float, refuses: str) -> str:
    """What is or will soon be wrong with dates at `wall` (Unix times), for people; empty: nothing.

    `refuses`: who does not take what has ended.
    """
    if wall < not_before:
        return f"{what} is not valid yet: {refuses}"
    left = not_after - wall
    if left <= 0:
        return f"{what} has expired: {refuses}"
    if left < SOON_S:
        days = int(left // 86400)
        return f"{what} expires in {days} day{'' if days == 1 else 's'}"
    return ""


@dataclass(frozen=True, slots=True)
class BackendCertificate:
    """A file in the `tls` of a backend, and for how long it is good."""

    backend: str
    key: str
    """In `tls`: `certificate` or `ca_file`."""
    file: Path
    not_before: float
    not_after: float
    """Unix times. Of a chain the first end counts; of authorities, each of which may be the right one, the last."""

    def warning(self, wall: float) -> str:
        """What is or will soon be wrong with its dates at Unix time `wall`; empty: nothing."""
        if self.key == "certificate":
            what, refuses = "our certificate", "it refuses us"
        else:
            what, refuses = "the authority in", "its certificate is refused"
        return words_on(
            f"backend {self.backend}: {what} {self.file}", self.not_before, self.not_after, wall, refuses
        )


def backend_certificate(backend: str, key: str, file: Path) -> BackendCertificate | None:
    """What a PEM file says of its dates; None: nothing that could be read. Raises OSError."""
    spans = [span for der in _ders(file.read_bytes()) if (span := _validity(der)) is not None]
    if not spans:
        return None
    if key == "certificate":
        begin, end = max(begin for begin, _ in spans), min(end for _, end in spans)
    else:
        begin, end = min(begin for begin, _ in spans), max(end for _, end in spans)
    return BackendCertificate(backend, key, file, begin, end)


def end_of(certificates: tuple[BackendCertificate, ...], key: str) -> float:
    """When what stands at this key of `tls` ends, Unix time; inf: it does not, or nothing stands there."""
    return min((found.not_after for found in certificates if found.key == key), default=inf)


def first_der(file: Path) -> bytes | None:
    """The first certificate of a PEM file; None: there is none. Raises OSError."""
    return next(_ders(file.read_bytes()), None)


def _ders(text: bytes) -> Iterator[bytes]:
    for found in _PEM.finditer(text):
        try:
            der = ssl.PEM_cert_to_DER_cert(found[0].decode("ascii"))
        except ValueError:  # what is no Base64 is OpenSSL's to refuse
            continue
        if der:
            yield der


def _validity(der: bytes) -> tuple[float, float] | None:
    """Both dates of a certificate; None: it is none."""
    try:
        (certificate,) = _parts(der)[:1]
        fields = _parts(_parts(certificate[1])[0][1])
        if fields[0][0] == _VERSION:
            fields = fields[1:]
        # serial number, signature, issuer, validity
        kind, span = fields[3]
        begin, end = _parts(span)
        if kind != _SEQUENCE:
            return None
        return _time(*begin), _time(*end)
    except (IndexError, ValueError):
        return None


def _parts(der: bytes) -> list[tuple[int, bytes]]:
    """The values that stand in a row, each with its tag. IndexError, ValueError: it is no DER."""
    found, at = [], 0
    while at < len(der):
        tag, length = der[at], der[at + 1]
        at += 2
        if length & 0x80:
            more = length & 0x7F
            length = int.from_bytes(der[at : at + more], "big")
            at += more
        if at + length > len(der):
            raise ValueError("cut short")
        found.append((tag, der[at : at + length]))
        at += length
    return found


def _time(tag: int, value: bytes) -> float:
    """Unix time of a UTCTime or GeneralizedTime (RFC 5280 4.1.2.5)."""
    text = value.decode("ascii")
    if tag == _UTC_TIME:
        text = ("20" if text < "50" else "19") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()
