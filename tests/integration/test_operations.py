"""What an operator does to a running system: pause, resume, forget, change the configuration, look at it."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orthanc_events_bridge.bridge.config import load
from orthanc_events_bridge.bridge.configuration import changes
from orthanc_events_bridge.bridge.state import State
from orthanc_events_bridge.errors import OutboxFullError
from orthanc_events_bridge.events.mapping import event_id
from orthanc_events_bridge.outbox_reader import OutboxReader
from orthanc_events_bridge.testing import dicom
from orthanc_events_bridge.testing.brokers import BROKERS
from orthanc_events_bridge.testing.brokers.nats import read_nats
from orthanc_events_bridge.testing.processes import wait_until
from orthanc_events_bridge.testing.programs import require
from orthanc_events_bridge.testing.servers import NatsServer
from orthanc_events_bridge.transports import REGISTERED
from tests.contract.link import Link
from tests.integration.beside import SOURCE, Beside
from tests.integration.webhook_tools import receiver
from tests.integration.whole import broker_or_skip, messages, started

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """One NATS for the tests that don't harm it; each has streams of its own."""
    require("nats-server")
    made = NatsServer(tmp_path_factory.mktemp("nats"))
    made.start()
    yield made
    made.close(kill=True)


@pytest.fixture
def beside(tmp_path: Path) -> Iterator[Beside]:
    with Beside(tmp_path / "beside") as made:
        yield made


_numbers = itertools.count(1)
Make = Callable[..., dict[str, Any]]


@pytest.fixture
def stream(server: NatsServer) -> Make:
    """Makes options of a transport to a stream of its own: ``stream(name, **options)``."""
    number = next(_numbers)

    def make(name: str, *, on: NatsServer = server, **options: Any) -> dict[str, Any]:
        place = {"stream": f"T{number}-{name}", "subject_prefix": f"t{number}.{name}"}
        limits = {"max_bytes": "64MiB"}
        return {"type": "nats", "name": name, "servers": [on.url], **place, "limits": limits, **options}

    return make


def told(transport: dict[str, Any]) -> list[int]:
    """The ``sequence`` of everything that a transport's stream holds, in its order."""
    return [event.sequence for event in read_nats(transport["servers"][0], stream=transport["stream"])]


def again(transport: dict[str, Any]) -> dict[str, Any]:
    """The same transport to another stream."""
    return transport | {name: f"{transport[name]}2" for name in ("stream", "subject_prefix")}


# -- pause and resume ----------------------------------------------------------------------------------------


