"""When studies are told ready, and when not: the rules of `derive` against an Orthanc whose answers are set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from orthanc_events_bridge.consumers.configuration import CommandLine, configure_as
from orthanc_events_bridge.loading import ConfigError
from orthanc_events_bridge.testing import event
from orthanc_events_bridge.testing.kit import Kit
from orthanc_events_bridge.workflows.derive import Deriver, DeriveSettings

ROOT = Path(__file__).resolve().parents[2]
CREATED = event("study.created", study="s")
STABLE = event("study.stable", study="s")
#: The quiet of the rules, and the second behind it from which it is certain.
QUIET = 61.0


@dataclass
class Archive:
    """What Orthanc has of one study: of each series its modality, and of each instance when it came, in seconds."""

    series: dict[str, str] = field(default_factory=dict)
    instances: dict[str, dict[str, float]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pacs: int | None = None
    asked: int = 0

    def add(self, series: str, *names: str, at: float = 0.0, modality: str = "CT") -> None:
        self.series.setdefault(series, modality)
        self.instances.setdefault(series, {}).update(dict.fromkeys(names, at))


def spelt(kit: Kit, seconds: float) -> str:
    return (kit.now - timedelta(seconds=kit._now) + timedelta(seconds=seconds)).strftime("%Y%m%dT%H%M%S")


def answer(kit: Kit, archive: Archive) -> None:
    """Have the kit's Orthanc answer from it."""
    study = {
        "ID": "s",
        "ParentPatient": "p",
        "MainDicomTags": {"StudyInstanceUID": "1.2.3"},
        "PatientMainDicomTags": {},
        "Series": [],
    }

    def one_series(name: str) -> dict[str, Any]:
        tags = {"Modality": archive.series[name]}
        return {"ID": name, "ParentStudy": "s", "MainDicomTags": tags, "Instances": list(archive.instances[name])}

    def there(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200 if archive.series else 404, json=study)

    def bulk(request: httpx.Request) -> httpx.Response:
        assert json.loads(request.content) == {"Resources": ["s"], "Level": "Instance", "Metadata": True}
        rows = [
            {"ID": one, "ParentSeries": series, "Metadata": {"ReceptionDate": spelt(kit, at)}}
            for series, instances in archive.instances.items()
            for one, at in instances.items()
        ]
        return httpx.Response(200, json=rows)

    def query(request: httpx.Request) -> httpx.Response:
        archive.asked += 1
        assert json.loads(request.content)["Query"]["StudyInstanceUID"] == "1.2.3"
        return httpx.Response(500 if archive.pacs is None else 200, json={"Path": "/queries/q"})

    def rows(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=[{"NumberOfStudyRelatedInstances": f"{archive.pacs} "}])

    route = kit.orthanc
    route.get("/studies/s").mock(side_effect=there)
    route.get("/studies/s/series").mock(
        side_effect=lambda request: httpx.Response(200, json=[one_series(name) for name in archive.series])
    )
    route.get(path__regex=r"^/series/(?P<name>[^/]+)$").mock(
        side_effect=lambda request, name: httpx.Response(200, json=one_series(name))
    )
    route.get(path__regex=r"^/instances/[^/]+/tags$").mock(
        side_effect=lambda request: httpx.Response(200, json=archive.tags)
    )
    route.post("/tools/bulk-content").mock(side_effect=bulk)
    route.get("/tools/now").mock(side_effect=lambda request: httpx.Response(200, text=spelt(kit, kit._now)))
    route.post("/modalities/pacs/query").mock(side_effect=query)
    route.get("/queries/q/answers").mock(side_effect=rows)


def settings(folder: Path, rules: str) -> Any:
    path = folder / "derive.yaml"
    path.write_text(
        f"broker: {{type: memory}}\northanc: http://orthanc.test\nstore: sqlite:///{folder}/x.db\nrules:\n{rules}"
    )
    return configure_as(DeriveSettings, {}, path, {}, CommandLine())


@contextmanager
def at_work(folder: Path, rules: str = "  - {name: all}\n", **more: Any) -> Iterator[tuple[Kit, Archive]]:
    archive = Archive()
    with Deriver(settings(folder, rules), **more).app.test() as kit:
        answer(kit, archive)
        yield kit, archive


def told(kit: Kit) -> list[tuple[str, Any]]:
    return [(one.name.partition(".")[2], one.data.get("missing", "complete")) for one in kit.published]


