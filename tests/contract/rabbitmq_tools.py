"""What the RabbitMQ tests share: transports to a server, and what they are refused with."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from orthanc_events_bridge.errors import TransportError
from orthanc_events_bridge.testing.brokers.rabbitmq import RabbitServer
from orthanc_events_bridge.testing.servers import require
from orthanc_events_bridge.transports.base import PublishError
from orthanc_events_bridge.transports.rabbitmq import RabbitTransport
from orthanc_events_bridge.transports.rabbitmq_options import RabbitOptions
from tests.contract.harness import check_text, run

#: The place, where a test has the server for itself.
EXCHANGE = "orthanc.events"
HISTORY = "orthanc.events.history"


def rabbit_server(folder: Path, config: str = "", plugins: tuple[str, ...] = ()) -> RabbitServer:
    """A server with this configuration; starting it takes a few seconds."""
    require("rabbitmq-server")
    return RabbitServer(folder / f"rabbitmq{time.monotonic_ns()}", config=config, plugins=plugins)


def url(server: RabbitServer) -> str:
    """For a plain client."""
    return f"amqp://guest:guest@127.0.0.1:{server.port}/"


def rabbit_transport(*servers: RabbitServer | str, **options: Any) -> RabbitTransport:
    """A transport to them."""
    urls = [one if isinstance(one, str) else f"amqp://127.0.0.1:{one.port}" for one in servers]
    defaults: dict[str, Any] = {"connect_timeout": 20, "ack_timeout": 20}
    return RabbitTransport(RabbitOptions.model_validate({"servers": urls, **defaults, **options}))


def refusal(
    transport: RabbitTransport,
    kind: type[TransportError] | tuple[type[TransportError], ...],
    work: Coroutine[Any, Any, object] | None = None,
    *,
    within: float = 10.0,
) -> str:
    """The text of the error with which connecting, or other work, must fail soon. Closes the transport."""

    async def main() -> TransportError:
        try:
            await (work or transport.connect())
        except TransportError as error:
            return error
        finally:
            await transport.close()
        raise AssertionError(f"no {kind}")

    began = time.monotonic()
    error = run(main())
    seconds = time.monotonic() - began
    assert seconds < within, f"{seconds:.1f} s: {error}"
    check_refusal(error, kind)
    return str(error)


def check_refusal(error: TransportError, kind: type[TransportError] | tuple[type[TransportError], ...]) -> None:
    """It is of this kind, names the broker, says what to do, and holds no secret."""
    actual = error.error if isinstance(error, PublishError) else error
    assert type(actual) in (kind if isinstance(kind, tuple) else (kind,)), repr(actual)
    assert actual.remedy, f"doesn't say what to do: {error}"
    assert "rabbitmq" in str(error).lower(), f"doesn't name the broker: {error}"
    check_text(error)


async def until(condition: Any, seconds: float = 30.0) -> None:
    """Wait until a condition holds, in an event loop."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.02)
