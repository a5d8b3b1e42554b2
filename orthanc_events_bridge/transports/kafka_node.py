"""A connection to one node of a Kafka cluster, by aiokafka."""
# mypy: disallow-subclassing-any=False
# (aiokafka comes without types.)

from __future__ import annotations

import asyncio
import logging
import ssl
from typing import Any

from aiokafka.conn import AIOKafkaConnection

from orthanc_events_bridge.transports.kafka_options import KafkaOptions
from orthanc_events_bridge.transports.tls import client_context, cut

# It would log each request at level DEBUG, the password and the events among them.
logging.getLogger("aiokafka").setLevel(logging.CRITICAL)


def arguments(options: KafkaOptions) -> dict[str, Any]:
    """What aiokafka's connections, and its clients but for ``bootstrap_servers``, need to reach the servers and log in.

    Secrets and certificates are read now, so that replaced ones are used.

    :raises TransportConfigurationError: they can't be read.
    """
    tls = options.tls_required
    found: dict[str, Any] = {
        "client_id": f"orthanc-events-bridge-{options.name}",
        "request_timeout_ms": round(options.connect_timeout * 1000),
        "security_protocol": ("SASL_" if options.sasl else "") + ("SSL" if tls else "PLAINTEXT"),
        "ssl_context": _context(options) if tls else None,
    }
    if options.sasl:
        found |= {
            "sasl_mechanism": options.sasl.upper(),
            "sasl_plain_username": options.user,
            "sasl_plain_password": options.secret("password"),
        }
    return found


def _context(options: KafkaOptions) -> ssl.SSLContext:
    context = client_context(options.tls, "Kafka")
    if options.tls.server_hostname is not None:
        # aiokafka has no word for it, and asyncio hands on the host that it connects to.
        plain = context.wrap_bio

        def wrap(
            incoming: ssl.MemoryBIO,
            outgoing: ssl.MemoryBIO,
            server_side: bool = False,
            server_hostname: str | bytes | None = None,
            session: ssl.SSLSession | None = None,
        ) -> ssl.SSLObject:
            return plain(incoming, outgoing, server_side, options.tls.server_hostname, session)

        context.wrap_bio = wrap  # type: ignore[method-assign]  # of this one context
    return context


class Connection(AIOKafkaConnection):
    """aiokafka's connection to one node, which ends at once, whatever a frozen server has not taken.

    :ivar muted: until then, on the event loop's clock, the server answers nothing, as it has said: a quota is used up.
    """

    muted = 0.0

    def close(self, reason: Any = None, exc: Any = None) -> Any:
        if self._writer is not None:
            cut(self._writer)
        return super().close(reason, exc)

    def begin(self, request: Any) -> asyncio.Future[Any]:
        """Send a request now; what comes back is for its answer. Several can be under way, and are answered in order.

        :raises errors.KafkaError: the connection is gone.
        """
        waiting = self.send(request)
        waiting.close()  # it would begin to wait when it is awaited, and one request can't be sent before that
        answer: asyncio.Future[Any] = self._requests[-1][2]
        answer.add_done_callback(self._answered)
        return answer

    def _answered(self, answer: asyncio.Future[Any]) -> None:
        if answer.cancelled() or answer.exception() is not None:  # looked at, also if nobody waits
            return
        if milliseconds := getattr(answer.result(), "throttle_time_ms", 0):
            self.muted = max(self.muted, asyncio.get_running_loop().time() + milliseconds / 1000)

    @property
    def encrypted(self) -> bool:
        """Whether it runs over TLS."""
        return self._writer is not None and self._writer.get_extra_info("ssl_object") is not None
