"""What every store can do; `tests/integration/test_stores.py` asks each the same."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

from orthanc_events_bridge.errors import BridgeError


class StoreError(BridgeError):
    """A store can't be asked now, or can't be used. What was to be noted may be noted all the same."""


class Begun(NamedTuple):
    """What beginning an effect has come to.

    :param state: ``mine``: do it. ``done``: it is. ``theirs``: another has begun it, and its lease holds.
    :param left: with ``theirs``: seconds for which it may still hold.
    """

    state: Literal["mine", "done", "theirs"]
    left: float = 0.0


class Store(ABC):
    """Entries by key, used in one event loop. Times are those of one clock, whoever asks: of the server, where there is
    one.

    Each of its calls raises `StoreError` where the store can't be asked.
    """

    @abstractmethod
    async def open(self) -> None:
        """Find or make what entries are kept in; called once, before everything else.

        Where it fails, the store is closed all the same.
        """

    @abstractmethod
    async def begin(self, key: str, owner: str, lease: float) -> Begun:
        """Begin an effect, unless it is done or another's lease holds; of several at the same time one succeeds.

        :param owner: another text for each beginning.
        :param lease: seconds, at least 1.
        """

    @abstractmethod
    async def renew(self, key: str, owner: str, lease: float) -> bool:
        """Let the lease hold from now on for so many seconds.

        :return: whether it was still the owner's.
        """

    @abstractmethod
    async def finish(self, key: str, owner: str, keep: float) -> bool:
        """Note that the effect is done, and remember it for so many seconds.

        :return: whether it was still the owner's. If not, nothing is noted.
        """

    @abstractmethod
    async def forget(self, key: str, owner: str) -> None:
        """The effect failed: whoever asks next may begin it. Nothing happens where it is not the owner's any more."""

    @abstractmethod
    async def recall(self, key: str) -> str | None:
        """The text that is noted under a key of `swap`; none where none is."""

    @abstractmethod
    async def swap(self, key: str, old: str | None, new: str, keep: float) -> bool:
        """Note a short text in place of another; of several at the same time one succeeds.

        :param old: what is noted there now; none: nothing.
        :param new: printable ASCII, at most 128 characters.
        :param keep: seconds for which it is remembered.
        :return: whether it is noted. No may also mean that it was, and the answer got lost: `recall` tells.
        """

    @abstractmethod
    async def close(self) -> None:
        """Let go of it. Never raises."""
