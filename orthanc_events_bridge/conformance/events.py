"""What is played: events of every type in both modes, of others, none at all, and some that say what is to be done."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from orthanc_events_bridge.consumers.samples import published
from orthanc_events_bridge.events.catalog import LEVELS, TYPES
from orthanc_events_bridge.events.derived import DERIVED
from orthanc_events_bridge.events.mapping import STRUCTURED, partition
from orthanc_events_bridge.events.samples import message, orthanc_id
from orthanc_events_bridge.transports.base import Outgoing

#: The site of what is played: others at the same broker can tell it by that.
SITE: Final = "conformance"
#: A header that nobody knows; it is to be kept.
CUSTOM: Final = ("org-example-note", "kept")
_JOB: Final = {"type": "DicomModalityStore", "state": "Failure", "progress": 40, "runtime": 0.487, "errorCode": 9}


@dataclass
class Played:
    """Events of one run of the conformance test; all of them have ids that no other run has.

    :ivar expected: id → the event in CloudEvents' JSON format.
    :ivar sent: id → as it was sent.
    :ivar binary: ids of those in binary mode.
    """

    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    expected: dict[str, dict[str, Any]] = field(default_factory=dict)
    sent: dict[str, Outgoing] = field(default_factory=dict)
    binary: set[str] = field(default_factory=set)
    _number: int = 0

    @property
    def secret(self) -> str:
        """Text that is in the data of some, and in what is no event: no log may have it."""
        return f"private-{self.run}"

    def make(self, name: str, *, study: str = "", binary: bool = False, **more: Any) -> Outgoing:
        """An event of a type.

        :param study: any text, by which events share a key.
        """
        level = name.partition(".")[0]
        given = {"study": orthanc_id(f"{self.run} {study}")} if study and level in LEVELS and level != "patient" else {}
        return self._made(partial(message, name, given, **{**self._next(), **more}), binary)

    def _next(self) -> dict[str, Any]:
        self._number += 1
        return {"source": f"urn:uuid:{uuid.UUID(self.run)}", "site": SITE, "number": self._number}

    def _made(self, make: Callable[..., Outgoing], binary: bool) -> Outgoing:
        sent = make(binary=binary)
        self.expected[sent.id] = json.loads(make(binary=False).body)
        self.sent[sent.id] = sent
        if binary:
            self.binary.add(sent.id)
        return sent

    def every_type(self) -> list[Outgoing]:
        """Each type in both modes, those of the bridge first, then those that consumers publish; and one whose source
        NATS escapes in headers, and no other broker does."""
        of_bridge = [
            self.make(one.name, binary=binary, job=_JOB if one.level == "job" else None)
            for one in TYPES
            for binary in (False, True)
        ]
        of_consumers = [
            self._made(partial(published, one.name, **self._next()), binary)
            for one in DERIVED
            for binary in (False, True)
        ]
        odd = f"https://pacs.example.org/{self.run}/east%20wing"
        return of_bridge + of_consumers + [self.make("study.stable", source=odd, binary=one) for one in (False, True)]

    def of_keys(self, keys: Iterable[str], count: int) -> list[Outgoing]:
        """So many of each of several keys, one key behind the other in turn, in both modes."""
        names = list(keys)
        return [
            self.make("study.metadata-updated", study=names[number % len(names)], binary=bool(number // len(names) % 2))
            for number in range(count * len(names))
        ]

    def unheard(self) -> list[Outgoing]:
        """Types, an attribute and a property of the future, and another producer's event."""
        base = self.make("study.stable", study="unheard")
        document = self.expected[base.id]
        del self.expected[base.id], self.sent[base.id]
        changes: tuple[dict[str, Any], ...] = (
            {"type": "org.example.report.signed.v1"},
            {"type": "io.orthanc-events.study.unheard-of.v1"},
            {"unheardof": "attribute", "data": {**document["data"], "unheardOf": {"of": ["a", "property"]}}},
        )
        found = []
        for number, change in enumerate(changes):
            event = {**document, **change, "id": str(uuid.uuid5(uuid.UUID(self.run), f"unheard {number}"))}
            sent = base._replace(id=event["id"], body=json.dumps(event).encode())
            self.expected[sent.id], self.sent[sent.id] = event, sent
            found.append(sent)
        return found

    def malformed(self) -> list[Outgoing]:
        """Messages that are no events, each with bytes that no other run has; they are in no `expected`."""
        secret = self.secret.encode()
        without_id = (("specversion", "1.0"), ("type", "org.example.without.id"), ("source", "urn:example"))
        some: tuple[tuple[str, bytes, tuple[tuple[str, str], ...]], ...] = (
            (STRUCTURED, b'{"specversion": "1.0", "id": "' + secret, ()),
            (STRUCTURED, b'{"hello": "' + secret + b'"}', ()),
            ("application/json", b'["' + secret + b'"]', ()),
            ("application/json", b'{"run": "' + secret + b'"}', without_id),
        )
        where = SITE, "server", "unknown", "server", partition("server")
        return [
            Outgoing(str(uuid.uuid5(uuid.UUID(self.run), f"malformed {number}")), *where, kind, body, attributes)
            for number, (kind, body, attributes) in enumerate(some)
        ]

    def told(self, what: str) -> Outgoing:
        """One whose handler is to do something: `subject_of` it is what tells the program.

        Those that are to do the same have one key, and one subject.
        """
        sent = self.make("study.stable", study=what, binary=what == "reject", metadata={"Remark": self.secret})
        sent = sent._replace(headers=(*sent.headers, CUSTOM))
        self.sent[sent.id] = sent
        return sent

    def subject_of(self, event: Outgoing) -> str:
        """By which the program is told of it."""
        return str(self.expected[event.id]["subject"])
