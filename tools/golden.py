"""Write the golden vectors, tests/golden/: every event type as each transport sends it, in both modes.

One file for each transport and mode, made by the transports' own encoders; and events.json, what is in them, as a
reader in any language has to find it. ``--check`` writes nothing, and exits with 1 where a file is not what would be
written. The format is explained in docs/any-language.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pamqp.frame
from aiokafka.record.memory_records import MemoryRecords
from pamqp.body import ContentBody
from pamqp.header import ContentHeader

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from orthanc_events_bridge.consumers.samples import published  # noqa: E402
from orthanc_events_bridge.events.catalog import LEVELS, TYPES  # noqa: E402
from orthanc_events_bridge.events.derived import DERIVED  # noqa: E402
from orthanc_events_bridge.events.samples import message, orthanc_id  # noqa: E402
from orthanc_events_bridge.transports.base import Outgoing  # noqa: E402
from orthanc_events_bridge.transports.kafka_options import KafkaOptions  # noqa: E402
from orthanc_events_bridge.transports.kafka_producer import Producer  # noqa: E402
from orthanc_events_bridge.transports.nats import NatsTransport  # noqa: E402
from orthanc_events_bridge.transports.nats_options import NatsOptions  # noqa: E402
from orthanc_events_bridge.transports.rabbitmq_options import RabbitOptions  # noqa: E402
from orthanc_events_bridge.transports.rabbitmq_publisher import Publisher  # noqa: E402
from orthanc_events_bridge.transports.webhook import WebhookTransport  # noqa: E402
from orthanc_events_bridge.transports.webhook_options import WebhookOptions  # noqa: E402

FOLDER: Final = ROOT / "tests" / "golden"
MODES: Final = ("structured", "binary")
#: Characters that a header can't hold as they are; a reader has to take them back.
ODD_SOURCE: Final = "https://pacs.example.org/orthanc/east%20wing"
_JOB: Final = {"type": "DicomModalityStore", "state": "Success", "progress": 100, "runtime": 0.487, "errorCode": 0}
_METADATA: Final = {"Remark": 'Größe "1,5 %" … 日本'}


def messages(*, binary: bool) -> Iterator[Outgoing]:
    """Each type that the bridge sends once, one whose source has to be escaped in headers, and each that consumers
    publish."""
    for number, one in enumerate(TYPES, 1):
        yield message(
            one.name,
            number=number,
            binary=binary,
            job=_JOB if one.level == "job" and one.verb != "submitted" else None,
            metadata=_METADATA if one.level in LEVELS and one.verb == "stable" else None,
            parents=one.name != "instance.deleted",
            inferred=one.verb == "deleted",
        )
    yield message("study.stable", {"study": orthanc_id("odd")}, number=99, source=ODD_SOURCE, binary=binary)
    for one in DERIVED:
        yield published(one.name, binary=binary)


def nats(event: Outgoing) -> dict[str, Any]:
    """What the protocol's HPUB says."""
    options = NatsOptions(servers=("nats://127.0.0.1",))
    line, _, rest = NatsTransport(options)._message(event, "reply").partition(b"\r\n")
    _, subject, _, head, total = line.decode().split()
    lines = rest[: int(head)].decode().split("\r\n")
    headers = dict(one.split(": ", 1) for one in lines[1:] if one)
    return {"subject": subject, "headers": headers, "body": rest[int(head) : int(total)].decode()}


def rabbitmq(event: Outgoing) -> dict[str, Any]:
    """What the frames of a publish say, but for the message id, which is another for each send."""
    room: Any = SimpleNamespace(frame_max=1 << 20)
    publisher = Publisher(room, RabbitOptions(servers=("amqp://127.0.0.1",)), frozenset())
    publisher._channel = SimpleNamespace(number=1)  # type: ignore[assignment]
    data, body = publisher._encode(event, 1), b""
    found: dict[str, Any] = {}
    while data:
        size, _, unmarshalled = pamqp.frame.unmarshal(data)
        frame: Any = unmarshalled
        data = data[size:]
        if isinstance(frame, ContentHeader):
            properties = frame.properties
            found["properties"] = {
                "content_type": properties.content_type,
                "delivery_mode": properties.delivery_mode,
            }
            found["headers"] = properties.headers
        elif isinstance(frame, ContentBody):
            body += frame.value
        else:
            found |= {"exchange": frame.exchange, "routing_key": frame.routing_key}
    return {**found, "body": body.decode()}


def kafka(event: Outgoing) -> dict[str, Any]:
    """What a record batch says."""
    options = KafkaOptions(servers=("127.0.0.1:9092",))
    batch = MemoryRecords(Producer(options.topic, 0).encode([event])).next_batch()
    assert batch is not None
    (record,) = batch
    return {
        "topic": options.topic,
        "partition": int(event.partition) % options.partitions,
        "key": record.key.decode(),
        "headers": {name: value.decode() for name, value in record.headers},
        "body": record.value.decode(),
    }


def webhook(event: Outgoing) -> dict[str, Any]:
    """A request's headers, but for those of HTTP itself; unsigned."""
    options = WebhookOptions(url="http://127.0.0.1/")
    headers = WebhookTransport(options)._headers(event)
    return {"headers": {name.decode(): value.decode() for name, value in headers}, "body": event.body.decode()}


TRANSPORTS: Final = {"nats": nats, "rabbitmq": rabbitmq, "kafka": kafka, "webhook": webhook}


def events() -> list[dict[str, Any]]:
    """The events in CloudEvents' JSON format, in the order of every file."""
    return [json.loads(one.body) for one in messages(binary=False)]


def files() -> dict[Path, str]:
    """Each file, and what is to be in it: a JSON document of a line for each vector."""
    found = {FOLDER / "events.json": _spelt(events())}
    for mode in MODES:
        for name, encoded in TRANSPORTS.items():
            rows = [encoded(one) for one in messages(binary=mode == "binary")]
            found[FOLDER / f"{name}-{mode}.json"] = _spelt(rows)
    return found


def _spelt(rows: list[dict[str, Any]]) -> str:
    return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"


def main() -> int:
    """Write them, or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where a file is not as it would be")
    check = parser.parse_args().check
    wrong = 0
    for path, text in files().items():
        if path.exists() and path.read_text("utf-8") == text:
            continue
        if check:
            wrong += 1
            print(f"{path.relative_to(ROOT)} is not what the encoders give: run `make golden`", file=sys.stderr)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, "utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
