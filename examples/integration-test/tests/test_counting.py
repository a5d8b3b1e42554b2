"""The consumer as it runs in production, with a real Orthanc and a real NATS, each in a container (docs/testing.md).

The fixtures `nats_container` and `orthanc_container` come with orthanc-events-bridge.
"""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from orthanc_events_bridge.testing.containers import NatsContainer, OrthancContainer


@pytest.fixture
def environment(nats_container: NatsContainer, orthanc_container: OrthancContainer) -> dict[str, str]:
    """Where the consumer finds both."""
    return {**os.environ, "BROKER_URL": nats_container.get_url(), "ORTHANC_URL": orthanc_container.get_url()}


def start(environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    """The consumer, as a process of its own."""
    return subprocess.Popen([sys.executable, "-m", "counting"], env=environment)


@pytest.fixture
def consumer(environment: dict[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    """The running consumer; it ends by SIGTERM, and then with 0."""
    process = start(environment)
    yield process
    process.terminate()
    assert process.wait(60) == 0


def count_of(orthanc: OrthancContainer, study: str) -> int:
    """What the consumer has written, once it has: that is an event too."""
    orthanc.wait_for_event("study.metadata-updated", study=study)
    return int(orthanc.get(f"/studies/{study}/metadata/1024"))


@pytest.mark.usefixtures("consumer")
def test_a_stable_study_is_counted(orthanc_container: OrthancContainer) -> None:
    study = orthanc_container.upload_study(series=2, instances=3)
    assert count_of(orthanc_container, study.id) == 6


def test_what_comes_while_the_consumer_is_down_is_counted_later(
    environment: dict[str, str], orthanc_container: OrthancContainer
) -> None:
    killed = start(environment)
    first = orthanc_container.upload_study()
    assert count_of(orthanc_container, first.id) == 1
    killed.kill()
    killed.wait()
    second = orthanc_container.upload_study(instances=2)
    orthanc_container.wait_for_event("study.stable", study=second.id)
    again = start(environment)
    assert count_of(orthanc_container, second.id) == 2
    again.terminate()
    assert again.wait(60) == 0


@pytest.mark.usefixtures("consumer")
def test_what_comes_while_the_broker_is_down_is_counted_later(
    nats_container: NatsContainer, orthanc_container: OrthancContainer
) -> None:
    nats_container.kill()
    study = orthanc_container.upload_study(instances=4)  # Orthanc takes it all the same
    nats_container.start()
    assert count_of(orthanc_container, study.id) == 4
