"""A database as stores use it: a few statements in one transaction, in whichever dialect.

A statement names its parameters ``{so}``, and what the database calls the seconds of the epoch ``{now}``. Each is
written so that it may be said twice, where an answer was lost: it does the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: A statement, and its parameters by name.
Step = tuple[str, Mapping[str, Any]]


class Database(ABC):
    """Used in one event loop. Each of its calls raises `orthanc_events_bridge.consumers.stores.base.StoreError` where
    the database can't be asked.

    :ivar file: it is in, on this machine; none: it is elsewhere.
    """

    file: Path | None = None

    @abstractmethod
    async def open(self, *create: str) -> None:
        """Connect, and make what is not there yet.

        :param create: statements that do nothing when said again.
        """

    @abstractmethod
    async def run(self, *steps: Step) -> list[tuple[Any, ...]]:
        """Run statements, all of them or none.

        :return: the rows that the last one gives.
        """

    @abstractmethod
    async def close(self) -> None:
        """Let go of it. Never raises."""
