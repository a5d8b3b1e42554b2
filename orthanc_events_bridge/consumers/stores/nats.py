"""A bucket of NATS' key-value store (2.11 or newer). Leases end by the server's clock: an entry goes by itself."""

from __future__ import annotations

import asyncio
import json
import math
import time
from typing import Any, Final

import nats.js.errors
from nats.js import JetStreamContext
from nats.js.api import DiscardPolicy, Header, StorageType, StreamConfig

from orthanc_events_bridge.consumers.stores.base import Begun, Store, StoreError
from orthanc_events_bridge.errors import TransportError
from orthanc_events_bridge.transports.nats_connection import Connection
from orthanc_events_bridge.transports.nats_options import NatsOptions
from orthanc_events_bridge.transports.servers import InTurn

BUCKET: Final = "ORTHANC_EVENTS_ONCE"
_STREAM: Final = f"KV_{BUCKET}"
_SUBJECT: Final = f"$KV.{BUCKET}."
#: From this version on an entry can have a time at which it ends.
_OLDEST: Final = (2, 11)
#: Another has written the entry since we looked.
_OTHER: Final = 10071
#: Seconds for which an entry stays that its owner has given up. It is the shortest there is.
_FREE: Final = 1.0


class NatsStore(Store):
    """See the module's text. What an entry holds is JSON: ``state``, ``owner``, ``lease``.

    :param options: how to reach NATS. ``limits.replicas`` and ``limits.storage`` are those of the bucket; ``declare``:
        whether it is made.
    """

    def __init__(self, options: NatsOptions) -> None:
        self._options = options
        self._connection: Connection | None = None
        self._servers = InTurn(options.servers, lambda url: Connection.open(options, url))
        self._connecting = asyncio.Lock()
        self._revisions: dict[tuple[str, str], int] = {}

    async def open(self) -> None:
        try:
            await self._open(await self._connected())
        except TransportError as error:
            raise _problem(error) from error

    async def _open(self, connection: Connection) -> None:
        version = connection.connected_server_version
        if (version.major, version.minor) < _OLDEST:
            raise StoreError(
                f"NATS {version.major}.{version.minor} lets no entry end by itself, as the bucket {BUCKET} needs it",
                "use NATS 2.11 or newer, or another store: PostgreSQL, or a file",
            )
        limits = self._options.limits
        wanted = StreamConfig(
            name=_STREAM,
            description="What consumers of Orthanc's changes do once",
            subjects=[f"{_SUBJECT}>"],
            max_msgs_per_subject=1,
            discard=DiscardPolicy.NEW,
            allow_msg_ttl=True,
            allow_rollup_hdrs=True,
            deny_delete=True,
            allow_direct=True,
            storage=StorageType(limits.storage),
            num_replicas=limits.replicas,
        )
        manager = connection.jsm(timeout=self._options.connect_timeout * 2)
        try:
            try:
                info = await connection.ask(manager.stream_info(_STREAM))
            except nats.js.errors.NotFoundError:
                if not self._options.declare:
                    raise StoreError(f"NATS has no bucket {BUCKET}, and declare is false", "make it") from None
                info = await connection.ask(manager.add_stream(wanted))
        except nats.js.errors.Error as error:
            raise StoreError(
                f"NATS can't make or read the bucket {BUCKET}: {error}", "check JetStream and the user's permissions"
            ) from error
        if not info.config.allow_msg_ttl:
            raise StoreError(
                f"the bucket {BUCKET} lets no entry end by itself",
                f"set allow_msg_ttl of the stream {_STREAM}, or delete it: then what is done is forgotten",
            )

    async def begin(self, key: str, owner: str, lease: float) -> Begun:
        entry = {"state": "begun", "owner": owner, "lease": lease}
        last = 0
        while True:
            if await self._put(key, owner, entry, lease, last):
                return Begun("mine")
            found = await self._get(key)
            last = 0
            if found is None:
                continue  # it has ended meanwhile
            last, state, since = found
            if state["state"] == "done":
                return Begun("done")
            if state["owner"] == owner:  # we have, and the answer got lost
                self._revisions[key, owner] = last
                return Begun("mine")
            if state["state"] != "free":
                # Only how long to wait depends on our clock being right.
                left = since + state["lease"] - time.time()
                return Begun("theirs", min(max(left, 1.0), state["lease"]))

    async def renew(self, key: str, owner: str, lease: float) -> bool:
        return await self._replace(key, owner, {"state": "begun", "owner": owner, "lease": lease}, lease)

    async def finish(self, key: str, owner: str, keep: float) -> bool:
        done = await self._replace(key, owner, {"state": "done", "owner": owner}, keep)
        self._revisions.pop((key, owner), None)
        return done

    async def forget(self, key: str, owner: str) -> None:
        await self._replace(key, owner, {"state": "free", "owner": ""}, _FREE)
        self._revisions.pop((key, owner), None)

    async def recall(self, key: str) -> str | None:
        found = await self._get(key)
        return None if found is None else str(found[1]["owner"])

    async def swap(self, key: str, old: str | None, new: str, keep: float) -> bool:
        found = await self._get(key)
        if (None if found is None else found[1]["owner"]) != old:
            return False
        noted = await self._put(key, new, {"state": "done", "owner": new}, keep, 0 if found is None else found[0])
        self._revisions.pop((key, new), None)
        return noted

    async def close(self) -> None:
        async with self._connecting:
            connection, self._connection = self._connection, None
        self._revisions.clear()
        if connection is not None:
            await connection.give_up()

    async def _replace(self, key: str, owner: str, entry: dict[str, Any], seconds: float) -> bool:
        """Write over our own entry."""
        last = self._revisions.get((key, owner))
        if last is None:
            return False
        if await self._put(key, owner, entry, seconds, last):
            return True
        found = await self._get(key)  # it is ours all the same where an answer got lost
        if found is None or found[1]["owner"] != owner:
            return False
        if found[1]["state"] == entry["state"]:
            self._revisions[key, owner] = found[0]
            return True
        return await self._put(key, owner, entry, seconds, found[0])

    async def _put(self, key: str, owner: str, entry: dict[str, Any], seconds: float, last: int) -> bool:
        """Write an entry, if nobody has written it since.

        :param last: the entry's revision; 0: there is none.
        """
        headers = {Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value: str(last)}
        try:
            connection = await self._connected()
            writing = self._stream(connection).publish(
                _SUBJECT + key, json.dumps(entry).encode(), headers=headers, msg_ttl=math.ceil(seconds)
            )
            done = await connection.ask(writing)
        except nats.js.errors.APIError as error:
            if error.err_code == _OTHER:
                return False
            raise _problem(error) from error
        except (TransportError, nats.js.errors.Error) as error:
            raise _problem(error) from error
        self._revisions[key, owner] = done.seq
        return True

    async def _get(self, key: str) -> tuple[int, dict[str, Any], float] | None:
        """Revision, content, and when it was written by the server's clock; none where there is none."""
        try:
            connection = await self._connected()
            manager = connection.jsm(timeout=self._options.connect_timeout * 2)
            # Not the direct kind: any replica answers that, and may be behind.
            found = await connection.ask(manager.get_msg(_STREAM, subject=_SUBJECT + key))
        except nats.js.errors.NotFoundError:
            return None
        except (TransportError, nats.js.errors.Error) as error:
            raise _problem(error) from error
        try:
            entry = json.loads(found.data or b"")
            written = found.time.timestamp() if found.time is not None else time.time()
            return found.seq or 0, {"owner": "", "lease": 0.0, **entry}, written
        except (ValueError, TypeError) as error:
            raise StoreError(f"the bucket {BUCKET} holds an entry that is none of ours", "delete it: " + key) from error

    def _stream(self, connection: Connection) -> JetStreamContext:
        return connection.jetstream(timeout=self._options.connect_timeout * 2)  # the deadline is `ask`'s

    async def _connected(self) -> Connection:
        """A connection, made anew where it was lost.

        :raises TransportError: no server lets us in.
        """
        async with self._connecting:  # who comes meanwhile gets the same
            if self._connection is not None:
                try:
                    self._connection.check()
                except TransportError:
                    await self._connection.give_up()
                    self._connection = None
                else:
                    return self._connection
            self._connection = await self._servers.open()
            return self._connection


def _problem(error: Exception) -> StoreError:
    if isinstance(error, TransportError):
        return StoreError(f"the store in NATS can't be asked: {error.message}", error.remedy)
    return StoreError(f"the store in NATS refuses: {error}", "check JetStream, its limits, and the user's permissions")
