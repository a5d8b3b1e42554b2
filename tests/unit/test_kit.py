"""The kit for users' tests: what it shows, and that it can fail. docs/testing.md is its other test."""

from __future__ import annotations

import ast
import asyncio
import inspect
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from orthanc_events_bridge.bridge.settings import Settings
from orthanc_events_bridge.consumers import Consumer, Event, Reject, Retry, RetryPolicy
from orthanc_events_bridge.consumers.event import read
from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.events import samples
from orthanc_events_bridge.testing import kit, orthanc_module
from orthanc_events_bridge.testing.events import event, orthanc_id
from orthanc_events_bridge.testing.orthanc_module import FakeOrthanc
from orthanc_events_bridge.transports.base import Incoming

STUDY = event("study.stable", study="study-1")


def app(**options: Any) -> Consumer:
    return Consumer("one", broker={"type": "memory"}, **options)


def test_an_hour_of_retries_is_no_time() -> None:
    consumer = app(retry=RetryPolicy(max_attempts=100, initial=36, maximum=36, jitter=1.0))
    at = []

    @consumer.on("study.stable")
    async def handler(given: Event) -> None:
        at.append(given.attempt)
        raise Retry

    with consumer.test() as trial:
        trial.send(STUDY)
        trial.advance(hours=1)
        assert at == list(range(1, 102))[:100]
        assert trial.now == samples.AT.replace(hour=13)
        trial.assert_dead(STUDY, "failed 100 times of 100")
        assert [one.at for one in trial.outcomes] == [36.0 * number for number in range(100)]


def test_a_retry_is_due_when_it_is_and_not_before() -> None:
    consumer = app()

    @consumer.on("study.stable")
    def handler(given: Event) -> str:
        if given.attempt == 1:
            raise Retry(after=3600)
        return given.operation

    with consumer.test() as trial:
        trial.send(STUDY)
        assert trial.waiting == 3600
        trial.advance(seconds=3599)
        assert not trial.handled
        trial.advance(seconds=1)
        assert trial.results == ["retry"]
        with pytest.raises(ValueError, match="back"):
            trial.advance(seconds=-1)


def test_an_ordered_consumer_waits_for_its_retries() -> None:
    order = []
    for ordered in (True, False):
        consumer = app(ordered=ordered)

        @consumer.on("study.*")
        def handler(given: Event) -> None:
            order.append(given.name)
            if given.attempt == 1 and given.name == "study.created":
                raise Retry(after=300)

        with consumer.test() as trial:
            trial.send(event("study.created", study="study-1"), STUDY)
            trial.advance(minutes=5)
            trial.assert_handled()
    assert order == ["study.created", "study.created", "study.stable", "study.created", "study.stable", "study.created"]


def test_what_a_handler_raised_is_there() -> None:
    consumer = app(retry=RetryPolicy(max_attempts=1))

    @consumer.on("study.stable")
    def fails(given: Event) -> None:
        raise KeyError("PatientID")

    @consumer.on("series.stable")
    async def rejects(given: Event) -> None:
        raise Reject("no")

    with consumer.test() as trial:
        trial.send(STUDY, event("series.stable"), event("job.failed"), b"nonsense")
        by_kind = {one.event.name if one.event else "": one for one in trial.outcomes}
        assert isinstance(by_kind["study.stable"].error, KeyError)
        assert by_kind["study.stable"].headers["orthanc-exception"] == "KeyError"
        assert by_kind["series.stable"].reason == "no"
        assert by_kind["job.failed"].kind == "ignored"
        assert "no CloudEvent" in by_kind[""].reason and by_kind[""].event is None
        assert {call.handler.rpartition(".")[2] for call in trial.calls} == {"fails", "rejects"}
        for words in ("study.stable studies/study-1", "KeyError", "no CloudEvent", "ignored", "0:00:00"):
            assert words in trial.story


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (lambda trial: trial.assert_handled(), "study.stable studies/study-1 was not handled"),
        (lambda trial: trial.assert_handled(STUDY), "was not handled"),
        (lambda trial: trial.assert_retried(STUDY, 5), "given back for [60], not for [5] s"),
        (lambda trial: trial.assert_retried(event("study.deleted")), "was not given back"),
        (lambda trial: trial.assert_dead(STUDY), "is not among the dead letters"),
    ],
)
def test_a_failure_tells_the_story(check: Callable[[Any], None], words: str) -> None:
    consumer = app()

    @consumer.on("study.stable")
    def handler(given: Event) -> None:
        raise Retry(after=60)

    with consumer.test() as trial:
        trial.send(STUDY)
        with pytest.raises(AssertionError) as caught:
            check(trial)
    assert words in str(caught.value)
    assert "attempt 1: retried" in str(caught.value) and "due in 60 s" in str(caught.value)


