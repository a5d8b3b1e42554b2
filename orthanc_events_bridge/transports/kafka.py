"""Kafka.

Structured and binary mode are those of the official CloudEvents binding for Kafka 1.0.2.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from orthanc_events_bridge.errors import NotConnectedError, TransportError
from orthanc_events_bridge.transports.base import (
    Capabilities,
    DeadLetters,
    Incoming,
    Outgoing,
    Place,
    PublishError,
    Subscription,
    Transport,
)
from orthanc_events_bridge.transports.kafka_connection import Cluster
from orthanc_events_bridge.transports.kafka_dead import KafkaDeadLetters
from orthanc_events_bridge.transports.kafka_options import KafkaOptions
from orthanc_events_bridge.transports.kafka_publisher import Publisher
from orthanc_events_bridge.transports.kafka_reader import offsets, read
from orthanc_events_bridge.transports.kafka_retries import Retries, inbox_topic
from orthanc_events_bridge.transports.kafka_subscription import KafkaSubscription
from orthanc_events_bridge.transports.kafka_topic import Topic, open_topic
from orthanc_events_bridge.transports.options import TransportOptions
from orthanc_events_bridge.transports.servers import InTurn
from orthanc_events_bridge.transports.subscriptions import check_name


class KafkaTransport(Transport):
    """Publishes to one topic; all events of a key go to one partition."""

    capabilities = Capabilities(
        durable=True,
        deduplicates=False,
        replayable=True,
        ordered=True,
        declares_topology=True,
        refuses_when_full=False,
        identifies_place=True,
        subscribable=True,
        has_inboxes=True,
        counts_deliveries=False,
        pipelined=True,
    )
    #: A seam for `make test-mutants`: protections that are left out.
    without: frozenset[str] = frozenset()

    def __init__(self, options: TransportOptions, consumer: str = "") -> None:
        """:param consumer: whose inbox is the place, in place of the topic for everybody."""
        assert isinstance(options, KafkaOptions)
        super().__init__(options)
        self._everybodys = options
        self._consumer = consumer
        if consumer:
            options = options.model_copy(update={"topic": inbox_topic(options, consumer)})
        self._options = options
        self._cluster: Cluster | None = None
        self._topic: Topic | None = None
        self._readers: set[Cluster] = set()
        self._subscriptions: set[KafkaSubscription] = set()
        self._begun: set[str] = set()  # names that are not new, even if Kafka has forgotten all
        self._behind: dict[str, set[str]] = {}  # members of each name that could not say that they go
        self._servers = InTurn(options.servers, lambda server: Cluster.open(self._options, server))
        self._publisher = Publisher(options, self.without)

    async def connect(self) -> str:
        cluster = self._cluster
        if cluster is None or not cluster.connected:
            await self.close()
            cluster = self._cluster = await self._servers.open()
        if self._consumer:
            main = await open_topic(cluster, self._everybodys)
            options = main.limits_of(self._everybodys)
            await Retries(cluster, options, self._consumer, main.metadata, main.largest).need(self._options.topic)
        topic = await open_topic(cluster, self._options)
        if self._topic is None or self._topic.metadata != topic.metadata:
            topic = await self._publisher.begin(cluster, topic)
        self._topic = topic
        return topic.metadata.id

    async def close(self) -> None:
        clusters = [*self._readers, *([self._cluster] if self._cluster else [])]
        self._cluster = self._topic = None
        ends = [subscription.close() for subscription in self._subscriptions]
        self._subscriptions.clear()
        await asyncio.gather(*ends, *(cluster.give_up() for cluster in clusters))

    def _connected(self) -> tuple[Cluster, Topic]:
        if self._cluster is None or self._topic is None:
            raise NotConnectedError("not connected to Kafka", "connect first")
        self._cluster.check()
        return self._cluster, self._topic

    def inbox(self, consumer: str) -> Place:
        check_name(self.name, consumer)
        return KafkaTransport(self._everybodys, consumer)

    async def publish(self, events: Sequence[Outgoing]) -> None:
        try:
            cluster, topic = self._connected()
        except TransportError as error:
            raise PublishError(0, error) from error
        if self._consumer:
            events = [event.in_inbox(self._consumer, self._everybodys.topic) for event in events]
        await self._publisher.publish(cluster, topic, events)

    # Receiving, and looking at it.

    async def subscribe(
        self,
        name: str,
        *,
        oldest: bool = False,
        in_flight: int = 256,
        ack_wait: float = 30.0,
        ordered: bool = False,
        longest: float = 0.0,  # Kafka has no limit for it: it hears of the subscriber, and not of what that holds
        inbox_only: bool = False,
    ) -> Subscription:
        check_name(self.name, name)
        _, topic = self._connected()
        subscription = await KafkaSubscription.open(
            topic.limits_of(self._options),
            topic,
            self._servers.open,
            name,
            oldest=oldest or name in self._begun,
            in_flight=in_flight,
            ack_wait=ack_wait,
            behind=self._behind.setdefault(name, set()),
            kind="inbox" if inbox_only else "ordered" if ordered else "unordered",
        )
        (self._begun.discard if inbox_only else self._begun.add)(name)
        self._subscriptions = {one for one in self._subscriptions if not one.closed} | {subscription}
        return subscription

    async def dead_letters(self, consumer: str) -> DeadLetters:
        cluster, _ = self._connected()
        check_name(self.name, consumer)
        found = KafkaDeadLetters(cluster, self._everybodys, consumer)
        await found.find()
        return found

    async def tail(self, *, oldest: bool = False) -> AsyncGenerator[Incoming]:
        _, topic = self._connected()
        # Connections of its own: a node answers one request after the other, and this one waits for events.
        cluster = await self._servers.open()
        self._readers.add(cluster)
        try:
            if self._topic is None:
                raise cluster.lost()
            async for incoming in read(cluster, self._options, topic.metadata, oldest=oldest):
                yield incoming
        finally:
            self._readers.discard(cluster)
            await cluster.give_up()

    async def describe(self) -> list[str]:
        cluster, _ = self._connected()
        topic = await open_topic(cluster, self._options)
        oldest = await offsets(cluster, self._options, topic.metadata, oldest=True)
        newest = await offsets(cluster, self._options, topic.metadata, oldest=False)
        return [_cluster_line(cluster, self._options), *topic.describe(sum(newest.values()) - sum(oldest.values()))]


def _cluster_line(cluster: Cluster, options: KafkaOptions) -> str:
    servers = "1 server" if len(cluster.nodes) == 1 else f"{len(cluster.nodes)} servers"
    tls = "with TLS" if cluster.encrypted else "without TLS"
    login = f"as {options.user} by {options.sasl}" if options.sasl else "without a login"
    return f"Kafka cluster {cluster.id}, {servers}, {tls}, {login}"
