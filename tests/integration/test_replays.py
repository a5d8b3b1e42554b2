"""A replay over a real outbox, to a broker in memory: what is chosen, refused, gone, interrupted and gone on with."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orthanc_events_bridge.bridge import BusyError
from orthanc_events_bridge.bridge.replay import Pace, Replay, Selected, count
from orthanc_events_bridge.bridge.replays import Kept, Replays, Run
from orthanc_events_bridge.changes.model import Fact
from orthanc_events_bridge.errors import BridgeError, EventRejectedError, TransportConfigurationError
from orthanc_events_bridge.folder import Folder
from orthanc_events_bridge.outbox import OutboxWriter
from orthanc_events_bridge.outbox_reader import OutboxReader
from orthanc_events_bridge.outbox_schema import JUMP
from orthanc_events_bridge.transports.base import Incoming, Outgoing
from orthanc_events_bridge.transports.memory import Broker, MemoryTransport
from orthanc_events_bridge.transports.options import MemoryOptions
from orthanc_events_bridge.values import EventFilter

pytestmark = pytest.mark.integration

SHAPE = {
    "source": "urn:uuid:6f1c1d0e-6f0b-4d0c-9a39-0d3a3d8f3b6e",
    "type_prefix": "io.orthanc-events",
    "schema_base": "urn:orthanc-events:schema:",
    "site": "main",
}


class Scene:
    """An outbox, and what is done with it."""

    def __init__(self, path: Path) -> None:
        self.folder = Folder(path / "outbox")
        self.folder.prepare()
        self.now = 1_700_000_000.0
        self.writer = OutboxWriter(self.folder.outbox, lambda: self.now)
        self.reader = OutboxReader(self.folder.outbox)
        self.broker = Broker()
        self.replays = Replays(self.folder)
        self.on_read: Callable[[], None] = lambda: None

    def record(self, count: int, *, study: str = "study", change: str = "NewSeries") -> None:
        """Record changes of a study's series, a second apart."""
        for _ in range(count):
            self.now += 1
            number = self.writer.position + 1
            parents = {"study": study, "patient": "patient"}
            fact = Fact(change, "series", f"series-{number}", 5, number, "20261126T000000", parents)
            self.writer.append([fact], number, 0, lambda level, resource: None)

    def begin(self, **choice: Any) -> Kept:
        def make(number: int) -> Run:
            chosen: dict[str, Any] = {"types": [], "study": "", "since": 0, "first": 0, "through": self.writer.position}
            return Run(number, "memory", "one", self.writer.recorder, **(chosen | choice))

        return self.replays.begin(make)

    def selected(self, kept: Kept) -> Selected:
        scene, types = self, EventFilter(include=tuple(kept.run.types)) if kept.run.types else EventFilter()

        class Watched(Selected):
            def rows(self, after: int, limit: int) -> Any:
                found = super().rows(after, limit)
                scene.on_read()
                return found

        return Watched(self.reader, lambda: {0: SHAPE}, kept.run, types.accepts)

    def replay(self, kept: Kept, *, size: int = 7) -> Replay:
        options = MemoryOptions(type="memory")
        pace = Pace(0)
        pace.portion = lambda batch: size  # type: ignore[method-assign]

        async def sleep(seconds: float) -> None:
            await asyncio.sleep(0)

        def make() -> Any:
            return MemoryTransport(options, self.broker).inbox("one")

        return Replay(options, make, self.selected(kept), kept, pace, sleep)

    def run(self, kept: Kept, *, size: int = 7) -> None:
        asyncio.run(asyncio.wait_for(self.replay(kept, size=size).run(), 60))

    async def until(self, count: int) -> None:
        """Wait until the consumer has got so many."""
        while len(self.inbox()) < count:  # noqa: ASYNC110  # a broker of lists tells nobody
            await asyncio.sleep(0)

    def inbox(self) -> list[Incoming]:
        return self.broker.inboxes.get("one", [])

    def got(self) -> list[int]:
        """The positions of the events that the consumer has got, in their order."""
        return [int(json.loads(message.body)["sequence"]) for message in self.inbox()]


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    yield made
    made.reader.close()
    made.writer.close()


