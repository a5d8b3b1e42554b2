"""The dead letters of a consumer of the broker in memory."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

from orthanc_events_bridge.transports.base import DeadLetter, DeadLetters, Incoming


class MemoryDeadLetters(DeadLetters):
    """Marks are the messages themselves.

    :param place: the broker's own list.
    :param check: raises where the broker doesn't answer.
    """

    def __init__(self, place: list[Incoming], check: Callable[[], Awaitable[None]]) -> None:
        self._place = place
        self._check = check

    async def read(self) -> AsyncGenerator[DeadLetter]:
        await self._check()
        for message in list(self._place):
            yield DeadLetter(message, message)

    async def remove(self, letters: Sequence[DeadLetter]) -> None:
        await self._check()
        marks = {id(letter.mark) for letter in letters}
        self._place[:] = [message for message in self._place if id(message) not in marks]

    async def close(self) -> None:
        pass
