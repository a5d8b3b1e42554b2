"""What the topics of one Kafka consumer have in common: how they are made, and how copies are put into them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from aiokafka import errors
from aiokafka.protocol.admin import CreateTopicsRequest
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from orthanc_events_bridge.errors import NotConnectedError, TransportConfigurationError
from orthanc_events_bridge.transports.kafka_connection import Cluster
from orthanc_events_bridge.transports.kafka_delays import Copy
from orthanc_events_bridge.transports.kafka_options import KafkaOptions
from orthanc_events_bridge.transports.kafka_protocol import TopicMetadata, refused

#: Seconds between two looks at a topic that is coming into being.
_LOOK: Final = 0.02

#: What Kafka answers where nothing is stored, and another node, or the same one soon, does it.
LED_ELSEWHERE: Final = frozenset(
    {
        errors.UnknownTopicOrPartitionError.errno,
        errors.LeaderNotAvailableError.errno,
        errors.NotLeaderForPartitionError.errno,
    }
)


async def need_topic(
    cluster: Cluster, options: KafkaOptions, topic: str, partitions: int, settings: Mapping[str, str]
) -> tuple[TopicMetadata, bool]:
    """Find a consumer's topic, or make it.

    :param partitions: how many it is made with.
    :param settings: by Kafka's names, with which it is made; how it is replicated is the same for all.
    :return: the topic, and whether it was made now.
    :raises NotConnectedError: Kafka doesn't answer.
    :raises TransportConfigurationError: it is not there, and can't be made.
    """
    found = await cluster.topic(topic)
    made = found is None
    if made:
        if not options.declare:
            few = f"with {partitions} partition{'' if partitions == 1 else 's'}"
            policy = f"cleanup.policy={settings['cleanup.policy']}"
            raise TransportConfigurationError(
                f"Kafka has no topic {topic}, and declare is false",
                f"make it, {few} and {policy}, or set declare to true",
            )
        await _make(cluster, options, topic, partitions, settings)
    end = asyncio.get_running_loop().time() + options.connect_timeout
    while found is None or -1 in found.leaders or not found.leaders:
        if asyncio.get_running_loop().time() > end:
            raise NotConnectedError(f"no server of Kafka leads the topic {topic}", "start the servers that hold it")
        await asyncio.sleep(_LOOK)
        found = await cluster.topic(topic)
    return found, made


async def _make(
    cluster: Cluster, options: KafkaOptions, topic: str, partitions: int, settings: Mapping[str, str]
) -> None:
    needed = {
        "unclean.leader.election.enable": "false",
        "min.insync.replicas": str(options.limits.needed_replicas),
    }
    rows = [*{**needed, **settings}.items()]
    new: tuple[Any, ...] = (topic, partitions, options.limits.replicas, [], rows)
    answer = await cluster.ask(CreateTopicsRequest([new], round(options.connect_timeout * 1000), False))
    for _, code, text in answer.topic_errors:
        # Another subscriber can have been quicker.
        if code in (errors.NoError.errno, errors.TopicAlreadyExistsError.errno):
            continue
        error = refused(code, topic)
        if isinstance(error, TransportConfigurationError) or getattr(errors.for_code(code), "retriable", False):
            raise error
        raise TransportConfigurationError(
            f"Kafka can't make the topic {topic}: {text or errors.for_code(code).__name__} ({code})",
            "check `limits`; limits.replicas can't be more than there are servers",
        )


def batch_of(copies: Sequence[Copy]) -> bytes:
    """Copies as Kafka stores them, of now."""
    builder = DefaultRecordBatchBuilder(
        magic=2,
        compression_type=0,
        is_transactional=0,
        producer_id=-1,
        producer_epoch=-1,
        base_sequence=-1,
        batch_size=2**30,
    )
    now = time.time_ns() // 1_000_000
    for offset, copy in enumerate(copies):
        builder.append(offset, now, copy.key, copy.value, list(copy.headers))
    return bytes(builder.build())
