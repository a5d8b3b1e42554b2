"""What an anonymizer tells: events that must not lead from a pseudonymous study to its original.

Who reads the stream would learn it from a causation, a correlation or a trace, and from an id that follows from the
cause, since all causes can be tried. So these begin chains of their own, and their ids follow from what is told alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from orthanc_events_bridge.consumers.event import Event

if TYPE_CHECKING:
    from orthanc_events_bridge.consumers.app import Consumer


async def tell_anonymized(
    app: Consumer, cause: Event, *, study: str, patient: str, instances: Sequence[str], rule: str
) -> str:
    """Publish ``study.anonymized``. Told again of the same instances, it is the same event.

    :param cause: the event that is being handled: it gives source and site, and nothing else.
    :param study: Orthanc's id of the anonymized study; never the original's, nor is any other here.
    :param patient: Orthanc's id of its patient.
    :param instances: Orthanc's ids of its instances.
    :param rule: by which it was done; everybody can read its name.
    :return: the event's id.
    :raises TransportError: see `Consumer.publish`.
    """
    data = {
        "change": "AnonymizedStudy",
        "level": "study",
        "id": study,
        "parents": {"patient": patient},
        "rule": rule,
        "instances": len(instances),
    }
    return await app.publish("study.anonymized", data, cause=cause, of=_of(study, instances), linked=False)


async def tell_received(
    app: Consumer,
    cause: Event,
    *,
    level: str,
    identifier: str,
    parents: Mapping[str, str],
    instances: Sequence[str],
    rule: str,
) -> str:
    """Publish ``result.received``. Told again of the same instances, it is the same event.

    :param cause: as in `tell_anonymized`.
    :param level: ``study``, ``series`` or ``instance``: what the result is, in the original study.
    :param identifier: Orthanc's id of it, there.
    :param parents: level → Orthanc's id of what is above it; its study at least, unless it is one.
    :param instances: Orthanc's ids of its instances.
    :param rule: as in `tell_anonymized`.
    :return: the event's id.
    :raises TransportError: see `Consumer.publish`.
    """
    data = {
        "level": level,
        "id": identifier,
        "parents": dict(parents),
        "rule": rule,
        "instances": len(instances),
    }
    return await app.publish("result.received", data, cause=cause, of=_of(identifier, instances), linked=False)


def _of(identifier: str, instances: Sequence[str]) -> str:
    return json.dumps([identifier, sorted(instances)])
