"""``bridge.db`` on a real disk: positions, settings, what was set aside, commands."""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orthanc_events_bridge.bridge import state as state_module
from orthanc_events_bridge.bridge.state import Progress, State
from orthanc_events_bridge.errors import OutboxError
from orthanc_events_bridge.status import BridgeView

Open = Callable[[], State]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bridge.db"


@pytest.fixture
def opened(path: Path) -> Iterator[Open]:
    states: list[State] = []

    def make() -> State:
        states.append(State(path))
        return states[-1]

    yield make
    for state in states:
        state.close()


@pytest.fixture
def view(path: Path) -> Iterator[BridgeView]:
    made = BridgeView(path)
    yield made
    made.close()


def test_new_transport_begins_with_the_oldest_row(opened: Open) -> None:
    assert opened().progress("nats", "r") == Progress(0, None, "", 0)


def test_progress_is_kept(opened: Open) -> None:
    state = opened()
    state.progress("nats", "r")
    state.save("nats", Progress(12, 7, "made then", 5))
    assert state.progress("nats", "r") == Progress(12, 7, "made then", 5)
    assert opened().progress("nats", "r") == Progress(12, 7, "made then", 5)
    assert state.progress("other", "r") == Progress(0, None, "", 0)


def test_new_outbox_begins_anew_and_keeps_what_belongs_to_the_broker(opened: Open, view: BridgeView) -> None:
    state = opened()
    state.progress("nats", "old")
    state.save("nats", Progress(12, 7, "made then", 5))
    state.gap("nats", 3, 4)
    assert state.progress("nats", "new") == Progress(0, 7, "made then", 5)
    assert view.transports()[0]["gap_through"] is None
    assert view.acknowledged_seq() == 7


def test_gap_grows_and_keeps_its_beginning(opened: Open, view: BridgeView) -> None:
    state = opened()
    state.progress("nats", "r")
    state.gap("nats", 3, 9)
    state.gap("nats", 12, 20)
    [transport] = view.transports()
    assert (transport["gap_from"], transport["gap_through"]) == (3, 20)


def test_delivered_is_what_all_transports_have_of_this_outbox(opened: Open, view: BridgeView) -> None:
    state = opened()
    assert view.delivered("r", None) == 0
    for name, position in (("a", 12), ("b", 5)):
        state.progress(name, "r")
        state.save(name, Progress(position, position + 100, "", 0))
    assert view.delivered("r", None) == 5
    assert view.delivered("another", None) == 0
    assert view.behind("r") == "b"
    # One that is configured no longer keeps its place, until it is forgotten on purpose.
    assert view.delivered("r", ["a"]) == 5
    assert view.acknowledged_seq() == 105
    state.forget("b")
    assert view.delivered("r", ["a"]) == 12
    assert view.acknowledged_seq() == 112
    assert view.behind("r") == "a"


def test_transport_that_is_configured_and_was_not_started_yet_needs_everything(opened: Open, view: BridgeView) -> None:
    state = opened()
    assert view.delivered("r", ["a"]) == 0
    state.progress("a", "r")
    state.save("a", Progress(12, None, "", 0))
    assert view.delivered("r", ["a"]) == 12
    assert view.delivered("r", ["a", "new"]) == 0
    state.progress("new", "r", 9)
    assert view.delivered("r", ["a", "new"]) == 9
    assert view.acknowledged_seq() is None, "nothing of the log was delivered yet"


def test_configured_ones_are_those_of_the_note_for_capture(opened: Open, view: BridgeView) -> None:
    state = opened()
    assert view.configured() is None
    state.note("capture", {"transports": ["a", "b"]})
    assert view.configured() == ["a", "b"]


def test_new_transport_begins_where_it_is_told_and_a_known_one_does_not(opened: Open) -> None:
    state = opened()
    assert state.progress("late", "r", 40).position == 40
    assert state.progress("late", "r", 80).position == 40
    assert state.progress("late", "another outbox", 40).position == 0, "nothing of another outbox may be missed"