def test_a_paused_transport_gets_nothing_over_every_restart_and_goes_on_where_it_was(
    beside: Beside, stream: Make
) -> None:
    one, other = stream("one"), stream("other")
    beside.configure(one, other)
    beside.start()
    before = beside.record(5)
    beside.wait_delivered("one", "other")

    done = beside.command("transports", "pause", "one")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "transport one is paused, and the outbox keeps what it has not had (0 rows)\n"
    paused = beside.transport("one")
    assert paused["state"] == "paused"
    assert paused["since"] == paused["paused"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", paused["since"])
    while_paused = beside.record(5)
    beside.wait_delivered("other")
    beside.kill()
    assert beside.transport("one")["state"] == "paused"
    assert beside.transport("other")["state"] == "bridge not running"
    beside.start()
    while_paused += beside.record(5)
    beside.wait_delivered("other")
    beside.stop()
    beside.start()
    while_paused += beside.record(5)
    beside.wait_delivered("other")
    after = beside.transport("one")
    assert (after["position"], after["pending"], after["paused"]) == (before[-1], 15, paused["paused"])
    assert told(one) == before
    assert told(other) == before + while_paused
    text = beside.command("status").stdout
    assert f"one: paused since {paused['paused']}; the outbox holds 15 rows" in text
    assert "orthanc-events transports resume one" in text

    done = beside.command("transports", "resume", "one")
    assert (done.returncode, done.stdout) == (0, "transport one goes on from its position (15 rows)\n")
    beside.wait_delivered("one")
    assert told(one) == before + while_paused
    assert beside.transport("one")["paused"] is None
    beside.wait(lambda: beside.transport("one")["state"] == "connected")


def test_what_is_asked_while_no_bridge_runs_is_done_before_it_sends_anything(beside: Beside, stream: Make) -> None:
    one, other = stream("one"), stream("other")
    beside.configure(one, other)
    beside.start()
    before = beside.record(3)
    beside.wait_delivered("one", "other")
    beside.stop()
    done = beside.command("transports", "pause", "one")
    assert done.returncode == 0
    assert done.stdout == "the bridge is not running: it is asked to pause transport one when it starts\n"
    assert "one: to pause it was asked for, and the bridge has not done it yet" in beside.command("transports").stdout
    more = beside.record(3)
    beside.start()
    beside.wait_delivered("other")
    assert beside.transport("one")["state"] == "paused"
    assert told(one) == before
    assert told(other) == before + more
    assert "has not done it yet" not in beside.command("transports").stdout


def test_pauses_that_are_asked_while_no_bridge_runs_are_all_there_before_anything_is_sent(
    beside: Beside, tmp_path: Path
) -> None:
    with receiver(tmp_path / "receiver") as server:
        names = [f"hook{number}" for number in range(4)]
        hooks = [{"type": "webhook", "name": name, "url": f"{server.url}/{name}", "probe": False} for name in names]
        beside.configure(*hooks)
        beside.start()
        beside.wait(lambda: all(beside.transport(name)["state"] == "connected" for name in names))
        beside.stop()
        for name in names:
            assert beside.command("transports", "pause", name).returncode == 0
        beside.record(3)
        beside.start()
        beside.wait(lambda: {beside.transport(name)["state"] for name in names} == {"paused"})
        assert [server.received(f"/{name}") for name in names] == [[]] * len(names)


def test_a_pause_lets_the_batch_under_way_come_to_its_end(beside: Beside, stream: Make, server: NatsServer) -> None:
    """Cut off, events that the broker has would be sent again, which not every broker would drop."""
    link = Link(server.port, latency=0.1)  # so that there is always one under way
    try:
        one = stream("one")
        far = {"servers": [f"nats://127.0.0.1:{link.port}"], "ack_timeout": "30s", "connect_timeout": "30s"}
        beside.configure(one | far | {"batch": 20})
        beside.start()
        everything: list[int] = []
        for _ in range(3):
            before = len(everything)
            everything += beside.record(150)
            beside.wait(lambda before=before: beside.transport("one")["position"] > before)  # type: ignore[misc]
            assert beside.command("transports", "pause", "one").returncode == 0
            position, published = (beside.transport("one")[key] for key in ("position", "published"))
            assert position == published == len(told(one)), "nothing that wasn't counted"
            assert beside.command("transports", "resume", "one").returncode == 0
        beside.wait_delivered("one")
        assert beside.transport("one")["published"] == len(everything)
        assert told(one) == everything
    finally:
        link.close()


def test_a_transport_whose_broker_is_frozen_can_be_paused(beside: Beside, stream: Make, tmp_path: Path) -> None:
    with NatsServer(tmp_path / "frozen") as frozen:
        one = stream("one", on=frozen, ack_timeout="30s", connect_timeout="30s")
        beside.configure(one)
        beside.start()
        before = beside.record(3)
        beside.wait_delivered("one")
        frozen.freeze()
        behind = beside.record(3)
        beside.wait(lambda: beside.transport("one")["pending"] == 3)
        assert beside.command("transports", "pause", "one").returncode == 0
        frozen.thaw()
        assert beside.command("transports", "resume", "one").returncode == 0
        beside.wait_delivered("one")
        assert told(one) == before + behind


def test_what_can_not_be_done_is_one_clear_error(beside: Beside, stream: Make) -> None:
    beside.configure(stream("one"), stream("other"))
    beside.start()
    beside.record()
    beside.wait_delivered("one", "other")
    for action in ("pause", "resume", "forget"):
        done = beside.command("transports", action, "onee")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "orthanc-events: there is no transport onee (there are: one, other)\n"
    done = beside.command("transports", "resume", "one")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "orthanc-events: transport one is not paused\n")
    done = beside.command("transports", "forget", "one")
    assert (done.returncode, done.stdout) == (1, "")
    assert "transport one is still configured: remove it from the configuration first" in done.stderr
    assert beside.transport("one")["state"] == "connected"


def test_who_does_not_wait_asks_all_the_same(beside: Beside, stream: Make) -> None:
    beside.configure(stream("one"))
    beside.start()
    beside.record()
    beside.wait_delivered("one")
    done = beside.command("transports", "pause", "one", "--no-wait")
    assert (done.returncode, done.stdout) == (0, "the bridge is asked to pause transport one\n")
    beside.wait(lambda: beside.transport("one")["state"] == "paused")


