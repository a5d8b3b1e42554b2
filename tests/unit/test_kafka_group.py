"""A member of a group at Kafka, without one: what it makes of a server that isn't ready yet."""

from __future__ import annotations

import asyncio
from collections import deque
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiokafka import errors

from orthanc_events_bridge.errors import NotConnectedError
from orthanc_events_bridge.transports import kafka_group
from orthanc_events_bridge.transports.kafka_connection import Cluster
from orthanc_events_bridge.transports.kafka_group import Group
from orthanc_events_bridge.transports.kafka_options import KafkaOptions

LOADS = errors.GroupLoadInProgressError.errno
MOVED = errors.NotCoordinatorForGroupError.errno
STRANGER = errors.UnknownMemberIdError.errno
DENIED = errors.GroupAuthorizationFailedError.errno


class Answering:
    """A cluster of which each question has one of these codes for an answer, the last one for good."""

    def __init__(self, *codes: int) -> None:
        self.codes = deque(codes)
        self.asked: list[str] = []

    async def ask(self, request: Any) -> Any:
        self.asked.append(type(request).__name__)
        return SimpleNamespace(coordinator_id=1, error_code=0)

    async def node(self, number: int) -> Any:
        return SimpleNamespace(begin=lambda request: request)

    async def wait(self, request: Any, seconds: float) -> Any:
        self.asked.append(type(request).__name__)
        return SimpleNamespace(error_code=self.codes.popleft() if len(self.codes) > 1 else self.codes[0])


def leave(cluster: Answering) -> list[str]:
    """What is asked by one that leaves for a member that could not."""
    one = cast(Cluster, cluster)
    group = Group(
        one,
        one,
        KafkaOptions.model_validate({"type": "kafka", "servers": ["127.0.0.1:9092"]}),
        "workers",
        600.0,
        "unordered",
    )
    asyncio.run(group.leave(member="of-before"))
    return [name.removesuffix("Request").split("_")[0] for name in cluster.asked]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka_group, "_PAUSE", 0.0)


def test_leaving_is_said_again_to_a_server_that_loads_its_groups() -> None:
    """One that has just started says so. Who took that for an answer would wait for the dead one to be given up."""
    assert leave(Answering(LOADS, LOADS, 0)) == ["LeaveGroup"] * 3


def test_leaving_is_said_to_the_server_that_leads_the_group_now() -> None:
    assert leave(Answering(MOVED, 0)) == ["LeaveGroup", "FindCoordinator", "LeaveGroup"]


def test_a_member_that_is_gone_already_has_left() -> None:
    assert leave(Answering(STRANGER)) == ["LeaveGroup"]


def test_leaving_that_was_refused_is_not_taken_for_done() -> None:
    with pytest.raises(Exception, match="let the user read the consumer group"):
        leave(Answering(DENIED))


def test_a_server_that_is_never_ready_is_not_waited_for_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka_group, "_LOADING", -1.0)
    with pytest.raises(NotConnectedError, match="workers"):
        leave(Answering(LOADS))
