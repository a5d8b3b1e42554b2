"""Signatures of webhooks: the answers that Standard Webhooks' own libraries know, and secrets that are none."""

from __future__ import annotations

import base64

import pytest

from orthanc_events_bridge.errors import TransportConfigurationError
from orthanc_events_bridge.transports.webhook_signature import keys, sign

#: From the test suites of the libraries at github.com/standard-webhooks/standard-webhooks ("sign function works").
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
IDENTIFIER, TIMESTAMP, BODY = "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}'
SIGNATURE = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_signature_is_the_known_one() -> None:
    assert sign(keys(SECRET, "x"), IDENTIFIER, TIMESTAMP, BODY) == SIGNATURE


@pytest.mark.parametrize(
    ("identifier", "timestamp", "body"),
    [
        (f"{IDENTIFIER}x", TIMESTAMP, BODY),
        (IDENTIFIER, TIMESTAMP + 1, BODY),
        (IDENTIFIER, TIMESTAMP, BODY + b" "),
    ],
)
def test_signature_covers_id_time_and_body(identifier: str, timestamp: int, body: bytes) -> None:
    assert sign(keys(SECRET, "x"), identifier, timestamp, body) != SIGNATURE


def test_several_secrets_sign_each_for_itself() -> None:
    text = f"\n  another one  \n{SECRET}\r\n\n"
    assert keys(text, "x") == (b"another one", base64.b64decode(SECRET[6:]))
    other, known = sign(keys(text, "x"), IDENTIFIER, TIMESTAMP, BODY).split(" ")
    assert known == SIGNATURE
    assert other == sign((b"another one",), IDENTIFIER, TIMESTAMP, BODY)


def test_plain_text_is_the_key_itself() -> None:
    assert keys("grüß", "x") == ("grüß".encode(),)
    plain = base64.b64decode(SECRET[6:])
    with pytest.raises(UnicodeDecodeError):
        plain.decode()
    assert keys(SECRET[6:], "x") == (SECRET[6:].encode(),)


@pytest.mark.parametrize("text", ["whsec_", "whsec_Mf", "whsec_canary!", "whsec_grüß", "ok\nwhsec_canary", " \n", ""])
def test_what_is_no_secret_is_named_and_not_shown(text: str) -> None:
    with pytest.raises(TransportConfigurationError) as caught:
        keys(text, "transport x: signing_secret")
    error = caught.value
    assert "transport x: signing_secret" in str(error) and error.remedy
    assert error.__cause__ is None and error.__context__ is None
    assert "canary" not in str(error) and "Mf" not in str(error)
