"""Whether what a program has made for its name is as docs/any-language.md asks for, as far as a broker tells."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orthanc_events_bridge import transports
from orthanc_events_bridge.errors import TransportConfigurationError
from orthanc_events_bridge.transports.rabbitmq_options import RabbitOptions

if TYPE_CHECKING:
    from orthanc_events_bridge.transports.options import TransportOptions


async def differing(options: TransportOptions, name: str) -> str:
    """What is missing or otherwise; empty if nothing is. What is there already is compared, and nothing is made.

    The program has to have ended: for a moment we subscribe in its place, but at Kafka, where that takes seconds and
    tells no more than reading its dead letters did.

    :param options: of the broker.
    :param name: the consumer's.
    :raises BridgeError: the broker doesn't answer.
    """
    if options.type == "kafka":
        return ""
    transport = transports.create(options.model_copy(update={"declare": False}))
    try:
        await transport.connect()
        subscription = await transport.subscribe(name, in_flight=1)
        await subscription.close()
        if isinstance(options, RabbitOptions):
            await _compare_queues(options, name)
    except TransportConfigurationError as error:
        return error.message
    finally:
        await transport.close()
    return ""


async def _compare_queues(options: RabbitOptions, name: str) -> None:
    """RabbitMQ tells no settings; it refuses to make a queue with others than it has.

    :raises TransportConfigurationError: a queue has others.
    """
    # Where another broker is used, RabbitMQ's client need not be installed.
    from orthanc_events_bridge.transports.rabbitmq_asking import Asking
    from orthanc_events_bridge.transports.rabbitmq_queues import Queues, dead_arguments
    from orthanc_events_bridge.transports.rabbitmq_servers import Servers

    connection = await Servers(options).open()
    asking = Asking(connection)
    try:
        queues = Queues.of(name, options)
        dead = {queues.dead: dead_arguments(options)} if await asking.exists(queues.dead) else {}
        for queue, arguments in (queues.lasting | dead).items():
            await asking.declare(queue, arguments)
    finally:
        await asking.end()
        await connection.give_up()
