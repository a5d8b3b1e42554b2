"""The main test for each version of Orthanc with each of the brokers, in containers (``make test-matrix``).

What differs between versions is asked in full elsewhere: of Orthanc by ``make test-newer``, of brokers by
``make test-containers``. Here each pair does its work once: a study is uploaded, the broker is killed, another one is
uploaded, the broker is started again, both become stable, one is deleted; every event comes once, and in order, by the
ledger.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from orthanc_events_bridge.testing import dicom
from orthanc_events_bridge.testing.brokers import BROKERS, way
from orthanc_events_bridge.testing.line import Line
from orthanc_events_bridge.testing.processes import wait_until
from orthanc_events_bridge.testing.programs import MissingComponentError, skip_or_fail

if way() != "containers":
    pytest.skip("TEST_SERVERS is not containers", allow_module_level=True)

from orthanc_events_bridge.testing.containers import (
    BrokerContainer,
    ContainerServer,
    KafkaContainer,
    NatsContainer,
    RabbitMQContainer,
)

pytestmark = pytest.mark.integration

#: Images of Orthanc, and of the brokers with which each is asked in CI, by their names in `testing.images`. A broker's
#: version is the bridge's matter alone, and needs only one of the Orthancs; ``make test-matrix`` has all pairs.
PAIRS = {
    "orthanc-1.10": ("nats-2.10", "rabbitmq-3.10", "kafka"),
    "orthanc": ("nats", "rabbitmq", "kafka"),
    # Debian's sid moves daily, and its Python plugin 7.1 crashes by itself when Orthanc stops while changes come in.
    "orthanc-sid": (),
}
IMAGES = ("nats-2.10", "nats", "rabbitmq-3.10", "rabbitmq", "kafka")
CELLS = [
    pytest.param(orthanc, image, marks=() if image in in_ci else pytest.mark.slow)
    for orthanc, in_ci in PAIRS.items()
    for image in IMAGES
]
CONTAINERS: dict[str, Callable[..., BrokerContainer]] = {
    "nats": NatsContainer,
    "rabbitmq": RabbitMQContainer,
    "kafka": KafkaContainer,
}
#: What says a server's version.
ASK = {
    "kafka": "ls /opt/kafka/libs | sed -n 's/^kafka-clients-\\(.*\\)\\.jar$/\\1/p'",
    "nats": "nats-server --version | sed 's/.*v//'",
    "rabbitmq": "rabbitmqctl version",
    "orthanc": "python3 -c 'import sys; print(*sys.version_info[:2], sep=\".\")'",
}


def version(server: object, kind: str) -> str:
    """What a program beside the running server says."""
    assert isinstance(server, ContainerServer)
    code, said = server.execute(["sh", "-c", ASK[kind]], {})
    assert code == 0, said
    return said.split()[-1]


@pytest.mark.parametrize(("orthanc", "image"), CELLS)
def test_every_event_comes_once_and_in_order(
    orthanc: str, image: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    kind = image.partition("-")[0]
    try:
        broker = BROKERS[kind](CONTAINERS[kind](tmp_path / "broker", image=image))
        line = Line(tmp_path / "line", broker=kind, made=broker, image=orthanc, transport=BROKERS[kind].impatient)
    except MissingComponentError as error:
        skip_or_fail(error)
    with line:
        record_property("orthanc", line.orthanc.get("/system")["Version"])
        record_property("python", version(line.orthanc, "orthanc"))
        record_property("broker", broker.title)
        record_property("version", version(broker.server, kind))
        line.ledger.expect("server.started")

        def upload() -> dicom.Study:
            study = dicom.make_study(series=2, instances=3)
            for instance in study:
                line.ledger.stored(line.orthanc.upload(instance.data))
            for level, ids in (("study", [study.id]), ("patient", [study.patient]), ("series", study.series)):
                for one in ids:
                    line.ledger.expect(f"{level}.stable", one)
            return study

        def are_stable() -> bool:
            levels = ("patients", "studies", "series")
            return all(
                line.orthanc.get(f"/{level}/{one}")["IsStable"]
                for level in levels
                for one in line.orthanc.get(f"/{level}")
            )

        first = upload()
        line.settle()
        broker.kill()
        upload()
        line.wait(lambda document: document["transports"][0]["state"] == "not connected")
        broker.start()
        assert wait_until(are_stable, 60, every=0.2)
        assert line.orthanc.delete("studies", first.id)
        line.ledger.deleted("studies", first.id)
        report = line.report()
        report.assert_clean()
        assert report.duplicated == 0
