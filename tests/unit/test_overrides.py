"""Options by variables of the environment, over those of the file: as Orthanc's images have it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from orthanc_events_bridge.bridge.config import ConfigError, Problem, parse
from orthanc_events_bridge.bridge.settings import Settings
from orthanc_events_bridge.transports.nats_options import NatsOptions
from orthanc_events_bridge.transports.webhook_options import WebhookOptions

FILE = "conf/orthanc-events.yaml"
#: That of our images, by variables alone.
IMAGES = (Path(__file__).parents[2] / "docker" / "orthanc-events.yaml").read_text("utf-8")
SOURCE = "urn:uuid:6f1c1d0e-6f0b-4d0c-9a39-0d3a3d8f3b6e"
GIVEN = {"ORTHANC_EVENTS_SOURCE": SOURCE, "ORTHANC_EVENTS_BROKER": "tls://a:4222,b:4222"}


def settings(variables: dict[str, str], text: str = IMAGES) -> Settings:
    return parse(text, FILE, {f"ORTHANC_EVENTS{name}": value for name, value in variables.items()} | GIVEN)


def problem(variables: dict[str, str], text: str = IMAGES) -> Problem:
    with pytest.raises(ConfigError) as caught:
        settings(variables, text)
    (found,) = caught.value.problems
    return found


def test_options_blocks_and_lists() -> None:
    found = settings(
        {
            "__SITE": "north",
            "__LOG_LEVEL": "debug",
            "__DATA__TAGS": '["Modality", "StudyInstanceUID"]',
            "__DATA__METADATA__0": "RemoteAET",
            "__EVENTS": '{"exclude": ["instance.*"]}',
            "__OUTBOX__MAX_BYTES": "5GiB",
            "__OUTBOX__KEEP": "14d",
            "__CAPTURE__INFER_INSTANCES": "true",
        }
    )
    assert (found.site, found.log_level) == ("north", "debug")
    assert (found.data.tags, found.data.metadata) == (("Modality", "StudyInstanceUID"), ("RemoteAET",))
    assert found.events.exclude == ("instance.*",)
    assert (found.outbox.max_bytes, found.outbox.keep) == (5 * 2**30, 14 * 86400)
    assert found.capture.infer_instances


def test_the_broker_that_the_file_has_as_a_url_gets_more_options(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("s3cret\n")
    prefix = "__TRANSPORTS__0__"
    found = settings(
        {
            f"{prefix}USER": "bridge",
            f"{prefix}PASSWORD_FILE": str(tmp_path / "password"),
            f"{prefix}TLS__CA_FILE": "/run/secrets/ca.pem",
            f"{prefix}LIMITS__MAX_AGE": "90d",
        }
    )
    (transport,) = found.transports
    assert isinstance(transport, NatsOptions)
    assert transport.servers == ("tls://a:4222", "tls://b:4222")
    assert (transport.user, transport.secret("password")) == ("bridge", "s3cret")
    assert transport.limits.max_age == 90 * 86400


def test_several_transports() -> None:
    webhook = '{"type": "webhook", "url": "https://hooks.example.org/", "token": "abc"}'
    kafka = "kafka://k:9092"
    found = settings({"__TRANSPORTS__1": webhook, "__TRANSPORTS__2": kafka, "__TRANSPORTS__2__NAME": "lake"})
    assert [one.name for one in found.transports] == ["nats", "webhook", "lake"]
    assert isinstance(found.transports[1], WebhookOptions)
    assert found.transports[1].secret("token") == "abc"

    # All of them, and then there need be no other.
    text = IMAGES.replace("${ORTHANC_EVENTS_BROKER}", "${NOT_SET}").replace("${ORTHANC_EVENTS_SOURCE}", "${NOT_SET}")
    (transport,) = settings({"__SOURCE": SOURCE, "__TRANSPORTS": f"[{webhook}]"}, text).transports
    assert transport.name == "webhook"
    typed = {"__SOURCE": SOURCE, "__TRANSPORTS__0__TYPE": "nats", "__TRANSPORTS__0__SERVERS__0": "nats://c:4222"}
    assert settings(typed, text).transports[0].name == "nats"


def test_text_stays_text() -> None:
    found = settings({"__TRANSPORTS__0__USER": "0123", "__TRANSPORTS__0__PASSWORD": "12345", "__SITE": "7"})
    assert found.site == "7"
    assert isinstance(found.transports[0], NatsOptions)
    assert (found.transports[0].user, found.transports[0].secret("password")) == ("0123", "12345")


def test_a_file_without_options_is_enough() -> None:
    found = settings({"__SOURCE": SOURCE, "__TRANSPORTS__0": "nats://a:4222"}, "# nothing\n")
    assert found.source == SOURCE


@pytest.mark.parametrize(
    ("name", "value", "option", "wrong"),
    [
        ("__DATA__TAGZ", "Modality", "data.tagz", "tags"),
        ("__OUTBOX__KEEP", "s3cret", "outbox.keep", "${ORTHANC_EVENTS__OUTBOX__KEEP}"),
        ("__OUTBOX", '{"keep": "s3cret"}', "outbox.keep", "${ORTHANC_EVENTS__OUTBOX}"),
        ("__TRANSPORTS__2", "nats://a:4222", "transports[2]", "from 0 to 1"),
        ("__TRANSPORTS__ONE", "nats://a:4222", "transports.one", "from 0 to 1"),
        ("__TRANSPORTS__0__TOKEN", '["s3cret"]', "transports[0].token", "text"),
        ("__0", "x", "0", "no such option"),
    ],
)
def test_what_is_wrong_names_the_variable_and_no_value(name: str, value: str, option: str, wrong: str) -> None:
    found = problem({name: value})
    assert (found.file, found.line, found.option) == (f"ORTHANC_EVENTS{name}", None, option)
    assert wrong in f"{found.wrong} {found.right}"
    assert "s3cret" not in str(found)


def test_what_is_wrong_in_the_file_is_said_all_the_same() -> None:
    found = problem({"__SITE": "north"}, IMAGES.replace("site:", "sight:"))
    assert (found.file, found.option) == (FILE, "sight")


@pytest.mark.parametrize(("page", "count"), [("compose.md", 5), ("configuration.md", 4)])
def test_what_the_pages_show_is_valid(page: str, count: int) -> None:
    text = (Path(__file__).parents[2] / "docs" / page).read_text("utf-8")
    shown = dict(re.findall(r"(?m)^ORTHANC_EVENTS(__\w+)=(.+)$", text))
    assert len(shown) == count
    found = settings({name: value.strip("'") for name, value in shown.items()} | {"__TRANSPORTS__0__USER": "bridge"})
    assert [one.name for one in found.transports] == ["nats", "webhook"]
    assert found.data.tags == ("Modality", "StudyInstanceUID")
