"""A ledger, not a feeling: what Orthanc acknowledged against what a plain client of the broker read back.

Clients write down what Orthanc acknowledged (`Ledger.stored`, `Ledger.deleted`, …). From that the ledger
derives which events must come, how often, and compares them with what the broker holds (`Ledger.compare`):

lost
    an event that must be there is not.
repeated
    one fact is told again under another id: more events of a kind about a resource than acknowledgements
    justify, or one number of Orthanc's log in two events.
unexpected
    an event about something that nobody asked Orthanc for, one that shares its id or sequence with another
    fact, or one with a partition key that isn't its study's.
out of order
    a first delivery whose sequence is not above those before it with the same partition key; or a story that
    can't be: created twice without a deletion between, deleted or growing while not there.
duplicated
    the same event (same id) delivered more than once.
unrecoverable
    under kills of Orthanc only: missing, and gone without a trace in Orthanc itself (see `Ledger.compare`).

Facts are written down after Orthanc has answered, so two clients must not work on the same *patient* at the
same time if one of them deletes, except with a lock of their own around request and record. Clients on
different patients, and clients that only add, need nothing.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from orthanc_events_bridge.testing.brokers.events import Event
from orthanc_events_bridge.testing.comparison import Comparison, Fact, Report, matches

__all__ = ["Event", "Ledger", "Report"]

_LEVELS = {"patients": "patient", "studies": "study", "series": "series", "instances": "instance"}


@dataclass(slots=True)
class _Node:
    """A resource that Orthanc has, or may have."""

    level: str
    id: str
    parent: str | None
    children: set[str] = field(default_factory=set)
    #: Creations and deletions in this life that nobody acknowledged: whether they happened isn't known.
    maybe_created: int = 0
    maybe_deleted: int = 0

    @property
    def certain(self) -> bool:
        return not self.maybe_created and not self.maybe_deleted


class Ledger:
    """What Orthanc acknowledged, and what events it must bring. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._required: Counter[Fact] = Counter()
        self._optional: Counter[Fact] = Counter()
        self._allowed: list[str] = []
        self._nodes: dict[str, _Node] = {}
        self._study: dict[str, str] = {}
        self._existed: set[str] = set()

    # What clients write down.

    def stored(self, answer: Mapping[str, Any]) -> None:
        """Write down Orthanc's answer to an upload (``POST /instances`` of one file)."""
        ids = answer["ID"], answer["ParentSeries"], answer["ParentStudy"], answer["ParentPatient"]
        if answer["Status"] == "Success":
            self.stored_ids(*ids)
        elif answer["Status"] == "AlreadyStored":
            self.already_stored(*ids)

    def stored_ids(self, instance: str, series: str, study: str, patient: str) -> None:
        """Write down that an instance was stored that Orthanc did not have (acknowledged by C-STORE, say).

        If it is known to be there, Orthanc is taken to overwrite: it deletes the old one first.
        """
        with self._lock:
            if (old := self._nodes.get(instance)) is not None:
                if old.certain:
                    self._delete(old)
                else:
                    self._absent(old)
            for node in self._family(series, study, patient):
                if node.certain and node.id in self._nodes:
                    continue
                if node.id not in self._nodes:
                    self._require(node, "created")
                    self._add(node)
                elif node.maybe_deleted:
                    self._maybe(node, "created")  # whether it was still there, nobody knows
                else:
                    self._confirm(node)
                node.maybe_created = node.maybe_deleted = 0
            new = _Node("instance", instance, series)
            self._require(new, "created")
            self._add(new)
            self._grown(instance, self._required)

    def already_stored(self, instance: str, series: str, study: str, patient: str) -> None:
        """Write down that Orthanc had this instance already: an earlier request had been carried out."""
        with self._lock:
            for resource in (patient, study, series, instance):
                if (node := self._nodes.get(resource)) is not None:
                    self._confirm(node)

    def maybe_stored(self, instance: str, series: str, study: str, patient: str) -> None:
        """Write down that an upload was sent and not acknowledged: its events may come and need not."""
        with self._lock:
            new = self._nodes.get(instance)
            if new is not None and (new.certain or (new.maybe_created and not new.maybe_deleted)):
                return
            for node in self._family(series, study, patient):
                if node.id not in self._nodes:
                    self._add(node)
                elif not node.maybe_deleted:
                    continue
                node.maybe_created += 1
                self._maybe(node, "created")
            if new is None:
                new = _Node("instance", instance, series)
                self._add(new)
            new.maybe_created += 1
            self._maybe(new, "created")
            self._grown(instance, self._optional)

    def deleted(self, level: str, resource: str) -> None:
        """Write down an acknowledged deletion.

        :param level: as in REST paths (``studies``) or as in events (``study``).
        """
        with self._lock:
            node = self._nodes.get(resource)
            if node is None:
                self._required[f"{_LEVELS.get(level, level)}.deleted", resource] += 1
                return
            while True:  # what was deleted was there, and so were those above it
                self._confirm(node)
                if node.parent is None or node.parent not in self._nodes:
                    break
                node = self._nodes[node.parent]
            self._delete(self._nodes[resource])

    def maybe_deleted(self, level: str, resource: str) -> None:
        """Write down that a deletion was sent and not acknowledged: its events may come and need not."""
        with self._lock:
            node = self._nodes.get(resource)
            if node is None:
                self._optional[f"{_LEVELS.get(level, level)}.deleted", resource] += 1
                return
            for below in self._subtree(node):
                self._maybe_delete(below)
            while node.parent is not None:
                node = self._nodes[node.parent]
                if any(self._nodes[child].certain for child in node.children):
                    break
                self._maybe_delete(node)

    def existed(self, instance: str, series: str, study: str, patient: str) -> None:
        """Write down an instance that was there before capture began: its creation is not asked for."""
        with self._lock:
            for node in [*self._family(series, study, patient), _Node("instance", instance, series)]:
                if node.id not in self._nodes:
                    self._add(node)
                    self._existed.add(node.id)

    def expect(self, kind: str, resource: str = "", times: int = 1) -> None:
        """Ask for an event of any other kind: ``study.stable``, ``job.succeeded``, ``server.started`` …"""
        with self._lock:
            self._required[kind, resource] += times

    def allow(self, *kinds: str) -> None:
        """Leave kinds (globs: ``*.stable``) unjudged: they may come, as often as they like, and need not."""
        with self._lock:
            self._allowed += kinds

    @property
    def required(self) -> int:
        """How many events have to come by now, without those of unjudged kinds."""
        with self._lock:
            return sum(n for (kind, _), n in self._required.items() if not matches(kind, self._allowed))

    # How it keeps its books.

    def _family(self, series: str, study: str, patient: str) -> list[_Node]:
        wanted = (("patient", patient, None), ("study", study, patient), ("series", series, study))
        return [self._nodes.get(one) or _Node(level, one, parent) for level, one, parent in wanted]

    def _add(self, node: _Node) -> None:
        self._nodes[node.id] = node
        if node.parent is not None:
            self._nodes[node.parent].children.add(node.id)
        if node.level == "study":
            self._study[node.id] = node.id
        elif node.parent is not None:
            self._study[node.id] = self._study[node.parent]

    def _require(self, node: _Node, verb: str) -> None:
        self._required[f"{node.level}.{verb}", node.id] += 1

    def _maybe(self, node: _Node, verb: str) -> None:
        self._optional[f"{node.level}.{verb}", node.id] += 1

    def _certainly(self, fact: Fact) -> None:
        if self._optional[fact] > 0:
            self._optional[fact] -= 1
            self._required[fact] += 1

    def _grown(self, instance: str, where: Counter[Fact]) -> None:
        node = self._nodes[instance]
        while node.parent is not None:
            node = self._nodes[node.parent]
            where[f"{node.level}.instance-added", node.id] += 1

    def _confirm(self, node: _Node) -> None:
        """The resource is there: what was uncertain about its life is known now, as far as one can tell."""
        if node.maybe_created and not node.maybe_deleted:
            self._certainly((f"{node.level}.created", node.id))
            if node.level == "instance":
                above = node
                while above.parent is not None:
                    above = self._nodes[above.parent]
                    self._certainly((f"{above.level}.instance-added", above.id))
        elif node.maybe_deleted and not node.maybe_created:
            self._optional[f"{node.level}.deleted", node.id] -= node.maybe_deleted
        node.maybe_created = node.maybe_deleted = 0

    def _absent(self, node: _Node) -> None:
        """The resource was not there, though it might have been."""
        if node.maybe_deleted and not node.maybe_created:
            self._certainly((f"{node.level}.deleted", node.id))
        self._remove(node)

    def _maybe_delete(self, node: _Node) -> None:
        if node.maybe_deleted <= node.maybe_created:
            node.maybe_deleted += 1
            self._maybe(node, "deleted")

    def _delete(self, node: _Node) -> None:
        """Orthanc deletes a resource, everything below it, and those above it that are empty then."""
        for below in self._subtree(node):
            if below is node or below.certain:
                self._require(below, "deleted")
            else:
                self._maybe(below, "deleted")
            self._remove(below)
        while node.parent is not None:
            node = self._nodes[node.parent]
            if any(self._nodes[child].certain for child in node.children):
                break
            if node.children:
                self._maybe_delete(node)
            else:
                self._require(node, "deleted")
                self._remove(node)

    def _subtree(self, node: _Node) -> list[_Node]:
        found = [node]
        for one in found:
            found += [self._nodes[child] for child in one.children]
        return found[::-1]

    def _remove(self, node: _Node) -> None:
        del self._nodes[node.id]
        if node.parent in self._nodes:
            self._nodes[node.parent].children.discard(node.id)

    # Comparison.

    def compare(
        self,
        events: Iterable[Event],
        *,
        kills: int = 0,
        existing: Collection[str] | None = None,
        log: Iterable[Mapping[str, Any]] = (),
        forgotten: Iterable[Fact] = (),
    ) -> Report:
        """Compare with what the broker holds.

        With kills of Orthanc, an event that is missing counts as unrecoverable where Orthanc itself can't
        tell it any more: kinds that only callbacks show; stable events; creations of what is not there now.
        Everything else stays lost. The more is given of what Orthanc says afterwards, the sharper that is.

        :param events: in the order of the stream.
        :param kills: how often Orthanc was killed (or stopped while changes came in).
        :param existing: the ids that Orthanc has at the end (`OrthancServer.existing`): each that the ledger
            knows must have been created, acknowledged or not.
        :param log: the rows of Orthanc's log at the end (`OrthancServer.changes`): each must be told by an
            event with its number.
        :param forgotten: behind a power cut, of the rows that the outbox lost those with minted ids, as kind of event
            and resource: what was told of them can't be known to have been, and is told a second time where it follows
            from what exists. That counts as unrecoverable too.
        :raises ValueError: there were kills, and ``existing`` is not given.
        """
        if kills and existing is None:
            raise ValueError("with kills, nothing can be called lost unless it is known what exists at the end")
        with self._lock:
            comparison = Comparison(
                {fact: n for fact, n in self._required.items() if n > 0},
                {fact: n for fact, n in self._optional.items() if n > 0},
                allowed=self._allowed,
                studies=self._study,
                existed=self._existed,
                existing=existing or (),
                kills=kills,
                forgotten=forgotten,
            )
            return comparison.run(list(events), log)