def test_the_list_of_transports(beside: Beside, stream: Make) -> None:
    one, other = stream("one"), stream("other")
    beside.configure(one, other)
    beside.start()
    beside.record(3)
    beside.wait_delivered("one", "other")
    beside.command("transports", "pause", "other")
    beside.configure(one)
    beside.wait(lambda: beside.transport("other")["state"] == "not configured")
    done = beside.command("transports")
    assert (done.returncode, done.stderr) == (0, "")
    head, first, second, *_ = done.stdout.splitlines()
    assert re.split(" {2,}", head) == [
        "TRANSPORT", "TYPE", "STATE", "POSITION", "PENDING", "PAUSED SINCE", "CONFIGURED",
    ]  # fmt: skip
    assert first.split() == ["one", "nats", "connected", "3", "0", "-", "yes"]
    since = beside.transport("other")["paused"]
    assert second.split() == ["other", "-", "not", "configured", "3", "0", since, "no"]
    listed = json.loads(beside.command("transports", "--json").stdout)
    for entry, name in zip(listed, ("one", "other"), strict=True):
        seen = beside.transport(name)
        assert entry == {key: seen.get(key) for key in entry}
        assert list(entry) == ["name", "type", "state", "since", "position", "pending", "paused", "configured"]
    assert [entry["configured"] for entry in listed] == [True, False]


# -- removed, forgotten, new ---------------------------------------------------------------------------------


def kept(beside: Beside) -> list[int]:
    """The positions that the outbox holds."""
    reader = OutboxReader(beside.folder.outbox)
    try:
        return [row.position for row in reader.rows(0, 10_000)]
    finally:
        reader.close()


def test_a_removed_transport_holds_the_outbox_until_it_is_forgotten(beside: Beside, stream: Make) -> None:
    one, old = stream("one"), stream("old")
    at_once = {"keep": 0}
    beside.configure(one, old, outbox=at_once)
    beside.start()
    beside.record(3)
    beside.wait_delivered("one", "old")
    beside.retain()
    assert kept(beside) == [], "what all have had goes at once"

    beside.configure(one, outbox=at_once)
    beside.wait(lambda: beside.transport("old")["state"] == "not configured")
    held = beside.record(3)
    beside.wait_delivered("one")
    beside.retain()
    assert kept(beside) == held
    line = "transport old is not configured any more and keeps its place: the outbox holds everything behind position 3"
    beside.wait_log(line)
    assert "`orthanc-events transports forget old`" in beside.log()
    text = beside.command("status").stdout
    assert "old: not configured any more; it keeps its place, and the outbox holds 3 rows" in text
    assert "what to do: put it back, or `orthanc-events transports forget old`" in text
    beside.stop()
    beside.start()
    beside.wait_log(line, 2)  # said again at a start, and not more often
    beside.retain()
    assert kept(beside) == held

    done = beside.command("transports", "forget", "old")
    assert (done.returncode, done.stderr) == (0, "")
    assert "transport old is forgotten, and the outbox holds nothing for it any more (3 rows" in done.stdout
    assert beside.transport("old") == {}
    beside.retain()
    assert kept(beside) == []
    assert beside.log().count(line) == 2


def test_a_removed_transport_that_is_put_back_has_missed_nothing(beside: Beside, stream: Make) -> None:
    one, old = stream("one"), stream("old", start="now")
    beside.configure(one, old)
    beside.start()
    before = beside.record(3)
    beside.wait_delivered("one", "old")
    beside.configure(one)
    beside.wait(lambda: beside.transport("old")["state"] == "not configured")
    meanwhile = beside.record(3)
    beside.wait_delivered("one")
    assert told(old) == before
    beside.configure(one, old)
    beside.wait_delivered("old")
    assert told(old) == before + meanwhile


@pytest.mark.parametrize("start", ["oldest", "now"])
def test_a_forgotten_transport_comes_back_as_a_new_one(beside: Beside, stream: Make, start: str) -> None:
    one, old = stream("one"), stream("old", start=start)
    beside.configure(one, old)
    beside.start()
    before = beside.record(3)
    beside.wait_delivered("one", "old")
    state = State(beside.folder.bridge)
    state.set_aside("old", 2, "an id", "study.created", "too large")
    state.gap("old", 1, 1)
    state.close()
    assert "old: 1 events are set aside" in beside.command("status").stdout
    # Taken out of the file a moment ago: the bridge reads it first.
    beside.configure(one)
    assert beside.command("transports", "forget", "old").returncode == 0
    assert json.loads(beside.command("set-aside", "--json").stdout) == []
    meanwhile = beside.record(3)
    beside.wait_delivered("one")
    beside.configure(one, again(old))
    beside.wait(lambda: beside.transport("old")["state"] == "connected")
    after = beside.record(3)
    beside.wait_delivered("old")
    assert beside.transport("old")["gap"] is None
    expected = after if start == "now" else before + meanwhile + after
    assert told(again(old)) == expected


