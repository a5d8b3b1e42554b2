"""When failed jobs are resubmitted, made again, left alone or given up; with a recorded Orthanc."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import respx

from orthanc_events_bridge.consumers import Event
from orthanc_events_bridge.consumers.configuration import CommandLine, configure_as
from orthanc_events_bridge.events.mapping import STRUCTURED
from orthanc_events_bridge.loading import ConfigError
from orthanc_events_bridge.testing import event, orthanc_id
from orthanc_events_bridge.testing.events import AT, RECORDER
from orthanc_events_bridge.testing.kit import Kit
from orthanc_events_bridge.transports.base import Outgoing
from orthanc_events_bridge.workflows.job_retry import JobRetry, JobRetrySettings

STUDY = orthanc_id("study")
JOB = {"type": "DicomModalityStore", "remoteAet": "PACS", "parentResources": [STUDY], "errorCode": 9}


def made(tmp_path: Path, more: str = "") -> JobRetry:
    """The consumer of a file."""
    file = tmp_path / "job-retry.yaml"
    file.write_text(
        f"broker: {{type: memory}}\nstore: sqlite:///{tmp_path}/notes.db\northanc: http://orthanc.test\n{more}", "utf-8"
    )
    return JobRetry(configure_as(JobRetrySettings, {}, environment={}, given=CommandLine(file)))


@pytest.fixture
def kit(tmp_path: Path) -> Iterator[Kit]:
    with made(tmp_path, "resubmit: {attempts: 3}\n").app.test() as kit:
        prepare(kit)
        yield kit


def prepare(kit: Kit, **modalities: str) -> None:
    """Let Orthanc's clock be the kit's, and let it know of these modalities, by name and AET."""
    kit.orthanc.get("/tools/now").mock(side_effect=lambda _: httpx.Response(200, text=spelt(kit.now).partition(".")[0]))
    expanded = {name: {"AET": aet} for name, aet in (modalities or {"other": "X", "pacs": "PACS"}).items()}
    kit.orthanc.get("/modalities?expand").respond(json=expanded)
    kit.orthanc.get("/orthanc-events/status").respond(json={"outbox": {"recorder": RECORDER}})


def spelt(at: datetime) -> str:
    """As Orthanc spells a moment."""
    return at.strftime("%Y%m%dT%H%M%S.%f")


def failed(number: int = 1, job_id: str = "job-1", *, at: datetime = AT, created: datetime = AT, **more: Any) -> Event:
    """A failure, the n-th event of the outbox."""
    job = {**JOB, "state": "Failure", "created": spelt(created), "completed": spelt(at), **more}
    return event("job.failed", job_id=job_id, number=number, at=at, job=job)


def succeeded(number: int, job_id: str, *, at: datetime = AT, **more: Any) -> Event:
    """What a failure did has been done by this job."""
    job = {**JOB, "state": "Success", "created": spelt(AT), "completed": spelt(at), "errorCode": 0, **more}
    return event("job.succeeded", job_id=job_id, number=number, at=at, job=job)


def known(kit: Kit, *jobs: Mapping[str, Any]) -> None:
    """Let Orthanc have these jobs."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/jobs":
            return httpx.Response(200, json=list(jobs))
        found = [job for job in jobs if request.url.path == f"/jobs/{job['ID']}"]
        return httpx.Response(200, json=found[0]) if found else httpx.Response(404)

    kit.orthanc.get(url__regex=r"^http://orthanc.test/jobs").mock(side_effect=answer)


def resubmitting(kit: Kit, one: Event, **more: Any) -> respx.Route:
    """Let Orthanc have the job of a failure, which succeeds when it is resubmitted."""
    known(kit, described(one))

    def begun(request: httpx.Request) -> httpx.Response:
        known(kit, described(one, **{"State": "Success", **more}))
        return httpx.Response(200, json={})

    return kit.orthanc.post(f"/jobs/{one.job_id}/resubmit").mock(side_effect=begun)


