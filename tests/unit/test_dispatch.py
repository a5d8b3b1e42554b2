"""The AI dispatch's parts without servers: what becomes of workflows, which one a result is of, what files may say."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml
from pydantic import SecretStr

from orthanc_events_bridge.consumers.configuration import CommandLine, configure_as
from orthanc_events_bridge.errors import BridgeError, OrthancError
from orthanc_events_bridge.loading import ConfigError
from orthanc_events_bridge.workflows.dispatch import Dispatcher
from orthanc_events_bridge.workflows.dispatch_settings import DispatchSettings
from orthanc_events_bridge.workflows.orders import Origin, order
from orthanc_events_bridge.workflows.service import split
from orthanc_events_bridge.workflows.transitions import (
    arrived,
    begun_again,
    cancelled,
    delivered,
    done_with,
    given_up,
    mended,
    noted,
    returned,
)
from orthanc_events_bridge.workflows.workflow import STATES, Outcome, Workflow, Workflows

ORIGIN = Origin("event", "first", "urn:x", "io.orthanc-events", "main", "2026-01-01T00:00:00Z", "series/s", "", "study")
ROOT = Path(__file__).parents[2]
RESULT = Outcome("came", "1")


def workflow(identifier: str = "w", **more: Any) -> Workflow:
    return Workflow(identifier, "dispatch", "series", ORIGIN, "study", "all", 3, **more)


# -- what becomes of one --------------------------------------------------------------------------------------


def test_a_step_that_is_done_changes_nothing_where_it_was_cancelled_or_a_result_came_before() -> None:
    change = done_with("sending", lambda row: row.to("waiting"))
    assert change(workflow(state="sending")).state == "waiting"  # type: ignore[union-attr]
    assert change(workflow(state="cancelled")) is None
    assert change(workflow(state="returning")) is None
    assert given_up("sending", "failed", "why")(workflow(state="done")) is None


def test_a_result_counts_late_and_for_what_has_failed_and_not_for_what_was_stopped() -> None:
    for state in sorted(STATES.keys() - {"cancelled", "superseded"}):
        found = arrived(RESULT)(workflow(state=state, reason="none came", step="watch"))
        assert found is not None and (found.state, found.reason, found.results) == ("returning", "", (RESULT,))
    for state in ("cancelled", "superseded"):
        assert arrived(RESULT)(workflow(state=state)) is None


def test_a_result_that_is_told_again_is_nothing_new_and_one_with_more_in_it_is() -> None:
    sent = replace(RESULT, given="back", sent=True)
    assert arrived(RESULT)(workflow(state="done", results=(sent,))) is None
    more = arrived(Outcome("came", "2"))(workflow(state="done", results=(sent,)))
    assert more is not None and more.results == (Outcome("came", "2"),)
    # And what was done with the smaller one is not said of the larger.
    assert noted(RESULT, sent)(more) is None
    assert noted(RESULT, sent)(workflow(results=(RESULT,))).results == (sent,)  # type: ignore[union-attr]


def test_it_is_done_when_all_that_is_expected_was_sent_on() -> None:
    report, image = Outcome("r", "1", "b", True, ("report",)), Outcome("i", "1", "c", False, ("image",))
    assert returned(workflow(results=(report, replace(image, given="")))) is None
    assert returned(workflow(results=(report, image))).state == "delivering"  # type: ignore[union-attr]
    assert delivered(())(workflow(results=(report, image))) is None
    assert delivered(("report", "image"))(workflow(results=(report,))).state == "waiting"  # type: ignore[union-attr]
    whole = workflow(results=(report, replace(image, sent=True)))
    assert delivered(("report", "image"))(whole).state == "done"  # type: ignore[union-attr]
    assert delivered(())(workflow(results=(report,))).state == "done"  # type: ignore[union-attr]


def test_a_person_goes_on_where_it_was_given_up_and_stops_what_has_not_ended() -> None:
    failed = given_up("sending", "failed", "refused")(workflow(state="sending", job="j"))
    assert failed is not None and (failed.step, failed.reason) == ("send", "refused")
    again = begun_again(failed)
    assert again is not None and (again.state, again.run, again.job, again.reason) == ("sending", 1, "", "")
    late = begun_again(workflow(state="overdue", step="watch"))
    assert late is not None and late.state == "sending"
    stopped = cancelled(workflow(state="returning"))
    assert stopped is not None and stopped.state == "cancelled"
    resumed = begun_again(stopped)
    assert resumed is not None and resumed.state == "returning"
    assert cancelled(stopped) is None and begun_again(workflow(state="waiting")) is None
    after_failure = cancelled(failed)
    assert after_failure is not None and begun_again(after_failure).state == "sending"  # type: ignore[union-attr]
    late_and_stopped = cancelled(workflow(state="overdue", step="watch"))
    assert late_and_stopped is not None and begun_again(late_and_stopped).state == "sending"  # type: ignore[union-attr]
    for state in ("done", "superseded"):
        for change in (begun_again, cancelled):
            with pytest.raises(BridgeError, match=f"workflow w is {state}"):
                change(workflow(state=state))
    assert mended("sending")(failed).state == "sending"  # type: ignore[union-attr]
    assert mended("returning")(failed) is None


# -- rows -----------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> SecretStr:
    return SecretStr(f"sqlite:///{tmp_path}/dispatch.db")


def test_a_row_survives_and_is_changed_by_one_at_a_time(tmp_path: Path, store: SecretStr) -> None:
    async def both() -> None:
        first, second = Workflows(store, "dispatch"), Workflows(store, "dispatch")
        begun = await first.begin(workflow(begun=1.5))
        assert await second.begin(workflow(begun=9.0)) == begun  # it is there already
        turns = 0

        def late(row: Workflow) -> Workflow:
            nonlocal turns
            turns += 1
            if turns == 1:  # somebody else is quicker
                with contextlib.closing(sqlite3.connect(tmp_path / "dispatch.db", isolation_level=None)) as other:
                    other.execute("UPDATE orthanc_events_workflows SET version = version + 1")
            return row.to("sending")

        assert ((await first.change("w", late)).state, turns) == ("sending", 2)
        more = [one.change("w", lambda row: replace(row, uids=row.uids + 1)) for one in [first, second] * 20]
        await asyncio.gather(*more)
        found = await first.find("w")
        assert found is not None and found.uids == 40
        result = Outcome("came", "1", "back", True, ("report",))
        await first.change("w", lambda row: row.with_result(result).to("done"))
        found = await second.find("w")
        assert found is not None
        assert (found.results, found.origin, found.begun) == ((result,), ORIGIN, 1.5)
        assert [state for state, _ in found.history] == ["anonymizing", "sending", "done"]
        assert await Workflows(store, "another").all() == []
        await first.close()
        await second.close()

    asyncio.run(both())


def test_a_larger_content_supersedes_what_is_not_done(store: SecretStr) -> None:
    async def run() -> list[str]:
        rows = Workflows(store, "dispatch")
        for number, state in enumerate(("done", "waiting", "failed", "cancelled")):
            await rows.begin(workflow(state, begun=float(number)))
            await rows.change(state, lambda row, state=state: row.to(state))  # type: ignore[misc]
        await rows.begin(replace(workflow("other", begun=0.0), series="another"))
        await rows.begin(workflow("new", begun=10.0))
        await rows.begin(workflow("waiting"))  # told again, it supersedes nothing
        found = [one.state for one in await rows.all()]
        await rows.close()
        return found

    assert asyncio.run(run()) == ["done", "anonymizing", "superseded", "superseded", "cancelled", "anonymizing"]


def test_a_result_is_of_the_workflow_whose_images_it_names_most_completely(store: SecretStr) -> None:
    async def run() -> list[str | None]:
        rows = Workflows(store, "dispatch")
        for name, uids, begun in (("small", "abc", 1.0), ("large", "abcdef", 2.0), ("elsewhere", "xyz", 3.0)):
            await rows.begin(replace(workflow(name, begun=begun), series=name, study="p", uids=len(uids)))
            await rows.note_uids(name, list(uids))
        await rows.begin(replace(workflow("alone"), series="alone", study="q"))
        asked = [("abc", "p"), ("abcdef", "p"), ("xy", "p"), ("nothing", "p"), ("nothing", "q"), ("ab", "r")]
        found = [await rows.referred_to(set(uids), study) for uids, study in asked]
        await rows.close()
        return [one.id if one else None for one in found]

    assert asyncio.run(run()) == ["small", "large", "elsewhere", None, "alone", None]


def test_what_others_may_read_is_refused(tmp_path: Path, store: SecretStr) -> None:
    (tmp_path / "dispatch.db").touch(mode=0o644)
    with pytest.raises(BridgeError, match="can be read by others"):
        asyncio.run(Workflows(store, "dispatch").all())


# -- orders, answers, files -----------------------------------------------------------------------------------


def test_an_order_is_the_same_for_the_same_and_says_nothing_of_pseudonyms() -> None:
    one, same, other = (order("step.ordered", spelt, ORIGIN, {"workflow": "w"}) for spelt in ("a", "a", "b"))
    assert one.id == same.id != other.id
    body = json.loads(one.body)
    assert (body["type"], body["correlationid"]) == ("io.orthanc-events.step.ordered.v1", "first")
    assert body["data"] == {"workflow": "w"}


def test_the_parts_of_an_answer_are_what_they_were_to_the_byte() -> None:
    parts = [b"\r\n--x\x00\r\n\r\n", b"", b"--b"]
    body = b"".join(b"--b1\r\nContent-Type: application/dicom\r\n\r\n" + one + b"\r\n" for one in parts) + b"--b1--"
    kind = 'multipart/related; type="application/dicom"; boundary=b1'
    assert list(split(body, kind)) == parts
    assert list(split(b"preamble\r\n" + body + b"\r\nepilogue", kind)) == parts
    for wrong, of in ((body[:-2], kind), (body, "text/html"), (body, "multipart/related")):
        with pytest.raises(OrthancError):
            list(split(wrong, of))


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "secret").write_text("0123456789abcdef", "utf-8")
    return {
        "broker": {"type": "memory"},
        "orthanc": "http://orthanc.test",
        "store": f"sqlite:///{tmp_path}/dispatch.db",
        "anonymize": {"secret_file": str(tmp_path / "secret")},
        "service": {"dicomweb": "ai"},
        "results": {"to": {"modality": "pacs"}},
        "rules": [{"name": "all"}],
    }


def made(settings: dict[str, Any]) -> Dispatcher:
    return Dispatcher(configure_as(DispatchSettings, settings, None, {}, CommandLine()))


def test_each_step_has_a_consumer_with_limits_of_its_own(settings: dict[str, Any]) -> None:
    settings["service"] |= {"concurrency": 7, "retry": {"max_attempts": 3}}
    found = {one.name: one for one in made(settings).consumers}
    names = ("dispatch", *(f"dispatch-{step}" for step in ("anonymize", "send", "watch", "return", "deliver")))
    assert tuple(found) == names
    send, watch = found["dispatch-send"].settings, found["dispatch-watch"].settings
    assert (send.concurrency, send.policy().max_attempts) == (7, 3)
    assert (watch.policy().max_attempts, watch.policy().max_age) == (None, None)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("store", "broker", "is no database"),
        ("ordered", True, "would hold up all others"),
        ("service", {}, "how it is reached has to be said in one way"),
        ("service", {"dicomweb": "ai", "answers": "http://ai.test/results"}, "give one of dicomweb, answers"),
        ("rules", [{"name": "a"}, {"name": "a"}], "is the name of another rule"),
        ("anonymize", {"project": "a b"}, "can't be the name of a project"),
        ("results", {"to": {}}, "where it sends to is not said"),
    ],
)
def test_what_makes_no_sense_is_said_with_its_place(
    settings: dict[str, Any], place: str, value: Any, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        made({**settings, place: value})


def test_the_example_is_right_and_the_schema_for_editors_takes_it() -> None:
    path = ROOT / "config" / "dispatch.yaml"
    found = configure_as(DispatchSettings, {}, path, {}, CommandLine()).settings
    assert (found.service.dicomweb, found.service.deadline, list(found.results.expect)) == ("ai", 3600, ["report"])
    schema = json.loads((ROOT / "orthanc_events_bridge/workflows/orthanc-dispatch.schema.json").read_text("utf-8"))
    jsonschema_rs.meta.validate(schema)
    text = path.read_text("utf-8")
    jsonschema_rs.validate(schema, yaml.safe_load(text))
    for right, wrong in (("dicomweb: ai", "dicmweb: ai"), ("rules:", "rule:"), ("is: SR", "iss: SR")):
        assert right in text
        with pytest.raises(jsonschema_rs.ValidationError):
            jsonschema_rs.validate(schema, yaml.safe_load(text.replace(right, wrong, 1)))


@pytest.mark.parametrize("arguments", [["dispatch", "--check"], ["workflow", "list"]])
def test_a_missing_pydicom_is_named(arguments: list[str]) -> None:
    code = "import sys; sys.modules['pydicom'] = None; from orthanc_events_bridge.cli import main"
    command = [sys.executable, "-c", f"{code}; sys.exit(main({arguments!r}))"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        'orthanc-events: pydicom is not installed (pip install "orthanc-events-bridge[anonymizer]")\n'
    )
