"""``bridge.db`` on a real disk: positions, settings, what was set aside, commands."""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

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
    assert view.acknowledged_seq(None) == 7


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
        state.save(name, Progress(position, None, "", 0))
    assert view.delivered("r", None) == 5
    assert view.delivered("another", None) == 0
    # A transport that is configured no longer must not hold the outbox for ever.
    assert view.delivered("r", ["a"]) == 12
    assert view.acknowledged_seq(["a"]) is None, "nothing of the log was delivered yet"


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
    state.done(found[0])
    assert [c.transport for c in opened().commands()] == ["other"]


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
    assert view.acknowledged_seq(None) is None and view.delivered("r", None) == 0