def test_nothing_sent_is_nothing_handled() -> None:
    consumer = app()
    consumer.on("study.stable")(lambda given: None)
    with consumer.test() as trial, pytest.raises(AssertionError, match="nothing was sent"):
        trial.assert_handled()


def test_a_wrong_reason_is_a_failure() -> None:
    consumer = app()

    @consumer.on("study.stable")
    def handler(given: Event) -> None:
        raise Reject("full moon")

    with consumer.test() as trial:
        trial.send(STUDY)
        trial.assert_dead(STUDY, "moon")
        with pytest.raises(AssertionError, match="full moon"):
            trial.assert_dead(STUDY, "sun")


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_orthanc_answers_what_is_recorded_and_nothing_else(kind: str) -> None:
    consumer = app(orthanc="http://orthanc:8042/pacs")

    def sync(given: Event, orthanc: httpx.Client) -> Any:
        return orthanc.get("/system").json()

    async def coroutine(given: Event, orthanc: httpx.AsyncClient) -> Any:
        return (await orthanc.get("/system")).json()

    consumer.on("server.started")(sync if kind == "sync" else coroutine)
    with consumer.test() as trial:
        system = trial.orthanc.get("/system")
        system.side_effect = [httpx.Response(503, headers={"Retry-After": "3600"}), httpx.Response(200, json=18)]
        trial.send(event("server.started"))
        assert trial.results == [18] and system.call_count == 2
        assert str(system.calls[0].request.url) == "http://orthanc:8042/pacs/system"
    with consumer.test() as trial:
        with pytest.raises(AssertionError, match=r"asked Orthanc for GET /system, and nothing is recorded"):
            trial.send(event("server.started"))
        trial.orthanc.get("/system").respond(json=19)
        trial.advance(seconds=1)
        assert trial.results == [19]


def test_other_clients_are_left_alone() -> None:
    consumer = app()
    consumer.on("study.stable")(lambda given: None)
    with consumer.test() as trial:
        trial.orthanc.get("/system").respond(json=18)
        with pytest.raises(httpx.ConnectError):
            httpx.get("http://127.0.0.1:1/system")


def test_a_handler_that_does_not_end_fails_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kit, "PATIENCE", 0.01)
    consumer = app()

    @consumer.on("study.stable")
    async def handler(given: Event) -> None:
        await asyncio.Event().wait()

    with consumer.test() as trial, pytest.raises(AssertionError, match="have not ended"):
        trial.send(STUDY)


def test_a_retry_without_end_fails_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kit, "_ENDLESS", 50)
    consumer = app(retry=RetryPolicy(max_attempts=None, max_age=None))

    @consumer.on("study.stable")
    def handler(given: Event) -> None:
        raise Retry

    with consumer.test() as trial:
        trial.send(STUDY)
        with pytest.raises(AssertionError, match="no end"):
            trial.finish()


def test_a_wrong_use_says_what_is_right() -> None:
    with pytest.raises(BridgeError, match="no handler"):
        app().test()
    consumer = app()
    consumer.on("study.stable")(lambda given: None)

    async def inside() -> None:
        with consumer.test():
            pass

    with pytest.raises(BridgeError, match="async with"):
        asyncio.run(inside())
    with consumer.test() as trial:
        pass
    with pytest.raises(BridgeError, match="is over"):
        trial.send(STUDY)


# -- events ----------------------------------------------------------------------------------------------------------


def test_what_is_sent_are_the_bridges_own_bytes() -> None:
    """Attributes in their order, and data, as the mapping writes them."""
    for name in ("study.stable", "server.started", "job.failed", "instance.deleted"):
        made = event(name)
        sent = kit.outgoing(made)
        assert b'"partitionkey": ' in sent.body and sent.address == f"main.{name}.{sent.partition}"
        again = read(Incoming(sent.address, sent.body, {"content-type": sent.content_type}))
        assert again == made