def test_a_transport_that_is_added_later_begins_with_the_oldest_kept_event_or_with_the_next(
    beside: Beside, stream: Make
) -> None:
    first = stream("first")
    beside.configure(first)
    beside.start()
    before = beside.record(5)
    beside.wait_delivered("first")
    oldest, now = stream("oldest"), stream("now", start="now")
    beside.configure(first, oldest, now)
    beside.wait(lambda: beside.transport("oldest") and beside.transport("now"))
    assert beside.transport("now")["position"] == before[-1]
    after = beside.record(5)
    beside.wait_delivered("first", "oldest", "now")
    assert told(oldest) == told(first) == before + after
    assert told(now) == after
    # From now on both go on where they are, whatever `start` says.
    beside.kill()
    more = beside.record(5)
    beside.configure(first, oldest | {"start": "now"}, now)
    beside.start()
    beside.wait_delivered("oldest", "now")
    assert told(oldest) == before + after + more
    assert told(now) == after + more


def test_a_later_transport_has_no_gap_of_what_was_given_up_before_it_was_there(beside: Beside, stream: Make) -> None:
    first = stream("first")
    beside.configure(first)
    beside.start()
    beside.record(5)
    beside.wait_delivered("first")
    beside.command("transports", "pause", "first")
    beside.record(5)
    beside.give_up(7)
    assert beside.transport("first")["gap"] == [6, 7], "shown at once, though nobody has come by"
    late = stream("late")
    beside.configure(first, late)
    beside.wait_delivered("late")
    assert told(late) == [8, 9, 10]
    assert beside.transport("late")["gap"] is None
    beside.command("transports", "resume", "first")
    beside.wait_delivered("first")
    assert told(first) == [1, 2, 3, 4, 5, 8, 9, 10]
    assert beside.transport("first")["gap"] == [6, 7]


def test_at_the_very_first_start_now_is_when_recording_began(beside: Beside, stream: Make) -> None:
    """The bridge may come late, by seconds or, with a mistake in its configuration, by hours."""
    one, other = stream("one", start="now"), stream("other", start="now")
    early = beside.record(5)
    beside.configure(one, other)
    beside.start()
    beside.wait_delivered("one", "other")
    early += beside.record(5)
    beside.wait_delivered("one", "other")
    assert told(one) == told(other) == early


def test_a_whole_lines_very_first_start_with_now_misses_nothing(tmp_path: Path) -> None:
    with started(tmp_path / "line", transport=["start: now"], stable_age=1000) as line:
        line.orthanc.upload(dicom.make_study().instances[0].data)
        line.settle()
        events = [message.event for message in messages(line.broker.url)]
        assert [int(event["sequence"]) for event in events] == [*range(1, len(events) + 1)]
        assert len(events) == line.status()["outbox"]["last_position"]


def test_with_a_lost_bridge_db_nothing_is_missed(beside: Beside, stream: Make) -> None:
    one = stream("one", start="now")
    beside.configure(one, outbox={"keep": 0})
    beside.start()
    before = beside.record(3)
    beside.wait_delivered("one")
    beside.kill()
    waiting = beside.record(3)
    for path in beside.folder.path.glob("bridge.db*"):
        path.unlink()
    beside.retain()
    assert kept(beside) == before + waiting, "nobody says that anything was delivered"
    beside.start()
    beside.wait_delivered("one")
    assert told(one) == before + waiting, "JetStream drops what it has"


def test_a_full_outbox_names_the_transport_that_holds_it(beside: Beside, stream: Make) -> None:
    one, old = stream("one"), stream("old")
    full = {"max_bytes": "256KiB"}
    beside.configure(one, old, outbox=full)
    beside.start()
    beside.record()
    beside.wait_delivered("one", "old")
    beside.configure(one, outbox=full)
    beside.wait(lambda: beside.transport("old")["state"] == "not configured")

    def fill() -> None:
        for _ in range(100):
            beside.record(100)
            beside.wait_delivered("one")
            beside.make_room()

    with pytest.raises(OutboxFullError) as caught:
        fill()
    assert "forget the transport that is behind (old)" in caught.value.remedy
    assert "outbox.max_bytes" in caught.value.remedy
    assert beside.command("transports", "forget", "old").returncode == 0
    beside.make_room()


