"""Events that a consumer publishes itself, derived from those that it is given (docs/events.md#derived-events).

They go where the bridge's go, so that whoever reads those reads these: the same streams, exchanges and topics, an
address of the same form, the partition of the study that they are about.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from orthanc_events_bridge.consumers.event import Event
from orthanc_events_bridge.errors import BridgeError, NotConnectedError
from orthanc_events_bridge.events.catalog import VERSION
from orthanc_events_bridge.events.derived import NAMES, derived_type, levels, schema
from orthanc_events_bridge.events.mapping import (
    NAMESPACE,
    STRUCTURED,
    SUBJECTS,
    partition,
    partition_key,
    trace_parent,
)
from orthanc_events_bridge.moments import iso
from orthanc_events_bridge.transports.base import Outgoing, PublishError

if TYPE_CHECKING:
    from orthanc_events_bridge.transports.base import Place

#: What types and schemas begin with where the cause doesn't say: the bridge's defaults.
PREFIX: Final = "io.orthanc-events"
SCHEMAS: Final = "urn:orthanc-events:schema:"
#: Another producer's type: reverse-DNS, in the characters that every broker takes in an address.
_FOREIGN: Final = re.compile(r"[a-z0-9-]+(\.[a-z0-9-]+)+\.(?P<level>[a-z0-9-]+)\.(?P<verb>[a-z0-9-]*[a-z-][a-z0-9-]*)")
_VERSION: Final = re.compile(r"\.v[0-9]+$")


def derive(
    name: str,
    data: Mapping[str, Any],
    cause: Event,
    *,
    producer: str,
    now: float,
    of: str | None = None,
    linked: bool = True,
) -> Outgoing:
    """Make an event from another one; see `orthanc_events_bridge.consumers.Consumer.publish`.

    :param producer: the name of the consumer.
    :param now: seconds of the epoch.
    :raises BridgeError: there can be no such event.
    """
    if not linked and (of is None or not data.get("id")):
        raise BridgeError(
            f"{name}: nothing may lead back to its cause, so neither its id nor what it is about can come from it",
            "give of=, and level, id and parents in its data",
        )
    kind, level, verb, more = _kind(name, cause)
    content = _content(name, data, cause)
    about, identifier = str(content.get("level", "")), content.get("id")
    key = cause.key
    if about in SUBJECTS and identifier:
        key = partition_key(about, str(identifier), content["parents"])
        more["subject"] = f"{SUBJECTS[about]}/{identifier}"
    elif linked and "subject" in cause.attributes:
        more["subject"] = cause.attributes["subject"]
    spelt = ("derived", producer, cause.source, kind, cause.id if of is None else of)
    event_id = str(uuid.uuid5(NAMESPACE, "\n".join(spelt)))
    attributes = {
        "specversion": "1.0",
        "id": event_id,
        "source": cause.source,
        "type": kind,
        "time": iso(now * 1000),
        "datacontenttype": "application/json",
        "producer": producer,
        "partitionkey": key,
        "recordedtime": iso(now * 1000),
        "traceparent": _trace(cause, event_id) if linked else trace_parent(event_id),
        **more,
    }
    if linked:
        attributes |= {"causationid": cause.id, "correlationid": cause.correlation_id}
    else:
        attributes["correlationid"] = event_id
    try:
        body = json.dumps({**attributes, "data": content}, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise BridgeError(
            f"{name}: its data can't be written as JSON: {type(error).__name__}", "give text, numbers, lists and dicts"
        ) from None
    return Outgoing(event_id, cause.site or "main", level, verb, key, partition(key), STRUCTURED, body)


def _kind(name: str, cause: Event) -> tuple[str, str, str, dict[str, str]]:
    """The type in full, level and verb for its address, and further attributes.

    :raises BridgeError: there can be no such type.
    """
    known = derived_type(name)
    if known is not None:
        base = cause.attributes.get("dataschema", "").removesuffix(f"{cause.name}.{VERSION}") if cause.ours else ""
        full = f"{name}.{VERSION}"
        return (
            f"{cause.prefix or PREFIX}.{full}",
            known.level,
            known.verb,
            {"dataschema": f"{base or SCHEMAS}{full}"},
        )
    if name in NAMES:
        raise BridgeError(
            f"{name!r} is told by the bridge alone", "give a type of your own: org.example.report.signed.v1"
        )
    found = _FOREIGN.fullmatch(_VERSION.sub("", name))
    if found is None:
        raise BridgeError(
            f"{name!r} can't be the type of an event",
            "use one of docs/events.md#derived-events, or one of your own that begins with your domain, in lower case:"
            " org.example.report.signed.v1",
        )
    short = f"{found['level']}.{found['verb']}"
    if short in NAMES or name.startswith((f"{PREFIX}.", f"{cause.prefix or PREFIX}.")):
        raise BridgeError(
            f"{name!r} would be taken for one of ours", "begin with your own domain, and end with words of your own"
        )
    return name, found["level"], found["verb"], {}


def _content(name: str, data: Mapping[str, Any], cause: Event) -> dict[str, Any]:
    """The data, with what it is about: what the cause is about, unless it says otherwise.

    :raises BridgeError: it is not what its type has.
    """
    content = dict(data)
    if "level" not in content and "id" not in content and cause.level:
        content = {"level": cause.level, "id": cause.resource_id, "parents": cause.data.get("parents", {}), **content}
    if "level" in content:
        content.setdefault("parents", {})
    known = derived_type(name)
    if known is None:
        return content
    wanted = schema(known, "")
    problems = [f"{one} is missing" for one in wanted["required"] if content.get(one) is None]
    problems += [f"it has no {one}" for one in content if one not in wanted["properties"]]
    if not problems and content["level"] not in levels(known):
        problems.append(f"it is about a {content['level']}")
    if problems:
        raise BridgeError(f"{name}: {'; '.join(problems)}", "see docs/events.md#derived-events")
    return content


def _trace(cause: Event, event_id: str) -> str:
    """W3C Trace Context: the trace of the cause goes on."""
    trace = cause.attributes.get("traceparent", "").split("-")
    if len(trace) != 4 or not re.fullmatch(r"[0-9a-f]{32}", trace[1]):
        return trace_parent(event_id)
    return f"00-{trace[1]}-{hashlib.sha256(event_id.encode()).hexdigest()[:16]}-01"


class Publisher:
    """Sends what a consumer publishes, over a connection of its own, that is made when it is first needed.

    :param make: makes the transport.
    """

    def __init__(self, make: Callable[[], Place]) -> None:
        self._make = make
        self._place: Place | None = None
        self._sending = asyncio.Lock()

    async def send(self, event: Outgoing) -> None:
        """Send it, and return when the broker has confirmed it.

        :raises TransportError: it has not. It may be there nevertheless: it is sent again with the same id.
        """
        async with self._sending:
            try:
                await self._send(event)
            except NotConnectedError:  # a connection that has long been dead is found so only now
                await self._send(event)

    async def _send(self, event: Outgoing) -> None:
        try:
            if self._place is None:
                self._place = self._make()
            await self._place.connect()
            await self._place.publish([event])
        except PublishError as error:
            await self._give_up()
            raise error.error from error
        except BaseException:
            await self._give_up()
            raise

    async def _give_up(self) -> None:
        place, self._place = self._place, None
        if place is not None:
            await place.close()

    async def close(self) -> None:
        """End the connection; it is made again when it is needed."""
        await self._give_up()
        self._sending = asyncio.Lock()  # the next use may be in another event loop

    @contextlib.contextmanager
    def lent(self, make: Callable[[], Place]) -> Iterator[None]:
        """Send elsewhere for a while. For tests."""
        own, self._make = self._make, make
        try:
            yield
        finally:
            self._make = own
