"""Orthanc with the bridge in a container, as users' tests have it, with each broker.

Only with ``TEST_SERVERS=containers`` (``make test-containers``).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.testing.brokers import way
from orthanc_events_bridge.testing.images import own_image
from orthanc_events_bridge.testing.processes import ServerError, free_port
from orthanc_events_bridge.testing.programs import MissingComponentError, skip_or_fail

if way() != "containers":
    pytest.skip("TEST_SERVERS is not containers", allow_module_level=True)

from orthanc_events_bridge.testing import engine
from orthanc_events_bridge.testing.containers import (
    BrokerContainer,
    KafkaContainer,
    NatsContainer,
    OrthancContainer,
    RabbitMQContainer,
)

pytestmark = pytest.mark.integration

KINDS: dict[str, Callable[..., BrokerContainer]] = {
    "nats": NatsContainer,
    "rabbitmq": RabbitMQContainer,
    "kafka": KafkaContainer,
}
#: A callback of a user's own.
LOGGING = "lambda kind, level, resource: orthanc.LogWarning(f'in Python: {resource}')"


@pytest.fixture(autouse=True)
def images() -> None:
    """All images are there."""
    try:
        for kind in ("orthanc", *KINDS):
            engine.find_image(kind)
    except MissingComponentError as error:
        skip_or_fail(error)


@pytest.mark.parametrize("kind", ["nats", "rabbitmq", "kafka-published"])
def test_a_study_is_told_from_its_upload_to_its_deletion(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``published``: where an engine can't give containers this machine's network."""
    kind, _, published = kind.partition("-")
    if published:
        for module in ("contained", "engine"):
            monkeypatch.setattr(f"orthanc_events_bridge.testing.{module}.shares_network", lambda: False)
    with (
        KINDS[kind]() as broker,
        OrthancContainer(broker, settings={"data": {"tags": ["StudyInstanceUID"]}}) as orthanc,
    ):
        folders = [broker.folder, orthanc.folder]
        assert broker.published == orthanc.published == bool(published)
        study = orthanc.upload_study(series=2, instances=2)
        other = orthanc.upload_study()
        stable = orthanc.wait_for_event("study.stable", study=study.id)
        for name in ("study.sta*", "io.orthanc-events.study.stable.v1"):
            assert orthanc.wait_for_event(name, study=study.id) == stable
        assert stable.tags == {"StudyInstanceUID": study.study_uid}
        assert orthanc.delete("studies", study.id)
        told = orthanc.events_until("study.deleted", study=study.id)
        names = [event.name for event in told]
        assert len({event.id for event in told}) == len(told)
        assert {event.study_id for event in told} == {study.id} != {other.id}
        assert [names.count(f"{level}.created") for level in ("instance", "series", "study")] == [4, 2, 1]
        assert [names.count(f"{level}.deleted") for level in ("instance", "series", "study")] == [4, 2, 1]
        assert names.index("study.created") < names.index("study.stable") < names.index("study.deleted")
        if kind == "nats":  # the others take long, and are asked in faults/test_broker.py
            broker.restart()
        orthanc.upload_study(study)  # the same study once more
        again = orthanc.events_until("study.stable", study=study.id, where=lambda event: event.id != stable.id)
        assert [event.id for event in again[: len(told)]] == [event.id for event in told]
        assert "study.created" in [event.name for event in again[len(told) :]]
    assert not [folder for folder in folders if folder.exists()]


