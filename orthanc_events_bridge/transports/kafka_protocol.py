"""What aiokafka 0.14 doesn't speak of Kafka's protocol, and what Kafka's errors mean to us.

aiokafka's metadata know no topic by its id, without which one that was deleted and made again is taken for the one
before.
"""
# mypy: disallow-subclassing-any=False
# (aiokafka comes without types.)

from __future__ import annotations

import uuid
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Final

from aiokafka import errors
from aiokafka.protocol.abstract import AbstractType
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import Boolean, CompactArray, CompactString, Int16, Int32, Schema, TaggedFields

from orthanc_events_bridge.errors import NotConnectedError, TransportConfigurationError, TransportError

_NO_ID: Final = uuid.UUID(int=0)


class _Uuid(AbstractType):
    @classmethod
    def encode(cls, value: uuid.UUID) -> bytes:
        return value.bytes

    @classmethod
    def decode(cls, data: BytesIO) -> uuid.UUID:
        return uuid.UUID(bytes=data.read(16))


class _MetadataResponse(Response):
    API_KEY = 3
    API_VERSION = 12
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "brokers",
            CompactArray(
                ("node_id", Int32),
                ("host", CompactString()),
                ("port", Int32),
                ("rack", CompactString()),
                ("tags", TaggedFields),
            ),
        ),
        ("cluster_id", CompactString()),
        ("controller_id", Int32),
        (
            "topics",
            CompactArray(
                ("error_code", Int16),
                ("name", CompactString()),
                ("topic_id", _Uuid),
                ("is_internal", Boolean),
                (
                    "partitions",
                    CompactArray(
                        ("error_code", Int16),
                        ("partition", Int32),
                        ("leader", Int32),
                        ("leader_epoch", Int32),
                        ("replicas", CompactArray(Int32)),
                        ("isr", CompactArray(Int32)),
                        ("offline_replicas", CompactArray(Int32)),
                        ("tags", TaggedFields),
                    ),
                ),
                ("authorized_operations", Int32),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class _MetadataStruct(RequestStruct):
    FLEXIBLE_VERSION = True
    API_KEY = 3
    API_VERSION = 12
    RESPONSE_TYPE = _MetadataResponse
    SCHEMA = Schema(
        ("topics", CompactArray(("topic_id", _Uuid), ("name", CompactString()), ("tags", TaggedFields))),
        ("allow_auto_topic_creation", Boolean),
        ("include_topic_authorized_operations", Boolean),
        ("tags", TaggedFields),
    )


class MetadataRequest(Request[_MetadataStruct]):
    """Asks for the nodes and one topic, which is not made by that."""

    API_KEY = 3

    def __init__(self, topic: str) -> None:
        self._topic = topic

    def build(self, request_struct_class: Any) -> Any:
        return request_struct_class([(_NO_ID, self._topic, {})], False, False, {})


@dataclass(frozen=True, slots=True)
class TopicMetadata:
    """A topic as the cluster knows it.

    :param id: another one where it was deleted and made again; empty where the cluster has none.
    :param leaders: the node that leads each partition; -1 where none does.
    :param replicas: the number of replicas of each partition.
    """

    id: str
    leaders: tuple[int, ...]
    replicas: tuple[int, ...]


def read_topic(answer: Any, name: str) -> TopicMetadata | None:
    """What an answer says of a topic; none where there is no such topic.

    :raises TransportError: it can't be asked for.
    """
    for code, found, identity, _, partitions, *_ in answer.topics:
        if found != name:
            continue
        if code == errors.UnknownTopicOrPartitionError.errno:
            return None
        if code:
            raise refused(code, name)
        rows = sorted((row[1], row[2], len(row[4])) for row in partitions)
        return TopicMetadata(
            "" if identity == _NO_ID else str(identity),
            tuple(leader for _, leader, _ in rows),
            tuple(replicas for _, _, replicas in rows),
        )
    return None


#: What a person has to permit.
_NOT_ALLOWED: Final = frozenset(
    error.errno for error in (errors.TopicAuthorizationFailedError, errors.ClusterAuthorizationFailedError)
)


def refused(code: int, topic: str) -> TransportError:
    """Which of our errors a code of Kafka's is, where it means the same whatever was asked for."""
    text = f"{errors.for_code(code).__name__} ({code})"
    if code in _NOT_ALLOWED:
        return TransportConfigurationError(
            f"Kafka does not permit this user what is needed at the topic {topic}: {text}",
            "let it describe and write to the topic, as a consumer read it too, and create it if declare is true",
        )
    if code == errors.InvalidTopicError.errno:
        return TransportConfigurationError(f"Kafka takes no topic of the name {topic}: {text}", "choose another name")
    if code == errors.InvalidTimestampError.errno:  # by default, an hour ahead of the server is too far
        return TransportConfigurationError(
            f"this machine's clock is too far from that of Kafka's servers for the topic {topic}: {text}",
            "set the clocks; message.timestamp.after.max.ms (and before) of the topic says how far they may differ",
        )
    return NotConnectedError(
        f"Kafka can't serve the topic {topic} at the moment: {text}", "it is tried again by itself"
    )