def test_all_that_was_chosen_is_sent_and_no_more(scene: Scene) -> None:
    scene.record(20)
    scene.record(5, study="other")
    scene.record(20)
    kept = scene.begin(first=9, through=40)
    scene.record(3)
    scene.run(kept)
    assert scene.got() == [*range(10, 41)]
    assert (kept.run.position, kept.run.sent) == (40, {"series.created": 31})


def test_only_what_is_about_a_study(scene: Scene) -> None:
    scene.record(1500)
    scene.record(3, study="other")
    scene.record(1500)
    # A job that names the study is not about it.
    fact = Fact("JobSuccess", "job", "job", 5, extra={"job": {"parentResources": ["other"]}})
    scene.writer.append([fact], 9999, 0, lambda level, resource: None)
    kept = scene.begin(study="other")
    scene.run(kept)
    assert scene.got() == [1501, 1502, 1503]
    assert count(scene.selected(kept), kept.run) == {}, "it is behind them"
    again = scene.begin(study="other")
    assert count(scene.selected(again), again.run) == {"series.created": 3}


def test_only_what_was_recorded_since(scene: Scene) -> None:
    scene.record(10)
    since = int(scene.now * 1000)
    scene.record(10)
    scene.run(scene.begin(since=since))
    assert scene.got() == [*range(10, 21)]


@pytest.mark.parametrize("size", [1, 7, 5000])
def test_only_some_types_with_little_work_for_the_others(scene: Scene, size: int) -> None:
    """Also where one goes at a time: the others are looked at many at once, and what is kept says how far that is."""
    for _ in range(3):
        scene.record(1400)
        scene.record(4, change="StableSeries")
    scene.record(1400)
    kept = scene.begin(types=["*.stable", "study.*"])
    looks: list[int] = []
    scene.on_read = lambda: looks.append(kept.run.position)
    scene.run(kept, size=size)
    assert kept.run.sent == {"series.stable": 12}
    assert len(scene.got()) == 12 and len(looks) < 40
    assert looks == sorted(looks) and looks[-1] == kept.run.through
    again = scene.begin(types=["*.stable"])
    assert count(scene.selected(again), again.run) == {"series.stable": 12}


def test_bytes_are_those_that_everyone_got(scene: Scene) -> None:
    from orthanc_events_bridge.events.mapping import to_outgoing

    scene.record(10)
    scene.run(scene.begin())
    told = [to_outgoing(row, SHAPE, scene.writer.recorder) for row in scene.reader.rows(0, 100)]
    assert [message.body for message in scene.inbox()] == [one.body for one in told]
    assert [message.headers["orthanc-event-id"] for message in scene.inbox()] == [one.id for one in told]


def test_what_is_refused_is_counted_and_the_rest_goes_on(scene: Scene) -> None:
    scene.record(20)
    too_large = EventRejectedError("the event is too large", "make it smaller")
    scene.broker.refuse = lambda event: too_large if json.loads(event.body)["sequence"].endswith("5") else None
    kept = scene.begin()
    scene.run(kept)
    assert scene.got() == [n for n in range(1, 21) if n not in (5, 15)]
    assert kept.run.refused == 2
    assert [one["position"] for one in kept.run.refusals] == [5, 15]
    assert kept.run.refusals[0]["type"] == "series.created" and "too large" in kept.run.refusals[0]["reason"]


def test_rows_that_go_meanwhile_are_counted(scene: Scene) -> None:
    scene.record(100)
    kept = scene.begin()
    reads = iter(range(1000))

    def retain() -> None:
        if next(reads) == 3:  # the rows up to 28 are read by now, and 21 of them sent
            scene.writer.detach(0, limit=60)

    scene.on_read = retain
    scene.run(kept)
    assert scene.got() == [*range(1, 29), *range(61, 101)]
    assert kept.run.gone == 32


def test_rows_that_were_gone_before_are_counted_and_a_jump_is_not(scene: Scene) -> None:
    scene.record(10)
    scene.writer.abandon()  # no clean stop
    scene.writer = OutboxWriter(scene.folder.outbox, lambda: scene.now)
    scene.record(10)
    scene.writer.detach(0, limit=4)
    kept = scene.begin(first=1)
    scene.run(kept)
    assert scene.got() == [*range(5, 11), *range(JUMP + 11, JUMP + 21)]
    assert kept.run.gone == 3
    scene.writer.detach(0, limit=100)
    rest = scene.begin(first=JUMP + 15)
    scene.run(rest)
    assert rest.run.gone == 5


