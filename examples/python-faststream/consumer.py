"""A consumer of Orthanc's events on NATS with FastStream, complete and without our package.

docs/any-language.md says what it has to do, rule by rule. Make `handle` your own.
"""

import asyncio
import json
import os
import re
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from cloudevents.core.base import BaseCloudEvent
from cloudevents.core.bindings.http import HTTPMessage, from_http_event
from cloudevents.core.formats.json import JSONFormat
from faststream import AckPolicy, FastStream
from faststream.nats import JStream, NatsBroker, PullSub
from faststream.nats.annotations import NatsMessage
from nats.js.api import AckPolicy as Acknowledged
from nats.js.api import ConsumerConfig, DeliverPolicy, DiscardPolicy, RetentionPolicy, StreamConfig
from nats.js.errors import NotFoundError

NAME = os.environ.get("CONSUMER", "python")
START = os.environ.get("START", "new")
MAX_ATTEMPTS = int(os.environ.get("MAX_ATTEMPTS", "20"))
ACK_WAIT = float(os.environ.get("ACK_WAIT", "30"))  # after so long without a word it is given to another
EVENTS, INBOX, DEAD = "ORTHANC_EVENTS", "ORTHANC_EVENTS_INBOX", "ORTHANC_EVENTS_DEAD"


class Retry(Exception):  # noqa: N818 -- not an error: what a handler asks for
    """Again in so many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__("later")
        self.seconds = seconds


class Reject(Exception):  # noqa: N818 -- the same
    """Never; no patient data in the reason."""


async def handle(event: BaseCloudEvent, attempt: int) -> None:
    """Your work. Returns: done. Anything but the two above: again, and behind MAX_ATTEMPTS never."""
    plain = json.loads(JSONFormat().write(event))
    print(json.dumps({"did": "begin", "attempt": attempt, "event": plain}), flush=True)
    try:  # what `orthanc-events conformance` tells it to do: leave it out
        told = json.loads(os.environ.get("CONFORMANCE", "{}")).get(event.get_subject())
        if told == "retry" and attempt == 1:
            raise Retry(1)
        if told == "later":
            raise Retry(3600)
        if told == "reject":
            raise Reject("told to")
        if told == "fail":
            raise RuntimeError(f"never said, it can have patient data: {event.get_data()!r}")
        await asyncio.sleep({"slow": 2, "hang": 1e9}.get(told or "", 0))
    finally:
        print(json.dumps({"did": "end", "id": event.get_id()}), flush=True)


def decode(headers: dict[str, str], body: bytes) -> BaseCloudEvent:
    """Of NATS' binding, which is HTTP's."""
    structured = headers.get("content-type", "").startswith(JSONFormat.CONTENT_TYPE)
    if not (json.loads(body).get("id") if structured else headers.get("ce-id")):
        raise ValueError("it has no id, and the SDK would make one up")
    return from_http_event(HTTPMessage(headers, body))


broker = NatsBroker(
    os.environ.get("BROKER_URL", "nats://127.0.0.1:4222"), max_reconnect_attempts=-1, graceful_timeout=25, logger=None
)
app = FastStream(broker, logger=None)
# Start more processes for more at a time: they share the events. The inbox does not wait for the events.
one_by_one = {True: asyncio.Lock(), False: asyncio.Lock()}
stopping = asyncio.Event()


async def raw(message: NatsMessage) -> bytes:
    return bytes(message.body)


async def copy(where: str, message: NatsMessage, given: dict[str, str], said: dict[str, str]) -> None:
    """Into the inbox, to be given again, or among the dead letters: the same bytes and headers, and what is to be said.

    It is there when this returns; a second copy of the same message is dropped.
    """
    meta = message.raw_message.metadata
    place = f"{meta.stream}.{meta.sequence.stream}.{meta.timestamp.timestamp():.6f}"
    event_id = given.get("orthanc-event-id") or given.get("nats-msg-id", "")
    headers = {name: value for name, value in given.items() if name not in ("nats-msg-id", "orthanc-due")} | said
    headers |= {
        "orthanc-consumer": NAME,
        "orthanc-address": given.get("orthanc-address", message.raw_message.subject),
        "Nats-Msg-Id": f"{event_id}:{where}:{NAME}:{place}",
    }
    if event_id:
        headers["orthanc-event-id"] = event_id
    subject = f"orthanc.inbox.{NAME}" if where == "retry" else f"orthanc.dead.{NAME}"
    client = await broker.connect()
    await client.jetstream().publish(subject, message.raw_message.data, headers=headers)


class Held:
    """As long as it is handled, nobody else is given it; unless we are frozen, and are late then."""

    def __init__(self, message: NatsMessage) -> None:
        self._message = message
        self._since = time.monotonic()

    @property
    def late(self) -> bool:
        return time.monotonic() - self._since > 0.8 * ACK_WAIT

    async def keep(self) -> None:
        while not self.late:
            await self._message.in_progress()
            self._since = time.monotonic()
            await asyncio.sleep(ACK_WAIT / 3)


async def settle(message: NatsMessage, given: dict[str, str], held: Held) -> None:
    """Have it handled, and say so to the broker; exactly one way."""
    said_before = given.get("orthanc-attempts", "") if given.get("orthanc-consumer") == NAME else ""
    before = int(said_before) if said_before.isdecimal() else 0
    # Workers that died with it in hand; a copy that had to wait was given once more.
    died = message.raw_message.metadata.num_delivered - (2 if "orthanc-due" in given else 1)
    attempt = before + max(0, died) + 1
    failure: Exception | None = None
    try:
        event = decode(given, message.raw_message.data)
    except Exception:  # whatever is in it
        failure = Reject("it is no CloudEvent")
    else:
        try:
            await handle(event, attempt)
        except Exception as error:
            failure = error
    if held.late:
        return  # another may have it by now
    if failure is not None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        said = {"orthanc-attempts": str(attempt), "orthanc-last-failure": now}
        said["orthanc-first-failure"] = given.get("orthanc-first-failure", now)
        if not isinstance(failure, Retry | Reject):
            said["orthanc-exception"] = type(failure).__name__
        if isinstance(failure, Reject) or attempt >= MAX_ATTEMPTS:
            over = f"failed {attempt} times of {MAX_ATTEMPTS}"
            reason = str(failure) if isinstance(failure, Reject) else over
            said["orthanc-reason"] = re.sub("[^ -~]", "?", reason)
            await copy("dead", message, given, said)
        else:
            wait = failure.seconds if isinstance(failure, Retry) else min(900, 2 ** (attempt - 1))
            due = datetime.fromtimestamp(time.time() + wait + 0.001, UTC)
            said |= {"orthanc-operation": "retry", "orthanc-due": due.isoformat(timespec="milliseconds")}
            await copy("retry", message, given, said)
    await message.ack()


def subscriber(stream: str, subject: str) -> Any:
    return broker.subscriber(
        subject,
        stream=JStream(stream, declare=False),
        durable=NAME,
        pull_sub=PullSub(batch_size=1, timeout=1.0),
        ack_policy=AckPolicy.MANUAL,
        no_reply=True,
        decoder=raw,
    )


@subscriber(INBOX, f"orthanc.inbox.{NAME}")
@subscriber(EVENTS, "orthanc.events.>")
async def consume(body: bytes, message: NatsMessage) -> None:
    given = {name.lower(): value for name, value in (message.raw_message.headers or {}).items()}
    left = 0.0
    with suppress(ValueError, KeyError):
        left = datetime.fromisoformat(given["orthanc-due"]).timestamp() - time.time()
    if left > 0:
        await message.nack(delay=left + 0.25)
        return
    held = Held(message)
    alive = asyncio.create_task(held.keep())
    try:
        async with one_by_one[message.raw_message.subject == f"orthanc.inbox.{NAME}"]:
            if stopping.is_set():
                await message.nack()  # not begun: it is for others
            else:
                await settle(message, given, held)
    except Exception as error:  # the broker is away, or a place is full: it comes again
        print(f"not settled: {type(error).__name__}", file=sys.stderr)
    finally:
        alive.cancel()


def give_up(why: str) -> NoReturn:
    print(why, file=sys.stderr, flush=True)
    os._exit(1)  # sys.exit would show FastStream's stack as well


@app.on_startup
async def prepare() -> None:
    """What it needs at NATS is made, where it is missing."""
    manager = (await broker.connect()).jetstream()._jsm
    try:
        found = (await manager.stream_info(EVENTS)).config
    except NotFoundError:
        give_up(f"NATS has no stream {EVENTS}: start the bridge first")
    with suppress(NotFoundError):
        await manager.consumer_info(EVENTS, f"{NAME}-00")
        give_up(f"the consumer {NAME} is an ordered one of another program: take another name")
    beside = StreamConfig(
        discard=DiscardPolicy.NEW,
        storage=found.storage,
        num_replicas=found.num_replicas,
        max_bytes=2**30,
        duplicate_window=found.duplicate_window,
    )
    for name, subjects, more in (
        (INBOX, "orthanc.inbox.*", {"retention": RetentionPolicy.WORK_QUEUE, "max_age": found.max_age}),
        (DEAD, "orthanc.dead.*", {"max_age": 0.0}),
    ):
        try:
            await manager.stream_info(name)
        except NotFoundError:
            await manager.add_stream(beside.evolve(name=name, subjects=[subjects], **more))
    for stream, subject in ((INBOX, f"orthanc.inbox.{NAME}"), (EVENTS, "orthanc.events.>")):
        try:
            await manager.consumer_info(stream, NAME)
        except NotFoundError:
            begin = DeliverPolicy.ALL if stream == INBOX or START == "oldest" else DeliverPolicy.NEW
            config = ConsumerConfig(
                durable_name=NAME,
                filter_subject=subject,
                ack_policy=Acknowledged.EXPLICIT,
                ack_wait=ACK_WAIT,
                max_deliver=-1,
                max_ack_pending=-1,
                deliver_policy=begin,
            )
            await manager.add_consumer(stream, config)


@app.on_shutdown
async def stop() -> None:
    """Before FastStream waits for what is begun."""
    stopping.set()


@app.after_startup
async def ready() -> None:
    print(json.dumps({"did": "ready"}), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--decode"]:  # golden vectors
        for one in json.loads(Path(sys.argv[2]).read_text("utf-8")):
            print(JSONFormat().write(decode(one["headers"], one["body"].encode())).decode())
    else:
        with suppress(KeyboardInterrupt):
            asyncio.run(app.run())