def test_the_defaults_are_the_bridges() -> None:
    for option in ("type_prefix", "schema_base", "site"):
        assert samples.SHAPE[option] == Settings.model_fields[option].default


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: event("study.stabel"), "study.stabel"),
        (lambda: event("study.stable", series="s"), "is given series"),
        (lambda: event("server.started", study="s", tags={"a": "b"}), "is given study, tags"),
        (lambda: event("study.stable", job={"type": "a"}), "is given job"),
        (lambda: event("study.stable", at=samples.AT.replace(tzinfo=None)), "time zone"),
    ],
)
def test_a_wrong_event_is_refused(make: Callable[[], Event], words: str) -> None:
    with pytest.raises(BridgeError) as caught:
        make()
    assert words in str(caught.value) and caught.value.remedy


def test_parents_can_be_unknown() -> None:
    made = event("series.deleted", series="s", parents=False)
    assert made.study_id is None and made.key == "s"
    assert event("series.deleted", series="s").study_id == orthanc_id("study")


# -- the module that Orthanc has -------------------------------------------------------------------------------------


def test_the_stand_in_is_there_for_a_while() -> None:
    before = sys.modules.get("orthanc")
    with FakeOrthanc({"Name": "PACS"}) as orthanc:
        import orthanc as module

        assert module.ChangeType.STABLE_STUDY == 9 and module.ResourceType.NONE == 4  # type: ignore[attr-defined]
        assert '"Name": "PACS"' in module.GetConfiguration()
        orthanc.rest["GET", "/studies/*"] = [1]
        orthanc.rest["POST", "/tools/find"] = lambda body: body.upper()
        assert module.RestApiGet("/studies/s") == b"[1]"
        assert module.RestApiPost("/tools/find", "a") == b"A"  # type: ignore[attr-defined]
        with pytest.raises(module.OrthancException) as caught:
            module.RestApiGet("/series/s")
        assert caught.value.args[0] == 17
        seen: list[tuple[int, int, str]] = []
        module.RegisterOnChangeCallback(lambda *change: seen.append(change))
        with pytest.raises(RuntimeError, match="only register one"):
            module.RegisterOnChangeCallback(print)
        module.RegisterRestCallback("/hello/(.*)", lambda out, uri, **more: out.AnswerBuffer(uri, "text/plain"))
        assert orthanc.request("/hello/you").body == b"/hello/you"
        assert orthanc.request("/hallo").status == 404
    assert seen == [(orthanc_module.ChangeType.ORTHANC_STOPPED, 4, "")]
    assert sys.modules.get("orthanc") is before


def test_the_stand_in_has_what_the_plugin_uses() -> None:
    """As `typings/orthanc.pyi` has it: every name, and functions with as many arguments."""
    tree = ast.parse((Path(__file__).parents[2] / "typings" / "orthanc.pyi").read_text("utf-8"))
    found = 0
    for one in tree.body:
        if isinstance(one, ast.FunctionDef):
            found += _compare(one, getattr(FakeOrthanc(), one.name))
        elif isinstance(one, ast.ClassDef):
            kind = getattr(FakeOrthanc, one.name)
            methods = [method for method in one.body if isinstance(method, ast.FunctionDef)]
            found += 1 + sum(_compare(method, getattr(kind, method.name)) for method in methods)
    assert found > 10
    for name in ("ChangeType", "ResourceType"):
        assert all(name.isupper() for name in getattr(FakeOrthanc, name).__members__)


def _compare(typed: ast.FunctionDef, there: Callable[..., Any]) -> int:
    signature = inspect.signature(there)
    positional = [one for one in signature.parameters.values() if one.kind is one.POSITIONAL_ONLY]
    names = [one.arg for one in typed.args.posonlyargs]
    assert [one.name for one in positional] == names, typed.name
    return 1


# -- the plugin for pytest -------------------------------------------------------------------------------------------


def test_a_pytest_that_does_not_use_it_imports_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text(
        "import sys\n\n\ndef test_nothing_is_imported():\n"
        "    ours = {name for name in sys.modules if name.startswith('orthanc_events_bridge')}\n"
        "    assert ours - {'orthanc_events_bridge._version'} == {"
        "'orthanc_events_bridge', 'orthanc_events_bridge.testing', 'orthanc_events_bridge.testing.plugin'}\n"
        "    assert not {'httpx', 'respx', 'pydantic', 'cloudevents', 'pydicom', 'orthanc'} & set(sys.modules)\n",
        "utf-8",
    )
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "."]
    command += ["-p", "no:xdist", "-p", "no:respx"]  # respx's own plugin imports it
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_kit_is_quiet(caplog: pytest.LogCaptureFixture) -> None:
    consumer = app()
    consumer.on("study.stable")(lambda given: None)
    with caplog.at_level(logging.INFO), consumer.test() as trial:
        trial.send(STUDY)
    assert not caplog.records