def test_it_is_ready_when_nothing_has_come_for_long_enough(tmp_path: Path) -> None:
    with at_work(tmp_path) as (kit, archive):
        archive.add("a", "1")
        kit.send(CREATED)
        kit.advance(seconds=50)
        archive.add("a", "2", at=50)
        kit.advance(seconds=QUIET - 1)  # the first look finds the second image, and waits for it
        assert not kit.published
        kit.advance(seconds=2)
        assert told(kit) == [("ready", "complete")]
        data = kit.published[0].data
        assert (data["rule"], data["series"], data["instances"], data["parents"]) == ("all", 1, 2, {"patient": "p"})
        assert kit.published[0].causation_id == CREATED.id
        kit.finish()
        assert not kit.dead


def test_whoever_looks_it_is_told_once_and_again_when_more_has_come(tmp_path: Path) -> None:
    with at_work(tmp_path) as (kit, archive):
        archive.add("a", "1")
        kit.send(CREATED, STABLE, event("study.stable", study="s", number=2))
        kit.finish()
        assert told(kit) == [("ready", "complete")]
        archive.add("a", "2", at=kit._now)
        kit.send(event("study.stable", study="s", number=3))
        assert len(kit.published) == 1, "it is not quiet yet"
        kit.finish()
        assert told(kit) == [("ready", "complete"), ("updated", "complete")]
        kit.send(event("study.stable", study="s", number=4))
        kit.finish()
        assert len(kit.published) == 2
        assert kit.published[1].data["instances"] == 2


def test_a_study_that_was_deleted_and_comes_again_is_ready_again(tmp_path: Path) -> None:
    with at_work(tmp_path) as (kit, archive):
        archive.add("a", "1")
        kit.send(STABLE)
        kit.finish()
        archive.add("a", "1", at=1000.0)
        kit.advance(seconds=2000)
        kit.send(event("study.stable", study="s", number=2))
        kit.finish()
        assert [name for name, _ in told(kit)] == ["ready", "ready"]
        assert len({one.id for one in kit.published}) == 2


def test_expected_series_are_waited_for(tmp_path: Path) -> None:
    rules = "  - {name: two, series: {ct: {tag: Modality, is: CT}, sr: {tag: Modality, is: SR}}}\n"
    with at_work(tmp_path, rules) as (kit, archive):
        archive.add("a", "1")
        kit.send(STABLE)
        kit.advance(minutes=30)
        assert not kit.published
        archive.add("b", "2", at=kit._now, modality="SR")
        kit.send(event("study.stable", study="s", number=2))
        kit.advance(seconds=QUIET)
        assert told(kit) == [("ready", "complete")]
        kit.finish()
        assert len(kit.published) == 1


def test_at_its_deadline_it_is_told_with_what_is_missing(tmp_path: Path) -> None:
    rules = "  - {name: two, deadline: 10m, series: {ct: {tag: Modality, is: CT}, sr: {tag: Modality, is: SR}}}\n"
    with at_work(tmp_path, rules) as (kit, archive):
        archive.add("a", "1")
        kit.send(CREATED)
        kit.advance(seconds=600)
        assert not kit.published
        kit.advance(seconds=1)
        assert told(kit) == [("ready", {"series": ["sr"]})]
        assert kit.published[0].data["complete"] is False
        archive.add("b", "2", at=kit._now, modality="SR")
        kit.send(STABLE)
        kit.finish()
        assert told(kit)[1:] == [("updated", "complete")]


def test_waiting_is_no_failure_however_often(tmp_path: Path) -> None:
    with at_work(tmp_path) as (kit, archive):
        archive.add("a", "0")
        kit.send(CREATED)
        for number in range(70):
            archive.add("a", f"{number}", at=kit._now)
            kit.advance(seconds=50)
        assert len(kit.retried) > 40 and not kit.dead and not kit.published
        kit.finish()
        assert told(kit) == [("ready", "complete")]
        assert kit.published[0].data["instances"] == 70


def test_what_goes_on_coming_is_told_at_the_deadline_too(tmp_path: Path) -> None:
    with at_work(tmp_path, "  - {name: all, deadline: 5m}\n") as (kit, archive):
        archive.add("a", "0")
        kit.send(CREATED)
        for number in range(31):
            archive.add("a", f"{number}", at=kit._now)
            kit.advance(seconds=10)
        assert told(kit) == [("ready", {"quiet": True})]


def test_what_comes_to_an_old_study_is_waited_for_though_its_deadline_is_long_over(tmp_path: Path) -> None:
    with at_work(tmp_path) as (kit, archive):
        archive.add("a", "1")
        kit.advance(days=2)
        archive.add("a", "2", at=kit._now)
        kit.send(event("study.stable", study="s", at=kit.now))
        assert not kit.published
        kit.finish()
        assert told(kit) == [("ready", "complete")]


