"""The Kafka topic that events go to: found and checked, or made."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from aiokafka import errors
from aiokafka.protocol.admin import CreateTopicsRequest, DescribeConfigsRequest

from orthanc_events_bridge.errors import NotConnectedError, TransportConfigurationError, TransportError
from orthanc_events_bridge.transports.kafka_connection import Cluster
from orthanc_events_bridge.transports.kafka_options import KafkaOptions
from orthanc_events_bridge.transports.kafka_protocol import TopicMetadata, refused
from orthanc_events_bridge.values import format_duration, format_size

#: Seconds between two looks at a topic that is coming into being.
_LOOK: Final = 0.02
#: What the protocol calls a topic among the things that have settings.
_TOPIC: Final = 2

#: Settings with which a topic would lose events.
_NEEDED: Final[Mapping[str, str]] = {"cleanup.policy": "delete", "unclean.leader.election.enable": "false"}
_LARGEST: Final = "max.message.bytes"
_SEGMENT: Final = "segment.bytes"


@dataclass(frozen=True, slots=True)
class Topic:
    """The topic as it was found.

    :param settings: by Kafka's names; empty where we may not read them.
    """

    name: str
    metadata: TopicMetadata
    settings: Mapping[str, str]

    @property
    def largest(self) -> int | None:
        """How many bytes an event can have, with what Kafka puts around it; none where we may not know."""
        return int(self.settings[_LARGEST]) if _LARGEST in self.settings else None

    def limits_of(self, options: KafkaOptions) -> KafkaOptions:
        """The options for topics of a consumer that says no limits: as safe, and kept for as long, as this one."""
        if not options.limits_as_found:
            return options
        found: dict[str, Any] = {"replicas": min(self.metadata.replicas)}
        if self.settings:
            found["min_insync_replicas"] = int(self.settings["min.insync.replicas"])
            found["max_age"] = max(0.0, int(self.settings["retention.ms"]) / 1000)
            found["max_bytes"] = max(0, int(self.settings["retention.bytes"]))
        return options.model_copy(update={"limits": options.limits.model_copy(update=found)})

    def describe(self, count: int) -> list[str]:
        """It in a few lines.

        :param count: of its events.
        """
        partitions, replicas = len(self.metadata.leaders), min(self.metadata.replicas)
        lines = [f"topic {self.name}: {count} events, {partitions} partitions, {replicas} replicas"]
        if not self.settings:
            return [*lines, "its settings can't be read: the user may not describe them (DescribeConfigs)"]
        age, length = int(self.settings["retention.ms"]), int(self.settings["retention.bytes"])
        limits = (
            f"age {format_duration(age / 1000) if age > 0 else 'unlimited'}",
            f"size of a partition {format_size(length) if length > 0 else 'unlimited'}",
        )
        needed = self.settings["min.insync.replicas"]
        return [
            *lines,
            f"limits: {', '.join(limits)}; a full partition drops its oldest events",
            f"an event is confirmed by {needed} replicas at least, and takes up to {self.largest} bytes as a record",
        ]


async def open_topic(cluster: Cluster, options: KafkaOptions) -> Topic:
    """Find the topic and check it, or make it.

    :raises NotConnectedError: Kafka doesn't answer.
    :raises TransportConfigurationError: the topic can't be used as it is.
    """
    found = await cluster.topic(options.topic)
    if found is None and not options.declare:
        raise TransportConfigurationError(
            f"Kafka has no topic {options.topic}, and declare is false", "make it, or set declare to true"
        )
    if found is None:
        await _make(cluster, options)
    metadata = await _complete(cluster, options, found)
    topic = Topic(options.topic, metadata, await _settings(cluster, options))
    _check(topic, options)
    return topic


async def _complete(cluster: Cluster, options: KafkaOptions, found: TopicMetadata | None) -> TopicMetadata:
    """Wait until each of its partitions has a leader, as after it was made."""
    end = asyncio.get_running_loop().time() + options.connect_timeout
    while found is None or -1 in found.leaders or not found.leaders:
        if asyncio.get_running_loop().time() > end:
            lost = [str(number) for number, leader in enumerate(found.leaders) if leader == -1] if found else []
            what = f"partition {', '.join(lost)} of the topic {options.topic}" if lost else f"the topic {options.topic}"
            raise NotConnectedError(f"no server of Kafka leads {what}", "start the servers that hold it")
        await asyncio.sleep(_LOOK)
        found = await cluster.topic(options.topic)
    return found


async def _make(cluster: Cluster, options: KafkaOptions) -> None:
    wanted = _wanted(options)
    if options.limits.max_bytes:
        # Only whole segments are dropped, and one of them has a gigabyte otherwise.
        wanted[_SEGMENT] = str(min(2**30, max(2**20, options.limits.max_bytes // 4)))
    new: tuple[Any, ...] = (options.topic, options.partitions, options.limits.replicas, [], list(wanted.items()))
    answer = await cluster.ask(CreateTopicsRequest([new], round(options.connect_timeout * 1000), False))
    for _, code, text in answer.topic_errors:
        # Another bridge can have been quicker.
        if code not in (errors.NoError.errno, errors.TopicAlreadyExistsError.errno):
            raise _not_made(code, text or "", options)


def _not_made(code: int, text: str, options: KafkaOptions) -> TransportError:
    error = errors.for_code(code)
    # A cluster that has just started counts no server as its own yet, and says that one replica is too many.
    starting = code == errors.InvalidReplicationFactorError.errno and "are currently fenced" in text
    if starting or getattr(error, "retriable", False):
        return NotConnectedError(
            f"Kafka can't make the topic {options.topic} now: {error.__name__} ({code})", "it is tried again by itself"
        )
    known = refused(code, options.topic)
    if isinstance(known, TransportConfigurationError):
        return known
    return TransportConfigurationError(
        f"Kafka can't make the topic {options.topic}: {text or error.__name__} ({code})",
        "check `limits` and partitions; limits.replicas can't be more than there are servers",
    )


async def _settings(cluster: Cluster, options: KafkaOptions) -> dict[str, str]:
    names = [*_wanted(options), _LARGEST]
    answer = await cluster.ask(DescribeConfigsRequest([(_TOPIC, options.topic, names)]))
    found: dict[str, str] = {}
    for code, _, _, _, entries in answer.resources:
        if code == errors.UnknownTopicOrPartitionError.errno:
            raise cluster.fail(refused(code, options.topic))
        found |= {name: value for name, value, *_ in entries}
    return found


def _wanted(options: KafkaOptions) -> dict[str, str]:
    limits = options.limits
    return {
        **_NEEDED,
        "min.insync.replicas": str(limits.needed_replicas),
        "retention.ms": str(round(limits.max_age * 1000) or -1),
        "retention.bytes": str(limits.max_bytes or -1),
    }


def _check(topic: Topic, options: KafkaOptions) -> None:
    """A topic that exists is never changed: what differs is named. What we may not read can't be checked."""
    wanted = _wanted(options)
    compared = options.declare and not options.limits_as_found
    differing = [
        f"{name} is {topic.settings[name]}, wanted {wanted[name]}"
        for name in (wanted if compared else _NEEDED)
        if topic.settings.get(name, wanted[name]) != wanted[name]
    ]
    if compared:
        partitions, replicas = len(topic.metadata.leaders), set(topic.metadata.replicas)
        if partitions != options.partitions:
            differing.append(f"partitions is {partitions}, wanted {options.partitions}")
        if replicas != {options.limits.replicas}:
            differing.append(f"replicas is {min(replicas)}, wanted {options.limits.replicas}")
    if differing:
        raise TransportConfigurationError(
            f"the Kafka topic {options.topic} exists with other settings: {'; '.join(differing)}",
            "change `limits`, partitions or the topic so that they agree, or set declare to false to keep its settings;"
            " an empty one can be deleted: a consumer that came first made it with the defaults",
        )
