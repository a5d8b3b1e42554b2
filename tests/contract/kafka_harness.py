"""Kafka for the contract suite."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from zlib import crc32

from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from orthanc_events_bridge.testing.brokers.kafka import KafkaServer
from orthanc_events_bridge.transports.base import Outgoing, Transport
from orthanc_events_bridge.transports.kafka import KafkaTransport
from orthanc_events_bridge.transports.kafka_options import KafkaOptions
from tests.contract.harness import SECRET, Harness, Stored, aside, server
from tests.contract.kafka_tools import PLAIN, administrate, read_topic
from tests.contract.link import Link

#: Fewer than the default, for a topic is made for every test; several, so that order across keys is not kept by chance.
PARTITIONS: Final = 8
#: Clients log in; what the harness itself does goes by the listener for administrators.
LOGIN: Final = f"""\
listener.security.protocol.map=CLIENT:SASL_PLAINTEXT,PROXY:SASL_PLAINTEXT,INTERNAL:PLAINTEXT,CONTROLLER:PLAINTEXT
sasl.enabled.mechanisms=PLAIN
listener.name.client.plain.sasl.jaas.config={PLAIN} user_contract="{SECRET}";
listener.name.proxy.plain.sasl.jaas.config={PLAIN} user_contract="{SECRET}";
"""


class KafkaHarness(Harness):
    title = "Kafka"
    deadline = 2.0
    attribute_prefix = "ce_"
    one_order = False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        made = server("kafka", folder, config=LOGIN)
        assert isinstance(made, KafkaServer)
        self._server = made
        self._server.start()

    @property
    def _url(self) -> str:
        return f"127.0.0.1:{self._server.admin_port}"

    def tidy(self) -> None:
        super().tidy()
        self._server.thaw()
        if not self._server.running:
            self._server.start()
        self._remove(lambda topic: not topic.startswith("__"))

    def transport(
        self, *, declare: bool = True, room: int = 0, port: int | None = None, impatient: bool = False
    ) -> Transport:
        assert not room, "it never refuses for want of room"
        deadline = self.deadline if impatient else self.patience
        return KafkaTransport(
            KafkaOptions.model_validate(
                {
                    "servers": [f"127.0.0.1:{port or self._server.port}"],
                    "topic": self.place,
                    "partitions": PARTITIONS,
                    "inbox_prefix": f"inbox.{self.place}",
                    "dead_prefix": f"dead.{self.place}",
                    "declare": declare,
                    "sasl": "plain",
                    "user": "contract",
                    "password": SECRET,
                    "connect_timeout": deadline,
                    "ack_timeout": deadline,
                }
            )
        )

    def read(self) -> list[Stored]:
        return self._read(self.place)

    def read_inbox(self, consumer: str) -> list[Stored]:
        return self._read(f"inbox.{self.place}.{consumer}")

    def remove_inbox(self, consumer: str) -> None:
        self._remove(lambda topic: topic == f"inbox.{self.place}.{consumer}")

    def make_other_inbox(self, consumer: str) -> list[str]:
        topic = f"inbox.{self.place}.{consumer}"

        async def work(admin: AIOKafkaAdminClient) -> None:
            await admin.create_topics([NewTopic(topic, 3, 1, topic_configs={"cleanup.policy": "compact"})])

        administrate(self._url, work)
        return [topic, "cleanup.policy", "compact", "partitions is 3"]

    def _read(self, topic: str) -> list[Stored]:
        found = []
        for row in aside(read_topic(self._url, topic)):
            headers = {name: value.decode() for name, value in row.headers}
            assert len(headers) == len(row.headers)
            assert row.partition == crc32(row.key) % 64 % PARTITIONS
            assert headers["orthanc-site"] == "main"
            found.append(Stored(row.topic, row.value, headers["content-type"], headers["orthanc-event-id"], headers))
        return found

    def address(self, event: Outgoing) -> str:
        return self.place

    def too_large(self) -> int:
        return 1048588

    def make_room(self) -> None:
        raise NotImplementedError

    def kill(self) -> None:
        self._server.kill()

    def start(self) -> None:
        self._server.start()

    def freeze(self) -> None:
        self._server.freeze()

    def thaw(self) -> None:
        self._server.thaw()

    def remove_place(self) -> None:
        self._remove(lambda topic: topic == self.place)

    def _remove(self, which: Callable[[str], bool]) -> None:
        async def work(admin: AIOKafkaAdminClient) -> None:
            while topics := [topic for topic in await admin.list_topics() if which(topic)]:
                await admin.delete_topics(topics)
                await asyncio.sleep(0.02)

        administrate(self._url, work)

    def make_place(self, **different: Any) -> list[str]:
        config = {
            "cleanup.policy": "delete",
            "unclean.leader.election.enable": "false",
            "min.insync.replicas": "1",
            "retention.ms": str(30 * 24 * 3600 * 1000),
            "retention.bytes": str(160 * 2**20),
        }
        config |= {name: value for name, value in different.items() if name != "partitions"}
        partitions = different.get("partitions", PARTITIONS)

        async def work(admin: AIOKafkaAdminClient) -> None:
            answer = await admin.create_topics([NewTopic(self.place, partitions, 1, topic_configs=config)])
            assert [code for _, code, _ in answer.topic_errors] == [0], answer

        administrate(self._url, work)
        return [*different, *(str(value) for value in different.values())]

    def different(self) -> list[dict[str, Any]]:
        return [
            {"cleanup.policy": "compact"},
            {"unclean.leader.election.enable": "true"},
            {"min.insync.replicas": "2"},
            {"retention.ms": "3600000"},
            {"retention.bytes": "-1"},
            {"partitions": 3},
        ]

    def settled(self, consumer: str) -> None:
        """Acknowledgements are collected for a twentieth of a second, and then stored."""
        time.sleep(1.0)

    def traces(self) -> int:
        async def work(admin: AIOKafkaAdminClient) -> int:
            names = [name for name, *_ in await admin.list_consumer_groups()]
            # Other tests' consumers stay known: aiokafka can't delete them.
            places = [re.findall(r"PLACE\d+", name) for name in names]
            return sum(not those or self.place in those for those in places)

        return administrate(self._url, work)

    def _link(self, latency: float) -> Link:
        """The one that the server advertises, for all of a test's transports."""
        if not self._links:
            self._links.append(Link(self._server.behind_port, port=self._server.proxy_port))
        self._links[0].latency = latency
        return self._links[0]

    @property
    def port(self) -> int:
        return self._server.port

    def close(self) -> None:
        self._server.close()
