"""What becomes of jobs, told by looking at Orthanc's list of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from orthanc_events_bridge.changes.jobs import Jobs
from orthanc_events_bridge.changes.model import Fact
from orthanc_events_bridge.plugin.lookup import job_snapshot


def job(number: str, state: str, *, created: int = 0, ended: int | None = None) -> dict[str, Any]:
    completed = {} if ended is None else {"CompletionTime": f"20261124T0900{ended:02}.000001"}
    return {
        "ID": number,
        "State": state,
        "Type": "Archive",
        "CreationTime": f"20261124T0800{created:02}.5",
        **completed,
    }


def jobs(known: Mapping[str, str] | None = None) -> Jobs:
    return Jobs(job_snapshot, known)


def look(what: Jobs, *answers: dict[str, Any]) -> list[tuple[str, str | None]]:
    facts, seen = what.look(answers)
    what.done(seen)
    return [(fact.change, fact.resource) for fact in facts]


def test_what_is_there_at_the_very_first_start_is_no_news_but_its_end_is() -> None:
    what = jobs()
    assert look(what, job("a", "Success", ended=1), job("b", "Running")) == []
    assert look(what, job("a", "Success", ended=1), job("b", "Success", ended=2)) == [("JobSuccess", "b")]


def test_each_turn_is_told_once() -> None:
    what = jobs({})
    assert look(what, job("a", "Pending")) == [("JobSubmitted", "a")]
    assert look(what, job("a", "Running")) == []
    assert look(what, job("a", "Failure", ended=1)) == [("JobFailure", "a")]
    assert look(what, job("a", "Failure", ended=1)) == []
    assert look(what, job("a", "Pending")) == []  # resubmitted, under the same id
    assert look(what, job("a", "Success", ended=3)) == [("JobSuccess", "a")]


def test_one_that_was_resubmitted_and_failed_again_between_two_looks() -> None:
    what = jobs({})
    look(what, job("a", "Failure", ended=1))
    assert look(what, job("a", "Failure", ended=2)) == [("JobFailure", "a")]


def test_what_came_and_ended_between_two_looks_is_told_whole_and_in_order() -> None:
    what = jobs({})
    told = look(what, job("b", "Success", created=2, ended=3), job("a", "Failure", created=1, ended=9))
    assert told == [("JobSubmitted", "a"), ("JobFailure", "a"), ("JobSubmitted", "b"), ("JobSuccess", "b")]


def test_a_restart_tells_nothing_twice_and_what_was_missed() -> None:
    what = jobs({})
    look(what, job("a", "Success", ended=1), job("b", "Running"))
    again = jobs(what.known)
    assert look(again, job("a", "Success", ended=1), job("b", "Success", ended=2)) == [("JobSuccess", "b")]


def test_the_end_of_one_that_is_gone_is_counted() -> None:
    what = jobs({})
    look(what, job("a", "Running"), job("b", "Success", ended=1))
    assert look(what) == [] and what.missed == 1 and what.known == {}


def test_a_second_telling_has_the_same_date_and_thus_the_same_id() -> None:
    what = jobs({"b": ""})
    answers = [job("a", "Success", ended=1), job("b", "Failure", ended=2)]
    assert what.look(answers) == what.look(answers)
    facts, _ = what.look(answers)
    snapshot = {
        "type": "Archive",
        "state": "Success",
        "created": "20261124T080000.5",
        "completed": "20261124T090001.000001",
    }
    assert facts[0] == Fact(
        "JobSubmitted", "job", "a", 1795507200000, None, "20261124T080000.5", {}, {"inferred": True, "job": snapshot}
    )
    assert facts[1].date == "20261124T090001.000001" and facts[1].at == 1795510801000


@pytest.mark.parametrize("answer", [{"Status": "ok"}, ["a"], [None], [{"ID": "a"}]])
def test_what_is_no_list_of_jobs(answer: Any) -> None:
    with pytest.raises((LookupError, TypeError)):
        jobs({}).look(answer)
