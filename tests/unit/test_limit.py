"""So many requests at once to one Orthanc, whoever asks; and nobody waits for himself."""

from __future__ import annotations

import asyncio
import functools
import gc
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator

import httpx
import pytest

from orthanc_events_bridge.consumers import limit as module
from orthanc_events_bridge.consumers.limit import MOMENT, Among, Limit, limit_of
from orthanc_events_bridge.consumers.limited import AsyncLimited, Limited
from orthanc_events_bridge.consumers.metrics import metrics_text


def alone(test: Callable[[], Coroutine[None, None, None]]) -> Callable[[], None]:
    """Run a test in an event loop of its own."""

    @functools.wraps(test)
    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), 60))

    return run


class Clock:
    """Seconds that only tests let pass."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


async def turn() -> None:
    """Let all tasks go on as far as they can."""
    for _ in range(20):
        await asyncio.sleep(0)


@alone
async def test_so_many_have_a_place_and_the_others_get_it_in_the_order_of_their_coming() -> None:
    limit, order = Limit(2), []

    async def ask(number: int) -> None:
        place = await limit.enter_async()
        order.append(number)
        await there.wait()
        place.leave()

    there = asyncio.Event()
    tasks = [asyncio.create_task(ask(number)) for number in range(6)]
    await turn()
    assert order == [0, 1] and (limit.taken, limit.waiting) == (2, 4)
    there.set()
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2, 3, 4, 5] and (limit.taken, limit.waiting) == (0, 0)


@alone
async def test_threads_and_coroutines_share_the_places() -> None:
    limit = Limit(1)
    place = await limit.enter_async()
    begun, ended = threading.Event(), threading.Event()

    def ask() -> None:
        begun.set()
        limit.enter().leave()
        ended.set()

    thread = threading.Thread(target=ask)
    thread.start()
    while not limit.waiting:  # noqa: ASYNC110 -- a thread changes it
        await asyncio.sleep(0)
    assert begun.is_set() and not ended.is_set()
    place.leave()
    await asyncio.to_thread(thread.join)
    assert ended.is_set() and limit.taken == 0


@alone
async def test_who_gives_up_waiting_takes_no_place() -> None:
    limit = Limit(1)
    place = await limit.enter_async()
    tasks = [asyncio.create_task(limit.enter_async()) for _ in range(3)]
    await turn()
    tasks[0].cancel()  # while it waits
    await turn()
    place.leave()
    tasks[1].cancel()  # and when it has just been given one
    found = await tasks[2]
    assert tasks[0].cancelled() and tasks[1].cancelled()
    found.leave()
    assert (limit.taken, limit.waiting) == (0, 0)


@alone
async def test_who_has_a_place_does_not_wait_for_another_at_any_orthanc() -> None:
    one, other = Limit(1), Limit(1)
    elsewhere = asyncio.create_task(other.enter_async())
    await elsewhere
    places = [await one.enter_async(), await one.enter_async(), await other.enter_async()]
    assert (one.taken, other.taken) == (2, 2)
    waiting = asyncio.create_task(one.enter_async())
    for place in places[1:]:
        place.leave()
    await turn()
    assert not waiting.done()  # what was over the limit gives nobody a place
    places[0].leave()
    (await waiting).leave()


@alone
async def test_one_more_is_let_in_where_all_wait_for_their_readers_and_not_while_orthanc_is_at_one() -> None:
    clock = Clock()
    limit = Limit(2, clock)
    reading, busy = [await asyncio.create_task(limit.enter_async()) for _ in range(2)]
    reading.read()
    waiting = asyncio.create_task(limit.enter_async())
    await turn()
    clock.seconds += 100 * MOMENT
    limit.look()
    await turn()
    assert not waiting.done()  # Orthanc is at the other one, however long that takes
    busy.read()
    clock.seconds += MOMENT / 2
    with reading.theirs():  # it is read on
        limit.look()
    clock.seconds += MOMENT / 2
    limit.look()
    await turn()
    assert not waiting.done()
    clock.seconds += MOMENT / 2
    limit.look()
    (await waiting).leave()


def test_who_waits_looks_by_himself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOMENT", 0.001)

    async def ask(limit: Limit) -> None:
        (await asyncio.create_task(limit.enter_async())).read()
        (await limit.enter_async()).leave()
        await asyncio.to_thread(lambda: limit.enter().leave())

    asyncio.run(ask(Limit(1)))


def test_a_place_is_not_given_to_an_event_loop_that_is_gone() -> None:
    limit = Limit(1)
    place = limit.enter()
    loop = asyncio.new_event_loop()
    task = loop.create_task(limit.enter_async())
    loop.call_soon(loop.stop)
    loop.run_forever()
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    assert limit.waiting == 1
    place.leave()
    assert (limit.taken, limit.waiting) == (0, 0)


def test_workers_share_the_number_and_each_has_one_at_least() -> None:
    assert [Among(number, 4).share(10) for number in range(4)] == [3, 3, 2, 2]
    assert [Among(number, 4).share(2) for number in range(4)] == [1, 1, 1, 1]
    assert Among().share(24) == 24


def test_one_address_has_one_limit_and_the_least_counts() -> None:
    limit = limit_of("http://LOCALHOST/a/", 5)
    assert limit_of("http://localhost:80/a", 7) is limit and limit.most == 5
    assert limit_of("http://localhost:80/a", 3) is limit and limit.most == 3
    assert limit_of("http://localhost/b", 7) is not limit
    assert limit_of("https://localhost/a", 7) is not limit


@alone
async def test_what_each_orthanc_has_and_what_waits_can_be_watched() -> None:
    pytest.importorskip("prometheus_client")
    limit = limit_of("http://watched:1", 1)
    place = await limit.enter_async()
    waiting = asyncio.create_task(limit.enter_async())
    await turn()
    lines = metrics_text([]).decode().splitlines()
    assert 'orthanc_consumer_orthanc_requests{orthanc="http://watched:1"} 1.0' in lines
    assert 'orthanc_consumer_orthanc_requests_waiting{orthanc="http://watched:1"} 1.0' in lines
    place.leave()
    (await waiting).leave()


def answer(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, stream=Parts()) if request.method == "GET" else httpx.Response(200, content=b"stored")


class Parts(httpx.AsyncByteStream, httpx.SyncByteStream):
    """An answer in pieces."""

    def __iter__(self) -> Iterator[bytes]:
        yield from (b"1", b"2")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self:
            yield part


@alone
async def test_what_is_downloaded_can_be_uploaded_meanwhile_with_one_place() -> None:
    limit = Limit(1)
    async with httpx.AsyncClient(transport=AsyncLimited(httpx.MockTransport(answer), limit)) as orthanc:

        async def download() -> AsyncIterator[bytes]:
            async with orthanc.stream("GET", "http://a/file") as file:
                async for part in file.aiter_bytes():
                    assert limit.taken == 2
                    assert (await orthanc.post("http://a/instances", content=part)).text == "stored"
                    yield part

        assert (await orthanc.post("http://a/instances", content=download())).text == "stored"
    assert limit.taken == 0


def test_and_in_threads() -> None:
    limit = Limit(1)
    with httpx.Client(transport=Limited(httpx.MockTransport(answer), limit)) as orthanc:

        def download() -> Iterator[bytes]:
            with orthanc.stream("GET", "http://a/file") as file:
                for part in file.iter_bytes():
                    assert limit.taken == 2
                    assert orthanc.post("http://a/instances", content=part).text == "stored"
                    yield part

        assert orthanc.post("http://a/instances", content=download()).text == "stored"
    assert limit.taken == 0


@alone
async def test_a_place_is_left_when_the_answer_is_read_or_closed_or_does_not_come() -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("nobody")

    limit = Limit(1)
    async with httpx.AsyncClient(transport=AsyncLimited(httpx.MockTransport(answer), limit)) as orthanc:
        async with orthanc.stream("GET", "http://a/file"):
            assert limit.taken == 1  # until its end
        assert limit.taken == 0
        assert (await orthanc.get("http://a/file")).content == b"12"
        assert limit.taken == 0
    async with httpx.AsyncClient(transport=AsyncLimited(httpx.MockTransport(fail), limit)) as orthanc:
        with pytest.raises(httpx.ConnectError):
            await orthanc.get("http://a/file")
        assert limit.taken == 0


def test_what_nobody_closes_is_found() -> None:
    limit = Limit(1)
    with httpx.Client(transport=Limited(httpx.MockTransport(answer), limit)) as orthanc:
        found = orthanc.send(orthanc.build_request("GET", "http://a/file"), stream=True)
        assert limit.taken == 1
        del found
        gc.collect()
        assert limit.taken == 0


def test_an_answer_that_is_closed_in_the_midst_of_asking_blocks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the garbage collector, which comes at any moment."""
    monkeypatch.setattr(module, "MOMENT", 0.001)

    def now() -> float:
        if places:
            places.pop().leave()  # whoever looks at the clock has the lock
        return 0.0

    places: list[module.Place] = []
    limit = Limit(1, now)
    place = limit.enter()
    place.read()
    places.append(place)
    done = threading.Event()

    def ask() -> None:
        limit.enter().leave()
        done.set()

    threading.Thread(target=ask, daemon=True).start()
    assert done.wait(60) and limit.taken == 0