def described(one: Event, **more: Any) -> dict[str, Any]:
    """The job of a failure, as Orthanc describes it."""
    job = one.job
    content = {"RemoteAet": job["remoteAet"], "ParentResources": job["parentResources"]}
    said = {"Type": job["type"], "State": "Failure", "ErrorCode": 9, "ErrorDescription": "Error in the network"}
    dates = {"CreationTime": job["created"], "CompletionTime": job["completed"]}
    return {"ID": one.job_id, **said, **dates, "Content": content, **more}


def test_each_failure_waits_longer_and_in_the_end_it_is_given_up(kit: Kit, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    at = AT
    for number, minutes in enumerate((1, 2, 4), 1):
        one = failed(number, at=at)
        again = resubmitting(kit, one)
        kit.send(one, one)  # it comes twice
        assert again.call_count == number - 1
        assert kit.waiting == pytest.approx(minutes * 60)
        kit.advance(minutes=minutes - 0.1)
        assert again.call_count == number - 1
        kit.advance(minutes=0.2)
        assert again.call_count == number
        kit.advance(minutes=1)
        assert kit.waiting is None and again.call_count == number
        at = kit.now
    assert {one.levelname for one in caplog.records} == {"INFO"}  # to wait is nothing to be warned of
    one = failed(4, at=at)
    known(kit, described(one))
    kit.send(one)
    assert again.call_count == 3
    (dead,) = kit.dead
    assert "given up behind 3 resubmissions: error 9, Error in the network)" in repr(dead)


@pytest.mark.parametrize("hours", [-5, 5])
def test_waits_are_by_orthancs_own_clock(kit: Kit, hours: int) -> None:
    """The workers' may be another."""
    clock = lambda _: httpx.Response(200, text=spelt(kit.now + timedelta(hours=hours)).partition(".")[0])  # noqa: E731
    kit.orthanc.get("/tools/now").mock(side_effect=clock)
    one = failed(at=AT + timedelta(hours=hours))
    again = resubmitting(kit, one)
    kit.send(one)
    assert kit.waiting == pytest.approx(60)
    kit.advance(minutes=1.1)
    assert again.call_count == 1


def test_a_clock_that_is_set_back_lets_nobody_wait_for_longer(kit: Kit) -> None:
    one = failed(at=AT + timedelta(days=3))
    known(kit, described(one))
    kit.send(one)
    assert kit.waiting == pytest.approx(60)


def test_what_orthanc_has_forgotten_is_made_again(kit: Kit) -> None:
    known(kit)
    kit.orthanc.get(f"/studies/{STUDY}").respond(json={})
    at = AT + timedelta(minutes=1, seconds=1)
    two = failed(2, "job-2", at=at, created=at, localAet="GATEWAY")

    def begun(request: httpx.Request) -> httpx.Response:
        known(kit, described(two))
        return httpx.Response(200, json={"ID": "job-2"})

    store = kit.orthanc.post("/modalities/pacs/store").mock(side_effect=begun)
    kit.send(failed(localAet="GATEWAY"))
    kit.advance(minutes=1.1)
    assert store.call_count == 1
    assert b'"LocalAet":"GATEWAY"' in store.calls[0].request.content.replace(b": ", b":")
    # The one that was made again counts on, and what was forgotten is not made twice.
    kit.send(two)
    kit.advance(minutes=1)
    assert store.call_count == 1
    assert kit.waiting == pytest.approx(60, abs=10)


def test_what_orthanc_forgot_of_a_submission_is_submitted_once_more(kit: Kit) -> None:
    """It was killed before it had written it down; and that counts as one."""
    one = failed()
    known(kit, described(one))
    again = kit.orthanc.post("/jobs/job-1/resubmit").respond(json={})
    kit.send(one)
    kit.advance(minutes=1.1)
    assert again.call_count == 1
    again = resubmitting(kit, one)
    kit.advance(minutes=1)
    assert again.call_count == 2
    kit.finish()
    kit.assert_handled()
    at = kit.now
    for number in (2, 3):
        one = failed(number, at=at)
        again = resubmitting(kit, one)
        kit.send(one)
        kit.finish()
        at = kit.now
    assert again.call_count == 4 and not kit.dead


def test_a_failure_that_orthanc_forgot_counts_all_the_same(kit: Kit) -> None:
    """It was killed before it had written down that the job failed again: it has the time of the failure before."""
    one = failed(2, at=AT + timedelta(minutes=5))
    again = resubmitting(kit, failed(1))
    kit.send(one)
    kit.finish()
    assert again.call_count == 1


def test_two_modalities_of_one_aet_are_not_taken_for_each_other(kit: Kit) -> None:
    """What was sent to one of them is not there in the other."""
    prepare(kit, main="PACS", backup="PACS")
    one, other = failed(), described(failed(job_id="job-2"), State="Success")
    again = resubmitting(kit, one)
    known(kit, described(one), {**other, "CreationTime": spelt(AT + timedelta(seconds=5))})
    kit.send(one, succeeded(2, "job-2", at=AT + timedelta(seconds=5)))
    kit.finish()
    assert again.call_count == 1
    # Its own success is one.
    kit.send(succeeded(3, "job-1", at=kit.now), failed(4, at=kit.now))
    assert kit.waiting == pytest.approx(60)


def test_of_two_failures_of_the_same_the_later_one_counts(kit: Kit) -> None:
    """Whichever comes first, and whichever job was made first: one of them is answered, and only one."""
    later = AT + timedelta(seconds=20)
    one = failed(1, "job-1", at=AT + timedelta(seconds=10), created=AT + timedelta(seconds=5))
    two = failed(2, "job-2", at=later, created=AT)
    for first, second in ((one, two), (two, one)):
        known(kit, described(one), described(two))
        kit.send(first, second)
        not_again = kit.orthanc.post("/jobs/job-1/resubmit")
        again = kit.orthanc.post("/jobs/job-2/resubmit").respond(json={})
        kit.advance(minutes=5)
        assert not not_again.called
        assert again.called
        known(kit, described(one), described(two, State="Success"))
        kit.finish()
        kit.send(succeeded(3, "job-2", at=kit.now))
        kit.assert_handled()
        one = failed(4, "job-1", at=kit.now, created=kit.now - timedelta(seconds=1))
        two = failed(5, "job-2", at=kit.now + timedelta(seconds=1), created=kit.now - timedelta(seconds=2))


def test_failures_that_others_repeat_are_not_counted_as_ours(kit: Kit) -> None:
    """They make the waits longer, but nothing is given up for them."""
    for number in range(1, 7):
        kit.send(failed(number, f"job-{number}", at=kit.now, created=kit.now))
        kit.advance(seconds=1)
    one = failed(7, "job-7", at=kit.now, created=kit.now)
    again = resubmitting(kit, one)
    kit.send(one)
    kit.advance(minutes=63.9)
    assert not again.called
    kit.advance(minutes=0.3)
    assert again.call_count == 1 and not kit.dead


def test_what_is_redriven_is_submitted_at_once_and_counted_from_1(kit: Kit) -> None:
    at = AT
    for number in range(1, 5):
        one = failed(number, at=at)
        again = resubmitting(kit, one)
        kit.send(one)
        kit.finish()
        at = kit.now
    assert len(kit.dead) == 1 and again.call_count == 3
    again = resubmitting(kit, one)
    body = json.dumps({**one.attributes, "data": one.data}).encode()
    headers = (("orthanc-operation", "redrive"),)
    kit.send(Outgoing(one.id, "main", "job", "failed", "k", "00", STRUCTURED, body, headers=headers))
    assert again.call_count == 4
    kit.finish()
    assert again.call_count == 4
    one = failed(5, at=kit.now)
    resubmitting(kit, one)
    kit.send(one)
    assert kit.waiting == pytest.approx(120)
    kit.finish()
    assert len(kit.dead) == 1


def test_a_peer_is_known_by_its_url(kit: Kit) -> None:
    known(kit)
    peers = {"a": {"Url": "http://user:secret@peer:8042/"}, "b": {"Url": "http://other:8042/"}}
    kit.orthanc.get("/peers?expand").respond(json=peers)
    kit.orthanc.get(f"/studies/{STUDY}").respond(json={})

    def begun(request: httpx.Request) -> httpx.Response:
        known(
            kit,
            {
                "ID": "job-2",
                "Type": "OrthancPeerStore",
                "State": "Success",
                "CreationTime": spelt(kit.now),
                "Content": {"Peer": ["http://peer:8042/", "user", ""], "ParentResources": [STUDY]},
            },
        )
        return httpx.Response(200, json={"ID": "job-2"})

    store = kit.orthanc.post("/peers/a/store").mock(side_effect=begun)
    kit.send(failed(type="OrthancPeerStore", remoteAet=None, peer="http://peer:8042/"))
    kit.finish()
    kit.assert_handled()
    assert store.call_count == 1


@pytest.mark.parametrize(
    ("modalities", "there", "job", "reason"),
    [
        ({}, True, {}, "has none of its modalities at PACS"),
        ({"a": {"AET": "PACS"}, "b": {"AET": "PACS"}}, True, {}, "knows 2 of its modalities at PACS"),
        ({"a": {"AET": "PACS"}}, False, {}, "1 of 1 that it sent are deleted"),
        ({}, True, {"type": "DicomWebStowClient"}, "does not say what it sent where"),
    ],
)
def test_what_can_not_be_made_again_is_a_dead_letter_that_says_why(
    kit: Kit, modalities: dict[str, Any], there: bool, job: dict[str, Any], reason: str
) -> None:
    known(kit)
    kit.orthanc.get("/modalities?expand").respond(json=modalities)
    kit.orthanc.get(url__regex=f"/[a-z]+/{STUDY}$").respond(200 if there else 404, json={})
    kit.send(failed(**job))
    kit.finish()
    (dead,) = kit.dead
    assert reason in repr(dead)


@pytest.mark.parametrize("state", ["Pending", "Running", "Success", "Paused", "Retry"])
def test_a_job_that_somebody_has_taken_up_is_left_alone(kit: Kit, state: str) -> None:
    one = failed()
    known(kit, described(one, State=state))
    again = kit.orthanc.post("/jobs/job-1/resubmit")
    kit.send(one)
    kit.finish()
    kit.assert_handled()
    assert not again.called


@pytest.mark.parametrize("state", ["Pending", "Running", "Success", "Failure"])
def test_a_later_job_that_does_the_same_takes_its_place(kit: Kit, state: str) -> None:
    """So the router's, which makes new jobs, are not retried by both."""
    one = failed()
    at = {"CreationTime": spelt(AT + timedelta(seconds=5)), "CompletionTime": spelt(AT + timedelta(seconds=6))}
    known(kit, described(one), described(one, ID="job-2", State=state, **at))
    again = kit.orthanc.post("/jobs/job-1/resubmit")
    kit.send(one)
    kit.finish()
    kit.assert_handled()
    assert not again.called


@pytest.mark.parametrize(
    "other",
    [
        {"RemoteAet": "OTHER", "ParentResources": [STUDY]},
        {"RemoteAet": "PACS", "ParentResources": [STUDY, orthanc_id("another")]},
        {"RemoteAet": "PACS"},
    ],
)
def test_a_later_job_that_sends_something_else_or_elsewhere_does_not(kit: Kit, other: dict[str, Any]) -> None:
    one = failed()
    later = described(one, ID="job-2", State="Success", CreationTime=spelt(AT + timedelta(seconds=5)), Content=other)
    again = resubmitting(kit, one)
    known(kit, described(one), later)
    kit.send(one)
    kit.finish()
    assert again.call_count == 1


def test_one_that_was_resubmitted_before_its_worker_died_is_not_resubmitted_again(kit: Kit) -> None:
    one = failed()
    known(kit, described(one, CompletionTime=spelt(AT + timedelta(minutes=1))))  # it has failed again since
    again = kit.orthanc.post("/jobs/job-1/resubmit")
    kit.send(one)
    kit.finish()
    kit.assert_handled()
    assert not again.called


def test_what_was_cancelled_stays_so_and_so_does_what_failed_before(kit: Kit) -> None:
    one = failed(1, "job-1")
    known(kit, described(one))
    kit.send(one, failed(2, "job-2", errorCode=37))
    kit.finish()
    kit.assert_handled()


def test_what_has_succeeded_since_is_not_made_again_although_orthanc_forgot_both(kit: Kit) -> None:
    known(kit)
    kit.send(failed(1), succeeded(2, "job-9"))
    kit.finish()
    kit.assert_handled()
    # A failure behind it is a first one, and a success of before is none of it.
    three = failed(3, "job-10", at=kit.now, created=kit.now)
    known(kit, described(three))
    kit.send(three, succeeded(2, "job-9"))
    assert kit.waiting == pytest.approx(60)


def test_what_orthanc_refuses_is_tried_again(kit: Kit) -> None:
    one = failed()
    known(kit, described(one))
    kit.orthanc.post("/jobs/job-1/resubmit").respond(403)
    kit.send(one)
    kit.advance(hours=2)
    assert kit.waiting is not None and not kit.dead
    again = resubmitting(kit, one)
    kit.finish()
    kit.assert_handled()
    assert again.calls.last.response.status_code == 200


def test_only_failures_of_its_own_orthanc_are_its_own(tmp_path: Path) -> None:
    with made(tmp_path, "source: urn:mine\n").app.test() as kit:
        prepare(kit)
        kit.send(failed(), event("job.failed", job_id="job-2"))
        kit.assert_handled()


def test_what_another_orthanc_forgot_is_not_made_again_here(kit: Kit) -> None:
    """Where nobody has said whose failures are to be taken, its plugin knows that they aren't its own."""
    known(kit)
    kit.orthanc.get("/orthanc-events/status").respond(json={"outbox": {"recorder": "another"}})
    kit.send(failed())
    kit.finish()
    (dead,) = kit.dead
    assert "the job is of another Orthanc (urn:uuid:" in repr(dead)


def test_without_the_plugin_that_is_not_known(kit: Kit) -> None:
    known(kit)
    kit.orthanc.get("/orthanc-events/status").respond(404)
    kit.orthanc.get(f"/studies/{STUDY}").respond(404)
    kit.orthanc.get(url__regex=f"/[a-z]+/{STUDY}$").respond(404)
    kit.send(failed())
    kit.finish()
    (dead,) = kit.dead
    assert "1 of 1 that it sent are deleted" in repr(dead)


def test_what_ends_untold_is_made_again_with_longer_waits_and_given_up_in_the_end(kit: Kit) -> None:
    """Orthanc forgets each before anybody has seen how it ended."""
    known(kit)
    kit.orthanc.get(f"/studies/{STUDY}").respond(json={})
    store = kit.orthanc.post("/modalities/pacs/store")
    store.side_effect = [httpx.Response(200, json={"ID": f"job-{number}"}) for number in range(2, 9)]
    kit.send(failed(1))
    for number, minutes in enumerate((1, 1, 2), 1):  # due 1, 2 and 4 minutes behind the failure
        kit.advance(minutes=minutes, seconds=2)
        assert store.call_count == number
        kit.send(event("job.failed", job_id=f"job-{number + 1}", number=number + 1, at=kit.now))
    kit.finish()
    assert store.call_count == 3
    (dead,) = kit.dead
    assert "given up behind 3 resubmissions: error 9, which Orthanc has forgotten" in repr(dead)


def test_what_goes_on_for_long_is_looked_at_until_it_has_ended(kit: Kit) -> None:
    """It may fail, and be forgotten before anybody has seen it."""
    one = failed()
    again = resubmitting(kit, one, State="Running")
    kit.send(one)
    kit.advance(hours=5)
    assert again.call_count == 1 and kit.waiting is not None and kit.waiting <= 900
    known(kit)
    kit.send(event("job.failed", job_id="job-1", number=2, at=kit.now))
    kit.orthanc.get(f"/studies/{STUDY}").respond(json={})

    def done(request: httpx.Request) -> httpx.Response:
        known(kit, described(one, ID="job-2", State="Success", CreationTime=spelt(kit.now)))
        return httpx.Response(200, json={"ID": "job-2"})

    store = kit.orthanc.post("/modalities/pacs/store").mock(side_effect=done)
    kit.finish()
    kit.assert_handled()
    assert store.call_count == 1


def test_a_failure_without_its_job_is_visible_where_nobody_looks_after_it_any_more(kit: Kit) -> None:
    one = failed()
    resubmitting(kit, one)
    kit.send(one)
    kit.advance(minutes=1.1)
    kit.send(succeeded(2, "job-1", at=kit.now))
    kit.finish()
    kit.send(event("job.failed", job_id="job-1", number=3, at=kit.now))
    (dead,) = kit.dead
    assert "raise JobsHistorySize" in repr(dead)


def test_a_success_that_orthanc_forgot_counts_where_the_job_was_ours(kit: Kit) -> None:
    known(kit)
    kit.orthanc.get(f"/studies/{STUDY}").respond(json={})
    store = kit.orthanc.post("/modalities/pacs/store").respond(json={"ID": "job-2"})
    kit.send(failed(1))
    kit.advance(minutes=1, seconds=2)
    kit.send(event("job.succeeded", job_id="job-2", number=2, at=kit.now), event("job.succeeded", job_id="x", number=3))
    kit.finish()
    kit.assert_handled()
    assert store.call_count == 1


def test_the_error_of_a_plugins_job_is_told(kit: Kit) -> None:
    at = AT
    for number in range(1, 5):
        one = failed(number, type="DicomWebStowClient", at=at, errorCode=1)
        content = {"FunctionErrorCode": 9, "FunctionErrorDescription": "Error in the network protocol"}
        again = resubmitting(kit, one, ErrorCode=1, Content=content)
        known(kit, described(one, ErrorCode=1, Content=content))
        kit.send(one)
        kit.finish()
        at = kit.now
    assert again.call_count == 3
    (dead,) = kit.dead
    assert "given up behind 3 resubmissions: error 9, Error in the network protocol" in repr(dead)


def test_types_that_are_not_chosen_are_passed_over(kit: Kit) -> None:
    kit.send(failed(type="ResourceModification"))
    kit.assert_handled()


def test_a_failure_without_its_job_is_visible(kit: Kit) -> None:
    kit.send(event("job.failed", job_id="job-1"))
    (dead,) = kit.dead
    assert "raise JobsHistorySize" in repr(dead)


@pytest.mark.parametrize(
    ("more", "option"),
    [
        ("ordered: true", "ordered: would hold up all other jobs"),
        ("resubmit: {initial: 1h, maximum: 1m}", "resubmit.maximum: maximum (line 4) is shorter than initial"),
        ("resubmit: {attempts: 0}", "resubmit.attempts: "),
        ("resubmit: {maximum: 9d}", "resubmit.maximum: "),
        ("retry: {max_age: 1h}", "retry.max_age: retry.max_age (line 4) is shorter than resubmit.maximum"),
        ("types: []", "types: "),
        ("attempts: 3", "attempts: there is no such option"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, more: str, option: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made(tmp_path, more)
    assert f"job-retry.yaml:4: {option}" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "broker: amqp://127.0.0.1",
            "job-retry.yaml:1: store: where to note how often something has failed is not said",
        ),
        (
            "broker: kafka://127.0.0.1:9092",
            "job-retry.yaml:1: store: where to note how often something has failed is not said",
        ),
    ],
)
def test_what_is_missing_is_said(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "job-retry.yaml"
    file.write_text(text, "utf-8")
    with pytest.raises(ConfigError) as caught:
        JobRetry(configure_as(JobRetrySettings, {}, environment={}, given=CommandLine(file)))
    assert said in str(caught.value)


def test_the_example_of_its_page_and_the_commented_one_can_be_loaded(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    file = tmp_path / "job-retry.yaml"
    page = (root / "docs" / "consumers" / "job-retry.md").read_text("utf-8")
    file.write_text(page.partition("```yaml\n")[2].partition("```")[0], "utf-8")
    for path in (file, root / "config" / "job-retry.yaml"):
        found = configure_as(JobRetrySettings, {}, environment={}, given=CommandLine(path))
        assert JobRetry(found).app.handlers
        assert [found.settings.resubmit.wait(number) for number in (1, 2, 11, 12, 15)] == [60, 120, 61440, 86400, 86400]
    # Of the commented one, what is commented out is right too.
    text = (root / "config" / "job-retry.yaml").read_text("utf-8")
    file.write_text(re.sub(r"^# (?=(source|store): )", "", text, flags=re.MULTILINE), "utf-8")
    found = configure_as(JobRetrySettings, {}, environment={}, given=CommandLine(file))
    assert found.settings.source and found.settings.store
