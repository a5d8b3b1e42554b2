"""The nodes of a Kafka cluster, and a connection to each.

What aiokafka 0.14 leaves to us, as measured: its client says "unable to bootstrap" for a wrong password too, makes a
topic that was deleted by asking for it, can't tell it from the one before, and hides a lost connection behind tries
without an end; closing waits for a frozen server. So only its single connection is used, with its protocol and login.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import Any, Final, TypeVar

from aiokafka import errors

from orthanc_events_bridge.errors import NotConnectedError, TransportConfigurationError, TransportError
from orthanc_events_bridge.transports.kafka_node import Connection, arguments
from orthanc_events_bridge.transports.kafka_options import KafkaOptions
from orthanc_events_bridge.transports.kafka_protocol import MetadataRequest, TopicMetadata, read_topic

_T = TypeVar("_T")

#: Seconds that a closed connection's task may take to end.
_CLOSING: Final = 0.2


class _HungUpError(TransportConfigurationError):
    """The server ended the connection in place of answering the first questions."""


class Cluster:
    """The nodes of one Kafka cluster; made by `open`, used once, and ended by `give_up`.

    :ivar fault: why it can't be used any more.
    :ivar id: as the cluster calls itself.
    :ivar nodes: host and port of each node, as it advertises them.
    """

    def __init__(self, options: KafkaOptions) -> None:
        self.fault: TransportError | None = None
        self.id = ""
        self.nodes: dict[int, tuple[str, int]] = {}
        self._options = options
        # By the node's number; the first one, before the numbers are known, has none.
        self._connections: dict[int | None, Connection] = {}
        self._opening: dict[int, asyncio.Lock] = {}

    @classmethod
    async def open(cls, options: KafkaOptions, server: str) -> Cluster:
        """Connect to a server of it.

        :raises NotConnectedError: it can't be reached.
        :raises TransportConfigurationError: it refuses us, or we refuse it.
        """
        with contextlib.suppress(_HungUpError):  # it was on its way down
            return await cls._open(options, server)
        try:
            return await cls._open(options, server)
        except _HungUpError as error:
            raise TransportConfigurationError(error.message, error.remedy) from error

    @classmethod
    async def _open(cls, options: KafkaOptions, server: str) -> Cluster:
        cluster = cls(options)
        host, _, port = server.rpartition(":")
        try:
            cluster._connections[None] = await cluster._connect(host.strip("[]"), int(port), "")
            try:
                # A listener that wants a login, and gets another question instead, ends the connection.
                await cluster.topic(options.topic)
            except NotConnectedError as error:
                if isinstance(error.__cause__, errors.KafkaConnectionError):
                    raise cluster._hung_up(f"Kafka at {server}", "") from error.__cause__
                raise
        except BaseException:
            await cluster.give_up()
            raise
        address = (host.strip("[]"), int(port))
        for number, node in cluster.nodes.items():
            if node == address:
                cluster._connections[number] = cluster._connections.pop(None)
                break
        return cluster

    async def _connect(self, host: str, port: int, hint: str) -> Connection:
        connection = Connection(host, port, **arguments(self._options))
        place = f"Kafka at {host}:{port}"
        try:
            async with asyncio.timeout(self._options.connect_timeout):
                await connection.connect()
        except Exception as error:
            connection.close()
            raise self._problem(place, hint, error) from error
        except asyncio.CancelledError:
            connection.close()
            raise
        return connection

    # Asking.

    async def node(self, number: int) -> Connection:
        """The connection to a node, made where there is none.

        :raises TransportError: it can't be.
        """
        found = self._connections.get(number)
        if found is not None and found.connected():
            return found
        if number not in self.nodes:
            raise NotConnectedError(f"Kafka's node {number} is not known to the cluster", "it is looked for again")
        async with self._opening.setdefault(number, asyncio.Lock()):
            found = self._connections.get(number)
            if found is None or not found.connected():
                self.check()
                host, port = self.nodes[number]
                hint = f", as node {number} of the cluster advertises it"
                try:
                    found = self._connections[number] = await self._connect(host, port, hint)
                except _HungUpError as error:  # another server has let us in
                    raise self.lost(error.__cause__) from error
                if self.fault is not None:
                    found.close()
                    raise self.fault
        return found

    async def ask(self, request: Any, number: int | None = None) -> Any:
        """The answer to a request, within ``connect_timeout``.

        :param number: of the node to ask; any, where there is none.
        :raises NotConnectedError: there is none.
        :raises TransportConfigurationError: the servers are too old.
        """
        self.check()
        if number is not None:
            connection = await self.node(number)
        else:
            there = [one for one in self._connections.values() if one.connected()]
            if not there:
                raise self.lost()
            connection = there[0]
        try:
            return await self.wait(connection.begin(request), self._options.connect_timeout)
        except (NotImplementedError, errors.IncompatibleBrokerVersion) as error:
            raise TransportConfigurationError(
                f"the servers are no Kafka that this transport can use: {error}", "Kafka 3.1 or later is needed"
            ) from error
        except errors.KafkaError as error:
            raise self.lost(error) from error

    async def wait(self, answer: asyncio.Future[_T], seconds: float) -> _T:
        """Wait for an answer.

        :param seconds: not counting those for which a server has said that it will answer nothing (KIP-219).
        :raises NotConnectedError: none in time.
        :raises errors.KafkaError: the connection is gone.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while not answer.done():
            end = max(end, *(one.muted + seconds for one in self._connections.values()), 0)
            left = end - loop.time()
            if left <= 0:
                raise self.fail(
                    NotConnectedError(
                        f"Kafka does not answer within {seconds:g} s",
                        "check that its servers are well; it is tried again",
                    )
                )
            await asyncio.wait({answer}, timeout=left)
        return answer.result()

    async def topic(self, name: str) -> TopicMetadata | None:
        """What the cluster says of a topic, and with it of its nodes; none where there is no such topic.

        :raises TransportError: no answer, or a refusal.
        """
        answer = await self.ask(MetadataRequest(name))
        self.id = answer.cluster_id or ""
        self.nodes = {number: (host, port) for number, host, port, *_ in answer.brokers}
        return read_topic(answer, name)

    @property
    def connected(self) -> bool:
        """Whether there is a connection that can be used."""
        return self.fault is None and any(connection.connected() for connection in self._connections.values())

    @property
    def encrypted(self) -> bool:
        """Whether connections run over TLS."""
        return any(connection.encrypted for connection in self._connections.values())

    # Its end.

    def check(self) -> None:
        """Can it be used still?

        :raises TransportError: no.
        """
        if self.fault is not None:
            raise self.fault

    def fail(self, error: TransportError) -> TransportError:
        """From now on it can't be used any more."""
        if self.fault is None:
            self.fault = error
        return error

    def lost(self, error: BaseException | None = None) -> TransportError:
        """A connection was lost, and with it everything."""
        text = f": {error}" if error and str(error) else ""
        servers = ", ".join(self._options.servers)
        return self.fail(
            NotConnectedError(f"the connection to Kafka ({servers}) was lost{text}", "it is made again by itself")
        )

    async def give_up(self) -> None:
        """End it at once: nothing that a frozen server doesn't take holds it up."""
        self.lost()
        tasks = {connection._read_task for connection in self._connections.values()} - {None}
        ends = {connection.close() for connection in self._connections.values()} - {None}
        self._connections.clear()
        if tasks or ends:
            await asyncio.wait({asyncio.ensure_future(one) for one in tasks | ends}, timeout=_CLOSING)

    # What it is ended by at the beginning.

    def _hung_up(self, place: str, text: str) -> _HungUpError:
        return _HungUpError(
            f"{place} ended the connection while we introduced ourselves{text}",
            "check whether that port wants TLS (tls.enabled) or a login (sasl), and tls.cert_file if it verifies its "
            "clients; see its log",
        )

    def _problem(self, place: str, hint: str, error: Exception) -> TransportError:
        """Which of our errors a failed attempt to connect is."""
        text = str(error) or type(error).__name__
        if isinstance(error, ssl.SSLError):
            return TransportConfigurationError(
                f"{place}{hint}: TLS failed: {text}",
                "check that this port has TLS, tls.ca_file, the names and dates in the certificates, and tls.cert_file",
            )
        if isinstance(error, errors.SaslAuthenticationFailed):
            return TransportConfigurationError(
                f"{place} refuses the credentials of user {self._options.user}", "check sasl, user and password"
            )
        if isinstance(error, errors.UnsupportedSaslMechanismError | errors.IllegalSaslStateError):
            return TransportConfigurationError(
                f"{place} takes no login by {self._options.sasl}", "check sasl, and that this port wants a login"
            )
        if isinstance(error, TimeoutError):
            text = f"no answer within {self._options.connect_timeout:g} s"
        elif isinstance(error, ConnectionResetError | BrokenPipeError | errors.KafkaConnectionError):
            return self._hung_up(place, hint)
        if isinstance(error, OSError | errors.KafkaError):
            return NotConnectedError(f"{place}{hint} can't be reached: {text}", "start Kafka, or check `servers`")
        # The error itself may hold what was sent.
        return TransportConfigurationError(f"{place}: {type(error).__name__}", "check the transport's options")
