"""One connection to one NATS server, by nats-py, for `orthanc_events_bridge.transports.nats`.

What nats-py 2.16 leaves to us, as measured: reconnecting hides lost publishes, so that a lost connection is
given up and made anew; a refused connection is tried again for minutes; closing waits for a frozen server; a
server without TLS is sent the password although TLS was asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Awaitable
from typing import Any, Final, TypeVar

import nats.errors
import nats.js.errors
from nats.aio.transport import TcpTransport

from orthanc_events_bridge.errors import NotConnectedError, TransportConfigurationError, TransportError
from orthanc_events_bridge.transports.nats_listening import Listening
from orthanc_events_bridge.transports.nats_login import login_of, tls_of
from orthanc_events_bridge.transports.nats_options import NatsOptions
from orthanc_events_bridge.transports.tls import cut

_T = TypeVar("_T")

#: Seconds that nats-py may take to close what is aborted already.
_CLOSING: Final = 0.2
#: Seconds between two looks at whether the connection is still there; nats-py does not always say so.
_LOOK: Final = 0.1


class _HungUpError(TransportConfigurationError):
    """The server ended the connection in place of answering the login."""


class Connection(Listening):
    """nats-py's client; made by `open`, used once, and ended by `give_up`.

    :ivar fault: why it can't be used any more.
    """

    def __init__(self, options: NatsOptions, url: str) -> None:
        super().__init__()
        self.fault: TransportError | None = None
        self._faulty: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._opening = True
        self._ours = options
        self._url = url

    @classmethod
    async def open(cls, options: NatsOptions, url: str) -> Connection:
        """Connect to a server.

        :raises NotConnectedError: it can't be reached.
        :raises TransportConfigurationError: it refuses us, or we refuse it.
        """
        try:
            return await cls._open(options, url)
        except _HungUpError:
            # It was on its way down, or its answer got lost behind the end of the connection.
            pass
        try:
            return await cls._open(options, url)
        except _HungUpError as error:
            raise TransportConfigurationError(error.message, error.remedy) from error

    @classmethod
    async def _open(cls, options: NatsOptions, url: str) -> Connection:
        connection = cls(options, url)
        try:
            await asyncio.wait_for(
                connection.connect(
                    url,
                    name=f"orthanc-events-bridge {options.name}",
                    allow_reconnect=False,
                    connect_timeout=options.connect_timeout,  # type: ignore[arg-type]  # a float works
                    ping_interval=10,
                    max_outstanding_pings=2,
                    error_cb=connection._on_error,
                    closed_cb=connection._on_closed,
                    tls=tls_of(options),
                    tls_hostname=options.tls.server_hostname,
                    tls_handshake_first=options.tls.handshake_first,
                    **login_of(options),
                ),
                options.connect_timeout + 1,
            )
            if not connection.is_connected:  # nats-py takes an end of file in place of the last answer for a success
                raise ConnectionResetError("no answer")
            connection.check()
        except TransportError:
            await connection.give_up()
            raise
        except Exception as error:
            problem = connection._not_connected(error)
            await connection.give_up()
            raise problem from error
        except asyncio.CancelledError:
            await connection.give_up()
            raise
        connection._opening = False
        return connection

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        """What the server says of itself: first, before anything is sent to it, and whenever it changes."""
        self._max_payload = info.get("max_payload", self._max_payload)  # an account's limit comes after the login
        wish = self._ours.tls
        if initial_connection and not wish.handshake_first:
            if self._ours.tls_required and info.get("tls_available"):
                info["tls_required"] = True
            if self._ours.tls_required and not info.get("tls_required"):
                raise TransportConfigurationError(
                    f"NATS at {self._url} does not offer TLS, and the configuration insists on it",
                    "turn TLS on at the server, or write nats:// and leave `tls` out",
                )
            if wish.enabled is False and info.get("tls_required"):
                raise TransportConfigurationError(
                    f"NATS at {self._url} insists on TLS, and the configuration forbids it",
                    "leave tls.enabled out",
                )
        await super()._process_info(info, initial_connection)

    @property
    def encrypted(self) -> bool:
        """Whether it runs over TLS."""
        tcp = self._transport
        return isinstance(tcp, TcpTransport) and tcp._io_writer is not tcp._bare_io_writer

    # Its end.

    def fail(self, error: TransportError) -> None:
        """From now on it can't be used any more; who waits for it is told."""
        if self.fault is None:
            self.fault = error
        if not self._faulty.done():
            self._faulty.set_result(None)

    def lost(self, error: BaseException | None = None) -> NotConnectedError:
        """The error that says so."""
        text = f": {error}" if error and str(error) else ""
        return NotConnectedError(f"the connection to NATS at {self._url} was lost{text}", "it is made again by itself")

    def check(self) -> None:
        """Is it still there?

        :raises TransportError: no.
        """
        reading: asyncio.Task[None] | None = self._reading_task
        if self.fault is None and (not self.is_connected or reading is None or reading.done()):
            self.fail(self.lost(self.last_error))
        if self.fault is not None:
            raise self.fault

    async def wait(self, future: asyncio.Future[Any], seconds: float) -> bool:
        """Wait for something, but not longer than the connection lasts.

        :return: whether it came in time.
        :raises TransportError: the connection can't be used any more.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while not future.done():
            self.check()
            left = end - loop.time()
            if left <= 0:
                return False
            both = {future, self._faulty}
            await asyncio.wait(both, timeout=min(left, _LOOK), return_when=asyncio.FIRST_COMPLETED)
        return True

    async def send(self, commands: bytes) -> None:
        """Hand over messages as the protocol spells them; waits while too much is under way to the socket.

        :raises nats.errors.Error: the connection is closed.
        """
        if not self.is_connected:
            raise nats.errors.ConnectionClosedError
        self._pending.append(commands)
        self._pending_data_size += len(commands)
        await self._flush_pending(force_flush=self._pending_data_size > self._max_pending_size)

    def post(self, command: bytes) -> None:
        """Hand over a short message as the protocol spells it, without waiting.

        Only for what is bounded otherwise: nothing holds up who posts too much.
        """
        self._pending.append(command)
        self._pending_data_size += len(command)
        if self._flush_queue is not None and self._flush_queue.empty():
            self._flush_queue.put_nowait(asyncio.get_running_loop().create_future())

    async def ask(self, question: Awaitable[_T]) -> _T:
        """The answer to a request, within ``connect_timeout``.

        :raises TransportError: there is none.
        :raises nats.js.errors.Error: JetStream refuses.
        """
        asking = asyncio.ensure_future(question)
        asking.add_done_callback(lambda done: done.cancelled() or done.exception())  # looked at, also if nobody waits
        try:
            if await self.wait(asking, self._ours.connect_timeout):
                return asking.result()
            raise NotConnectedError(
                f"NATS at {self._url} does not answer within {self._ours.connect_timeout:g} s",
                "check that the server is well and JetStream has a leader",
            )
        except nats.js.errors.Error:
            raise
        except (nats.errors.Error, OSError) as error:
            raise self.lost(error) from error
        finally:
            if not asking.done():
                asking.cancel()

    async def _on_error(self, error: Exception) -> None:
        """Without it nats-py would log tracebacks, and try a server again that refused the connection."""
        if self._opening and not self.is_connected:
            raise error
        text = str(error)
        if "permissions violation" in text.lower():
            prefix = self._ours.subject_prefix
            self.fail(
                TransportConfigurationError(
                    f"NATS does not permit this user what is needed: {text.removeprefix('nats: ')}",
                    f"let it publish to {prefix}.> and $JS.API.> (consumers: $JS.ACK.> too), and subscribe to _INBOX.>",
                )
            )
        elif not isinstance(error, nats.errors.SlowConsumerError):
            self.fail(self.lost(error))

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        """As nats-py closes, in tasks of which nobody looks at the end: what it can't send any more is no news."""
        try:
            await super()._close(status, do_cbs)
        except OSError as error:
            self.fail(self.lost(error))

    async def _on_closed(self) -> None:
        self.fail(self.lost(self.last_error))

    async def give_up(self) -> None:
        """End it at once: nothing that a frozen server doesn't take holds it up."""
        self.fail(self.lost())
        self._opening = False
        self._pending.clear()
        self._pending_data_size = 0
        subscriptions = list(self._subs.values())
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            cut(writer)
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self.close(), _CLOSING)
        for subscription in subscriptions:  # nats-py leaves their tasks when its own closing is interrupted
            task: asyncio.Task[None] | None = subscription._wait_for_msgs_task
            if task is not None:
                task.cancel()

    # What it is ended by at the beginning.

    def _not_connected(self, error: Exception) -> TransportError:
        """Which of our errors a failed attempt to connect is."""
        place = f"NATS at {self._url}"
        text = (str(error) or type(error).__name__).removeprefix("nats: ").strip("'")
        if isinstance(error, ssl.SSLError):
            return TransportConfigurationError(
                f"{place}: TLS failed: {text}",
                "check tls.ca_file, the names and dates in the certificates, and tls.cert_file",
            )
        if "authorization" in text.lower() or "authentication" in text.lower():
            return TransportConfigurationError(
                f"{place} refuses the credentials: {text}",
                "check user, password, token, NKey or credentials file",
            )
        if isinstance(error, TimeoutError):
            text = f"no answer within {self._ours.connect_timeout:g} s"
        elif isinstance(error, OSError) and self._server_info:
            # From TLS 1.3 on a server looks at our certificate when the handshake is over for us.
            return _HungUpError(
                f"{place} ended the connection while we logged in: {text}",
                "check the credentials, and tls.cert_file if it verifies its clients; see its log",
            )
        if isinstance(error, OSError | nats.errors.Error):  # with them TimeoutError
            return NotConnectedError(f"{place} can't be reached: {text}", "start NATS, or check `servers`")
        return TransportConfigurationError(f"{place}: {type(error).__name__}: {text}", "check the transport's options")
