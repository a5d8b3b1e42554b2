"""Consumers in other languages, `examples/`: they decode what the bridge sends, and settle as our own kit does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest

from orthanc_events_bridge import transports
from orthanc_events_bridge.conformance.events import Played
from orthanc_events_bridge.conformance.judging import differences
from orthanc_events_bridge.conformance.rules import rules_of
from orthanc_events_bridge.consumers.broker import broker_options
from orthanc_events_bridge.events.mapping import trace_parent
from orthanc_events_bridge.testing import dicom
from orthanc_events_bridge.testing.brokers import make_broker
from orthanc_events_bridge.testing.reacting import consumer_url
from orthanc_events_bridge.transports.base import Outgoing
from tests.integration.languages import LANGUAGES, PATIENCE, ROOT, Consumer
from tests.integration.whole import started

pytestmark = pytest.mark.integration

GOLDEN: Final = ROOT / "tests" / "golden"
OURS: Final = ROOT / "tests" / "integration" / "conformant.py"
BROKERS: Final = ("nats", "rabbitmq", "kafka")
each_language = pytest.mark.parametrize("language", LANGUAGES)

#: What differs from run to run in the events of the same files.
VOLATILE: Final = ("id", "time", "recorder", "sequence", "recordedtime", "traceparent")


@pytest.fixture(scope="module")
def built() -> Mapping[str, Future[list[str]]]:
    """The command of each, built two at a time."""
    with ThreadPoolExecutor(2) as pool:
        # Go takes longest.
        return {name: pool.submit(LANGUAGES[name].built) for name in sorted(LANGUAGES, key=lambda one: one != "go")}


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """A running broker of each kind."""
    folder = tmp_path_factory.mktemp("any-language")
    with contextlib.ExitStack() as stack:
        found = {}
        for kind in BROKERS:
            broker = make_broker(kind, folder / kind)
            stack.callback(broker.server.close, kill=True)
            broker.start()
            found[kind] = consumer_url(broker)
        yield found


@pytest.fixture(scope="module")
def verdicts(
    built: Mapping[str, Future[list[str]]], urls: Mapping[str, str]
) -> Iterator[Mapping[str, Future[tuple[int, dict[str, Any], str]]]]:
    """What the runner says of each program, and of one of our own kit on each broker: side by side, and beside other
    tests, since they wait most of the time."""
    ours: Callable[[], list[str]] = lambda: [sys.executable, str(OURS)]  # noqa: E731
    commands: dict[str, tuple[str, Callable[[], list[str]]]] = {
        name: (one.broker, built[name].result) for name, one in LANGUAGES.items()
    }
    commands |= {f"ours-{kind}": (kind, ours) for kind in BROKERS}
    with ThreadPoolExecutor(len(commands) + 1) as pool:
        played = {name: pool.submit(conformance, urls[kind], command) for name, (kind, command) in commands.items()}
        yield {**played, "broken": pool.submit(conformance, urls["nats"], ours, patience=5.0, BROKEN="1")}


def conformance(
    url: str, command: Callable[[], list[str]], patience: float = PATIENCE, **environment: str
) -> tuple[int, dict[str, Any], str]:
    """Exit code, the document, and what is said beside it."""
    runner = [sys.executable, "-m", "orthanc_events_bridge", "conformance", "--broker", url, "--json"]
    done = subprocess.run(
        [*runner, "--patience", str(patience), "--", *command()],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


# -- golden vectors ------------------------------------------------------------------------------------------


@each_language
@pytest.mark.parametrize("mode", ["structured", "binary"])
def test_every_golden_vector_is_decoded_by_its_sdk(
    language: str, mode: str, built: Mapping[str, Future[list[str]]]
) -> None:
    command = built[language].result()
    vectors = GOLDEN / f"{LANGUAGES[language].broker}-{mode}.json"
    done = subprocess.run([*command, "--decode", vectors], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    wanted = json.loads((GOLDEN / "events.json").read_text("utf-8"))
    for event, decoded in zip(wanted, found, strict=True):
        assert not differences(event, decoded)


# -- a real Orthanc ------------------------------------------------------------------------------------------


def files() -> list[bytes]:
    """Two instances of one series, always the same."""
    return [
        dicom.instance_bytes(patient_id="GOLDEN", study_uid="2.25.1", series_uid="2.25.2", sop_uid=f"2.25.{number}")
        for number in (3, 4)
    ]


def stable_part(event: Mapping[str, Any]) -> str:
    """What is the same whenever the same files are sent, as text."""
    data = {name: value for name, value in event["data"].items() if name != "seq"}
    kept = {name: value for name, value in event.items() if name not in VOLATILE}
    return json.dumps({**kept, "data": data}, sort_keys=True)


def stable(consumer: Consumer) -> set[str]:
    """The levels of what was told to be stable."""
    return {one["data"]["level"] for one in consumer.events() if ".stable." in one["type"]}


@pytest.mark.parametrize("kind", BROKERS)
def test_what_a_real_orthanc_tells_is_decoded_field_by_field(
    kind: str, tmp_path: Path, built: Mapping[str, Future[list[str]]], verdicts: Mapping[str, Future[Any]]
) -> None:
    golden = {json.dumps(one, sort_keys=True) for one in json.loads((GOLDEN / "orthanc.json").read_text("utf-8"))}
    names = [name for name, one in LANGUAGES.items() if one.broker == kind]
    with started(tmp_path / "line", broker=kind) as line, contextlib.ExitStack() as stack:
        url = consumer_url(line.broker)
        consumers = [
            stack.enter_context(
                Consumer(built[name].result(), tmp_path / name, BROKER_URL=url, CONSUMER=f"in-{name}", ACK_WAIT="10")
            )
            for name in names
        ]
        for data in files():
            line.orthanc.upload(data)
        for consumer in consumers:
            consumer.wait(lambda one=consumer: stable(one) == {"patient", "study", "series"})
        line.orthanc.delete("studies", dicom.orthanc_id("GOLDEN", "2.25.1"))
        line.settle()
        # What the broker holds, by a plain client with a decoder of its own.
        sent = [one for one in line.broker.read() if not one.kind.startswith("server.")]
        for consumer in consumers:
            consumer.wait(
                lambda consumer=consumer: {one.id for one in sent} <= {one["id"] for one in consumer.events()}
            )
            found = [one for one in consumer.events() if ".server." not in one["type"]]
            # On a slow machine something is stable twice, which is told twice.
            assert set(map(stable_part, found)) == golden
            by_id = {one["id"]: one for one in found}
            for one in sent:
                event = by_id[one.id]
                assert int(event["sequence"]) == one.sequence
                assert (event["recorder"], event["partitionkey"]) == (one.recorder, one.key)
                assert not differences({"time": one.time}, {"time": event["time"]})
                assert event["data"].get("seq") == one.seq
                assert event["traceparent"] == trace_parent(one.id)
            for key in {one.key for one in sent}:
                assert [one["id"] for one in found if one["partitionkey"] == key] == [
                    one.id for one in sent if one.key == key
                ]


# -- several of one name -------------------------------------------------------------------------------------


async def publish(url: str, events: list[Outgoing]) -> None:
    transport = transports.create(broker_options(url).for_consumer())
    await transport.connect()
    try:
        await transport.publish(events)
    finally:
        await transport.close()


@each_language
def test_workers_of_one_name_share_the_events_also_when_one_ends(
    language: str, tmp_path: Path, built: Mapping[str, Future[list[str]]], urls: Mapping[str, str]
) -> None:
    url, command = urls[LANGUAGES[language].broker], built[language].result()
    asyncio.run(publish(url, []))  # the place is there
    played = Played()
    keys = [f"key {number}" for number in range(10)]
    with contextlib.ExitStack() as stack:
        first, second = (
            stack.enter_context(
                Consumer(command, tmp_path / name, BROKER_URL=url, CONSUMER=f"shared-{language}", ACK_WAIT="10")
            )
            for name in ("first", "second")
        )
        asyncio.run(publish(url, played.of_keys(keys, 15)))
        second.wait(lambda: len(given(first, played) + given(second, played)) >= 50)
        first.terminate()
        asyncio.run(publish(url, played.of_keys(keys, 5)))
        second.wait(lambda: {*given(first, played), *given(second, played)} == played.sent.keys())
        # Each to one of them; where a connection is lost a few come again.
        assert len(given(first, played) + given(second, played)) <= len(played.sent) * 1.1
        if language == "go":  # a partition has one worker, so that the order holds whoever that is
            for worker in (first, second):
                numbers = {one: number for number, one in enumerate(played.sent)}
                for key in {one.key for one in played.sent.values()}:
                    mine = [numbers[one] for one in dict.fromkeys(given(worker, played)) if played.sent[one].key == key]
                    assert mine == sorted(mine)


def given(consumer: Consumer, played: Played) -> list[str]:
    """The ids of those of ours that a program was given."""
    return [one["id"] for one in consumer.events() if one["id"] in played.sent]


@pytest.mark.parametrize("language", [name for name, one in LANGUAGES.items() if one.broker != "kafka"])
def test_it_does_not_begin_under_the_name_of_an_ordered_consumer(
    language: str, built: Mapping[str, Future[list[str]]], urls: Mapping[str, str]
) -> None:
    url, name = urls[LANGUAGES[language].broker], f"ordered-{language}"
    asyncio.run(be_ordered(url, name))
    environment = os.environ | {"BROKER_URL": url, "CONSUMER": name, "START": "oldest"}
    done = subprocess.run(built[language].result(), env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert done.stdout == ""
    assert f"the consumer {name} is an ordered one of another program: take another name" in done.stderr


async def be_ordered(url: str, name: str) -> None:
    """Make what an ordered name has, by our kit."""
    transport = transports.create(broker_options(url).for_consumer())
    await transport.connect()
    try:
        subscription = await transport.subscribe(name, ordered=True)
        await subscription.close()
    finally:
        await transport.close()


# -- the rules -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LANGUAGES, *(f"ours-{kind}" for kind in BROKERS)])
def test_it_meets_every_rule(name: str, verdicts: Mapping[str, Future[Any]]) -> None:
    code, document, said = verdicts[name].result()
    assert document, said
    kind = LANGUAGES[name].broker if name in LANGUAGES else name.removeprefix("ours-")
    assert [one["rule"] for one in document["rules"]] == list(rules_of(kind))
    wrong = [one for one in document["rules"] if one["result"] != "met"]
    assert not wrong, f"{json.dumps(wrong, indent=1)}\n{said}"
    assert (code, document["met"]) == (0, True)


def test_a_program_that_breaks_rules_is_told_which(verdicts: Mapping[str, Future[Any]]) -> None:
    code, document, said = verdicts["broken"].result()
    assert document, said
    assert (code, document["met"]) == (1, False)
    failed = {one["rule"]: one["details"] for one in document["rules"] if one["result"] == "failed"}
    assert failed.keys() >= {"D1", "D2", "S1", "S2", "S4", "S5", "S7", "L1", "L5", "P5"}
    assert "sequence is " in failed["D1"][0]
    assert failed["L1"][0] == "SIGTERM: its exit code is 3"
    assert failed["S2"][0] == "it was to be given as attempts 1 and 2, and came as [1]"
