"""What every store must do in which is noted what is done once: SQLite, NATS, PostgreSQL.

Leases here are of the shortest kind, a second, where one has to end; nothing is asserted of how long that takes.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from orthanc_events_bridge.consumers import Consumer, Event, Retry, once
from orthanc_events_bridge.consumers.settings import ConsumerSettings
from orthanc_events_bridge.consumers.stores import Store, StoreError, make
from orthanc_events_bridge.consumers.stores.nats import BUCKET, NatsStore
from orthanc_events_bridge.consumers.stores.postgresql import PostgresDatabase
from orthanc_events_bridge.consumers.stores.sql import SqlStore
from orthanc_events_bridge.consumers.stores.sqlite import SqliteStore
from orthanc_events_bridge.testing import event
from orthanc_events_bridge.testing.postgresql import PostgresServer
from orthanc_events_bridge.testing.processes import Server
from orthanc_events_bridge.testing.programs import require
from orthanc_events_bridge.testing.servers import NatsServer
from orthanc_events_bridge.transports.nats_connection import Connection
from orthanc_events_bridge.transports.nats_options import NatsOptions
from tests.contract.nats_tools import listener
from tests.contract.raw_nats import ask

#: Long enough not to end in a test; and the shortest.
LONG, SHORT = 600.0, 1.0


def store_of(given: str | Mapping[str, Any]) -> Store:
    """As a consumer makes it of its option."""
    store = ConsumerSettings.model_validate({"name": "one", "store": given}).chosen_store()
    assert store is not None
    return make(store)


class Kind:
    """A kind of store.

    :ivar url: as users give it.
    :ivar server: what it runs on, if anything.
    """

    def __init__(
        self,
        url: str,
        options: Mapping[str, Any] | None = None,
        server: Server | None = None,
        store: Store | None = None,
    ) -> None:
        self.url = url
        self._given = options or url
        self._store = store
        self.server = server

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Store]:
        """As a worker of its own opens it."""
        store = self._store or store_of(self._given)
        try:
            await store.open()
            yield store
        finally:
            await store.close()


@pytest.fixture(
    scope="module",
    params=["sqlite", *(pytest.param(name, marks=pytest.mark.integration) for name in ("nats", "postgresql"))],
)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kind]:
    folder: Path = tmp_path_factory.mktemp("store")
    if request.param == "sqlite":
        yield Kind(f"sqlite:///{folder}/once.db")
        return
    server, url = _server(request.param, folder)
    server.start()
    try:
        yield Kind(url, server=server)
    finally:
        server.close(kill=True)


def _server(name: str, folder: Path) -> tuple[Server, str]:
    if name == "nats":
        require("nats-server")
        nats = NatsServer(folder / "nats")
        return nats, nats.url
    require("postgres")
    postgres = PostgresServer(folder / "postgres")
    return postgres, f"postgresql://postgres@127.0.0.1:{postgres.port}/postgres"


def asked(test: Callable[[Kind, str], Coroutine[Any, Any, None]]) -> Callable[[Kind, str], None]:
    """A test that is a coroutine function, with a key of its own."""

    @functools.wraps(test)
    def run(kind: Kind, key: str) -> None:
        asyncio.run(test(kind, key))

    return run


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    name = request.node.originalname
    return f"consumer.{name}.{event('study.stable', study=name).id}"


async def until(condition: Callable[[], Awaitable[Any]]) -> None:
    async with asyncio.timeout(60):
        while not await condition():  # noqa: ASYNC110 -- of a server
            await asyncio.sleep(0.05)


@asked
async def test_an_effect_is_begun_by_one_and_done_for_all(kind: Kind, key: str) -> None:
    async with kind.opened() as one, kind.opened() as other:
        assert (await one.begin(key, "a", LONG)).state == "mine"
        theirs = await other.begin(key, "b", LONG)
        assert theirs.state == "theirs" and 0 < theirs.left <= LONG
        assert await one.renew(key, "a", LONG)
        assert (await other.begin(key, "b", LONG)).state == "theirs"
        assert await one.finish(key, "a", LONG)
        assert (await other.begin(key, "b", LONG)).state == "done"
        assert (await one.begin(key, "c", LONG)).state == "done"
    async with kind.opened() as later:
        assert (await later.begin(key, "d", LONG)).state == "done"
        assert (await later.begin(key + "0", "d", LONG)).state == "mine"


@asked
async def test_of_many_at_once_one_begins(kind: Kind, key: str) -> None:
    async with kind.opened() as one, kind.opened() as other, kind.opened() as third:
        for number in range(10):
            all_at_once = [
                store.begin(f"{key}{number}", f"{place}-{again}", LONG)
                for again in range(3)
                for place, store in enumerate((one, other, third))
            ]
            states = [found.state for found in await asyncio.gather(*all_at_once)]
            assert sorted(states) == ["mine"] + ["theirs"] * 8


@asked
async def test_what_failed_may_be_begun_at_once(kind: Kind, key: str) -> None:
    async with kind.opened() as one, kind.opened() as other:
        assert (await one.begin(key, "a", LONG)).state == "mine"
        await other.forget(key, "b")  # not its own: nothing happens
        assert (await other.begin(key, "b", LONG)).state == "theirs"
        await one.forget(key, "a")
        assert (await other.begin(key, "b", LONG)).state == "mine"
        await one.forget(key, "a")
        assert not await one.finish(key, "a", LONG)
        assert await other.finish(key, "b", LONG)


@asked
async def test_a_lease_that_is_not_renewed_ends(kind: Kind, key: str) -> None:
    async with kind.opened() as one, kind.opened() as other:
        assert (await one.begin(key, "a", SHORT)).state == "mine"

        async def taken() -> bool:
            return (await other.begin(key, "b", LONG)).state == "mine"

        await until(taken)
        assert not await one.renew(key, "a", LONG)
        assert not await one.finish(key, "a", LONG)
        await one.forget(key, "a")
        assert (await one.begin(key, "c", LONG)).state == "theirs"
        assert await other.finish(key, "b", LONG)


@asked
async def test_what_is_done_is_forgotten_in_the_end(kind: Kind, key: str) -> None:
    async with kind.opened() as one:
        assert (await one.begin(key, "a", LONG)).state == "mine"
        assert await one.finish(key, "a", SHORT)

        async def forgotten() -> bool:
            return (await one.begin(key, "b", LONG)).state == "mine"

        await until(forgotten)


@asked
async def test_of_two_who_note_a_text_in_place_of_the_same_one_does(kind: Kind, key: str) -> None:
    async with kind.opened() as one, kind.opened() as two:
        old: str | None = None
        for number in range(10):
            assert await one.recall(key) == await two.recall(key) == old
            texts = [f"{number} of {name}" for name in "ab"]
            stores_and_texts = zip((one, two), texts, strict=True)
            noted = await asyncio.gather(*(store.swap(key, old, text, LONG) for store, text in stores_and_texts))
            assert sorted(noted) == [False, True]
            assert not await two.swap(key, old, "late", LONG)
            old = texts[noted.index(True)]
        assert not await one.swap(key, None, "first", LONG)


@asked
async def test_a_note_is_forgotten_in_the_end(kind: Kind, key: str) -> None:
    async with kind.opened() as one:
        assert await one.swap(key, None, "one", LONG)
        assert await one.swap(key, "one", "two", SHORT)

        async def forgotten() -> bool:
            return await one.recall(key) is None

        await until(forgotten)
        assert await one.swap(key, None, "three", LONG)


@asked
async def test_a_server_that_is_restarted_remembers(kind: Kind, key: str) -> None:
    if kind.server is None:
        return
    async with kind.opened() as one:
        assert (await one.begin(key, "a", LONG)).state == "mine"
        assert await one.finish(key, "a", LONG)
        assert (await one.begin(key + "1", "a", LONG)).state == "mine"
        kind.server.kill()
        with pytest.raises(StoreError) as caught:
            await one.begin(key, "b", LONG)
        assert caught.value.remedy
        with pytest.raises(StoreError):
            await one.renew(key + "1", "a", LONG)
        kind.server.start()

        async def there() -> bool:
            try:
                return (await one.begin(key, "b", LONG)).state == "done"
            except StoreError:
                return False

        await until(there)
        assert await one.renew(key + "1", "a", LONG)
        assert await one.finish(key + "1", "a", LONG)


# -- by handlers -----------------------------------------------------------------------------------------------------


def app(kind: Kind) -> Consumer:
    return Consumer("one", broker="nats://127.0.0.1:1", store=kind.url)


@asked
async def test_two_workers_that_race_do_it_once(kind: Kind, key: str) -> None:
    one, other, done = app(kind), app(kind), []
    gate = asyncio.Event()

    async def work(consumer: Consumer, given: Event) -> str:
        try:
            async with consumer.once(given, "effect") as first:
                if first:
                    await gate.wait()
                    done.append(given.id)
                return "did" if first else "done already"
        except Retry as retry:
            gate.set()
            return "waits" if 0 < (retry.after or 0) <= 300 else f"waits for {retry.after}"

    given = event("study.stable", study=key)
    assert sorted(await asyncio.gather(work(one, given), work(other, given))) == ["did", "waits"]
    assert await work(other, given) == "done already"
    assert done == [given.id]
    await asyncio.gather(one._turns.close(), other._turns.close())


#: A worker that dies in the middle of its effect.
_DIES = """
import asyncio, sys
from orthanc_events_bridge.consumers import Consumer
from orthanc_events_bridge.testing import event