# -- set aside -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["structured", "binary"])
def test_an_event_that_was_set_aside_is_sent_again_in_the_transports_own_mode(
    beside: Beside, stream: Make, mode: str
) -> None:
    one = stream("one", mode=mode, on_recreate="continue")
    beside.configure(one)
    beside.start()
    beside.record(3)
    beside.wait_delivered("one")
    reader = OutboxReader(beside.folder.outbox)
    second = event_id(reader.rows(1, 1)[0], SOURCE)
    reader.close()
    state = State(beside.folder.bridge)
    # At 3 stands another event than the one that was set aside: it was in an outbox that was here before.
    for position, identifier in ((2, second), (3, "an id"), (9, "an id")):
        state.set_aside("one", position, identifier, "study.created", "too large")
    state.close()
    beside.configure(again(one))  # an empty place, which doesn't know its id
    beside.wait_log(APPLIES)
    assert beside.command("transports", "pause", "one").returncode == 0
    done = beside.command("set-aside", "--resend")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (
        0,
        "3 set aside; the bridge was asked to send them again",
    )
    beside.wait_log("can't be done: transport one is paused; resume it first", 3)
    assert beside.command("transports", "resume", "one").returncode == 0
    beside.command("set-aside", "--resend")
    beside.wait_log("transport one: the event at 2 was sent again")
    beside.wait_log("can't be done: the event that was set aside at 3 is no longer kept")
    beside.wait_log("can't be done: the event at 9 is no longer kept")
    assert [entry["position"] for entry in json.loads(beside.command("set-aside", "--json").stdout)] == [3, 9]
    (message,) = messages(one["servers"][0], again(one)["stream"])
    if mode == "binary":
        assert message.headers["ce-sequence"] == f"{2:020d}"
        assert json.loads(message.body)["id"] == "study-2"
    else:
        assert message.event["sequence"] == f"{2:020d}"
        assert not [name for name in message.headers if name.startswith("ce-")]


def test_events_that_are_sent_again_one_by_one_hold_up_nothing_else(beside: Beside, tmp_path: Path) -> None:
    with receiver(tmp_path / "receiver") as server:
        hook = {"type": "webhook", "name": "hook", "url": f"{server.url}/hook", "probe": False}
        beside.configure(hook, {"type": "memory", "name": "other"})
        beside.start()
        positions = beside.record(300)
        beside.wait_delivered("hook", "other")
        reader = OutboxReader(beside.folder.outbox)
        state = State(beside.folder.bridge)
        for row in reader.rows(0, 300):
            state.set_aside("hook", row.position, event_id(row, SOURCE), "study.created", "too large")
        state.close()
        reader.close()
        server.control(always={"delay": 0.5})
        assert beside.command("set-aside", "--resend").returncode == 0
        beside.wait_log("was sent again")
        assert beside.command("transports", "pause", "other").returncode == 0
        beside.configure(hook)
        beside.wait_log(APPLIES)
        assert len(beside.status()["set_aside"]) > 100
        server.control(always=None)
        beside.wait(lambda: not beside.status()["set_aside"])
        assert len(server.received("/hook")) == 2 * len(positions)


# -- the configuration changes -------------------------------------------------------------------------------

APPLIES = "the changed configuration applies: "


def in_place(beside: Beside, text: str) -> None:
    with beside.config.open("w", encoding="utf-8") as file:
        file.write(text)


def replaced(beside: Beside, text: str) -> None:
    beside.write(text)


def behind_a_link(beside: Beside, text: str) -> None:
    """As Kubernetes puts a new ConfigMap in place."""
    new = beside.config.parent / f"version-{len(text)}.yaml"
    new.write_text(text, "utf-8")
    link = beside.config.with_suffix(".link")
    link.symlink_to(new)
    link.replace(beside.config)


@pytest.mark.parametrize("way", [in_place, replaced, behind_a_link])
def test_a_changed_configuration_applies_however_it_was_written(
    beside: Beside, stream: Make, way: Callable[[Beside, str], None]
) -> None:
    one = stream("one")
    beside.configure(one)
    beside.start()
    beside.record()
    beside.wait_delivered("one")
    pid = beside.status()["bridge"]["pid"]
    way(beside, beside.config.read_text("utf-8") + "site: north\n")
    beside.wait_log(f"{APPLIES}site\n")
    way(beside, beside.config.read_text("utf-8").replace("north", "south"))
    beside.wait_log(f"{APPLIES}site\n", 2)
    beside.record()
    beside.wait_delivered("one")
    events = read_nats(one["servers"][0], stream=one["stream"])
    sites = [event.address.removeprefix(f"{one['subject_prefix']}.").partition(".")[0] for event in events]
    assert sites == ["main", "south"]
    assert beside.status()["bridge"]["pid"] == pid