def test_an_unusual_one_and_what_a_wait_in_vain_says(tmp_path: Path) -> None:
    """A password at the broker, its stream's name, scripts in Lua and Python, and a second Orthanc to send to."""
    lua, script, password = tmp_path / "own.lua", tmp_path / "scripts" / "own.py", tmp_path / "password"
    lua.write_text('function OnStableStudy(id) print("in Lua: " .. id) end', "utf-8")
    script.parent.mkdir()
    script.write_text(f"import orthanc\northanc.RegisterOnChangeCallback({LOGGING})\n", "utf-8")
    password.write_text("secret", "utf-8")
    with (
        NatsContainer(config='authorization { user: bridge, password: "secret" }') as broker,
        OrthancContainer(orthanc={"DicomAlwaysAllowStore": True, "DicomAet": "ARCHIVE"}) as archive,
        OrthancContainer(
            broker,
            transport={"stream": "WARD", "user": "bridge", "password_file": str(password)},
            orthanc={"LuaScripts": [str(lua)], "DicomModalities": {"archive": archive.get_modality()}},
            user_script=script,
            mounts=[lua, password],
        ) as orthanc,
    ):
        study, other = orthanc.upload_study(), orthanc.upload_study()
        orthanc.post("/modalities/archive/store", [study.id])
        orthanc.wait_for_event("job.succeeded")
        assert archive.get("/studies") == [study.id]
        assert "orthanc-events" not in archive.log_text().replace(str(archive.folder), "")
        orthanc.wait_for_event("study.stable", study=study.id)
        for language in ("Lua", "Python"):
            orthanc.wait_log(f"in {language}: {study.id}")
        for timeout in (1, 10, 60):  # a slow machine has read nothing by then
            with pytest.raises(TimeoutError, match=f"^study.deleted .*did not come within {timeout} s") as raised:
                orthanc.wait_for_event("study.deleted", study=study.id, timeout=timeout)
            if "study.created" in (said := str(raised.value)):
                break
        assert re.search(rf"study\.created +studies/{study.id}(.|\n)*The bridge: connected, [0-9]+ rows behind", said)
        assert other.id not in said
        with pytest.raises(BridgeError, match=r"did you mean study\.stable"):
            orthanc.wait_for_event("study.stabel")


def test_what_the_engine_can_not_see_and_an_exit_code_are_told_as_they_are(tmp_path: Path) -> None:
    missing = NatsContainer(mounts=[tmp_path / "missing.pem"])
    with pytest.raises(ServerError, match=r"missing\.pem(.|\n)*the engine sees no such file"):
        missing.start()
    missing.close()
    assert not (tmp_path / "missing.pem").exists() and not missing.folder.exists()
    orthanc = OrthancContainer(orthanc={"HttpPort": "none"})
    with pytest.raises(ServerError, match=r"exit code 255(.|\n)*HttpPort"):
        orthanc.start()
    assert not orthanc.running and not orthanc.folder.exists()


def test_one_that_can_not_reach_its_broker_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    orthanc = OrthancContainer({"type": "nats", "servers": [f"nats://127.0.0.1:{free_port()}"]})
    orthanc.start(wait=False)
    orthanc.wait_log("can't be reached", timeout=120)
    monkeypatch.setattr(OrthancContainer, "deadline", 1.0)
    with pytest.raises(ServerError, match=r"was not ready within 1 s(.|\n)*transport nats: .*can't be reached"):
        orthanc.wait_ready()
    orthanc.close(kill=True)


@pytest.mark.parametrize(
    ("broker", "options", "wrong"),
    [
        ("http://127.0.0.1", {}, "is no URL of a broker"),
        ({"type": "nats", "sever": "x"}, {}, "sever"),
        ("nats://127.0.0.1:4222", {"settings": {"dtaa": {}}}, "dtaa: there is no such option; did you mean data"),
    ],
)
def test_what_is_configured_wrongly_is_refused_before_anything_starts(
    broker: Any, options: dict[str, Any], wrong: str
) -> None:
    with pytest.raises(BridgeError) as raised:
        OrthancContainer(broker, **options)
    assert wrong in str(raised.value)


def test_one_without_a_broker_has_no_events() -> None:
    with pytest.raises(BridgeError, match="was given no broker"):
        OrthancContainer().wait_for_event("study.stable")


def test_an_image_is_named_by_an_argument_before_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    find = engine.find_image.__wrapped__
    monkeypatch.setenv("ORTHANC_EVENTS_IMAGE_NATS", "127.0.0.1:1/mine:7")
    with pytest.raises(MissingComponentError, match=r"127\.0\.0\.1:1/mine:7(.|\n)*ORTHANC_EVENTS_IMAGE_NATS"):
        find("nats")
    with pytest.raises(MissingComponentError, match=r"127\.0\.0\.1:1/theirs:8"):
        find("nats", "127.0.0.1:1/theirs:8")
    assert find("nats", "rabbitmq") in (own_image("rabbitmq"), "rabbitmq:4.0.9")
    assert find("nats", own_image("nats")) == own_image("nats")
