"""RabbitMQ as a process of the tests: it starts, stops, dies and freezes for real, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import aiormq
import aiormq.abc
import pytest

from orthanc_events_bridge.events.samples import message
from orthanc_events_bridge.testing.brokers.rabbitmq import EXCHANGE, HISTORY, RabbitBroker, RabbitServer
from orthanc_events_bridge.testing.guard import marked_processes
from orthanc_events_bridge.testing.processes import ServerError, free_port, wait_until
from orthanc_events_bridge.testing.programs import require

pytestmark = pytest.mark.integration


@pytest.fixture
def rabbit(tmp_path: Path) -> Iterator[RabbitServer]:
    require("rabbitmq-server")
    with RabbitServer(tmp_path / "rabbit") as server:
        yield server


def greets(port: int) -> bool:
    with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
        connection.sendall(b"AMQP\x00\x00\x09\x01")
        try:
            return connection.recv(1) == b"\x01"
        except TimeoutError:
            return False


def listening(pid: int) -> set[int]:
    """The TCP ports on which a process listens, on whatever address."""
    sockets = {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and f"socket:[{columns[9]}]" in sockets:
                assert columns[1].startswith("0100007F"), "it listens to other machines"
                found.add(int(columns[1].partition(":")[2], 16))
    return found


def test_it_dies_and_comes_back_with_what_was_confirmed(rabbit: RabbitServer) -> None:
    broker = RabbitBroker(rabbit)

    async def fill(channel: aiormq.abc.AbstractChannel) -> None:
        # 3.10 never finds a leader again for a quorum queue that is killed seconds after it was made, as the last.
        for queue in ("durable", "last"):
            await channel.queue_declare(queue, durable=True, arguments={"x-queue-type": "quorum"})
        persistent = aiormq.spec.Basic.Properties(delivery_mode=2)
        for number in range(50):
            await channel.basic_publish(b"%d" % number, routing_key="durable", properties=persistent)

    async def take(channel: aiormq.abc.AbstractChannel) -> list[bytes]:
        return [(await channel.basic_get("durable", no_ack=True)).body for _ in range(50)]

    broker.administrate(fill)
    first = rabbit.pid
    rabbit.kill()
    assert not rabbit.running and not rabbit.children()
    with pytest.raises(ConnectionRefusedError):
        greets(rabbit.port)
    rabbit.start()
    assert rabbit.pid != first and greets(rabbit.port)
    assert broker.administrate(take) == [b"%d" % number for number in range(50)]
    assert rabbit.stop() < 60
    assert not marked_processes(rabbit._mark)


def test_it_freezes(rabbit: RabbitServer) -> None:
    rabbit.freeze()
    assert rabbit.running and not greets(rabbit.port)
    rabbit.thaw()
    assert wait_until(lambda: greets(rabbit.port), 30)
    rabbit.freeze()  # closing it now has to work too


def test_it_listens_on_its_own_ports_only(rabbit: RabbitServer) -> None:
    assert listening(rabbit.pid) == {rabbit.port, rabbit._distribution}
    assert not any("epmd" in Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0] for pid in rabbit.children())
    assert rabbit.ctl("eval", "node().").strip() == f"'{rabbit.node}'"
    assert not any("epmd" in Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0] for pid in rabbit.children())


def test_an_administrator_raises_alarms(rabbit: RabbitServer) -> None:
    rabbit.ctl("set_vm_memory_high_watermark", "0.0000001")
    assert wait_until(lambda: "memory" in rabbit.ctl("eval", "rabbit_alarm:get_alarms()."), 30)
    rabbit.ctl("set_vm_memory_high_watermark", "absolute", "2GB")
    assert wait_until(lambda: rabbit.ctl("eval", "rabbit_alarm:get_alarms().").strip() == "[]", 30)
    with pytest.raises(ServerError, match="rabbitmqctl nonsense failed"):
        rabbit.ctl("nonsense")


def test_the_configuration_is_appended_and_plugins_are_enabled(tmp_path: Path) -> None:
    require("rabbitmq-server")
    other = free_port()
    config = f"listeners.tcp.2 = 127.0.0.1:{other}"
    with RabbitServer(tmp_path / "rabbit", config=config, plugins=["rabbitmq_auth_mechanism_ssl"]) as server:
        assert greets(server.port) and greets(other)
        assert "rabbitmq_auth_mechanism_ssl" in server.ctl("eval", "rabbit_plugins:active().")


def test_a_configuration_that_is_wrong_is_shown(tmp_path: Path) -> None:
    require("rabbitmq-server")
    server = RabbitServer(tmp_path / "rabbit", config="nonsense = 1")
    with pytest.raises(ServerError, match=r"rabbitmq-server ended while it was starting(.|\n)*nonsense"):
        server.start()
    assert not server.running


def test_one_that_ended_by_itself_is_noticed(rabbit: RabbitServer) -> None:
    os.kill(rabbit.pid, signal.SIGKILL)
    assert wait_until(lambda: not rabbit.running, 10)
    with pytest.raises(ServerError, match="had ended by itself, exit code -9"):
        rabbit.stop()


def test_the_history_is_read_back_and_counted(rabbit: RabbitServer) -> None:
    broker = RabbitBroker(rabbit)
    sent = [message("study.created", number=number + 1) for number in range(300)]

    async def publish(channel: aiormq.abc.AbstractChannel) -> None:
        await channel.exchange_declare(EXCHANGE, exchange_type="topic", durable=True)
        await channel.queue_declare(HISTORY, durable=True, arguments={"x-queue-type": "stream"})
        await channel.queue_bind(HISTORY, EXCHANGE, "#")
        for one in sent:
            await channel.basic_publish(one.body, exchange=EXCHANGE, routing_key="main.study.created.07")

    assert broker.stored() == 0  # there is no such place
    broker.administrate(publish)
    found = broker.read()
    assert [event.id for event in found] == [one.id for one in sent]
    assert [event.position for event in found] == list(range(1, 301))
    assert {event.address for event in found} == {"main.study.created.07"}
    assert broker.stored() == 300
    broker.remove_place()
    assert broker.stored() == 0
    rabbit.kill()
    assert broker.stored() == 0
    rabbit.start()
