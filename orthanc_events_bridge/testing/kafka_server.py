"""Apache Kafka's server for tests, as a process. Standard library only."""

from __future__ import annotations

import base64
import os
import socket
import struct
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from orthanc_events_bridge.testing.guard import scratch_folder
from orthanc_events_bridge.testing.processes import Server, ServerError, free_port
from orthanc_events_bridge.testing.programs import find_java, find_kafka

#: Small, and quick to start: no second compiler, no parallel collector.
_JAVA: Final = ("-Xms128m", "-Xmx256m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")

_LOGGING: Final = """\
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = %d{HH:mm:ss.SSS} %p %c{1}: %m%n
rootLogger.level = warn
rootLogger.appenderRef.out.ref = out
logger.server.name = kafka.server.KafkaRaftServer
logger.server.level = info
"""


class KafkaServer(Server):
    """One node of Apache Kafka 4 (KRaft: broker and controller in one), its data in the folder.

    Kafka does not wait for the disk, but what it has confirmed is with the operating system: a kill loses nothing.

    Its listeners, all on 127.0.0.1, are ``CLIENT`` (``port``), ``PROXY`` (``behind_port``), and two without any
    security, whatever `config` makes of those: ``INTERNAL`` (``admin_port``: between nodes, and for administrators) and
    ``CONTROLLER``. A client goes on to the address that a listener advertises: only one that comes by way of ``PROXY``,
    which advertises `proxy_port`, stays behind a proxy.

    :param config: text for the end of ``server.properties``, where a later line wins. Read at each start, from the
        attribute ``config``.
    :param node: its number in a cluster.
    :param archive: whether to start from an archive of Java's classes, made at the first use: a second faster.
    :param java: the program, where `find_java` is not to look for it.
    :param jars: Kafka's folder, where `find_kafka` is not to look for it.

    :ivar proxy_port: where a proxy that leads to ``behind_port`` listens, if there is one. Read at each start.
    :ivar proxy_host: where that is; this machine, where nothing is said.
    :ivar scram: users and passwords for SCRAM-SHA-256 and SCRAM-SHA-512, known from the first start on.
    """

    title = "Kafka"

    def __init__(
        self,
        folder: Path,
        *,
        config: str = "",
        node: int = 1,
        archive: bool = True,
        java: Path | None = None,
        jars: Path | None = None,
    ) -> None:
        super().__init__(folder)
        self.java = java or find_java()
        self.jars = jars or find_kafka()
        self.config = config
        self.node = node
        self.port, self.behind_port, self.admin_port, self.controller_port = (free_port() for _ in range(4))
        self.proxy_port = free_port()
        self.proxy_host: str | None = None
        self.scram: Mapping[str, str] = {}
        self.cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        self.voters = [self]
        self._archive = archive
        self._record: Path | None = None

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"127.0.0.1:{self.port}"

    @property
    def data(self) -> Path:
        """Where topics are kept."""
        return self.folder / "data"

    def start(self, *, wait: bool = True) -> float:
        """See `Server`. At the first start the storage is formatted before."""
        if self._archive and not self._classes.exists():
            _make_archive(self._classes)
        if not (self.data / "meta.properties").exists():
            self._format()
        return super().start(wait=wait)

    @property
    def _classes(self) -> Path:
        return self.jars / "classes.jsa"

    def _java_command(self) -> list[str]:
        logging = self.folder / "log4j2.properties"
        logging.write_text(_LOGGING, "utf-8")
        command = [str(self.java), *_JAVA, "-Xlog:disable", "-Xlog:all=error:stderr", "-Xshare:auto"]
        if self._record is not None:
            command.append(f"-XX:ArchiveClassesAtExit={self._record}")
        elif self._archive and self._classes.exists():
            command.append(f"-XX:SharedArchiveFile={self._classes}")
        return [*command, f"-Dlog4j2.configurationFile={logging}", "-cp", f"{self.jars}/*"]

    def _command(self) -> list[str]:
        return [*self._java_command(), "kafka.Kafka", str(self._write_config())]

    def _write_config(self) -> Path:
        path = self.folder / "server.properties"
        nodes = len(self.voters)
        # Until the session of a node that was killed is over, a controller refuses the one that comes in its place.
        # A controlled shutdown spares that, and waits for minutes where the others are gone too.
        text = f"""\
process.roles=broker,controller
node.id={self.node}
controller.quorum.voters={",".join(f"{voter.node}@127.0.0.1:{voter.controller_port}" for voter in self.voters)}
log.dirs={self.data}
listeners=CLIENT://127.0.0.1:{self.port},PROXY://127.0.0.1:{self.behind_port},\
INTERNAL://127.0.0.1:{self.admin_port},CONTROLLER://127.0.0.1:{self.controller_port}
advertised.listeners=CLIENT://127.0.0.1:{self.port},PROXY://{self.proxy_host or "127.0.0.1"}:{self.proxy_port},\
INTERNAL://127.0.0.1:{self.admin_port}
listener.security.protocol.map=CLIENT:PLAINTEXT,PROXY:PLAINTEXT,INTERNAL:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=INTERNAL
controller.listener.names=CONTROLLER
default.replication.factor={nodes}
offsets.topic.replication.factor={nodes}
offsets.topic.num.partitions=2
transaction.state.log.replication.factor={nodes}
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=2
group.initial.rebalance.delay.ms=0
controlled.shutdown.enable={str(nodes == 1).lower()}
broker.heartbeat.interval.ms=300
broker.session.timeout.ms={1500 if nodes == 1 else 3000}
num.network.threads=2
num.io.threads=4
log.segment.delete.delay.ms=500
log.cleaner.dedupe.buffer.size=8388608
{self.config}
"""
        path.write_text(text, "utf-8")
        return path

    def _format(self) -> None:
        command = [*self._java_command(), "kafka.tools.StorageTool", "format", "--ignore-formatted"]
        command += [f"--cluster-id={self.cluster}", "--config", str(self._write_config())]
        for user, password in self.scram.items():
            for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512"):
                command += ["--add-scram", f"{mechanism}=[name={user},password={password}]"]
        if code := self._complete(command):
            raise ServerError(self._message(f"could not format its storage, exit code {code}"))

    def _is_ready(self) -> bool:
        """Whether all listeners are open, and the broker counts itself among those of the cluster.

        Before, it answers and knows of none.
        """
        own = () if "listeners=" in self.config else (self.port, self.behind_port)
        try:
            for port in own:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return self.node in _brokers(self.admin_port)
        except (OSError, struct.error):
            return False


