"""The dead letters of a consumer at NATS."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Final

import nats.js.errors
from nats.js.api import RawStreamMsg

from orthanc_events_bridge.errors import NotConnectedError, TransportConfigurationError
from orthanc_events_bridge.transports.base import DeadLetter, DeadLetters, Escaped
from orthanc_events_bridge.transports.headers import ADDRESS
from orthanc_events_bridge.transports.nats_connection import Connection
from orthanc_events_bridge.transports.nats_options import NatsOptions

#: JetStream's numbers for: no such message; no such stream.
_NO_MESSAGE: Final = frozenset({10037, 10043, 10057})
_NO_STREAM: Final = 10059
#: So many are removed at a time.
_AT_ONCE: Final = 100


class NatsDeadLetters(DeadLetters):
    """Read one by one by their numbers in the stream, so that nothing of them changes."""

    def __init__(self, connection: Connection, options: NatsOptions, consumer: str) -> None:
        self._connection = connection
        self._patience = options.connect_timeout * 2  # the deadline is `ask`'s
        self._manager = connection.jsm(timeout=self._patience)
        self._stream = options.dead_stream
        self._subject = f"{options.dead_prefix}.{consumer}"

    async def read(self) -> AsyncGenerator[DeadLetter]:
        try:
            info = await self._connection.ask(self._manager.stream_info(self._stream))
        except nats.js.errors.NotFoundError:
            return  # nothing was ever rejected
        except nats.js.errors.APIError as error:
            raise self._refused(error) from error
        number, last = 1, info.state.last_seq
        while number <= last:
            message = await self._next(number)
            if message is None or message.seq is None or message.seq > last:
                return
            headers = {name.lower(): str(value) for name, value in (message.headers or {}).items()}
            address = headers.get(ADDRESS) or self._subject
            incoming = Escaped(address, message.data or b"", headers, str(message.seq))
            yield DeadLetter(incoming, message.seq)
            number = message.seq + 1

    async def _next(self, number: int) -> RawStreamMsg | None:
        """The first of ours from this number on."""
        asking = self._manager.get_msg(self._stream, seq=number, subject=self._subject, next=True)
        try:
            return await self._connection.ask(asking)
        except nats.js.errors.APIError as error:
            if error.err_code in _NO_MESSAGE or error.err_code == _NO_STREAM:
                return None
            raise self._refused(error) from error

    async def remove(self, letters: Sequence[DeadLetter]) -> None:
        for first in range(0, len(letters), _AT_ONCE):
            await asyncio.gather(*(self._remove(letter.mark) for letter in letters[first : first + _AT_ONCE]))

    async def _remove(self, number: object) -> None:
        # By nats-py the server would also overwrite it on its disk, and write its neighbours anew: 5 ms each, measured
        # with 6,000. As with what is acknowledged, their room is used again.
        request = json.dumps({"seq": number, "no_erase": True}).encode()
        asking = self._connection.request(f"$JS.API.STREAM.MSG.DELETE.{self._stream}", request, self._patience)
        try:
            answer = json.loads((await self._connection.ask(asking)).data)
            if "error" in answer:
                raise nats.js.errors.APIError.from_error(answer["error"])
        except nats.js.errors.APIError as error:
            if error.err_code not in _NO_MESSAGE and error.err_code != _NO_STREAM:
                raise self._refused(error) from error

    def _refused(self, error: nats.js.errors.APIError) -> TransportConfigurationError | NotConnectedError:
        text = f"{error.description} ({error.err_code})"
        if error.code == 503:
            return NotConnectedError(f"JetStream of NATS is not ready: {text}", "try again")
        return TransportConfigurationError(
            f"NATS does not let us work with the stream {self._stream}: {text}",
            "check the user's permissions: $JS.API.STREAM.INFO, MSG.GET and MSG.DELETE of it",
        )

    async def close(self) -> None:
        """The connection is the transport's."""