@pytest.mark.parametrize(
    ("tags", "missing"),
    [
        ({"NumberOfStudyRelatedInstances": "2"}, "complete"),
        ({"NumberOfStudyRelatedInstances": "3"}, {"instances": 1}),
        ({"NumberOfStudyRelatedInstances": "many"}, {"count": True}),
        ({}, {"count": True}),
    ],
)
def test_the_number_of_instances_by_a_tag(tmp_path: Path, tags: dict[str, str], missing: object) -> None:
    rules = "  - {name: all, instances: {tag: NumberOfStudyRelatedInstances}}\n"
    with at_work(tmp_path, rules) as (kit, archive):
        archive.tags = tags
        archive.add("a", "1", "2")
        kit.send(STABLE)
        kit.advance(seconds=QUIET)
        assert len(kit.published) == (missing == "complete")
        kit.finish()
        assert told(kit) == [("ready", missing)]


def test_the_number_of_instances_by_what_the_pacs_says(tmp_path: Path) -> None:
    with at_work(tmp_path, "  - {name: all, instances: {modality: pacs}}\n") as (kit, archive):
        archive.add("a", "1", "2")
        kit.send(STABLE)
        kit.advance(minutes=5)
        assert not kit.published, "it does not answer"
        archive.pacs = 3
        kit.advance(minutes=5)
        assert not kit.published, "it has more"
        archive.pacs = 2
        kit.advance(minutes=2)
        assert told(kit) == [("ready", "complete")]
        assert kit.published[0].data["expected"] == 2
        assert archive.asked < 20


def test_the_first_rule_that_fits_counts_and_of_the_rest_nothing_is_told(tmp_path: Path) -> None:
    rules = "  - {name: sr, when: {tag: Modality, is: SR}}\n  - {name: ct, when: {tag: Modality, is: CT}}\n"
    with at_work(tmp_path, rules) as (kit, archive):
        archive.add("a", "1")
        kit.send(STABLE)
        kit.finish()
        assert [one.data["rule"] for one in kit.published] == ["ct"]
        archive.series["a"] = "MR"
        kit.send(event("study.stable", study="s", number=2))
        assert len(kit.published) == 1 and not kit.dead


def test_who_dies_between_telling_and_noting_tells_the_same_again(tmp_path: Path, monkeypatch: Any) -> None:
    with at_work(tmp_path) as (kit, archive):
        archive.add("a", "1")
        kit.advance(seconds=QUIET)
        publish = kit._publisher.send
        deaths = [1]

        async def dying(sent: Any) -> None:
            await publish(sent)
            if deaths:
                deaths.pop()
                raise OSError

        monkeypatch.setattr(kit._publisher, "send", dying)
        kit.send(STABLE)
        kit.finish()
        first, second = kit.published
        assert (first.name, first.id) == (second.name, second.id) == ("study.ready", first.id)


def test_a_study_that_is_gone_is_done_with(tmp_path: Path) -> None:
    with at_work(tmp_path) as (kit, _):
        kit.send(STABLE)
        kit.assert_handled(STABLE)
        assert not kit.published


def test_a_dry_run_tells_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with at_work(tmp_path, dry=True) as (kit, archive):
        archive.add("a", "1")
        kit.send(CREATED)
        kit.finish()
        kit.assert_handled(CREATED)
        assert not kit.published
    assert "it would be told, by rule all: complete" in caplog.text


def test_the_file_that_comes_with_it_is_right() -> None:
    found = configure_as(DeriveSettings, {}, ROOT / "config" / "derive.yaml", {}, CommandLine()).settings
    assert [rule.name for rule in found.rules] == ["mr-brain", "moved from the PACS", "everything else"]
    assert set(found.rules[0].series) == {"t1", "t2"}


@pytest.mark.parametrize(
    ("rules", "wrong"),
    [
        ("  - {name: a}\n  - {name: a}\n", "rules[1].name: is the name of another rule"),
        ("  - {name: a, quiet: 2h}\n", "rules[0].deadline"),
        ("  - {name: a, instances: {}}\n", "it has to be known in one way"),
        ("  - {name: a, instances: {tag: A, modality: b}}\n", "it has to be known in one way"),
        ("  - {name: a, quiet: 0}\n", "rules[0].quiet"),
        ("  - {name: a}\nordered: true\n", "would hold up all others"),
        ("  []\n", "rules"),
    ],
)
def test_what_a_file_can_not_say(tmp_path: Path, rules: str, wrong: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(tmp_path, rules)
    text = str(caught.value)
    assert wrong in text and "derive.yaml" in text, text