def kafka_cluster(folder: Path, nodes: int = 3, *, config: str = "") -> list[KafkaServer]:
    """Make a cluster, not started yet: start each with ``wait=False``, then let each ``wait_ready``.

    Topics are replicated to every node, unless whoever makes one says otherwise. While fewer than half of the nodes
    run, none of them becomes ready.
    """
    servers = [KafkaServer(folder / f"node{number}", config=config, node=number) for number in range(1, nodes + 1)]
    for server in servers:
        server.cluster = servers[0].cluster
        server.voters = servers
    return servers


def _make_archive(path: Path) -> None:
    """Start a server once to note the classes that it needs; where that fails, servers start more slowly."""
    with scratch_folder() as folder:
        server = KafkaServer(folder, archive=False)
        handle, name = tempfile.mkstemp(prefix="classes-", dir=path.parent)
        os.close(handle)
        part = Path(name)
        try:
            server._format()
            part.unlink()
            server._record = part
            server.start()
            server.close()
            if part.exists():
                part.replace(path)
        finally:
            server.close(kill=True)
            part.unlink(missing_ok=True)


def _brokers(port: int) -> set[int]:
    """The numbers of the brokers that a node knows, by a plain socket: a client library would wait and log."""
    client = b"tests"
    request = struct.pack(f">hhih{len(client)}si", 3, 1, 0, len(client), client, 0)  # Metadata, of no topic
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection, connection.makefile("rb") as stream:
        connection.sendall(struct.pack(">i", len(request)) + request)
        answer = stream.read(struct.unpack(">i", stream.read(4))[0])
    (count,) = struct.unpack_from(">i", answer, 4)
    offset, found = 8, set()
    for _ in range(count):
        number, length = struct.unpack_from(">ih", answer, offset)
        offset += 6 + length + 4
        (rack,) = struct.unpack_from(">h", answer, offset)
        offset += 2 + max(rack, 0)
        found.add(number)
    return found
