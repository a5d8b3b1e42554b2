"""Where a Kafka consumer's name begins, and as what."""

from __future__ import annotations

import asyncio
from typing import Final

from orthanc_events_bridge.errors import NotConnectedError, TransportConfigurationError
from orthanc_events_bridge.transports.kafka_connection import Cluster
from orthanc_events_bridge.transports.kafka_delays import is_retry_topic
from orthanc_events_bridge.transports.kafka_group import HAS_MEMBERS, NOTE_TOO_LONG, Group
from orthanc_events_bridge.transports.kafka_options import KafkaOptions
from orthanc_events_bridge.transports.kafka_ordered import begun_as, was_begun_as
from orthanc_events_bridge.transports.kafka_partition import mark_of
from orthanc_events_bridge.transports.kafka_reader import offsets
from orthanc_events_bridge.transports.kafka_topic import Topic

#: Seconds between two tries to note where a name begins.
_LOOK: Final = 0.02


async def begin(
    group: Group, cluster: Cluster, options: KafkaOptions, topic: Topic, inbox: str, *, oldest: bool, ordered: bool
) -> None:
    """Fix where a new name begins, so that it is the same whatever happens from now on.

    With the topic, Kafka forgets what a name has had of it. Its inbox then tells that it is not new.

    :raises TransportConfigurationError: it has begun with the other ``ordered``, or with another topic.
    """
    begun = (inbox, 0)
    known = await group.stored()
    _check_topic(group.name, topic.name, inbox, {place[0] for place in known})
    stored = {place: row for place, row in known.items() if place[0] == topic.name or place == begun}
    before = was_begun_as(stored[begun][1]) if begun in stored else None
    if before not in (None, ordered):
        raise TransportConfigurationError(
            f"Kafka has the consumer group {group.name}, and it is {'ordered' if before else 'not ordered'}",
            "give the consumer another name, or subscribe as before",
        )
    said = begun_as(ordered)
    if stored.keys() - {begun}:
        if before is None:  # the inbox was deleted, or it never said it; where there are members, they say it
            offset, note = stored.get(begun, (0, ""))
            await group.store({begun: (offset, said + note)}, outside=True)
        return
    found = await offsets(cluster, options, topic.metadata, oldest=oldest or begun in stored)
    mark = mark_of(topic.metadata.id)
    end = asyncio.get_running_loop().time() + options.connect_timeout
    while True:
        rows = {(topic.name, one): (offset, mark) for one, offset in found.items()}
        codes = await group.store({**rows, begun: stored.get(begun, (0, said))}, outside=True)
        if not codes - {HAS_MEMBERS}:  # where the name has subscribers, it has begun
            return
        if asyncio.get_running_loop().time() > end:  # without a place it would begin with the oldest event
            raise NotConnectedError(
                f"Kafka does not note where {group.name} begins: {sorted(codes)}", "it is tried again by itself"
            )
        if codes & NOTE_TOO_LONG:
            mark = said = ""
        await asyncio.sleep(_LOOK)


def _check_topic(name: str, topic: str, inbox: str, known: set[str]) -> None:
    """A name reads one topic: it has one inbox, one place of dead letters and one group, named after it alone.

    :param known: the topics that the group has begun with.
    """
    others = sorted(one for one in known if one != inbox and not is_retry_topic(name, one))
    if topic in others or not others:
        return
    raise TransportConfigurationError(
        f"Kafka's consumer group {name} reads the topic {others[0]}, and is to read {topic}",
        "give one of the two consumers another name; if it has moved for good, delete what the group has noted: "
        f"kafka-consumer-groups.sh --delete-offsets --group {name} --topic {others[0]}",
    )
