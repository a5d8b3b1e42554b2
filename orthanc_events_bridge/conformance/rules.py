"""The rules that can be seen from outside, by their numbers in docs/any-language.md, and what was seen of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

#: Number → what it asks for, as docs/any-language.md says it at length.
RULES: Final[dict[str, str]] = {
    "P3": "what it has made for its name has the settings that the page says",
    "P5": "a name's first start begins with the next event, or with the oldest one, as it is told",
    "D1": "every type is decoded in structured mode, to the attribute and the property",
    "D2": "every type is decoded in binary mode",
    "D3": "types, attributes and properties that nobody has heard of are passed over",
    "D4": "what is no CloudEvent is a dead letter at once, and stops nobody",
    "S1": "an event is acknowledged behind its handler only: after kill -9 it comes again",
    "S2": "a retry comes again, not before it is due, and counts as an attempt",
    "S3": "a retry that waits holds up no other key, and outlives the program",
    "S4": "what a handler rejects is a dead letter at once, with the same bytes and headers",
    "S5": "what fails again and again is a dead letter when its attempts are over",
    "S6": "a dead letter says why, whose it is, how often it was given, and where it came from",
    "S7": "what is sent to its inbox is handled, as `orthanc-events dlq redrive` sends it",
    "S8": "NATS: the key by which a copy is dropped as a duplicate has the consumer's name in it",
    "S9": "Kafka: each dead letter has a key of its own, and can be read",
    "O1": "events of one key are handled one by one, in their order",
    "L1": "SIGTERM: what is begun ends and is settled, and the exit code is 0",
    "L2": "behind that nothing that was settled comes again, and what was not comes at the next start",
    "L3": "after kill -9 nothing is lost",
    "L5": "nothing of an event's data is in what it says beside",
}
#: Those that are for one broker alone.
_OF_BROKER: Final = {"S8": "nats", "S9": "kafka"}


def rules_of(broker: str) -> dict[str, str]:
    """Those that are played at a broker.

    :param broker: ``nats``, ``rabbitmq`` or ``kafka``.
    """
    return {rule: text for rule, text in RULES.items() if _OF_BROKER.get(rule, broker) == broker}


@dataclass
class Verdicts:
    """What was seen of each rule.

    :ivar rules: that are played.
    :ivar wrong: rule → what is against it, in sentences.
    :ivar shown: rules that were played to their end.
    """

    rules: Mapping[str, str] = field(default_factory=lambda: RULES)
    wrong: dict[str, list[str]] = field(default_factory=dict)
    shown: set[str] = field(default_factory=set)

    def against(self, rule: str, why: str) -> None:
        """Something is against a rule."""
        self.wrong.setdefault(rule, []).append(why)

    def check(self, rule: str, right: object, why: str) -> None:
        """It was played; something is against it unless that is right."""
        self.shown.add(rule)
        if not right:
            self.against(rule, why)

    @property
    def met(self) -> bool:
        """Whether all are."""
        return not self.wrong and self.shown >= self.rules.keys()

    def rows(self) -> list[dict[str, Any]]:
        """For programs: one for each rule."""
        return [
            {
                "rule": number,
                "result": "failed" if number in self.wrong else "met" if number in self.shown else "not played",
                "text": text,
                "details": self.wrong.get(number, []),
            }
            for number, text in self.rules.items()
        ]
