"""The plugin for pytest: fixtures for users' own tests (docs/testing.md).

It is loaded in every pytest of who has this package: it imports what it needs when a fixture is used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from orthanc_events_bridge.consumers import Consumer
    from orthanc_events_bridge.testing.containers import (
        KafkaContainer,
        NatsContainer,
        OrthancContainer,
        RabbitMQContainer,
    )
    from orthanc_events_bridge.testing.kit import Kit
    from orthanc_events_bridge.testing.orthanc_module import FakeOrthanc


@pytest.fixture
def consumer_kit() -> Iterator[Callable[[Consumer], Kit]]:
    """Starts the kit of a consumer (``Consumer.test``), and ends it with the test: ``kit = consumer_kit(app)``."""
    with contextlib.ExitStack() as stack:
        yield lambda app: stack.enter_context(app.test())


@pytest.fixture
def orthanc_module() -> Iterator[FakeOrthanc]:
    """The module ``orthanc``, for scripts that import it: it is there for as long as the test runs."""
    from orthanc_events_bridge.testing.orthanc_module import FakeOrthanc

    with FakeOrthanc() as orthanc:
        yield orthanc


def _running(name: str, *arguments: Any) -> Iterator[Any]:
    """A started container of `testing.containers`; without an engine or image the test is skipped, and in CI fails."""
    try:
        from orthanc_events_bridge.testing import containers
    except ImportError as error:
        pytest.fail(f'{error}: pip install "orthanc-events-bridge[containers]"', pytrace=False)
    from orthanc_events_bridge.testing.programs import MissingComponentError, skip_or_fail

    try:
        container = getattr(containers, name)(*arguments)
    except MissingComponentError as error:
        skip_or_fail(error)
    with container:
        yield container


@pytest.fixture(scope="session")
def nats_container() -> Iterator[NatsContainer]:
    """A NATS with JetStream in a container, for all tests."""
    yield from _running("NatsContainer")


@pytest.fixture(scope="session")
def rabbitmq_container() -> Iterator[RabbitMQContainer]:
    """A RabbitMQ in a container, for all tests."""
    yield from _running("RabbitMQContainer")


@pytest.fixture(scope="session")
def kafka_container() -> Iterator[KafkaContainer]:
    """A Kafka in a container, for all tests."""
    yield from _running("KafkaContainer")


@pytest.fixture(scope="session")
def orthanc_container(nats_container: NatsContainer) -> Iterator[OrthancContainer]:
    """An Orthanc with the bridge in a container, connected to `nats_container`, for all tests."""
    yield from _running("OrthancContainer", nats_container)
