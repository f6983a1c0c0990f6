"""The certificates that the proxy shows its clients, and which one is shown for which name.

A listener has one TLS context for its whole life, the front. It holds no certificate: as soon as a client has said
which name it wants (SNI, RFC 6066), the context of that name's certificate takes its place. So certificates are
replaced by replacing a table, and connections that stand are not touched.

Certificate and key are tried on each other before they are used: a handshake in memory, in which our own client
trusts just this certificate. It also tells what the certificate says, which Python's `ssl` tells of a peer only.
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from policies.units import BadValueError
from proxy.certificate_dates import words_on

if TYPE_CHECKING:
    from proxy.config import CertificateConfig

_NO_CHECK_TIME: Final = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME: an expired certificate is to be read too."""
_FLIGHTS: Final = 8
"""More than a handshake has."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """One certificate with its key, ready to be shown."""

    file: Path
    names: tuple[str, ...]
    """Small letters; `*.example.com` stands for one more label."""
    not_before: float
    not_after: float
    """Unix times."""
    context: ssl.SSLContext = field(repr=False, compare=False)
    fingerprint: str = ""
    """SHA-256 of the certificate itself, hexadecimal."""

    def seconds_left(self, wall: float) -> float:
        """Until it ends, at Unix time `wall`; negative: it has ended."""
        return self.not_after - wall

    def warning(self, wall: float) -> str:
        """What is or will soon be wrong with its dates, for people; empty: nothing."""
        return words_on(
            f"certificate {self.file}", self.not_before, self.not_after, wall, "clients refuse it"
        )


def load_certificates(sections: Sequence[CertificateConfig]) -> tuple[Certificate, ...]:
    """Those of the configuration, in its order. Raises BadValueError naming file and key (`tls`, index, key)."""
    return tuple(_load(number, section) for number, section in enumerate(sections))


def fingerprints(certificates: Sequence[Certificate]) -> list[str]:
    """Of each."""
    return [certificate.fingerprint for certificate in certificates]


def _load(number: int, section: CertificateConfig) -> Certificate:
    context = server_context()
    if missing := unreadable(section.certificate, section.key):
        key = "key" if section.certificate not in missing else "certificate"
        raise BadValueError("; ".join(missing.values()), at=("tls", number, key))
    try:
        load_chain(context, section.certificate, section.key)
        said, der = _read(context, section.certificate)
    except ssl.SSLError as error:
        raise _unusable(number, "certificate", section.certificate, not_for_tls(error)) from None
    except OSError as error:
        reason = (error.strerror or "cannot be read").lower()
        raise _unusable(number, "certificate", section.certificate, reason) from error
    names = tuple(name.lower() for name in section.names) or _names(said)
    if not names and number:
        raise _unusable(
            number, "certificate", section.certificate, "names no host: say for which it is (`names`)"
        )
    return Certificate(
        section.certificate,
        names,
        float(ssl.cert_time_to_seconds(said["notBefore"])),
        float(ssl.cert_time_to_seconds(said["notAfter"])),
        context,
        sha256(der).hexdigest(),
    )


def unreadable(*files: Path) -> dict[Path, str]:
    """Those that cannot be read, each with words on it: OpenSSL does not say which one it misses."""
    found = {}
    for file in files:
        try:
            file.open("rb").close()
        except OSError as error:
            found[file] = f"{file}: {(error.strerror or 'cannot be read').lower()}"
    return found


def _unusable(number: int, key: str, file: Path, reason: str) -> BadValueError:
    return BadValueError(f"{file}: {reason}", at=("tls", number, key))


def server_context() -> ssl.SSLContext:
    """TLS 1.2 or newer, HTTP/1.1; no certificate yet."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    return context


def load_chain(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    """As `load_cert_chain`, which would ask at the terminal for a key's password: here such a key is an error."""
    context.load_cert_chain(certificate, key, password=_no_password)


def _no_password() -> str:
    error = ssl.SSLError("the key is encrypted")
    error.reason = "BAD_PASSWORD_READ"
    raise error


def not_for_tls(error: ssl.SSLError) -> str:
    """Why OpenSSL cannot use a file, in words."""
    match error.reason:
        case "KEY_VALUES_MISMATCH":
            reason = "the key belongs to another certificate"
        case "BAD_PASSWORD_READ":
            reason = "the key is encrypted: store it without a password"
        case _:
            said = getattr(error, "verify_message", None) or error.reason or "not usable"
            reason = said.lower().replace("_", " ")
    return f"cannot be used for TLS ({reason})"


def _read(server: ssl.SSLContext, file: Path) -> tuple[dict[str, Any], bytes]:
    """What the certificate of `server` says, and itself. Raises ssl.SSLError: no handshake succeeds with it."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(file)
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = client.wrap_bio(back, there), server.wrap_bio(there, back, server_side=True)
    for _ in range(_FLIGHTS):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
    said, der = ends[0].getpeercert(), ends[0].getpeercert(binary_form=True)
    assert said
    assert der
    return said, der


def _names(said: dict[str, Any]) -> tuple[str, ...]:
    """The hosts that a certificate is for, addresses too."""
    return tuple(
        name.lower() for kind, name in said.get("subjectAltName", ()) if kind in ("DNS", "IP Address")
    )


class ServerCertificates:
    """Chooses by the name that a client wants; what is unknown, or not said, gets the first certificate."""

    def __init__(self, certificates: Sequence[Certificate]) -> None:
        self.front = server_context()
        self.front.sni_callback = self._chosen
        self._by_name: dict[str, ssl.SSLContext] = {}
        self._first: ssl.SSLContext
        self.use(certificates)

    def use(self, certificates: Sequence[Certificate]) -> None:
        """Show these from the next handshake on; at least one."""
        self._first = certificates[0].context
        by_name: dict[str, ssl.SSLContext] = {}
        for certificate in certificates:
            for name in certificate.names:
                by_name.setdefault(name, certificate.context)
        self._by_name = by_name

    def find(self, name: str | None) -> ssl.SSLContext:
        """The context for a name: as it is, else by its wildcard, else the first of all."""
        if not name:
            return self._first
        name = name.lower().rstrip(".")
        found = self._by_name.get(name)
        if found is None:
            found = self._by_name.get("*." + name.partition(".")[2], self._first)
        return found

    def _chosen(self, connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        connection.context = self.find(name)
