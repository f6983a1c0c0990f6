"""Certificates for clients: which one is shown for which name, and what of a file cannot be used."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from hypothesis import given
from hypothesis import strategies as st

from policies.units import BadValueError
from proxy.certificates import Certificate, ServerCertificates, load_certificates, server_context
from proxy.config import CertificateConfig

AUTHORITY = trustme.CA()


def write(
    folder: Path,
    name: str,
    *hosts: str,
    not_after: datetime.datetime | None = None,
    not_before: datetime.datetime | None = None,
) -> CertificateConfig:
    """A certificate and its key in files."""
    made = AUTHORITY.issue_cert(*hosts, not_after=not_after, not_before=not_before)
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    certificate.write_bytes(b"".join(pem.bytes() for pem in made.cert_chain_pems))
    key.write_bytes(made.private_key_pem.bytes())
    return CertificateConfig(certificate=certificate, key=key)


def names(*names: str) -> Certificate:
    return Certificate(Path(names[0]), names, 0.0, 1.0, server_context())


def problem(section: CertificateConfig) -> BadValueError:
    with pytest.raises(BadValueError) as caught:
        load_certificates([section])
    return caught.value


def test_a_certificate_tells_its_names_and_dates(tmp_path: Path) -> None:
    end = datetime.datetime(2031, 5, 6, 7, 8, 9)
    (found,) = load_certificates(
        [write(tmp_path, "a", "api.Example.com", "*.b.example", "10.0.0.7", not_after=end)]
    )
    assert found.names == ("api.example.com", "*.b.example", "10.0.0.7")
    assert found.not_after == end.replace(tzinfo=datetime.UTC).timestamp()


def test_names_of_the_configuration_win(tmp_path: Path) -> None:
    section = write(tmp_path, "a", "a.example").model_copy(update={"names": ["B.example"]})
    assert load_certificates([section])[0].names == ("b.example",)


def test_a_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    a, b = write(tmp_path, "a", "a.example"), write(tmp_path, "b", "b.example")
    error = problem(CertificateConfig(certificate=a.certificate, key=b.key))
    assert "the key belongs to another certificate" in error.message
    assert error.at == ("tls", 0, "certificate")


def test_a_key_with_a_password_is_refused_and_nobody_is_asked_for_it(tmp_path: Path) -> None:
    section = write(tmp_path, "a", "a.example")
    key = load_pem_private_key(section.key.read_bytes(), None)
    encrypted = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    section.key.write_bytes(encrypted)
    assert "without a password" in problem(section).message


@pytest.mark.parametrize(("missing", "at"), [("key", "key"), ("certificate", "certificate")])
def test_a_file_that_is_not_there_is_named(missing: str, at: str, tmp_path: Path) -> None:
    section = write(tmp_path, "a", "a.example")
    getattr(section, missing).unlink()
    error = problem(section)
    assert error.message == f"{getattr(section, missing)}: no such file or directory"
    assert error.at == ("tls", 0, at)


def test_every_beginning_of_a_file_is_refused_and_never_half_used(tmp_path: Path) -> None:
    section = write(tmp_path, "a", "a.example")
    whole = section.certificate.read_bytes()
    last = whole.rindex(b"-----END")
    for cut in range(0, last, 97):
        section.certificate.write_bytes(whole[:cut])
        problem(section)


def test_an_expired_certificate_is_read_and_warned_of(tmp_path: Path) -> None:
    now = 1_900_000_000.0
    end = datetime.datetime.fromtimestamp(now, datetime.UTC)
    day = datetime.timedelta(days=1)
    for left, said in ((-1, "has expired"), (5, "expires in 5 days"), (1, "expires in 1 day"), (30, "")):
        section = write(tmp_path, f"a{left}", "a.example", not_after=end + left * day)
        (found,) = load_certificates([section])
        assert (said in found.warning(now)) if said else found.warning(now) == ""
    assert "not valid yet" in found.warning(0.0 - 1e10)


def test_a_name_finds_its_certificate_then_its_wildcard_then_the_first() -> None:
    first, wild, exact = names("first.example"), names("*.b.example"), names("api.b.example", "first.example")
    served = ServerCertificates([first, wild, exact])
    for name, wanted in {
        "first.example": first,
        "API.b.example.": exact,
        "www.b.example": wild,
        "b.example": first,
        "deep.www.b.example": first,
        "": first,
        None: first,
        "*.b.example": wild,
    }.items():
        assert served.find(name) is wanted.context, name


@given(st.text())
def test_any_name_gets_some_certificate(name: str) -> None:
    served = ServerCertificates([names("a.example"), names("*.b.example")])
    assert isinstance(served.find(name), ssl.SSLContext)


def test_old_versions_and_other_protocols_are_not_offered() -> None:
    context = server_context()
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
