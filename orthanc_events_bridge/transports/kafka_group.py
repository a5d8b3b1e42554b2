"""A member of a Kafka consumer group, and how the members share partitions.

aiokafka's own (0.14) stops every member at each change in the group, asks again for what they hold, and keeps to itself
that a connection is lost. So the group's protocol is spoken here. Partitions move in two steps, as in Kafka's
cooperative rebalancing (KIP-429): whoever is to lose one ends what it holds of it first, and everybody else works on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from aiokafka import errors
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata
from aiokafka.protocol.commit import OffsetCommitRequest, OffsetFetchRequest
from aiokafka.protocol.coordination import FindCoordinatorRequest
from aiokafka.protocol.group import HeartbeatRequest, JoinGroupRequest, LeaveGroupRequest, SyncGroupRequest

from orthanc_events_bridge.errors import NotConnectedError, TransportConfigurationError, TransportError
from orthanc_events_bridge.transports.kafka_connection import Cluster
from orthanc_events_bridge.transports.kafka_options import KafkaOptions
from orthanc_events_bridge.transports.kafka_ordered import Kind
from orthanc_events_bridge.transports.kafka_sharing import Claim, Place, by_topic, share_out
from orthanc_events_bridge.transports.subscriptions import boot_time

#: How members of ours share. Kafka lets nobody in who knows another way than those who are there: with another topic,
#: or of another kind, so that who shares out knows all that there is.
_PROTOCOL: Final = "orthanc-events-1"
#: Seconds that a server may take to find, load or move a group, beside what it takes to answer.
_LOADING: Final = 15.0
#: Seconds between two tries meanwhile.
_PAUSE: Final = 0.1
#: Kafka forgets a group's place a week after its last member has left, unless it is told otherwise: milliseconds.
_REMEMBERED: Final = 10 * 365 * 86_400_000
#: Offset of a partition that has no place yet.
_NONE: Final = -1

_LOADS: Final = errors.GroupLoadInProgressError.errno
_MOVED: Final = frozenset({errors.GroupCoordinatorNotAvailableError.errno, errors.NotCoordinatorForGroupError.errno})
_SHARING: Final = errors.RebalanceInProgressError.errno
_ID_NEEDED: Final = errors.MemberIdRequired.errno
_STRANGER: Final = errors.UnknownMemberIdError.errno
#: To who is no member: those who are have the say.
HAS_MEMBERS: Final = _STRANGER
NOTE_TOO_LONG: Final = frozenset({errors.OffsetMetadataTooLargeError.errno, errors.InvalidCommitOffsetSizeError.errno})
#: What a person has to change.
_MISTAKES: Final[Mapping[int, str]] = {
    errors.InconsistentGroupProtocolError.errno: "a subscriber of this name reads another topic, or is of another kind "
    "(ordered, or with its inbox alone), or another program has a consumer group of this name; end that first, or use "
    "another name",
    errors.InvalidSessionTimeoutError.errno: "choose an ack_wait that group.min.session.timeout.ms and "
    "group.max.session.timeout.ms of the server allow",
    errors.GroupAuthorizationFailedError.errno: "let the user read the consumer group",
    errors.InvalidGroupIdError.errno: "use another name",
    81: "raise group.max.size at the server",  # "group max size reached"
}


@dataclass(frozen=True, slots=True)
class Share:
    """What a member was given.

    :param places: its own now.
    :param more: others are to be moved, as soon as who has them gives them up.
    :param counts: for the member that did the sharing: the topics and how many partitions each had.
    """

    places: frozenset[Place]
    more: bool
    counts: Mapping[str, int] | None


class _Tries:
    """Again, until the time for it is over."""

    def __init__(self) -> None:
        self._end = asyncio.get_running_loop().time() + _LOADING

    async def again(self) -> bool:
        await asyncio.sleep(_PAUSE)
        return asyncio.get_running_loop().time() < self._end


class Group:
    """One member of a group.

    :param cluster: for joining alone: a server that has all members wait answers nothing else meanwhile.
    :param beside: for everything else.
    :param session: after so many seconds without a word of a member, its places are given to others.
    :param kind: that its members are of.
    :ivar name: of the group.
    :ivar member: our id; empty before we have one.
    :ivar lease: until then, on the clock `boot_time`, we are certainly a member.
    """

    def __init__(
        self, cluster: Cluster, beside: Cluster, options: KafkaOptions, name: str, session: float, kind: Kind
    ) -> None:
        self._cluster = cluster
        self._beside = beside
        self._patience = options.ack_timeout
        self.name = name
        self._protocol = f"{_PROTOCOL}-{kind}:{options.topic}"
        self._session = session
        self.member = ""
        self._generation = -1
        self._server = -1
        self._joining = False
        self.lease = float("inf")

    async def find(self) -> None:
        """Find the server that leads the group.

        :raises TransportError: there is none.
        """
        tries = _Tries()
        while True:
            answer = await self._beside.ask(FindCoordinatorRequest(self.name, 0))
            self._server = answer.coordinator_id
            if answer.error_code not in (_LOADS, *_MOVED) or not await tries.again():
                break
        if answer.error_code:
            raise self._refused(answer.error_code)

    async def _ask(self, cluster: Cluster, request: Any, seconds: float) -> Any:
        try:
            node = await cluster.node(self._server)
            return await cluster.wait(node.begin(request), seconds)
        except errors.KafkaError as error:
            raise cluster.lost(error) from error

    # Membership.

    async def join(
        self, claim: Claim, topics: Iterable[str], counts: Callable[[], Awaitable[Mapping[str, int]]]
    ) -> Share:
        """Take part in the next sharing out; waits until every other member does.

        :param topics: that we know of; another set than last time makes the others share anew.
        :param counts: asked when it is on us to share.
        :raises TransportError: we can't.
        """
        self._joining = True
        try:
            tries = _Tries()
            while True:
                code, share = await self._join(claim, sorted(topics), counts)
                if share is not None:
                    return share
                if code == _ID_NEEDED:
                    continue
                if code not in (_LOADS, _SHARING, *_MOVED) or not await tries.again():
                    raise self._refused(code)
                if code in _MOVED:
                    await self.find()
        finally:
            self._joining = False

    async def _join(
        self, claim: Claim, topics: list[str], counts: Callable[[], Awaitable[Mapping[str, int]]]
    ) -> tuple[int, Share | None]:
        known = ConsumerProtocolMemberMetadata(0, topics, claim.encode()).encode()
        milliseconds = round(self._session * 1000)
        request = JoinGroupRequest(
            self.name, milliseconds, milliseconds, self.member, None, "consumer", [(self._protocol, known)]
        )
        self.lease = float("inf")  # who is waiting for the others is not given up
        answer = await self._ask(self._cluster, request, self._session + _LOADING + self._patience)
        if answer.error_code:
            if answer.error_code == _ID_NEEDED:
                self.member = answer.member_id
            return answer.error_code, None
        self.member, self._generation = answer.member_id, answer.generation_id
        shares: list[tuple[str, bytes]] = []
        found = None
        if answer.leader_id == answer.member_id:
            found = await counts()
            shares = _share(answer.members, found)
        sync = SyncGroupRequest(self.name, self._generation, self.member, None, shares)
        began = boot_time()
        answer = await self._ask(self._cluster, sync, self._session + self._patience)
        if answer.error_code:
            return answer.error_code, None
        self.lease = began + self._session
        given = ConsumerProtocolMemberAssignment.decode(answer.member_assignment)
        places = frozenset((one.topic, one.partition) for one in given.partitions())
        return 0, Share(places, given.user_data == b"more", found)

    async def beat(self) -> bool:
        """Say that we are alive.

        :return: whether it is time to join anew.
        :raises TransportError: we are no member any more.
        """
        began = boot_time()
        request = HeartbeatRequest(self.name, self._generation, self.member)
        answer = await self._ask(self._cluster, request, self._patience)
        if answer.error_code not in (0, _SHARING):
            raise self._refused(answer.error_code)
        self.lease = began + self._session
        return bool(answer.error_code)

    async def leave(self, cluster: Cluster | None = None, member: str = "") -> None:
        """Say that we go, so that others get our places at once.

        :param cluster: over other connections than ours.
        :param member: another one than us.
        :raises TransportError: nobody has heard it.
        """
        request = LeaveGroupRequest(self.name, member or self.member)
        tries = _Tries()
        while True:
            code = (await self._ask(cluster or self._beside, request, self._patience)).error_code
            if code not in (_LOADS, *_MOVED) or not await tries.again():
                break
            if code in _MOVED:
                await self.find()
        if code not in (0, _STRANGER):
            raise self._refused(code)

    # Places.

    async def stored(self, places: Iterable[Place] | None = None) -> dict[Place, tuple[int, str]]:
        """Where the group has got to, and its note on it; places that it has never begun with are left out.

        :param places: none: all that we may see.
        :raises TransportError: it can't be had.
        """
        rows = None if places is None else list(by_topic((place, place[1]) for place in places).items())
        request = OffsetFetchRequest(self.name, rows)
        tries = _Tries()
        while True:
            answer = await self._ask(self._beside, request, self._patience)
            found = [(topic, *row) for topic, those in answer.topics for row in those]
            code = answer.error_code or next((row[4] for row in found if row[4]), 0)
            if code not in (_LOADS, *_MOVED) or not await tries.again():
                break
            if code in _MOVED:
                await self.find()
        if code:
            raise self._refused(code)
        return {(topic, one): (offset, note or "") for topic, one, offset, note, _ in found if offset != _NONE}

    async def store(self, places: Mapping[Place, tuple[int, str]], *, outside: bool = False) -> set[int]:
        """Note where the group has got to.

        :param outside: as nobody's member; refused with `HAS_MEMBERS` if there are any.
        :return: the codes of what was refused for a moment; it is to be tried again.
        :raises TransportError: it was refused.
        """
        rows = by_topic((place, (place[1], offset, note)) for place, (offset, note) in places.items())
        generation, member = (-1, "") if outside else (self._generation, self.member)
        request = OffsetCommitRequest(self.name, generation, member, _REMEMBERED, list(rows.items()))
        answer = await self._ask(self._beside, request, self._patience)
        codes = {code for _, those in answer.topics for _, code in those} - {0}
        passing = {_LOADS, _SHARING, *_MOVED, *NOTE_TOO_LONG}
        if self._joining:  # the number of the sharing out may have moved on, and we are about to hear of it
            passing.add(errors.IllegalGenerationError.errno)
        if outside:
            passing.add(HAS_MEMBERS)
        for code in codes - passing:
            raise self._refused(code)
        if codes & _MOVED:
            await self.find()
        return codes

    def _refused(self, code: int) -> TransportError:
        text = f"{errors.for_code(code).__name__} ({code})"
        if code in _MISTAKES:
            return TransportConfigurationError(
                f"Kafka does not let us into the consumer group {self.name}: {text}", _MISTAKES[code]
            )
        if code in (errors.UnknownMemberIdError.errno, errors.IllegalGenerationError.errno):
            return NotConnectedError(
                f"Kafka has given our share of {self.name} to others: nothing was heard of us for too long",
                "what was in hand comes again; subscribe again",
            )
        return NotConnectedError(f"Kafka's consumer group {self.name} can't be used now: {text}", "subscribe again")


def _share(members: Iterable[tuple[str, Any, bytes]], counts: Mapping[str, int]) -> list[tuple[str, bytes]]:
    claims = {
        member: Claim.decode(ConsumerProtocolMemberMetadata.decode(known).user_data) for member, _, known in members
    }
    shares, more = share_out(claims, counts)
    note = b"more" if more else b""
    rows = {member: by_topic((place, place[1]) for place in sorted(places)) for member, places in shares.items()}
    return [
        (member, ConsumerProtocolMemberAssignment(0, list(row.items()), note).encode()) for member, row in rows.items()
    ]