def test_what_is_done_together_is_kept_as_a_whole_or_not_at_all(opened: Open) -> None:
    state = opened()

    def torn() -> None:
        with state.together():
            state.progress("a", "r")
            raise KeyError

    with pytest.raises(KeyError):
        torn()
    assert opened().known() == {}
    with state.together():
        state.progress("a", "r", 3)
        state.progress("b", "r", 4)
        assert opened().known() == {}
    assert opened().known() == {"a": 3, "b": 4}


def test_pause_is_kept_with_its_beginning(opened: Open, view: BridgeView, monkeypatch: pytest.MonkeyPatch) -> None:
    state = opened()
    assert view.paused() == state.paused() == {}
    for moment in (1_795_464_387.5, 1_795_464_400.0):
        monkeypatch.setattr("orthanc_events_bridge.bridge.state.time.time", lambda moment=moment: moment)
        state.pause("nats")
    assert view.paused() == opened().paused() == {"nats": 1_795_464_387_500}
    state.resume("other")
    state.resume("nats")
    assert view.paused() == opened().paused() == {}


def test_forgotten_transport_leaves_nothing_and_comes_back_as_a_new_one(opened: Open, view: BridgeView) -> None:
    state = opened()
    for name in ("old", "other"):
        state.progress(name, "r")
        state.save(name, Progress(12, 7, "made then", 5))
        state.gap(name, 3, 4)
        state.set_aside(name, 2, "an id", "study.stable", "too large")
        state.pause(name)
    state.forget("old")
    assert [one["name"] for one in view.transports()] == ["other"]
    assert [one["transport"] for one in view.set_aside()] == ["other"]
    assert view.paused().keys() == {"other"}
    assert state.progress("old", "r", 9) == Progress(9, None, "", 0)


def test_settings_keep_their_number(opened: Open) -> None:
    state = opened()
    first = state.number_settings({"source": "urn:a", "site": "x"})
    assert state.number_settings({"site": "x", "source": "urn:a"}) == first
    second = state.number_settings({"source": "urn:b", "site": "x"})
    assert second > first > 0
    assert opened().number_settings({"source": "urn:a", "site": "x"}) == first
    assert state.settings() == {
        first: {"source": "urn:a", "site": "x"},
        second: {"source": "urn:b", "site": "x"},
    }


