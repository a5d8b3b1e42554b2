"""The Compose file, with images of our own: everything comes up, works together, scales, outlives kills, and goes.

Only with ``TEST_SERVERS=containers`` (``make test-compose``). The first broker always, the others among the slow.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator

import httpx
import pytest

from orthanc_events_bridge.testing.brokers import way
from orthanc_events_bridge.testing.dicom import Study, make_study
from orthanc_events_bridge.testing.processes import wait_until
from orthanc_events_bridge.testing.programs import MissingComponentError, skip_or_fail

if way() != "containers":
    pytest.skip("TEST_SERVERS is not containers", allow_module_level=True)

from tests.integration.composed import DEADLINE, Composed

pytestmark = pytest.mark.integration

CONSUMERS = ("router", "anonymizer", "dispatch", "derive", "job-retry", "events")
ORTHANCS = ("orthanc", "archive", "research")


SLOW = [pytest.param(profile, marks=pytest.mark.slow) for profile in ("rabbitmq", "kafka", "all")]


@pytest.fixture(scope="module", params=["nats", *SLOW])
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composed]:
    """All of it, up and healthy; in the end nothing of it is left."""
    try:
        composed = Composed(tmp_path_factory.mktemp("compose"), request.param)
    except MissingComponentError as error:
        skip_or_fail(error)
    with composed:
        yield composed
    assert composed.left() == []


def sent(stack: Composed) -> list[int]:
    """How much each router has sent."""
    return [log.count('"what": "sent"') for log in stack.logs("router")]


def arrived(stack: Composed, studies: list[Study]) -> None:
    """Wait until all of these are in the archive."""
    stack.until(lambda: all(stack.has("archive", study) for study in studies), "in the archive")


def test_the_demo_shows_studies_where_rules_say_and_their_events(stack: Composed) -> None:
    shown = stack.compose("run", "--rm", "-T", "demo")
    ct, mr = re.findall(r"stored: a study of \w+, (\S+)", shown)

    # Research has the MR alone, as somebody else; the archive has the originals, and what the AI service has found.
    (study,) = stack.get("research", "/studies?expand")
    assert study["PatientMainDicomTags"]["PatientID"].startswith("research-"), study
    assert {*stack.get("archive", "/studies")} == {ct, mr}
    assert stack.modalities("archive", ct) == ["CT", "SEG", "SR"]
    assert stack.modalities("archive", mr) == ["MR"]
    here = {one["ID"]: one["PatientMainDicomTags"]["PatientID"] for one in stack.get("orthanc", "/studies?expand")}
    ((sent, patient),) = [(one, here[one]) for one in here.keys() - {ct, mr, study["ID"]}]
    assert patient.startswith("ai-") and stack.modalities("orthanc", sent) == ["CT", "SEG", "SR"]
    said = re.search(r"the report says ([0-9.]+) ml; the sphere in the images has ([0-9.]+) ml", shown)
    assert said and abs(float(said[1]) / float(said[2]) - 1) < 0.1, shown
    workflows = ("orthanc-events", "workflow", "list", "--config", "/etc/orthanc-events/dispatch.yaml", "--json")
    (workflow,) = json.loads(stack.compose("exec", "-T", "dispatch", *workflows))
    assert (workflow["state"], workflow["rule"]) == ("done", "CT with geometry")
    assert not [name for name in CONSUMERS if "goes among the dead letters" in "".join(stack.logs(name))]

    stack.note_all()
    for broker in stack.brokers():
        stack.until(lambda broker=broker: not stack.report(broker).lost, f"told on {broker.title}")
        stack.report(broker).assert_clean()

    # As docs/compose.md says.
    for kind in ("study.stable", "study.routed", "study.ready"):
        line = re.compile(rf"io\.orthanc-events\.{kind}\.v1 +studies/{ct}")
        stack.until(lambda line=line: line.search(stack.logs("events")[0]), line.pattern)
    status = stack.get("orthanc", "/orthanc-events/status")
    assert {one["state"] for one in status["transports"]} == {"connected"}
    assert len(status["transports"]) == len(stack.brokers())


def test_containers_may_do_little_and_tell_no_secrets(stack: Composed) -> None:
    seen = set()
    secrets = [stack.secret(name) for name in ("orthanc-password", "ai-password")]
    with stack.containers() as containers:
        for one in containers:
            service, host = one.labels["com.docker.compose.service"], one.attrs["HostConfig"]
            seen.add(service)
            assert min(host["Memory"], host["NanoCpus"], host["PidsLimit"]) > 0, service
            assert "no-new-privileges:true" in host["SecurityOpt"], service
            for bindings in (host["PortBindings"] or {}).values():
                assert {binding["HostIp"] for binding in bindings} == {"127.0.0.1"}, service
            assert one.attrs["Config"]["User"].partition(":")[0] not in ("", "0", "root"), service
            assert host["CapDrop"] == ["ALL"], service
            assert host["ReadonlyRootfs"] == (service not in ORTHANCS), service
            assert not [one for secret in secrets if secret in json.dumps(one.attrs)], service
    assert {*CONSUMERS, "ai", "setup", "ready", *ORTHANCS, *(broker.kind for broker in stack.brokers())} <= seen


def test_the_ai_service_may_store_results_and_read_nothing(stack: Composed) -> None:
    with stack.containers("ai") as (ai,):
        (network,) = ai.attrs["NetworkSettings"]["Networks"]
        assert ai.client.networks.get(network).attrs["Internal"]  # no way out
    with stack.containers() as everything:
        on_it = [one for one in everything if network in one.attrs["NetworkSettings"]["Networks"]]
    assert {one.labels["com.docker.compose.service"] for one in on_it} == {"ai", "orthanc"}
    found = stack.compose("exec", "-T", "ai", "find", "/run/orthanc-events-ai", "-type", "f")
    assert found.split() == ["/run/orthanc-events-ai/authorization"]
    header = {"Authorization": stack.compose("exec", "-T", "ai", "cat", *found.split()).strip()}
    url = f"http://127.0.0.1:{stack.ports['orthanc']}"
    kind = {"Content-Type": 'multipart/related; type="application/dicom"; boundary=x'}
    with httpx.Client(base_url=url, headers=header, timeout=60, trust_env=False) as client:
        assert client.post("/dicom-web/studies", content=b"--x--\r\n", headers=kind).status_code not in (401, 403)
        for path in ("/studies", "/dicom-web/studies", "/system"):
            assert client.get(path).status_code == 403, path
        assert client.post("/tools/find", json={"Level": "Study", "Query": {}}).status_code == 403
    # By DICOM neither, whoever it says that it is.
    asked = ["findscu", "-v", "-S", "-aec", "ORTHANC", "-k", "QueryRetrieveLevel=STUDY", "-k", "PatientName"]
    for title in ("AI", "ARCHIVE", "RESEARCH"):
        done = subprocess.run(
            [*asked, "-aet", title, "127.0.0.1", str(stack.ports["dicom"])], capture_output=True, text=True, check=False
        )
        assert done.returncode or "Failed" in done.stdout + done.stderr, done
        assert "(0010,0010) PN [" not in done.stdout + done.stderr, done


def test_commands_in_orthancs_container_know_what_the_variables_say(stack: Composed) -> None:
    assert "the configuration is right" in stack.compose("exec", "-T", "orthanc", "orthanc-events", "check")


def test_four_routers_share_the_work(stack: Composed) -> None:
    stack.up(router=4)
    studies: list[Study] = []

    def all_at_work() -> bool:
        studies.append(make_study())
        stack.store(studies[-1])
        numbers = sent(stack)
        return len(numbers) == 4 and all(numbers)

    assert wait_until(all_at_work, DEADLINE, every=0.5), f"sent: {sent(stack)}\n{stack.ends()}"
    arrived(stack, studies)


def test_nothing_is_lost_when_containers_are_killed(stack: Composed) -> None:
    studies: list[Study] = []

    def more() -> None:
        studies.append(make_study(instances=2))
        stack.store(studies[-1])

    broker = stack.brokers()[0].kind
    for victim in (broker, "router", "orthanc"):
        more()
        stack.crash(victim)
        more()
    arrived(stack, studies)
    stack.note_all()
    for one in stack.brokers():
        stack.until(lambda one=one: not stack.report(one, kills=1).lost, f"told on {one.title}")
        stack.report(one, kills=1).assert_clean()
    stack.until(lambda: not stack.unwell(), "healthy again", stack.unwell)
