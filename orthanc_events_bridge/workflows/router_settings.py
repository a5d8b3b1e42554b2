"""A router's settings: every option declared once, with its documentation.

The tables in ``docs/consumers/router.md`` and ``orthanc-router.schema.json`` are generated from here
(``tools/generate_docs.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from pydantic import Field
from pydantic_core import PydanticCustomError

from orthanc_events_bridge.consumers.settings import LONGEST_NAME, ConsumerName, ConsumerSettings
from orthanc_events_bridge.values import FileName, Place, mistake
from orthanc_events_bridge.workflows.destinations import Destination
from orthanc_events_bridge.workflows.rules import Rule, mistakes


class RouterSettings(ConsumerSettings):
    """A router's file: the options of every consumer, and these."""

    name: ConsumerName = Field(default="router", description="Of the consumer.")
    event: Literal["study.stable", "series.stable", "instance.created"] = Field(
        default="study.stable", description="What is looked at, and sent as one: studies, series, or each instance."
    )
    match: Literal["all", "first"] = Field(
        default="all", description="`all`: every rule that fits counts. `first`: the first one that does, and no other."
    )
    rules: tuple[Rule, ...] = Field(min_length=1, description="What is sent where, from the top.")
    destinations: dict[str, Destination] = Field(min_length=1, description="Where to, by names of your own.")
    audit: FileName | None = Field(
        default=None,
        description="A file to which a line of JSON is appended for all that is sent: what, where to, when, by which "
        "rule. Orthanc's ids, no patient data. The log has the same lines.",
        examples=["/var/log/router-audit.jsonl"],
    )

    def contradictions(self) -> Iterator[tuple[Place, PydanticCustomError]]:
        """Names that lead to nothing."""
        yield from super().contradictions()
        yield from self.without_store("what has been sent")
        for destination in self.destinations:
            if re.fullmatch(r"[A-Za-z0-9_-]{1,48}", destination) is None:
                wrong, right = "can't be the name of a destination", "use letters, digits, _ and -, at most 48"
                yield ("destinations", destination), mistake(wrong, right, shown=destination)
            elif len(self.name) + 1 + len(destination) > LONGEST_NAME:
                wrong = f"{self.name}-{destination} would be too long for the name of a consumer"
                yield ("destinations", destination), mistake(wrong, f"use at most {LONGEST_NAME} characters together")
        yield from mistakes(self.rules, self.destinations, "destination")