def test_no_number_of_settings_is_given_again_when_the_file_was_lost(
    opened: Open, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the outbox name the number, and would be told with another source."""
    monkeypatch.setattr("orthanc_events_bridge.bridge.state.time.time", lambda: 1_795_464_387.5)
    state = opened()
    numbers = {state.number_settings({"source": f"urn:{n}"}) for n in range(3)}
    state.close()
    path.unlink()
    monkeypatch.setattr("orthanc_events_bridge.bridge.state.time.time", lambda: 1_795_464_400.0)
    assert opened().number_settings({"source": "urn:other"}) not in numbers


def test_view_finds_the_settings_that_apply(opened: Open, view: BridgeView) -> None:
    assert view.settings() is None
    state = opened()
    assert view.settings() is None
    number = state.number_settings({"source": "urn:a"})
    state.note("capture", {"settings": number, "keep": 5})
    assert view.settings() == (number, '{"source": "urn:a"}')
    assert view.note("capture") == {"settings": number, "keep": 5}
    assert view.note("other") == {}
    other = state.number_settings({"source": "urn:b"})
    assert view.all_settings() == {number: {"source": "urn:a"}, other: {"source": "urn:b"}}


def test_set_aside_and_taken_back(opened: Open, view: BridgeView) -> None:
    state = opened()
    state.set_aside("nats", 5, "an id", "study.stable", "too large")
    state.set_aside("nats", 5, "an id", "study.stable", "still too large")
    state.set_aside("nats", 3, "other id", "study.stable", "too large")
    entries = [(e["transport"], e["position"], e["event"], e["reason"]) for e in view.set_aside()]
    assert entries == [("nats", 3, "other id", "too large"), ("nats", 5, "an id", "still too large")]
    state.taken_back("nats", 5)
    assert [e["position"] for e in view.set_aside()] == [3]


def test_commands_are_done_in_order_and_once(opened: Open) -> None:
    state = opened()
    state.ask("resend", "nats", 5)
    state.ask("resend", "other")
    found = state.commands()
    assert [(c.command, c.transport, c.argument) for c in found] == [
        ("resend", "nats", 5),
        ("resend", "other", None),
    ]
    state.done(found[0], "sent again")
    assert [c.transport for c in opened().commands()] == ["other"]


def test_answer_is_found_by_the_commands_number(opened: Open, view: BridgeView) -> None:
    asking, state = opened(), opened()
    first, second = asking.ask("pause", "a"), asking.ask("forget", "b")
    assert asking.answer(first) is asking.answer(second) is None
    assert view.waiting() == [("pause", "a"), ("forget", "b")]
    for command, failed in zip(state.commands(), (False, True), strict=True):
        state.done(command, f"{command.command} {command.transport}", failed=failed)
    assert asking.answer(first) == (True, "pause a")
    assert asking.answer(second) == (False, "forget b")
    assert view.waiting() == []


def test_old_answers_go(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orthanc_events_bridge.bridge.state._ANSWERS", 2)
    state = opened()
    numbers = [state.ask("pause", "a") for _ in range(4)]
    for command in state.commands():
        state.done(command, "paused")
    assert [state.answer(number) is not None for number in numbers] == [False, False, True, True]


def test_file_of_a_version_without_pauses_and_answers_is_taken(opened: Open, path: Path, view: BridgeView) -> None:
    opened().close()
    db = sqlite3.connect(path)
    db.executescript("DROP TABLE paused; DROP TABLE answers")
    db.close()
    assert view.paused() == {}
    state = opened()
    state.pause("nats")
    assert view.paused().keys() == {"nats"}


def test_view_follows_a_file_that_was_lost_and_made_again(opened: Open, path: Path, view: BridgeView) -> None:
    state = opened()
    state.progress("nats", "r", 5)
    assert view.delivered("r", ["nats"]) == 5
    state.close()
    for file in path.parent.glob("bridge.db*"):
        file.unlink()
    assert view.delivered("r", ["nats"]) == 0
    assert view.transports() == []
    opened().progress("nats", "r", 2)
    assert view.delivered("r", ["nats"]) == 2


def test_file_is_closed_to_others(opened: Open, path: Path) -> None:
    opened()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_other_version_is_refused(opened: Open, path: Path) -> None:
    opened().close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 9")
    db.close()
    with pytest.raises(OutboxError, match="has version 9, this package uses 1"):
        opened()


def test_file_that_is_no_database_is_said_as_such(opened: Open, path: Path) -> None:
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(OutboxError, match="file is not a database"):
        opened()


def test_folder_that_is_not_there_is_said_as_such(tmp_path: Path) -> None:
    with pytest.raises(OutboxError, match="can't be opened: No such file"):
        State(tmp_path / "no" / "bridge.db")


def test_view_of_nothing(view: BridgeView) -> None:
    assert view.transports() == [] and view.set_aside() == [] and view.settings() is None
    assert view.acknowledged_seq() is None and view.delivered("r", None) == 0 and view.behind("r") is None
    assert view.paused() == {} and view.waiting() == [] and view.configured() is None and view.all_settings() == {}


@pytest.mark.parametrize("made", ["now", "by an earlier version"])
def test_a_spike_gives_its_disk_back_in_small_steps_while_it_is_open(opened: Open, path: Path, made: str) -> None:
    if made != "now":
        db = sqlite3.connect(path)
        schema = state_module._SCHEMA.replace("PRAGMA auto_vacuum = INCREMENTAL;", "")
        db.executescript(f"{schema} PRAGMA user_version = {state_module.VERSION}; COMMIT;")
        db.close()
    state = opened()
    state.pause("kept")
    with state.together():
        for position in range(20_000):
            state.set_aside("one", position, "event", "type", "x" * 300)
    wal = Path(f"{path}-wal")
    state.shrink()
    state.forget("one")
    for _ in range(6):
        state.shrink()
    assert path.stat().st_size < 500_000
    state.pause("other")
    state.pause("another")
    assert wal.stat().st_size <= 1_048_576
    assert set(state.paused()) == {"kept", "other", "another"}