def test_unchanged_transports_go_on_undisturbed_and_the_others_follow(
    beside: Beside, stream: Make, tmp_path: Path
) -> None:
    # Another stream is another place: what it is to have of what was sent before is for `on_recreate` to say.
    moved = stream("moved", on_recreate="continue")
    same, gone, new = stream("same"), stream("gone"), stream("new")
    beside.configure(same, moved, gone)
    beside.start()
    before = beside.record(3)
    since = beside.wait_connected("same", "moved", "gone")
    elsewhere = again(moved)
    beside.configure(same, elsewhere, new)
    beside.wait_log(f"{APPLIES}transport gone is gone, transport moved is changed, transport new is new\n")
    after = beside.record(3)
    since_then = beside.wait_connected("same", "moved", "new")
    assert told(same) == told(new) == before + after
    assert (told(moved), told(elsewhere)) == (before, after)
    assert told(gone) == before
    assert since_then["same"] == since["same"]
    assert since_then["moved"] > since["moved"]
    assert beside.transport("gone")["state"] == "not configured"


def test_mistakes_are_told_once_and_the_last_good_configuration_applies(beside: Beside, stream: Make) -> None:
    one = stream("one", user="u", password="CANARY-of-a-secret")
    beside.configure(one)
    beside.start()
    beside.record(3)
    since = beside.wait_connected("one")
    good = beside.config.read_text("utf-8")
    beside.write(good.replace("servers:", "srevers:") + "sight: x\n")
    beside.wait(lambda: len(beside.status()["bridge"]["configuration"]["mistakes"]) >= 2)
    mistakes = beside.status()["bridge"]["configuration"]["mistakes"]
    assert all(mistake.startswith(f"{beside.config}:") for mistake in mistakes)
    assert "did you mean servers" in str(mistakes) and "did you mean site" in str(mistakes)
    line = "the configuration was changed and has mistakes; running on with the last good one"
    text = beside.command("status").stdout
    assert f"{line}:\n" in text and all(mistake in text for mistake in mistakes)
    beside.record(3)
    beside.wait_delivered("one")
    beside.hang_up()  # read again: nothing new to be said
    more = beside.record(3)
    beside.wait_delivered("one")
    beside.config.unlink()
    beside.wait(lambda: "there is no such file" in str(beside.status()["bridge"]["configuration"]["mistakes"]))
    assert [beside.log().count(said) for said in (line, *mistakes)] == [2, *(1 for _ in mistakes)]
    beside.write(good)
    beside.wait_log("the mistakes in the configuration are mended")
    beside.wait(lambda: beside.status()["bridge"]["configuration"]["mistakes"] == [])
    assert "has mistakes" not in beside.command("status").stdout
    more = beside.record(3)
    beside.wait_delivered("one")
    assert told(one)[-3:] == more
    assert beside.wait_connected("one") == since, "nothing was disturbed"
    assert "CANARY" not in beside.log() + json.dumps(beside.status())


def test_sighup_reads_the_configuration_again(beside: Beside, stream: Make) -> None:
    beside.configure(stream("one"))
    beside.start()
    beside.record()
    beside.wait_delivered("one")
    said = "the configuration was read again and says the same as before"
    beside.hang_up()
    beside.wait_log(said)
    # The level of the log follows, both ways.
    beside.configure(stream("one"), log_level="warning")
    beside.wait_log(f"{APPLIES}log_level")
    beside.hang_up()
    beside.configure(stream("one"), log_level="info")
    beside.wait_log(f"{APPLIES}log_level", 2)
    assert beside.log().count(said) == 1
    beside.hang_up()
    beside.wait_log(said, 2)


def test_a_changed_filter_applies_to_what_is_read_from_then_on(beside: Beside, stream: Make) -> None:
    one, other = stream("one"), stream("other")
    beside.configure(one, other)
    beside.start()
    before = beside.record(3)
    since = beside.wait_connected("one", "other")
    beside.configure(one, other, events={"exclude": ["study.*"]})
    beside.wait_log(f"{APPLIES}events\n")
    beside.record(3)
    beside.wait_delivered("one", "other")
    beside.configure(one, other | {"events": {"exclude": ["study.*"]}})
    beside.wait_log(f"{APPLIES}events, transport other is changed\n")
    after = beside.record(3)
    beside.wait_delivered("one", "other")
    assert told(one) == before + after
    assert told(other) == before
    assert beside.wait_connected("one")["one"] == since["one"]


