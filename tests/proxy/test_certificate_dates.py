"""When the files in the `tls` of a backend end, and where that is said."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from proxy.certificate_dates import _validity, backend_certificate, end_of, first_der

NOW = 1_900_000_000.0
DAY_S = 86400.0
KEY = ec.generate_private_key(ec.SECP256R1())


def made(not_before: float, not_after: float, serial: int = 7) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a" * 60)])
    begin, end = (datetime.datetime.fromtimestamp(at, datetime.UTC) for at in (not_before, not_after))
    builder = x509.CertificateBuilder(name, name, KEY.public_key(), serial, begin, end)
    return builder.sign(KEY, hashes.SHA256())


def file_of(folder: Path, *spans: tuple[float, float]) -> Path:
    file = folder / "some.pem"
    file.write_bytes(b"words\n".join(made(*span).public_bytes(Encoding.PEM) for span in spans))
    return file


@given(
    st.integers(0, 2_000_000_000),
    st.integers(1, 5_000_000_000),
    st.integers(1, 2**159 - 1),
)
def test_the_dates_are_those_of_the_certificate(begin: int, length: int, serial: int) -> None:
    """Also behind 2050, where they are written in another way."""
    der = made(begin, begin + length, serial).public_bytes(Encoding.DER)
    assert _validity(der) == (begin, begin + length)


@given(st.integers(0, 200), st.binary(max_size=4))
def test_what_is_no_certificate_has_no_dates_and_breaks_nothing(cut: int, other: bytes) -> None:
    der = made(NOW, NOW + 1).public_bytes(Encoding.DER)
    assert _validity(der[:cut]) is None
    _validity(der[:cut] + other + der[cut + len(other) :])


def test_of_a_chain_the_first_end_counts_and_of_authorities_the_last(tmp_path: Path) -> None:
    file = file_of(tmp_path, (NOW, NOW + 90 * DAY_S), (NOW - 9, NOW + 30 * DAY_S))
    chain = backend_certificate("a", "certificate", file)
    authorities = backend_certificate("a", "ca_file", file)
    assert chain is not None
    assert authorities is not None
    assert (chain.not_before, chain.not_after) == (NOW, NOW + 30 * DAY_S)
    assert (authorities.not_before, authorities.not_after) == (NOW - 9, NOW + 90 * DAY_S)
    assert end_of((chain, authorities), "certificate") == chain.not_after
    assert end_of((authorities,), "certificate") == float("inf")
    assert first_der(file) == made_der(file)


def made_der(file: Path) -> bytes:
    return x509.load_pem_x509_certificates(file.read_bytes())[0].public_bytes(Encoding.DER)


def test_a_file_without_certificates_says_nothing(tmp_path: Path) -> None:
    file = tmp_path / "none.pem"
    file.write_text("-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n")
    assert backend_certificate("a", "ca_file", file) is None
    assert first_der(file) is None


@pytest.mark.parametrize(
    ("left_days", "certificate", "authority"),
    [
        (-1, "our certificate {} has expired: it refuses us", "has expired: its certificate is refused"),
        (5, "our certificate {} expires in 5 days", "the authority in {} expires in 5 days"),
        (30, "", ""),
    ],
)
def test_it_is_warned_of_three_weeks_before(
    left_days: int, certificate: str, authority: str, tmp_path: Path
) -> None:
    file = file_of(tmp_path, (NOW - 99 * DAY_S, NOW + (left_days + 0.5) * DAY_S))
    for key, wanted in (("certificate", certificate), ("ca_file", authority)):
        found = backend_certificate("nj", key, file)
        assert found is not None
        said = found.warning(NOW)
        assert (wanted.format(file) in said and said.startswith("backend nj: ")) if wanted else said == ""


def test_real_authorities_can_be_read(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(file))
    assert first_der(file) == ssl.PEM_cert_to_DER_cert(file.read_text())
    found = backend_certificate("a", "ca_file", file)
    assert found is not None
    assert found.not_after > found.not_before