async def main(url, study):
    app = Consumer("one", broker="nats://127.0.0.1:1", store=url)
    async with app.once(event("study.stable", study=study), "effect", lease=1):
        print("begun", flush=True)
        await asyncio.sleep(600)

asyncio.run(main(*sys.argv[1:]))
"""


@asked
async def test_what_a_killed_worker_had_begun_is_done_by_another(kind: Kind, key: str) -> None:
    dying = subprocess.Popen([sys.executable, "-c", _DIES, kind.url, key], stdout=subprocess.PIPE, text=True)
    consumer, given, waits, done = app(kind), event("study.stable", study=key), 0, []
    try:
        assert dying.stdout is not None and dying.stdout.readline() == "begun\n"

        async def tried() -> bool:
            nonlocal waits
            try:
                async with consumer.once(given, "effect") as first:
                    done.append(first)
                    return True
            except Retry:
                waits += 1
                return False

        begun = time.monotonic()
        while time.monotonic() - begun < 2:  # longer than the lease, which it renews
            assert not await tried()
            await asyncio.sleep(0.1)
        os.kill(dying.pid, signal.SIGKILL)
        await until(tried)
        assert done == [True] and waits > 1
    finally:
        dying.kill()
        dying.wait()
        assert dying.stdout is not None
        dying.stdout.close()
        await consumer._turns.close()


@asked
async def test_a_lease_that_was_lost_is_said(kind: Kind, key: str) -> None:
    one, given, said = app(kind), event("study.stable", study=key), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(once.__name__).addHandler(handler)

    async def never(seconds: float) -> None:
        await asyncio.Event().wait()

    one._turns.sleep = never  # it stands still: no lease is renewed
    async with kind.opened() as other:
        async with one.once(given, "effect", lease=SHORT) as first:
            assert first

            async def taken() -> bool:
                return (await other.begin(one._turns.key(given, "effect"), "b", LONG)).state == "mine"

            await until(taken)
        assert await other.finish(one._turns.key(given, "effect"), "b", LONG)
    logging.getLogger(once.__name__).removeHandler(handler)
    assert ["may be done twice" in line for line in said] == [True]
    await one._turns.close()


# -- of a single kind ------------------------------------------------------------------------------------------------


def test_a_file_that_can_not_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere") as caught:
        asyncio.run(SqliteStore(str(tmp_path / "nowhere" / "once.db")).open())
    assert caught.value.remedy


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[NatsServer]:
    require("nats-server")
    server = NatsServer(tmp_path / "nats")
    try:
        yield server
    finally:
        server.close(kill=True)


@pytest.mark.integration
def test_the_permissions_that_are_told_are_enough(nats: NatsServer) -> None:
    page = (Path(__file__).parents[2] / "docs" / "once.md").read_text("utf-8")
    paragraph = page.partition("The user at NATS needs")[2].partition("\n\n")[0]
    told = re.findall(r"`(\$[^`]+)`", paragraph)
    assert len(told) == 3
    allowed = json.dumps({"publish": told, "subscribe": ["_INBOX.>"]})
    nats.config = f'authorization {{ users: [{{user: "one", password: "pw", permissions: {allowed}}}] }}'
    nats.start()
    options = {"type": "nats", "servers": [nats.url], "user": "one", "password": "pw"}

    async def main() -> None:
        async with Kind("", options).opened() as store:
            assert (await store.begin("a.b.c", "a", LONG)).state == "mine"
            assert (await store.begin("a.b.c", "b", LONG)).state == "theirs"
            assert await store.renew("a.b.c", "a", LONG)
            assert await store.finish("a.b.c", "a", LONG)

    asyncio.run(main())


@pytest.mark.integration
def test_a_bucket_whose_entries_never_end_is_refused(nats: NatsServer) -> None:
    nats.start()
    ask(nats.port, f"STREAM.CREATE.KV_{BUCKET}", name=f"KV_{BUCKET}", subjects=[f"$KV.{BUCKET}.>"])

    async def main() -> None:
        async with Kind(nats.url).opened():
            pass

    with pytest.raises(StoreError, match="allow_msg_ttl"):
        asyncio.run(main())


def test_an_older_server_is_told_and_gets_no_bucket() -> None:
    async def main() -> None:
        async with Kind(server.url).opened():
            pass

    with listener(version="2.10.26", auth_required=False) as server:
        with pytest.raises(StoreError, match=r"NATS 2\.10 .*2\.11 or newer"):
            asyncio.run(main())
        assert not server.holds("STREAM.CREATE")


@pytest.mark.integration
def test_of_many_that_find_the_connection_lost_one_makes_it_again(
    nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = 0
    own = Connection.open

    async def counted(options: NatsOptions, url: str) -> Connection:
        nonlocal opened
        opened += 1
        return await own(options, url)

    async def main() -> None:
        async with Kind(nats.url).opened() as store:
            assert isinstance(store, NatsStore)
            assert store._connection is not None
            lost = store._connection._faulty
            nats.stop()
            nats.start()
            await asyncio.wait([lost], timeout=60)
            monkeypatch.setattr(Connection, "open", counted)
            begun = await asyncio.gather(*(store.begin(f"one.many.{number}", "me", LONG) for number in range(50)))
            assert {one.state for one in begun} == {"mine"}

    nats.start()
    asyncio.run(main())
    assert opened == 1


@pytest.mark.integration
def test_a_file_with_a_url_is_read_at_every_connection(tmp_path: Path) -> None:
    async def main() -> None:
        file.write_text(f"{url}\n", "utf-8")
        async with Kind("", store=make(file)).opened() as one:
            assert (await one.begin("one.effect.1", "me", LONG)).state == "mine"
            file.write_text("postgresql://postgres@127.0.0.1:1/elsewhere", "utf-8")
            assert await one.renew("one.effect.1", "me", LONG)  # the connection is there
            assert isinstance(one, SqlStore) and isinstance(one._database, PostgresDatabase)
            assert one._database._connection is not None
            await one._database._connection.close()
            with pytest.raises(StoreError, match="elsewhere"):
                await one.renew("one.effect.1", "me", LONG)
            file.write_text(url, "utf-8")
            assert await one.renew("one.effect.1", "me", LONG)

    file = tmp_path / "url"
    server, url = _server("postgresql", tmp_path)
    server.start()
    try:
        asyncio.run(main())
    finally:
        server.close(kill=True)


@pytest.mark.integration
def test_no_password_is_in_an_error() -> None:
    for url in ("postgresql://user:hunter2@127.0.0.1:1/db", "postgresql://user:hunter2@127.0.0.1:1/db?wrong=hunter2"):
        with pytest.raises(StoreError) as caught:
            asyncio.run(store_of(url).open())
        assert "hunter2" not in str(caught.value) and caught.value.remedy
