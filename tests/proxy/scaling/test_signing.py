"""Signatures: the specification's own vector, and nothing that was not signed as it is."""

from __future__ import annotations

import base64
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.units import BadValueError
from proxy.scaling import signing
from proxy.scaling.signing import (
    MOST_SIGNATURES,
    SIGNATURE,
    TIMESTAMP,
    TOLERANCE_S,
    SignatureError,
    secrets_of,
    sign,
    signed,
    verify,
    what_is_signed,
)

NOW = 1_700_000_000
OLD, NEW, OTHER = b"old-secret-of-16", b"new-secret-of-16", b"another-of-16-by"
BODY = b'{"operation":"start"}'


def test_the_vector_that_standard_webhooks_libraries_are_tested_with() -> None:
    secret = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    body = b'{"test": 2432232314}'
    assert sign(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body) == (
        "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    )


def test_what_is_signed_is_taken_and_its_id_known() -> None:
    assert verify([NEW], signed([NEW], "msg_1", NOW, BODY), BODY, NOW + 0.5) == "msg_1"


@pytest.mark.parametrize(("signing_with", "knowing"), [((OLD, NEW), (NEW,)), ((OLD,), (NEW, OLD))])
def test_a_secret_is_replaced_while_both_sides_work(
    signing_with: tuple[bytes, ...], knowing: tuple[bytes, ...]
) -> None:
    assert verify(knowing, signed(signing_with, "msg_1", NOW, BODY), BODY, NOW) == "msg_1"


@given(st.binary(max_size=50), st.binary(max_size=50))
def test_another_body_is_refused(body: bytes, other: bytes) -> None:
    headers = signed([NEW], "m", NOW, body)
    if body == other:
        assert verify([NEW], headers, other, NOW) == "m"
    else:
        with pytest.raises(SignatureError, match="no signature"):
            verify([NEW], headers, other, NOW)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"webhook-id": "msg_2"}, "no signature"),
        ({"webhook-timestamp": str(NOW + 1)}, "no signature"),
        ({"webhook-signature": "v1,AAAA"}, "no signature"),
        ({"webhook-signature": "v1,\udcff"}, "no signature"),
        ({"webhook-signature": ""}, "webhook-signature is missing"),
        ({"webhook-id": ""}, "webhook-id is missing"),
        ({"webhook-id": "a b"}, "webhook-id: at most"),
        ({"webhook-timestamp": "1e9"}, "whole seconds"),
        ({"webhook-timestamp": "-5"}, "whole seconds"),
        ({"webhook-timestamp": "١"}, "whole seconds"),
    ],
)
def test_what_was_changed_is_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(SignatureError, match=message):
        verify([NEW], signed([NEW], "msg_1", NOW, BODY) | change, BODY, NOW)


def test_another_secret_is_refused() -> None:
    with pytest.raises(SignatureError, match="wrong secret"):
        verify([NEW, OLD], signed([OTHER], "msg_1", NOW, BODY), BODY, NOW)


@pytest.mark.parametrize("off", [TOLERANCE_S, -TOLERANCE_S])
def test_five_minutes_either_way_and_no_more(off: float) -> None:
    headers = signed([NEW], "msg_1", NOW, BODY)
    assert verify([NEW], headers, BODY, NOW + off) == "msg_1"
    with pytest.raises(SignatureError, match="old" if off > 0 else "from the future"):
        verify([NEW], headers, BODY, NOW + off * 1.01)


def test_every_comparison_takes_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """All secrets are compared with all signatures, right ones included, and by `compare_digest` only."""
    made = []
    compare_digest = hmac.compare_digest

    def compare(left: bytes, right: bytes) -> bool:
        made.append((left, right))
        return compare_digest(left, right)

    monkeypatch.setattr(signing.hmac, "compare_digest", compare)
    verify([NEW, OLD], signed([NEW, OLD], "m", NOW, BODY), BODY, NOW)
    assert len(made) == 4


def test_a_flood_of_signatures_is_not_compared() -> None:
    headers = signed([NEW], "m", NOW, BODY)
    headers[SIGNATURE] = "v1,x " * MOST_SIGNATURES + headers[SIGNATURE]
    with pytest.raises(SignatureError):
        verify([NEW], headers, BODY, NOW)


def test_without_a_body_the_route_is_signed() -> None:
    assert what_is_signed("DELETE", "/platform/placements/a", b"") == b"DELETE /platform/placements/a"
    assert what_is_signed("PUT", "/platform/placements/a", BODY) == BODY


def test_secrets_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK", f"{NEW.decode()}  whsec_{base64.b64encode(OLD).decode()}")
    assert secrets_of("HOOK") == (NEW, OLD)


@pytest.mark.parametrize(
    ("value", "message"),
    [(None, "HOOK is not set"), ("", "HOOK is not set"), ("short", "16 bytes"), ("whsec_!!", "not base64")],
)
def test_secrets_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, value: str | None, message: str
) -> None:
    monkeypatch.delenv("HOOK", raising=False)
    if value is not None:
        monkeypatch.setenv("HOOK", value)
    with pytest.raises(BadValueError, match=message) as raised:
        secrets_of("HOOK", ("secret_env",))
    assert raised.value.at == ("secret_env",)
    assert value is None or not value or value not in str(raised.value)


def test_a_secret_in_the_place_of_the_name_is_not_shown() -> None:
    with pytest.raises(BadValueError) as raised:
        secrets_of("whsec_abcdefghijklmnop")
    assert "abcdef" not in str(raised.value)


def test_a_timestamp_is_that_of_the_sending() -> None:
    assert signed([NEW], "m", NOW, BODY)[TIMESTAMP] == str(NOW)