def test_another_source_is_warned_of_and_shapes_only_what_is_recorded_from_then_on(
    beside: Beside, stream: Make
) -> None:
    one = stream("one")
    beside.configure(one)
    beside.start()
    beside.record()
    beside.wait_delivered("one")
    beside.command("transports", "pause", "one")
    beside.record()
    beside.configure(one, source="urn:x:another", capture={"start": "log"})
    beside.wait_log(f"{APPLIES}source, capture\n")
    beside.wait_log("source is another one")
    beside.wait_log("a changed capture.start has no effect")
    beside.wait(lambda: beside.status()["bridge"]["configuration"]["mistakes"] == [])
    beside.record()
    beside.command("transports", "resume", "one")
    beside.wait_delivered("one")
    events = read_nats(one["servers"][0], stream=one["stream"])
    assert [event.source for event in events] == [SOURCE, SOURCE, "urn:x:another"]


def test_a_changed_drain_timeout_is_the_one_that_a_stop_waits_for(beside: Beside, stream: Make, tmp_path: Path) -> None:
    with NatsServer(tmp_path / "frozen") as frozen:
        one = stream("one", on=frozen)
        beside.configure(one, drain_timeout="100ms")
        beside.start()
        beside.record()
        beside.wait_delivered("one")
        beside.configure(one, drain_timeout="3s")
        beside.wait_log(f"{APPLIES}drain_timeout")
        frozen.freeze()
        beside.record()
        assert beside.stop() > 2.9
        frozen.thaw()


def test_a_whole_line_takes_changed_tags_over_without_any_restart(tmp_path: Path) -> None:
    with started(tmp_path / "line", stable_age=1000) as line:
        pid = line.bridge_pid()
        line.orthanc.upload(dicom.make_study().instances[0].data)
        line.settle()
        before = len(messages(line.broker.url))
        good = line.config.read_text("utf-8")
        line.config.write_text(good + "data:\n  tags: [Modality]\n  metadata: [RemoteAET]\n", "utf-8")
        line.wait(lambda _: f"{APPLIES}data" in line.orthanc.log_text())

        def has_tags() -> bool:
            line.orthanc.upload(dicom.make_study().instances[0].data)
            line.settle()
            return "tags" in messages(line.broker.url)[-1].event["data"]

        line.wait(lambda _: has_tags())
        events = [message.event for message in messages(line.broker.url)]
        assert not any("tags" in event["data"] for event in events[:before])
        assert any(event["data"].get("tags", {}).get("Modality") for event in events[before:])
        # Its limit too, with which capture must not wait.
        line.config.write_text(good + "outbox:\n  max_bytes: 1234567\n", "utf-8")
        line.wait(lambda document: document["capture"]["limit"] == 1234567)
        assert line.bridge_pid() == pid
        assert line.status()["bridge"]["restarts"] == 0


# -- tail ----------------------------------------------------------------------------------------------------


def tailed(
    config: Path, count: int, *options: str, end: str = "SIGINT", more: Callable[[], object] = lambda: None
) -> tuple[list[str], str]:
    """What ``orthanc-events tail --oldest`` prints until it has printed so many lines, and its standard error.

    :param more: brings further events, so that it has something to print when its reader has gone.
    """
    command = [sys.executable, "-m", "orthanc_events_bridge", "tail", "--oldest", "--config", str(config)]
    with subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # Tests that a shell runs in the background are started with SIGINT ignored, and so would this be.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            lines = [process.stdout.readline().rstrip("\n") for _ in range(count)]
            if end == "SIGINT":
                process.send_signal(signal.SIGINT)
            else:
                process.stdout.close()
                more()
            assert process.wait(60) == 0
            return lines, process.stderr.read()
        finally:
            process.kill()


def test_tail_shows_the_same_whichever_mode_events_were_sent_in(beside: Beside, stream: Make) -> None:
    structured, binary = stream("structured"), stream("binary", mode="binary")
    beside.configure(structured, binary)
    beside.start()
    beside.record(3)
    beside.wait_delivered("structured", "binary")
    shown = {}
    for name in ("structured", "binary"):
        lines, said = tailed(beside.config, 3, "--transport", name)
        whole, said_too = tailed(beside.config, 3, "--transport", name, "--json")
        assert (said, said_too) == ("", "")
        shown[name] = lines, [json.loads(line) for line in whole]
    assert shown["structured"] == shown["binary"]
    lines, events = shown["binary"]
    assert [line.split()[1:] for line in lines] == [
        ["io.orthanc-events.study.created.v1", f"studies/study-{number}"] for number in (1, 2, 3)
    ]
    assert [event["data"]["id"] for event in events] == ["study-1", "study-2", "study-3"]
    assert [event["sequence"] for event in events] == [f"{number:020d}" for number in (1, 2, 3)]


