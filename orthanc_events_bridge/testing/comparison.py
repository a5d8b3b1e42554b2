"""The comparison behind the ledger (see `orthanc_events_bridge.testing.ledger`), and its report."""

from __future__ import annotations

import fnmatch
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from orthanc_events_bridge.testing.brokers.events import Event

#: A kind of event and a resource: ``("study.created", id)``.
Fact = tuple[str, str]

#: Kinds that only Orthanc's callbacks show: a kill takes those that were queued.
CALLBACK_ONLY: Final = ("*.instance-added", "*.deleted", "job.*", "server.*")

#: Kinds whose timer a stop or a kill takes.
TIMED: Final = ("*.stable",)

#: Verbs that make a resource's story.
_STORY: Final = ("created", "instance-added", "deleted")


@dataclass(slots=True)
class Report:
    """What a comparison found: numbers, and a few examples of each (ids only)."""

    required: int = 0
    received: int = 0
    lost: int = 0
    repeated: int = 0
    unexpected: int = 0
    out_of_order: int = 0
    duplicated: int = 0
    unrecoverable: int = 0
    kills: int = 0
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Nothing lost, repeated, unexpected or out of order."""
        return not (self.lost or self.repeated or self.unexpected or self.out_of_order)

    def add(self, category: str, example: str, count: int = 1) -> None:
        """Count something under a category, and keep the first ten examples."""
        setattr(self, category, getattr(self, category) + count)
        examples = self.examples.setdefault(category, [])
        if len(examples) < 10:
            examples.append(example)

    def __str__(self) -> str:
        lines = []
        for name in (
            "required",
            "received",
            "lost",
            "repeated",
            "unexpected",
            "out_of_order",
            "duplicated",
            "unrecoverable",
            "kills",
        ):
            lines.append(f"{name.replace('_', ' '):<14}{getattr(self, name):>10}")
            lines += [f"    {example}" for example in self.examples.get(name, [])]
        return "\n".join(lines)

    def assert_clean(self, *, unrecoverable: int | None = None) -> None:
        """Raise AssertionError with the table unless all is well.

        :param unrecoverable: at most so many; not judged by default.
        """
        if not self.ok:
            raise AssertionError(f"the ledger does not balance\n{self}")
        if unrecoverable is not None and self.unrecoverable > unrecoverable:
            raise AssertionError(f"more than {unrecoverable} events are unrecoverable\n{self}")


class Comparison:
    """One comparison; what `Ledger.compare` works with.

    :param required: how often each fact must be told.
    :param optional: how often it may be told beyond that.
    :param allowed: globs of kinds that are not judged.
    :param studies: the study of each resource that was ever known.
    :param existed: resources that were there from the start.
    :param forgotten: facts with minted ids in rows that the outbox lost: they may have been told, and once more.
    """

    def __init__(
        self,
        required: Mapping[Fact, int],
        optional: Mapping[Fact, int],
        *,
        allowed: Collection[str],
        studies: Mapping[str, str],
        existed: Collection[str],
        existing: Collection[str],
        kills: int,
        forgotten: Iterable[Fact] = (),
    ) -> None:
        self.allowed = tuple(allowed)
        self.required = {fact: n for fact, n in required.items() if self.judged(fact[0])}
        self.most = Counter(self.required)
        self.most.update({fact: n for fact, n in optional.items() if self.judged(fact[0])})
        self.studies = studies
        self.forgotten = Counter(forgotten)
        self.existed = set(existed)
        self.existing = set(existing)
        self.known = self.existed | {resource for _, resource in self.most}
        self.report = Report(required=sum(self.required.values()), kills=kills)

    def judged(self, kind: str) -> bool:
        return not matches(kind, self.allowed)

    def run(self, events: list[Event], log: Iterable[Mapping[str, Any]]) -> Report:
        # What consumers publish is no fact of Orthanc, and is judged by tests of its own.
        first = self.first_deliveries([event for event in events if not event.producer])
        self.report.received = len(first)
        self.sequences(first)
        self.keys(first)
        facts = self.told_once(first)
        counts = Counter((event.kind, event.resource) for event in facts)
        self.too_many(facts, counts)
        told = {(event.seq, event.change, event.resource) for event in first}
        self.too_few(counts, [row for row in log if (row["Seq"], row["ChangeType"], row["ID"]) not in told])
        self.stories(facts, counts)
        return self.report

    def first_deliveries(self, events: list[Event]) -> list[Event]:
        seen: dict[str, Event] = {}
        for event in events:
            if (before := seen.setdefault(event.id, event)) is event:
                continue
            # What the outbox lost and read again has another sequence.
            if _same(before, event, moved=bool(self.forgotten)):
                self.report.add("duplicated", f"{event.id} {event.kind} {event.resource}")
            else:
                self.report.add("unexpected", f"id {event.id} is of {_name(before)} and of {_name(event)}")
        return list(seen.values())

    def sequences(self, events: list[Event]) -> None:
        owner: dict[tuple[str, str, int], Event] = {}
        highest: dict[tuple[str, str, str], int] = {}
        for event in events:
            number = event.source, event.recorder, event.sequence
            if (other := owner.setdefault(number, event)) is not event:
                both = f"{_name(other)} and of {_name(event)}"
                self.report.add("unexpected", f"sequence {event.sequence} is of {both}")
                continue
            line = event.source, event.recorder, event.key
            if event.sequence < highest.get(line, -1):
                late = f"{_name(event)}: sequence {event.sequence} came after {highest[line]}"
                self.report.add("out_of_order", late)
            highest[line] = max(event.sequence, highest.get(line, -1))

    def keys(self, events: list[Event]) -> None:
        for event in events:
            level = event.kind.partition(".")[0]
            wanted = self.studies.get(event.resource, event.key)
            if level in ("patient", "job"):
                wanted = event.resource
            elif level == "server":
                wanted = "server"
            # What is gone before anybody has seen it has no study any more: it has its own id as key.
            unseen = self.report.kills or event.resource in self.existed
            if event.key != wanted and not (unseen and event.key == event.resource):
                text = f"{_name(event)}: partition key {event.key} in place of {wanted}"
                self.report.add("unexpected", text)

    def told_once(self, events: list[Event]) -> list[Event]:
        """Leave out events that tell a row of Orthanc's log again under another id."""
        rows: dict[tuple[str, int, str, str], str] = {}
        facts = []
        for event in events:
            if event.seq is not None:
                row = event.source, event.seq, event.change, event.resource
                if rows.setdefault(row, event.id) != event.id:
                    self.report.add("repeated", f"{_name(event)}: row {event.seq} of the log in two events")
                    continue
            facts.append(event)
        return facts

    def too_many(self, facts: list[Event], counts: Counter[Fact]) -> None:
        for fact, n in counts.items():
            most = self.most[fact]
            if not self.judged(fact[0]) or n <= most:
                continue
            text = f"{fact[0]} {fact[1]}: {n} came, at most {most} can"
            again = min(n - most, self.forgotten[fact])
            if again:
                self.report.add("unrecoverable", text, again)
            if n - most > again:
                self.report.add("repeated" if most else "unexpected", text, n - most - again)

    def too_few(self, counts: Counter[Fact], untold: list[Mapping[str, Any]]) -> None:
        # What Orthanc's own log says is beyond doubt. A loss found there is not counted once more below.
        lost: Counter[Fact] = Counter()
        for row in untold:
            kind = _kind_of(row)
            if self.judged(kind):
                lost[kind, row["ID"]] += 1
                text = f"{kind} {row['ID']}: row {row['Seq']} of Orthanc's log is in no event"
                self.report.add("lost", text)
        missing = {fact: n - counts[fact] for fact, n in self.required.items() if n > counts[fact]}
        for fact in self.most:
            if fact[0].endswith(".created") and fact[1] in self.existing and not counts[fact]:
                missing.setdefault(fact, 1)
        for fact, n in sorted(missing.items()):
            rest = n - lost[fact]
            if rest <= 0:
                continue
            gone = self.unrecoverable(fact, counts[fact], rest)
            text = f"{fact[0]} {fact[1]}: {counts[fact]} of {counts[fact] + n} came"
            if gone:
                self.report.add("unrecoverable", text, gone)
            if rest > gone:
                self.report.add("lost", text, rest - gone)

    def unrecoverable(self, fact: Fact, came: int, missing: int) -> int:
        kind, resource = fact
        if not self.report.kills:
            return 0
        if matches(kind, CALLBACK_ONLY) or matches(kind, TIMED) or resource not in self.existing:
            return missing
        # It is there now, so that its last life at least can be read from the log.
        return missing if came else missing - 1

    def stories(self, facts: list[Event], counts: Counter[Fact]) -> None:
        """What is told about each resource must make sense in the order in which it came.

        What is missing is taken as having happened where the story needs it.
        """
        told: dict[tuple[str, str], list[Event]] = defaultdict(list)
        for event in facts:
            level, _, verb = event.kind.partition(".")
            if verb in _STORY:
                told[level, event.resource].append(event)
        for (level, resource), story in told.items():
            facts_of = {verb: (f"{level}.{verb}", resource) for verb in _STORY}
            if resource not in self.known or not all(self.judged(kind) for kind, _ in facts_of.values()):
                continue
            # What there is too few or too many of is reported already, and is not to be called disorder too.
            missing = {verb: max(0, self.most[fact] - counts[fact]) for verb, fact in facts_of.items()}
            extra = {verb: max(0, counts[fact] - self.most[fact]) for verb, fact in facts_of.items()}
            alive = resource in self.existed or not self.most[facts_of["created"]]
            for event in story:
                verb = event.kind.partition(".")[2]
                if alive == (verb == "created"):
                    between = "deleted" if alive else "created"
                    if extra[verb]:
                        extra[verb] -= 1
                        continue
                    if missing[between]:
                        missing[between] -= 1
                    else:
                        state = "was there" if alive else "was not there"
                        self.report.add("out_of_order", f"{_name(event)} while it {state}")
                alive = verb != "deleted"


_CHANGES = {
    "NewInstance": "created",
    "NewSeries": "created",
    "NewStudy": "created",
    "NewPatient": "created",
    "CompletedSeries": "completed",
    "StableSeries": "stable",
    "StableStudy": "stable",
    "StablePatient": "stable",
    "UpdatedAttachment": "attachment-updated",
    "UpdatedMetadata": "metadata-updated",
}


def _kind_of(row: Mapping[str, Any]) -> str:
    return f"{row['ResourceType'].lower()}.{_CHANGES.get(row['ChangeType'], 'unknown')}"


def matches(kind: str, globs: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(kind, glob) for glob in globs)


def _name(event: Event) -> str:
    return f"{event.kind} {event.resource}".strip()


def _same(one: Event, other: Event, *, moved: bool = False) -> bool:
    """Whether one event came twice; the sequence of one that was moved, or that two outboxes recorded, is another."""
    return (one.kind, one.resource, one.key, one.time) == (other.kind, other.resource, other.key, other.time) and (
        moved or one.recorder != other.recorder or one.sequence == other.sequence
    )
