"""NATS JetStream.

What nats-py 2.16 leaves to us, as measured: ``publish_async`` never reports an error acknowledgement and has no deadline,
so that acknowledgements come to an inbox of our own; reconnecting hides lost publishes, so that a lost connection is given
up and made anew. The CloudEvents binding for NATS is structured only in 1.0.2.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import DeliverPolicy, DiscardPolicy, RetentionPolicy, StorageType, StreamConfig, StreamInfo

from orthanc_events_bridge.errors import (
    EventRejectedError,
    NotConnectedError,
    RefusedError,
    TransportConfigurationError,
    TransportError,
)
from orthanc_events_bridge.transports.base import Capabilities, Incoming, Outgoing, PublishError, Transport
from orthanc_events_bridge.transports.options import NatsOptions, TransportOptions

#: Room for headers in the server's max_payload: id, content type, and NATS' own line.
_HEADERS: Final = 256
#: Error codes of JetStream (nats-server's errors.json) that speak of one event, of a full stream, of our rights.
_TOO_LARGE: Final = 10054
_FULL: Final = frozenset({10077, 10047, 10023})
_NOT_ALLOWED: Final = frozenset({10039, 10076, 10056})
_SECONDS_TO_CLOSE: Final = 1.0


class _Batch:
    """The acknowledgements of one batch as they come in."""

    def __init__(self, size: int, loop: asyncio.AbstractEventLoop) -> None:
        self.acknowledged = bytearray(size)
        self.count = 0
        self.failed: tuple[int, TransportError] | None = None
        self.done: asyncio.Future[None] = loop.create_future()

    def acknowledge(self, index: int) -> None:
        if not self.acknowledged[index]:
            self.acknowledged[index] = 1
            self.count += 1
            if self.count == len(self.acknowledged) and not self.done.done():
                self.done.set_result(None)

    def fail(self, index: int, error: TransportError) -> None:
        if self.failed is None:
            self.failed = index, error
        if not self.done.done():
            self.done.set_result(None)

    def leading(self) -> int:
        """How many from the first on are confirmed without a hole."""
        hole = self.acknowledged.find(0)
        return len(self.acknowledged) if hole < 0 else hole


class NatsTransport(Transport):
    """Publishes to one stream, with the event's id for JetStream to remove duplicates by."""

    capabilities = Capabilities(
        durable=True, deduplicates=True, replayable=True, ordered=True, declares_topology=True
    )
    #: A seam for `make test-mutants`: protections that are left out.
    without: frozenset[str] = frozenset()

    def __init__(self, options: TransportOptions) -> None:
        assert isinstance(options, NatsOptions)
        super().__init__(options)
        self._options = options
        self._client: Client | None = None
        self._server = 0
        self._inbox = ""
        self._batches = 0
        self._batch: _Batch | None = None
        self._stream_seq = 0
        self._denied = ""

    # -- the connection -------------------------------------------------------------------------------------------------

    async def connect(self) -> str:
        if self._client is None or not self._client.is_connected:
            await self.close()
            self._client = await self._connect_any()
            self._inbox = self._client.new_inbox()
            self._stream_seq, self._denied = 0, ""
            try:
                await self._client.subscribe(f"{self._inbox}.*.*", cb=self._on_ack, pending_msgs_limit=-1)
            except nats.errors.Error as error:
                raise self._lost(error) from error
        info = await self._stream()
        return info.created.isoformat() if info.created else ""

    async def _connect_any(self) -> Client:
        """Try the servers in turn, beginning with the one behind the last that worked or failed."""
        servers = self._options.servers
        problem: TransportError = NotConnectedError("there is no server")
        for _ in servers:
            url = servers[self._server % len(servers)]
            try:
                return await self._connect_to(url)
            except TransportError as error:
                problem = error
                self._server += 1
        raise problem

    async def _connect_to(self, url: str) -> Client:
        client = Client()
        options = self._options
        try:
            await asyncio.wait_for(
                client.connect(
                    url,
                    name=f"orthanc-events-bridge {self.name}",
                    allow_reconnect=False,
                    connect_timeout=options.connect_timeout,  # type: ignore[arg-type]  # a float works
                    ping_interval=10,
                    max_outstanding_pings=2,
                    error_cb=self._on_error,
                    closed_cb=self._on_closed,
                    tls=self._tls(),
                    tls_hostname=options.tls.server_hostname,
                    tls_handshake_first=options.tls.handshake_first,
                    **self._login(client),
                ),
                options.connect_timeout + 1,
            )
        except TransportError:
            await self._discard(client)
            raise
        except Exception as error:
            await self._discard(client)
            raise self._not_connected(url, error) from error
        if options.tls_required and not client._server_info.get("tls_required"):
            await self._discard(client)
            raise self._plain(url)
        return client

    def _plain(self, url: str) -> TransportConfigurationError:
        return TransportConfigurationError(
            f"{url} does not offer TLS, and the configuration insists on it",
            "turn TLS on at the server, or write nats:// and leave `tls` out",
        )

    def _tls(self) -> ssl.SSLContext | None:
        options = self._options.tls
        if not self._options.tls_required:
            return None
        try:
            context = ssl.create_default_context(cafile=options.ca_file)
            if options.cert_file and options.key_file:
                context.load_cert_chain(options.cert_file, options.key_file)
        except (OSError, ssl.SSLError) as error:
            raise TransportConfigurationError(
                f"a certificate or key can't be read: {error}", "check tls.ca_file, tls.cert_file and tls.key_file"
            ) from error
        return context

    def _login(self, client: Client) -> dict[str, Any]:
        """Credentials, read now, so that rotated ones are used. Passwords are handed over only once TLS stands."""
        options = self._options

        def guarded(secret: str) -> Any:
            def give() -> str:
                if options.tls_required and not client._server_info.get("tls_required"):
                    raise self._plain("the server")
                return secret

            return give

        login: dict[str, Any] = {}
        if (password := options.secret("password")) is not None:
            login.update(user=options.user, password=guarded(password))
        if (token := options.secret("token")) is not None:
            login["token"] = guarded(token)
        if (seed := options.secret("nkey_seed")) is not None:
            login["nkeys_seed_str"] = seed
        if options.credentials_file:
            login["user_credentials"] = str(options.credentials_file)
        if "nkeys_seed_str" in login or "user_credentials" in login:
            try:
                import nkeys  # noqa: F401  # nats-py needs it, and would fail later and less clearly
            except ImportError as error:
                raise TransportConfigurationError(
                    "NKeys and credentials files need one more package", 'pip install "orthanc-events-bridge[nkeys]"'
                ) from error
        return login

    def _not_connected(self, url: str, error: Exception) -> TransportError:
        """Which of our errors a failed attempt to connect is."""
        text = str(error) or type(error).__name__
        if isinstance(error, ssl.SSLError | ssl.CertificateError):
            return TransportConfigurationError(
                f"{url}: TLS failed: {text}", "check tls.ca_file, the certificates' names and dates, and tls.cert_file"
            )
        if "authorization" in text.lower() or "authentication" in text.lower():
            return TransportConfigurationError(
                f"{url} refuses the credentials", "check user, password, token, NKey or credentials file"
            )
        if isinstance(error, FileNotFoundError | PermissionError):
            return TransportConfigurationError(f"a credentials file can't be read: {text}", "check credentials_file")
        if isinstance(error, OSError | nats.errors.Error | asyncio.TimeoutError):
            if isinstance(error, asyncio.TimeoutError):
                text = f"no answer within {self._options.connect_timeout:g} s"
            return NotConnectedError(f"{url} can't be reached: {text}", "start NATS, or check `servers`")
        return TransportConfigurationError(f"{url}: {type(error).__name__}: {text}", "check the transport's options")

    def _lost(self, error: BaseException | None = None) -> NotConnectedError:
        text = f": {error}" if error and str(error) else ""
        return NotConnectedError(f"the connection to NATS was lost{text}", "it is made again by itself")

    async def _on_error(self, error: Exception) -> None:
        """nats-py would log a traceback; what matters reaches the batch."""
        if "permissions violation" in str(error).lower():
            self._denied = str(error)
            if self._batch is not None:
                self._batch.fail(self._batch.leading(), self._not_permitted())

    def _not_permitted(self) -> TransportConfigurationError:
        return TransportConfigurationError(
            f"NATS does not permit this user to do what is needed: {self._denied}",
            f"let it publish to {self._options.subject_prefix}.> and $JS.API.>, and subscribe to _INBOX.>",
        )

    async def _on_closed(self) -> None:
        if self._batch is not None:
            self._batch.fail(self._batch.leading(), self._lost())

    async def close(self) -> None:
        client, self._client = self._client, None
        if self._batch is not None:
            self._batch.fail(self._batch.leading(), self._lost())
        if client is not None:
            await self._discard(client)

    @staticmethod
    async def _discard(client: Client) -> None:
        """A frozen server must not hold up closing."""
        with contextlib.suppress(Exception):
            await asyncio.wait_for(client.close(), _SECONDS_TO_CLOSE)

    # -- the stream -----------------------------------------------------------------------------------------------------

    async def _stream(self) -> StreamInfo:
        """Find the stream and check it, or make it.

        :raises TransportConfigurationError: it can't be used as it is.
        """
        options = self._options
        client = self._client
        assert client is not None
        manager = client.jsm(timeout=options.connect_timeout)
        try:
            try:
                info = await manager.stream_info(options.stream)
            except nats.js.errors.NotFoundError as error:
                if not options.declare:
                    raise TransportConfigurationError(
                        f"the stream {options.stream} does not exist, and declare is false",
                        "make it, or set declare to true",
                    ) from error
                return await manager.add_stream(self._wanted())
        except nats.js.errors.ServiceUnavailableError as error:
            raise TransportConfigurationError(
                "JetStream is not on at this server or for this account", "start nats-server with -js"
            ) from error
        except nats.js.errors.APIError as error:
            raise TransportConfigurationError(
                f"the stream {options.stream} can't be made or read: {error.description}",
                "check `limits`, the account's limits and the user's permissions",
            ) from error
        except (nats.errors.Error, asyncio.TimeoutError) as error:
            if self._denied:
                raise self._not_permitted() from error
            raise NotConnectedError(
                f"NATS does not answer about the stream {options.stream}: {str(error) or type(error).__name__}",
                "check that JetStream is on and has a leader",
            ) from error
        self._check(info.config)
        return info

    def _wanted(self) -> StreamConfig:
        options, limits = self._options, self._options.limits
        return StreamConfig(
            name=options.stream,
            description="Changes of Orthanc as CloudEvents",
            subjects=[f"{options.subject_prefix}.>"],
            retention=RetentionPolicy.LIMITS,
            discard=DiscardPolicy.NEW,  # by default NATS evicts the oldest event silently
            max_age=limits.max_age,
            max_bytes=limits.max_bytes or -1,
            max_msgs=limits.max_messages or -1,
            storage=StorageType(limits.storage),
            num_replicas=limits.replicas,
            duplicate_window=limits.duplicate_window,
        )

    def _check(self, found: StreamConfig) -> None:
        """A stream that exists is never changed: what differs is named."""
        wanted = self._wanted()
        needed = ["retention", "discard"]
        if self._options.declare:
            needed += ["max_age", "max_bytes", "max_msgs", "storage", "num_replicas", "duplicate_window"]
        differing = [
            f"{name} is {_plain_value(getattr(found, name))}, wanted {_plain_value(getattr(wanted, name))}"
            for name in needed
            if getattr(found, name) != getattr(wanted, name)
        ]
        if not any(_covers(subject, self._options.subject_prefix) for subject in found.subjects or []):
            differing.append(f"its subjects {found.subjects} leave out {wanted.subjects}")
        if differing:
            raise TransportConfigurationError(
                f"the stream {found.name} exists with other settings: {'; '.join(differing)}",
                "change `limits` or the stream so that they agree, or set declare to false to keep its limits",
            )

    # -- publishing -----------------------------------------------------------------------------------------------------

    async def publish(self, events: Sequence[Outgoing]) -> None:
        client = self._client
        if client is None or not client.is_connected:
            raise PublishError(0, self._lost())
        if self._denied:
            raise PublishError(0, self._not_permitted())
        largest = client.max_payload - _HEADERS
        sendable = next((i for i, event in enumerate(events) if len(event.body) > largest), len(events))
        if sendable:
            await self._publish(client, events[:sendable])
        if sendable < len(events):
            size = len(events[sendable].body)
            raise PublishError(
                sendable,
                EventRejectedError(
                    f"the event has {size} bytes, and NATS takes {largest}", "raise max_payload at the server"
                ),
            )

    async def _publish(self, client: Client, events: Sequence[Outgoing]) -> None:
        self._batches += 1
        batch = self._batch = _Batch(len(events), asyncio.get_running_loop())
        reply = f"{self._inbox}.{self._batches}."
        prefix = self._options.subject_prefix
        try:
            for index, event in enumerate(events):
                headers = {"Nats-Msg-Id": event.id, "content-type": event.content_type}
                if "dedupe" in self.without:
                    del headers["Nats-Msg-Id"]
                subject = f"{prefix}.{event.site}.{event.level}.{event.verb}.{event.partition}"
                await client.publish(subject, event.body, f"{reply}{index}", headers)
                if batch.failed:
                    break
            if "confirm" not in self.without:
                await self._settled(batch)
        except nats.errors.Error as error:
            batch.fail(batch.leading(), self._lost(error))
        finally:
            self._batch = None
        if batch.failed:
            raise PublishError(batch.leading(), batch.failed[1])

    async def _settled(self, batch: _Batch) -> None:
        """Wait for the acknowledgements, as long as they keep coming."""
        seen = -1
        while not batch.done.done():
            if batch.count == seen:
                batch.fail(
                    batch.leading(),
                    NotConnectedError(
                        f"NATS has not confirmed an event within {self._options.ack_timeout:g} s",
                        "check the server; the events are sent again",
                    ),
                )
                return
            seen = batch.count
            await asyncio.wait([batch.done], timeout=self._options.ack_timeout)

    async def _on_ack(self, message: Msg) -> None:
        batch = self._batch
        number, _, index_text = message.subject[len(self._inbox) + 1 :].partition(".")
        if batch is None or int(number) != self._batches:
            return
        index = int(index_text)
        error = self._refusal(message)
        if error is not None:
            batch.fail(index, error)
        else:
            batch.acknowledge(index)

    def _refusal(self, message: Msg) -> TransportError | None:
        """Why an event was not stored; none when it was."""
        if not message.data:  # "503": nobody listens on the subject
            return NotConnectedError(
                f"no stream takes the subject {self._options.subject_prefix}.>: it was deleted, or has no leader",
                "it is made or found again by itself",
            )
        answer = json.loads(message.data)
        if "error" in answer:
            return _refused(answer["error"])
        seq = answer["seq"]
        if seq <= self._stream_seq and not answer.get("duplicate"):
            return NotConnectedError("the stream was made again while we were connected", "it is checked again")
        self._stream_seq = max(seq, self._stream_seq)
        return None

    # -- looking at it --------------------------------------------------------------------------------------------------

    async def subscribe(self, *, oldest: bool = False) -> AsyncIterator[Incoming]:
        client = self._client
        if client is None:
            raise NotConnectedError("not connected to NATS", "connect first")
        subject = f"{self._options.subject_prefix}.>"
        try:
            if oldest:
                subscription: Any = await client.jetstream().subscribe(
                    subject, stream=self._options.stream, ordered_consumer=True, deliver_policy=DeliverPolicy.ALL
                )
            else:
                subscription = await client.subscribe(subject)
            while client.is_connected:
                try:
                    message = await subscription.next_msg(timeout=1)
                except nats.errors.TimeoutError:
                    continue
                headers = {name.lower(): value for name, value in (message.headers or {}).items()}
                position = str(message.metadata.sequence.stream) if oldest else ""
                yield Incoming(message.subject, message.data, headers, position)
        except nats.errors.Error as error:
            raise self._lost(error) from error
        raise self._lost()

    async def describe(self) -> list[str]:
        info = await self._stream()
        client = self._client
        assert client is not None
        config, state = info.config, info.state
        age = f"{config.max_age:g} s" if config.max_age else "unlimited"
        size = f"{config.max_bytes} bytes" if config.max_bytes and config.max_bytes > 0 else "unlimited"
        tls = "with TLS" if client._server_info.get("tls_required") else "without TLS"
        return [
            f"NATS {client.connected_server_version}, {tls}, takes events of up to {client.max_payload - _HEADERS} bytes",
            f"stream {config.name}: {state.messages} events, {state.bytes} bytes, {config.num_replicas} replicas",
            f"limits: age {age}, size {size}, duplicate window {config.duplicate_window:g} s; full: new ones are refused",
        ]


def _refused(error: dict[str, Any]) -> TransportError:
    """Which of our errors an error acknowledgement of JetStream is."""
    code, text = error.get("err_code", 0), error.get("description", "")
    if code == _TOO_LARGE:
        return EventRejectedError(f"the stream refuses an event as too large: {text}", "raise its max_msg_size")
    if code in _FULL:
        return RefusedError(
            f"the stream is full: {text} ({code})",
            "raise its limits, purge it, or wait until its oldest events have aged out",
        )
    if code in _NOT_ALLOWED:
        return TransportConfigurationError(f"JetStream refuses: {text} ({code})", "check the account and the stream")
    return RefusedError(f"JetStream refuses: {text} ({code})", "see the NATS server's log")


def _covers(subject: str, prefix: str) -> bool:
    """Whether a stream's subject takes everything below our prefix."""
    ours = [*prefix.split("."), ">"]
    for index, token in enumerate(subject.split(".")):
        if token == ">":
            return True
        if index >= len(ours) or ours[index] == ">" or token not in ("*", ours[index]):
            return False
    return False


def _plain_value(value: object) -> object:
    return getattr(value, "value", value)
