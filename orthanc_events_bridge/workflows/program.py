"""What a command runs that is one consumer."""

from __future__ import annotations

from typing import Self

from orthanc_events_bridge.consumers.app import Consumer


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
