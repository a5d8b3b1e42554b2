"""The AI dispatch's steps, by the kit: no broker, and an Orthanc that is recorded."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from orthanc_events_bridge.consumers.app import Consumer
from orthanc_events_bridge.consumers.configuration import CommandLine, configure_as
from orthanc_events_bridge.consumers.stores import StoreError
from orthanc_events_bridge.errors import RefusedError
from orthanc_events_bridge.testing.dicom import Study, make_study
from orthanc_events_bridge.testing.kit import Kit
from orthanc_events_bridge.transports.base import Outgoing
from orthanc_events_bridge.workflows.dispatch import Dispatcher
from orthanc_events_bridge.workflows.dispatch_settings import DispatchSettings
from orthanc_events_bridge.workflows.orders import Origin, order
from orthanc_events_bridge.workflows.workflow import Outcome, Workflow

STUDY = make_study(patient_id="P-4711", instances=2)
SERIES = STUDY.series[0]
ORIGIN = Origin("event", "event", "urn:x", "io.orthanc-events", "main", "", f"series/{SERIES}", "", STUDY.id)


class Inboxes:
    """Notes what is ordered of whom."""

    def __init__(self) -> None:
        self.orders: list[tuple[str, Outgoing]] = []

    async def put(self, consumer: str, order: Outgoing) -> None:
        self.orders.append((consumer, order))

    async def close(self) -> None:
        """Nothing is open."""


class Made:
    """A dispatch without a broker, with a workflow in its store."""

    def __init__(self, folder: Path, **more: Any) -> None:
        (folder / "secret").write_text("0123456789abcdef", "utf-8")
        settings = {
            "broker": {"type": "memory"},
            "orthanc": "http://orthanc.test",
            "store": f"sqlite:///{folder}/dispatch.db",
            "audit": str(folder / "audit.jsonl"),
            "anonymize": {"secret_file": str(folder / "secret")},
            "service": {"dicomweb": "ai", "deadline": "1h"},
            "results": {"to": {"modality": "pacs"}},
            "rules": [{"name": "all"}],
        }
        self.dispatcher = Dispatcher(configure_as(DispatchSettings, {**settings, **more}, None, {}, CommandLine()))
        self.inboxes = Inboxes()
        self.dispatcher._inboxes = self.inboxes  # type: ignore[assignment]
        self._folder = folder

    def begin(self, **more: Any) -> None:
        one = Workflow("w", "dispatch", SERIES, ORIGIN, STUDY.id, "all", len(STUDY.instances), **more)
        asyncio.run(self._with(self.dispatcher.steps.workflows.begin(one)))

    async def _with(self, work: Any) -> Any:
        try:
            return await work
        finally:
            await self.dispatcher.close()

    def row(self) -> Workflow:
        found = asyncio.run(self._with(self.dispatcher.steps.workflows.find("w")))
        assert isinstance(found, Workflow)
        return found

    def step(self, name: str) -> Consumer:
        return next(one for one in self.dispatcher.consumers if one.name == f"dispatch-{name}")

    @property
    def ordered(self) -> list[str]:
        return [consumer for consumer, _ in self.inboxes.orders]

    def audit(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self._folder / "audit.jsonl").read_text("utf-8").splitlines()]


def push(identifier: str = "w") -> Outgoing:
    """An order."""
    data = {"level": "series", "id": SERIES, "parents": {"study": STUDY.id}, "workflow": identifier}
    return order("step.ordered", identifier, ORIGIN, data)


def recorded(kit: Kit, study: Study) -> list[bytes]:
    """An Orthanc with the series; what is put there."""
    put: list[bytes] = []

    def store(request: httpx.Request) -> httpx.Response:
        status = "AlreadyStored" if request.content in put else "Success"
        put.append(request.content)
        above = {"ParentSeries": "its-series", "ParentStudy": "its-study", "ParentPatient": "its-patient"}
        return httpx.Response(200, json={"Status": status, "ID": "x", **above})

    instances = [{"ID": one.id, "MainDicomTags": {"SOPInstanceUID": one.sop_uid}} for one in study]
    kit.orthanc.get(f"/series/{SERIES}/instances").respond(json=instances)
    for one in study:
        kit.orthanc.get(f"/instances/{one.id}/file").respond(content=one.data)
    kit.orthanc.post("/instances").mock(side_effect=store)
    kit.orthanc.get("/series/its-series").respond(json={"MainDicomTags": {"SeriesInstanceUID": "2.25.1"}})
    kit.orthanc.get("/series/its-series/study").respond(json={"MainDicomTags": {"StudyInstanceUID": "2.25.2"}})
    return put


def test_a_step_is_done_once_and_an_order_that_comes_again_orders_the_next_again(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.begin()
    with made.step("anonymize").test() as kit:
        put = recorded(kit, STUDY)
        kit.send(push())
        kit.assert_handled()
        row = made.row()
        assert (row.state, row.anonymized, row.study, row.uids) == ("sending", "its-series", "2.25.2", 3)
        assert len(put) == 2 and b"P-4711" not in b"".join(put)
        kit.send(push())
        kit.assert_handled()
    assert len(put) == 2
    assert made.ordered == ["dispatch-send", "dispatch-send"]
    assert len({one.id for _, one in made.inboxes.orders}) == 1  # the same order
    body = made.inboxes.orders[0][1].body
    assert b"its-series" not in body and b"2.25." not in body  # nobody learns there which pseudonym it has
    assert [one["what"] for one in made.audit()] == ["pseudonymised"]


def test_what_has_grown_is_left_to_the_workflow_of_all_of_it(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.begin()
    with made.step("anonymize").test() as kit:
        put = recorded(kit, make_study(patient_id="P-4711", instances=3))
        kit.send(push())
        kit.assert_handled()
    assert (made.row().state, put, made.ordered) == ("superseded", [], [])


def test_a_part_is_not_sent_for_the_whole(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.begin()
    whole, burned = make_study(instances=1), make_study(instances=1, canary={"BurnedInAnnotation": "YES"})
    with made.step("anonymize").test() as kit:
        recorded(kit, Study("P", "1.2", (*whole.instances, *burned.instances)))
        kit.send(push())
        kit.finish()
        assert str(kit.dead[0].reason) == "it is not sent: 1 instances: there is text in its pixels"
    row = made.row()
    assert (row.state, row.step, row.reason) == ("failed", "anonymize", str(kit.dead[0].reason))
    assert made.audit()[-1]["why"] == row.reason and not made.ordered


def test_a_series_that_was_deleted_has_failed(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.begin()
    with made.step("anonymize").test() as kit:
        kit.orthanc.get(f"/series/{SERIES}/instances").respond(404)
        kit.send(push())
        kit.finish()
    assert made.row().reason == "the series was deleted before it was sent"


def test_an_order_of_an_unknown_workflow_is_a_dead_letter(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.begin()
    with made.step("anonymize").test() as kit:
        kit.send(push("another"))
        assert "there is no such workflow" in str(kit.dead[0].reason)
    assert made.row().state == "anonymizing"


def test_a_deadline_that_is_over_makes_it_overdue_and_one_that_is_not_waits(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.begin(state="waiting", due=time.time() + 3600)
    with made.step("watch").test() as kit:
        kit.send(push())
        assert len(kit.retried) == 1 and 3500 < (kit.waiting or 0) <= 3600
    assert made.row().state == "waiting"
    asyncio.run(made._with(made.dispatcher.steps.workflows.change("w", lambda row: replace(row, due=1.0))))
    with made.step("watch").test() as kit:
        kit.send(push())
        assert "no result came within 3600 s" in str(kit.dead[0].reason)
    assert (made.row().state, made.row().step) == ("overdue", "watch")


def test_who_dies_between_the_row_and_the_dead_letter_leaves_no_row_without_one(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.begin(state="overdue", step="watch", reason="none came", due=1.0)
    with made.step("watch").test() as kit:
        kit.send(push())
        assert str(kit.dead[0].reason) == "none came"
    with made.step("send").test() as kit:
        kit.send(push())
        kit.assert_handled()  # it is not this step that was given up
    assert (made.row().state, made.ordered) == ("overdue", [])


def test_a_result_that_came_before_the_deadline_leaves_nothing_to_watch(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.begin(state="done", due=1.0, results=(Outcome("came", "1", "given", True),))
    with made.step("watch").test() as kit:
        kit.send(push())
        kit.assert_handled()
    assert (made.row().state, made.ordered) == ("done", [])


def test_what_cannot_be_written_down_holds_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(tmp_path)
    made.begin()

    async def full(*_: object) -> Workflow:
        raise StoreError("the disk is full", "make room")

    monkeypatch.setattr(made.dispatcher.steps.workflows, "find", full)
    with pytest.raises(RefusedError, match="the disk is full"):
        asyncio.run(made._with(made.dispatcher._give_up("w", "anonymizing", "why")))


def test_what_was_deleted_before_it_was_sent_is_made_again(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.begin(state="sending", anonymized="gone", study="2.25.2")
    with made.step("send").test() as kit:
        kit.orthanc.get("/series/gone").respond(404)
        kit.send(push())
        kit.assert_handled()
    assert (made.row().state, made.ordered) == ("anonymizing", ["dispatch-anonymize"])
    results = (Outcome("came", "1", "gone"), Outcome("other", "1", "there", True))
    change = made.dispatcher.steps.workflows.change("w", lambda row: replace(row, state="delivering", results=results))
    asyncio.run(made._with(change))
    with made.step("deliver").test() as kit:
        kit.orthanc.get("/series/gone").respond(404)
        kit.send(push())
        kit.assert_handled()
    row = made.row()
    assert (row.state, made.ordered[1:]) == ("returning", ["dispatch-return"])
    assert {one.series: one.given for one in row.results} == {"came": "", "other": "there"}
