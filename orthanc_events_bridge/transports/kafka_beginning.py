"""Where a Kafka consumer's name begins, and as what."""

from __future__ import annotations

import asyncio
from typing import Final

from orthanc_events_bridge.errors import NotConnectedError, TransportConfigurationError
from orthanc_events_bridge.transports.kafka_connection import Cluster
from orthanc_events_bridge.transports.kafka_delays import is_retry_topic
from orthanc_events_bridge.transports.kafka_group import HAS_MEMBERS, NOTE_TOO_LONG, Group
from orthanc_events_bridge.transports.kafka_options import KafkaOptions
from orthanc_events_bridge.transports.kafka_ordered import Kind, begun_as, was_begun_as
from orthanc_events_bridge.transports.kafka_partition import mark_of
from orthanc_events_bridge.transports.kafka_reader import offsets
from orthanc_events_bridge.transports.kafka_sharing import Place
from orthanc_events_bridge.transports.kafka_topic import Topic

#: Seconds between two tries to note where a name begins.
_LOOK: Final = 0.02


async def begin(
    group: Group, cluster: Cluster, options: KafkaOptions, topic: Topic, inbox: str, *, oldest: bool, kind: Kind
) -> None:
    """Fix where a new name begins, so that it is the same whatever happens from now on.

    With the topic, Kafka forgets what a name has had of it. Its inbox then tells that it is not new.

    :raises TransportConfigurationError: it has begun with the other order or with another topic, or has members of
        another kind.
    """
    begun = (inbox, 0)
    known = await group.stored()
    if kind != "inbox":
        _check_topic(group.name, topic.name, inbox, {place[0] for place in known})
    stored = {place: row for place, row in known.items() if place[0] == topic.name or place == begun}
    offset, note = stored.get(begun, (0, ""))
    before = was_begun_as(note)
    if {before, kind} == {"ordered", "unordered"}:
        raise TransportConfigurationError(
            f"Kafka has the consumer group {group.name}, and it is {'' if before == 'ordered' else 'not '}ordered",
            "give the consumer another name, or subscribe as before",
        )
    if before == kind and (kind == "inbox" or stored.keys() - {begun}):
        return
    said, note = begun_as(kind), note if before is None else note.removeprefix(begun_as(before))
    mark, found = mark_of(topic.metadata.id), dict[int, int]()
    # Who has its inbox alone needs no other place; who had it alone begins as if it were new, whatever was before that.
    if kind != "inbox" and (before == "inbox" or not stored.keys() - {begun}):
        oldest = oldest or (begun in stored and before != "inbox")
        found = await offsets(cluster, options, topic.metadata, oldest=oldest)
    end = asyncio.get_running_loop().time() + options.connect_timeout
    while True:
        rows = {(topic.name, one): (place, mark) for one, place in found.items()}
        codes = await group.store({**rows, begun: (offset, said + note)}, outside=True)
        if codes == {HAS_MEMBERS} and before not in (None, kind):
            await _check_members(group, begun, kind)
        if not codes - {HAS_MEMBERS}:  # where the name has subscribers, it has begun, and they say as what
            return
        if asyncio.get_running_loop().time() > end:  # without a place it would begin with the oldest event
            raise NotConnectedError(
                f"Kafka does not note where {group.name} begins: {sorted(codes)}", "it is tried again by itself"
            )
        if codes & NOTE_TOO_LONG:
            mark = said = ""
        await asyncio.sleep(_LOOK)


async def _check_members(group: Group, begun: Place, kind: Kind) -> None:
    """Are those who have changed the name's kind while we were about to?

    :raises TransportConfigurationError: they are still of the other.
    """
    _, note = (await group.stored([begun])).get(begun, (0, ""))
    if was_begun_as(note) != kind:
        what = "everything" if kind == "inbox" else "their inbox alone"
        raise TransportConfigurationError(
            f"Kafka's consumer group {group.name} has members that subscribe to {what}",
            "end them first, or use another name",
        )


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