def test_it_goes_on_where_it_was_interrupted(scene: Scene) -> None:
    scene.record(50)
    kept = scene.begin()
    number = kept.run.number

    async def interrupted() -> None:
        relay = scene.replay(kept)
        working = asyncio.create_task(relay.run())
        await scene.until(20)
        assert relay.leave()
        await working

    asyncio.run(interrupted())
    kept.close()
    sent = len(scene.inbox())
    assert 20 <= sent < 50
    assert scene.replays.unfinished() == [number]
    again = Replays(scene.folder).resume(number)
    assert again.run.position == sent
    scene.run(again)
    assert scene.got() == [*range(1, 51)]
    assert again.run.sent == {"series.created": 50}
    again.remove()
    again.close()
    assert not list(scene.folder.replays.iterdir())


def test_what_was_under_way_when_it_was_killed_has_the_same_key(scene: Scene) -> None:
    """The file is as it was before the last batch: a broker that removes duplicates has none."""
    scene.record(20)
    kept = scene.begin()
    file = scene.folder.replays / f"{kept.run.number}.json"
    before = file.read_text("utf-8")
    scene.run(kept)
    kept.close()
    file.write_text(before, "utf-8")
    again = scene.replays.resume(kept.run.number)
    scene.run(again)
    assert scene.got() == [*range(1, 21)]


def test_an_inbox_that_is_made_again_gets_everything_again(scene: Scene) -> None:
    scene.record(50)
    kept = scene.begin(first=10)
    done: list[str] = []

    def lose(event: Outgoing) -> None:
        if len(scene.inbox()) == 25 and not done:
            done.append(event.id)
            scene.broker.remove_inbox("one")
            scene.broker.cut()

    scene.broker.refuse = lose
    scene.run(kept)
    assert set(scene.got()) == {*range(11, 51)}


def test_what_a_person_has_to_change_ends_it_and_it_can_be_gone_on_with(scene: Scene) -> None:
    scene.record(20)
    kept = scene.begin()
    wrong = TransportConfigurationError("the broker lets nobody write there", "let us")
    scene.broker.refuse = lambda event: wrong if len(scene.inbox()) == 9 else None
    with pytest.raises(TransportConfigurationError):
        scene.run(kept)
    kept.close()
    scene.broker.refuse = lambda event: None
    again = scene.replays.resume(kept.run.number)
    assert again.run.position == 9
    scene.run(again)
    assert scene.got() == [*range(1, 21)]


def test_a_lost_broker_is_waited_for(scene: Scene) -> None:
    scene.record(50)
    kept = scene.begin()

    async def main() -> None:
        working = asyncio.create_task(scene.replay(kept).run())
        await scene.until(20)
        scene.broker.up = False
        scene.broker.cut()
        for _ in range(100):
            await asyncio.sleep(0)
        assert not working.done() and len(scene.inbox()) < 50
        scene.broker.up = True
        await asyncio.wait_for(working, 60)

    asyncio.run(main())
    assert scene.got() == [*range(1, 51)]


def test_one_process_at_a_time_works_on_it(scene: Scene) -> None:
    scene.record(1)
    first, second = scene.begin(), scene.begin()
    assert first.run.number != second.run.number
    with pytest.raises(BusyError, match="another process"):
        scene.replays.resume(first.run.number)
    first.close()
    scene.replays.resume(first.run.number).close()
    with pytest.raises(BridgeError, match=f"no replay 5 .*{first.run.number}"):
        scene.replays.resume(5)


def test_a_file_that_cannot_be_read_is_named(scene: Scene) -> None:
    kept = scene.begin()
    kept.close()
    file = scene.folder.replays / f"{kept.run.number}.json"
    for text in ("", "{", "[]", '{"number": 1}'):
        file.write_text(text, "utf-8")
        with pytest.raises(BridgeError, match="can't be read"):
            scene.replays.resume(kept.run.number)


def test_its_files_are_the_owners_alone(scene: Scene) -> None:
    kept = scene.begin()
    kept.close()
    assert scene.folder.replays.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in scene.folder.replays.iterdir()} == {0o600}
    scene.folder.prepare()  # it still takes the folder for ours
    assert abs(kept.run.number / 1000 - time.time()) < 3600
