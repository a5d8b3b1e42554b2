"""Orthanc with the bridge, and brokers for it, in containers: for users' integration tests (docs/testing.md).

::

    with NatsContainer() as nats, OrthancContainer(nats) as orthanc:
        study = orthanc.upload_study(instances=3)
        orthanc.wait_for_event("study.stable", study=study.id)
        nats.get_url()  # for the consumer

They need the extra ``containers`` and a container engine. The images are public ones, pinned
(`orthanc_events_bridge.testing.images`); an argument or a variable (``ORTHANC_EVENTS_IMAGE_NATS`` …) names others.
Whatever happens to the test run, its containers are removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from orthanc_events_bridge.testing.contained import BrokerContainer, ContainerServer
from orthanc_events_bridge.testing.kafka_server import KafkaServer
from orthanc_events_bridge.testing.orthanc_container import OrthancContainer
from orthanc_events_bridge.testing.processes import ServerError
from orthanc_events_bridge.testing.rabbitmq_server import RabbitServer
from orthanc_events_bridge.testing.servers import NatsServer

__all__ = [
    "BrokerContainer",
    "ContainerServer",
    "KafkaContainer",
    "NatsContainer",
    "OrthancContainer",
    "RabbitMQContainer",
]


class NatsContainer(NatsServer, BrokerContainer):
    """NATS with JetStream in a container. Used as a context manager it is started, and removed with all that it has.

    :param folder: where it keeps everything; a temporary one by default.
    :param port: for clients; a free one by default.
    :param config: text for the end of its configuration file.
    :param image: another one than ``ORTHANC_EVENTS_IMAGE_NATS`` or the default.
    :param mounts: files and folders that it sees too, under their own paths, and can't change: certificates, say.
    """

    kind = "nats"
    config_file = "nats.conf"

    def __init__(
        self,
        folder: Path | None = None,
        *,
        port: int | None = None,
        config: str = "",
        image: str | None = None,
        mounts: Iterable[str | Path] = (),
    ) -> None:
        super().__init__(self._prepare(folder, image, mounts), port=port, config=config, binary=Path("nats-server"))


class RabbitMQContainer(RabbitServer, BrokerContainer):
    """RabbitMQ in a container; ``guest`` may do everything. Used as a context manager as `NatsContainer` is.

    :param folder: where it keeps everything; a temporary one by default.
    :param port: for clients; a free one by default.
    :param config: text for the end of ``rabbitmq.conf``.
    :param plugins: to be enabled.
    :param image: another one than ``ORTHANC_EVENTS_IMAGE_RABBITMQ`` or the default.
    :param mounts: files and folders that it sees too, under their own paths, and can't change: certificates, say.
    """

    kind = "rabbitmq"
    config_file = "rabbitmq.conf"

    def __init__(
        self,
        folder: Path | None = None,
        *,
        port: int | None = None,
        config: str = "",
        plugins: Sequence[str] = (),
        image: str | None = None,
        mounts: Iterable[str | Path] = (),
    ) -> None:
        super().__init__(
            self._prepare(folder, image, mounts),
            config=config,
            plugins=plugins,
            port=port,
            binary=Path("rabbitmq-server"),
        )

    def _command(self) -> list[str]:
        command = super()._command()
        path = self.folder / self.config_file
        # Whoever comes from outside of the container is a stranger to it, which `guest` must not be.
        path.write_text("loopback_users = none\n" + path.read_text("utf-8"), "utf-8")
        return command

    def ctl(self, *arguments: str, timeout: float = 60.0) -> str:
        """See `RabbitServer.ctl`."""
        command = ["rabbitmqctl", "--node", self.node, "--longnames", "--quiet", *arguments]
        flags = f"-start_epmd false -erl_epmd_port {self._distribution} -dist_listen false"
        code, output = self.execute(["timeout", f"{timeout:.0f}", *command], {"RABBITMQ_CTL_ERL_ARGS": flags})
        if code == 124:
            raise ServerError(f"rabbitmqctl {arguments[0]} took longer than {timeout:.0f} s")
        if code:
            raise ServerError(f"rabbitmqctl {arguments[0]} failed, exit code {code}: {output.strip()}")
        return output


class KafkaContainer(KafkaServer, BrokerContainer):
    """Apache Kafka in a container: one node (KRaft). Used as a context manager as `NatsContainer` is.

    :param folder: where it keeps everything; a temporary one by default.
    :param config: text for the end of ``server.properties``.
    :param image: another one than ``ORTHANC_EVENTS_IMAGE_KAFKA`` or the default.
    :param mounts: files and folders that it sees too, under their own paths, and can't change: certificates, say.
    """

    kind = "kafka"
    config_file = "server.properties"

    def __init__(
        self,
        folder: Path | None = None,
        *,
        config: str = "",
        image: str | None = None,
        mounts: Iterable[str | Path] = (),
    ) -> None:
        super().__init__(
            self._prepare(folder, image, mounts),
            config=config,
            archive=False,
            java=Path("java"),
            jars=Path("/opt/kafka/libs"),
        )

    @property
    def inner_port(self) -> int:
        """See `BrokerContainer.inner_port`. Kafka sends clients on to the address that a listener advertises."""
        return self.behind_port

    def _write_config(self) -> Path:
        if self.published and self.proxy_host is None:
            self.proxy_host, self.proxy_port = self.alias, self.behind_port
        return super()._write_config()
