"""What kind of Kafka consumer one is; and what keeps the order of one that wants it: what its partitions wait for.

Of a partition of the events' topic one event is in hand at a time. One that is given back stays where it is, at the
head of its partition; when it is due and how often it was given stands in the note that Kafka keeps beside the group's
offset, so that whoever has the partition next goes on with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

#: Whether what everybody gets comes to it in order; or whether it has its inbox alone.
Kind = Literal["ordered", "unordered", "inbox"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)


def begun_as(kind: Kind) -> str:
    """With what the notes on the first partition of a consumer's inbox begin.

    There, because Kafka forgets the notes on the events' topic with that topic.
    """
    return f"{kind}:"


def was_begun_as(note: str) -> Kind | None:
    """The reverse; none where nobody has said it: an administrator has set the offset, or the server keeps no notes."""
    return next((kind for kind in KINDS if note.startswith(begun_as(kind))), None)


@dataclass(frozen=True, slots=True)
class Again:
    """An event that was given back, and holds up its partition.

    :param offset: where it is.
    :param attempts: how often it was given.
    :param due: when it is to be given again, as a time of the epoch.
    :param headers: that are added to it then.
    """

    offset: int
    attempts: int
    due: float
    headers: Mapping[str, str]

    def write(self, room: int) -> str:
        """As a note; without the headers, or empty, where the server takes no longer one.

        :param room: its bytes.
        """
        told = {"attempts": self.attempts, "due": round(self.due, 3)}
        for document in ({**told, "headers": dict(self.headers)}, told):
            text = json.dumps(document, separators=(",", ":"))
            if len(text) <= room:
                return text
        return ""

    @classmethod
    def read(cls, offset: int, note: str) -> Again | None:
        """The reverse. A note that says something else says nothing of this.

        :param offset: that it stands beside.
        """
        try:
            document = json.loads(note)
            headers = {str(name): str(value) for name, value in document.get("headers", {}).items()}
            return cls(offset, int(document["attempts"]), float(document["due"]), headers)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None
