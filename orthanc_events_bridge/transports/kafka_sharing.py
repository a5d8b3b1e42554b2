"""How the members of a Kafka consumer group share partitions: evenly, and with as few moves as that needs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

#: A topic's name, and the number of one of its partitions.
Place = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Claim:
    """What a member has when it joins anew.

    :param held: its places.
    :param busy: those of them with events that are being worked on; they stay, if it can be.
    :param leaves: it is about to go: all it has is for others.
    """

    held: frozenset[Place] = frozenset()
    busy: frozenset[Place] = frozenset()
    leaves: bool = False

    def encode(self) -> bytes:
        """As the other members read it."""
        document: dict[str, Any] = {
            what: by_topic((place, place[1]) for place in sorted(places))
            for what, places in (("held", self.held), ("busy", self.busy))
        }
        if self.leaves:
            document["leaves"] = True
        return json.dumps(document, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, data: bytes) -> Claim:
        """The reverse."""
        document = json.loads(data)
        held, busy = (
            frozenset((topic, one) for topic, those in document[what].items() for one in those)
            for what in ("held", "busy")
        )
        return cls(held, busy, document.get("leaves") is True)


def share_out(claims: Mapping[str, Claim], counts: Mapping[str, int]) -> tuple[dict[str, set[Place]], bool]:
    """Share every topic's partitions evenly, and move as few as that needs.

    :param claims: of each member.
    :param counts: the number of partitions of each topic.
    :return: each member's places, without those that another one has to give up first; and whether there are any.
    """
    takers = [member for member in claims if not claims[member].leaves] or list(claims)
    holders: dict[Place, str] = {}
    for member in sorted(claims):
        for place in claims[member].held:
            holders.setdefault(place, member)
    shares: dict[str, set[Place]] = {member: set() for member in claims}
    more = False
    for topic, count in sorted(counts.items()):
        mine: dict[str, list[int]] = {member: [] for member in claims}
        for partition in range(count):
            if (topic, partition) in holders:
                mine[holders[topic, partition]].append(partition)
        least, odd = divmod(count, len(takers))
        # One more goes to those who have it already, then to those who have the least so far.
        order = sorted(takers, key=lambda member: (len(mine[member]) <= least, len(shares[member]), member))
        quotas = dict.fromkeys(claims, 0) | {member: least + (place < odd) for place, member in enumerate(order)}
        taken: set[int] = set()
        for member, partitions in mine.items():
            partitions.sort(key=lambda partition: ((topic, partition) not in claims[member].busy, partition))
            taken.update(partitions[: quotas[member]])
            shares[member].update((topic, partition) for partition in partitions[: quotas[member]])
        free = iter([partition for partition in range(count) if partition not in taken])
        for member in order:
            for _ in range(quotas[member] - len(mine[member])):
                place = topic, next(free)
                if place in holders:
                    more = True
                else:
                    shares[member].add(place)
    return shares, more


def by_topic(rows: Iterable[tuple[Place, Any]]) -> dict[str, list[Any]]:
    """What belongs to places, in lists by their topics, as the protocol wants it."""
    found: dict[str, list[Any]] = {}
    for (topic, _), row in rows:
        found.setdefault(topic, []).append(row)
    return found
