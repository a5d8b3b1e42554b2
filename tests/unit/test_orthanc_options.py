"""Where an Orthanc is and how to log in, from the command line and the environment; what can't be right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orthanc_events_bridge.cli_options import orthanc_of, orthanc_options
from orthanc_events_bridge.errors import OrthancError
from orthanc_events_bridge.orthanc_api import OrthancOptions

URL = "https://pacs.example.org/orthanc"


def test_the_environment_is_enough() -> None:
    found = OrthancOptions.find(
        {"url": None, "user": None},
        {
            "ORTHANC_EVENTS_ORTHANC_URL": URL,
            "ORTHANC_EVENTS_ORTHANC_USER": "bridge",
            "ORTHANC_EVENTS_ORTHANC_PASSWORD": "secret",
            "ORTHANC_EVENTS_ORTHANC_CA_FILE": "/etc/ca.pem",
            "ORTHANC_EVENTS_ORTHANC_TIMEOUT": "5",
        },
    )
    assert found == OrthancOptions(URL, "bridge", "secret", ca_file=Path("/etc/ca.pem"), timeout=5)
    assert "secret" not in repr(found)


def test_a_login_is_never_put_together_from_both() -> None:
    environment = {"ORTHANC_EVENTS_ORTHANC_USER": "bridge", "ORTHANC_EVENTS_ORTHANC_PASSWORD": "secret"}
    assert OrthancOptions.find({"url": URL, "token_file": Path("t")}, environment) == OrthancOptions(
        URL, token_file=Path("t")
    )


def test_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    monkeypatch.setenv("ORTHANC_EVENTS_ORTHANC_URL", "http://other:8042")
    parser = argparse.ArgumentParser()
    orthanc_options(parser)
    arguments = ["--orthanc", URL, "--orthanc-user", "bridge", "--orthanc-password-file", "p", "--orthanc-timeout", "3"]
    found = orthanc_of(parser.parse_args(arguments))
    assert found == OrthancOptions(URL, "bridge", password_file=Path("p"), timeout=3)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"url": None}, "--orthanc URL"),
        ({"url": "pacs:8042"}, "no URL"),
        ({"url": "http://pacs:port"}, "no URL"),
        ({"url": "https://bridge:hidden@pacs"}, "holds credentials"),
        ({"url": URL, "user": "bridge"}, "a user needs a password"),
        ({"url": URL, "password": "hidden"}, "a user needs a password"),
        ({"url": URL, "user": "bridge", "password": "hidden", "token": "hidden"}, "password and token"),
        ({"url": URL, "cert_file": Path("c")}, "needs its key"),
        ({"url": URL, "timeout": 0.0}, "more than 0"),
    ],
)
def test_mistakes_are_named_without_secrets(given: dict[str, Any], says: str) -> None:
    with pytest.raises(OrthancError) as caught:
        OrthancOptions.find(given, {})
    assert says in str(caught.value) and "hidden" not in str(caught.value)
    assert caught.value.remedy


def test_a_secret_file_is_read_as_it_is_meant(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text(" with space \r\n", "utf-8")
    assert OrthancOptions(URL, "bridge", password_file=path).secret("password") == " with space "
    path.write_bytes(b"\n")
    with pytest.raises(OrthancError, match="is empty"):
        OrthancOptions(URL, "bridge", password_file=path).secret("password")
    path.write_bytes(b"\xff")
    with pytest.raises(OrthancError, match="UTF-8"):
        OrthancOptions(URL, "bridge", password_file=path).secret("password")
    with pytest.raises(OrthancError, match="can't be read"):
        OrthancOptions(URL, "bridge", password_file=tmp_path / "none").secret("password")