def test_tail_of_what_can_not_be_read_back_follows_the_outbox(beside: Beside, stream: Make) -> None:
    hook = {"type": "webhook", "name": "hook", "url": "http://127.0.0.1:9/"}
    beside.configure(stream("one"), hook | {"events": {"include": ["study.*"]}, "mode": "binary"})
    beside.start()
    beside.record(3)
    beside.wait_delivered("one")
    place = ("--outbox", str(beside.folder.path))
    lines, said = tailed(beside.config, 3, "--transport", "hook", *place)
    assert said == "hook: events can't be read back from a webhook; these are the outbox's\n"
    assert [line.split()[2] for line in lines] == ["studies/study-1", "studies/study-2", "studies/study-3"]
    whole, _ = tailed(beside.config, 3, "--transport", "hook", "--json", *place)
    of_the_broker, _ = tailed(beside.config, 3, "--transport", "one", "--json")
    assert [json.loads(line) for line in whole] == [json.loads(line) for line in of_the_broker]


def test_tail_of_a_webhook_needs_the_outbox(beside: Beside, capsys: pytest.CaptureFixture[str]) -> None:
    from orthanc_events_bridge.cli import main

    beside.configure({"type": "webhook", "url": "http://127.0.0.1:9/"})
    assert main(["tail", "--config", str(beside.config)]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "can't be read back" in said and "--outbox DIR" in said


@pytest.mark.parametrize("kind", BROKERS)
def test_tail_shows_what_a_plain_client_of_each_broker_reads(tmp_path: Path, kind: str) -> None:
    broker_or_skip(kind)
    with started(tmp_path / "line", broker=kind) as line:
        for instance in dicom.make_study(series=2):
            line.ledger.stored(line.orthanc.upload(instance.data))
        # Two series, a study and a patient: behind that nothing comes any more.
        assert wait_until(lambda: sum(event.kind.endswith(".stable") for event in line.events()) == 4, 60)
        read = {event.id: event.kind for event in line.events()}
        place = ("--outbox", str(line.folder.path), "--json")
        shown = [json.loads(text) for text in tailed(line.config, len(read), *place)[0]]
    assert {event["id"]: event["type"].removeprefix("io.orthanc-events.")[:-3] for event in shown} == read


@pytest.mark.parametrize("name", ["one", "hook"])
def test_tail_ends_quietly_when_its_reader_has_gone(beside: Beside, stream: Make, name: str) -> None:
    beside.configure(stream("one"), {"type": "webhook", "name": "hook", "url": "http://127.0.0.1:9/"})
    beside.start()
    beside.record(3)
    beside.wait_delivered("one")
    place = ("--outbox", str(beside.folder.path))
    lines, said = tailed(beside.config, 1, "--transport", name, *place, end="pipe", more=lambda: beside.record(20))
    assert len(lines) == 1
    assert "Error" not in said and "Traceback" not in said


@pytest.mark.parametrize("arguments", ["status", "transports", "set-aside", "transports --help"])
def test_a_reader_that_has_gone_is_no_error(beside: Beside, arguments: str) -> None:
    """Also where all fits into the pipe, and the end is noticed last."""
    command = [sys.executable, "-m", "orthanc_events_bridge", *arguments.split()]
    if "--help" not in arguments:
        command += ["--outbox", str(beside.folder.path)]
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


# -- the example with all ------------------------------------------------------------------------------------


def test_the_example_with_every_transport_is_valid_and_can_be_set_from_outside() -> None:
    path = Path(__file__).resolve().parents[2] / "config" / "all.yaml"
    settings = load(path, {})
    assert {options.type for options in settings.transports} == REGISTERED.keys() - {"memory"}
    assert [(options.name, options.start, options.mode) for options in settings.transports][-1] == (
        "archive",
        "now",
        "binary",
    )
    changed = load(path, {"NATS_URL": "nats://nats:4222", "ORTHANC_EVENTS_SITE": "north"})
    assert changes(settings, changed) == "site, transport nats is changed"
