"""The servers of one cluster, as a client tries them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from orthanc_events_bridge.errors import TransportConfigurationError, TransportError

_C = TypeVar("_C")


class InTurn(Generic[_C]):
    """Tries servers in turn, beginning with the last that worked.

    :param servers: their addresses.
    :param connect: makes a connection to one.
    """

    def __init__(self, servers: Sequence[str], connect: Callable[[str], Awaitable[_C]]) -> None:
        self._servers = servers
        self._connect = connect
        self._next = 0

    def pass_on(self) -> None:
        """Begin with the next one: what lets us in may still do no work, as in the lesser part of a cluster."""
        self._next += 1

    async def open(self) -> _C:
        """Connect to the first that takes us.

        :raises TransportError: none does; what a person has to mend is said first.
        """
        problem: TransportError | None = None
        for _ in self._servers:
            try:
                return await self._connect(self._servers[self._next % len(self._servers)])
            except TransportError as error:
                self.pass_on()
                if not isinstance(problem, TransportConfigurationError):
                    problem = error
        assert problem is not None
        raise problem
