"""What a command runs: one consumer, or several of one file."""

from __future__ import annotations

import asyncio
from typing import Self

from orthanc_events_bridge.consumers.app import Consumer
from orthanc_events_bridge.consumers.health import address_of, health
from orthanc_events_bridge.consumers.leaving import logs, run_until_told
from orthanc_events_bridge.consumers.settings import ConsumerSettings


class Program:
    """See `orthanc_events_bridge.cli_workers.Working`; what it has to check is its own.

    :ivar app: its consumer.
    """

    app: Consumer

    def complete(self) -> None:
        """See `Consumer.complete`.

        :raises BridgeError: something is missing.
        """
        self.app.complete()

    def numbered(self, number: int) -> Self:
        """See `Consumer.numbered`.

        :raises ConfigError: there is no such port.
        """
        self.app.numbered(number)
        return self

    def run(self) -> None:
        """Work until SIGTERM or SIGINT. See `Consumer.run`.

        :raises BridgeError: it can't begin.
        """
        self.app.run()


class Programs:
    """Several consumers, which begin and end together, and are told of at one address.

    :ivar settings: of the file.
    """

    settings: ConsumerSettings

    @property
    def consumers(self) -> list[Consumer]:
        """All of it."""
        raise NotImplementedError

    def complete(self) -> None:
        """Is all said, and as far as that can be known here, usable? Nothing is connected.

        :raises BridgeError: no.
        """
        for one in self.consumers:
            one.complete()

    async def ready(self) -> None:
        """Make ready what they share; asked before they begin.

        :raises BridgeError: it can't be used.
        """

    async def close(self) -> None:
        """Let go of what they share."""

    def numbered(self, number: int) -> Self:
        """See `Consumer.numbered`.

        :raises ConfigError: there is no such port.
        """
        http = address_of(self.settings.name, self.settings.http, number)
        self.settings = self.settings.model_copy(update={"http": http})
        return self

    def stop(self) -> None:
        """Begin to stop; to be called in the loop that it works in."""
        for one in self.consumers:
            one.stop()

    def run(self) -> None:
        """Work until SIGTERM or SIGINT. See `Consumer.run`.

        :raises BridgeError: it can't begin.
        """
        logs(self.settings.log_level)
        run_until_told(self.settings.name, self.serve, self.stop, self.settings.drain, self._running)

    def _running(self) -> list[str]:
        return [text for one in self.consumers for text in one.running]

    async def serve(self) -> None:
        """Work until `stop` is called.

        :raises BridgeError: it can't begin.
        """
        self.complete()
        try:
            await self.ready()
            async with health(self.settings.http, *self.consumers):
                await self._serve()
        finally:
            await self.close()

    async def _serve(self) -> None:
        tasks = [asyncio.ensure_future(one.serve()) for one in self.consumers]
        # One that can't begin ends all: none works by halves.
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        self.stop()
        await asyncio.wait(tasks)
        for task in tasks:
            task.result()
