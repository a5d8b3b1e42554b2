"""What a worker tells over HTTP and in traces, and how several are kept alive: without servers and without waiting."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from orthanc_events_bridge.consumers import Consumer, Event, RetryPolicy
from orthanc_events_bridge.consumers.clients import Clients
from orthanc_events_bridge.consumers.health import Health, health
from orthanc_events_bridge.consumers.meter import Meter
from orthanc_events_bridge.consumers.terms import Terms
from orthanc_events_bridge.consumers.threads import DaemonThreads
from orthanc_events_bridge.consumers.tracing import Spans
from orthanc_events_bridge.consumers.worker import Worker
from orthanc_events_bridge.consumers.workers import Workers
from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.transports.memory import MemoryTransport
from orthanc_events_bridge.transports.options import MemoryOptions

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def consumer(name: str = "one", meter: Meter | None = None) -> Consumer:
    """One that works, and is not subscribed yet."""
    made = Consumer(name, broker={"type": "memory"})
    made.meter = meter or Meter()
    made._worker = Worker(MemoryTransport(MemoryOptions()), Terms(name), [], Clients(None), made.meter)
    return made


def worker(of: Consumer) -> Worker:
    assert of._worker is not None
    return of._worker


def counted() -> Meter:
    meter = Meter()
    meter.begin()
    meter.end("study.stable", 0.05)
    meter.count("handled", "study.stable")
    meter.count("dead", "org.example.Doe^Jane")
    meter.handled("2027-01-15T08:00:00.000Z", 1_800_000_005.0)
    return meter


def test_metrics_have_the_counts_and_no_names_of_others() -> None:
    pytest.importorskip("prometheus_client")
    status, kind, text = Health([consumer(meter=counted())]).answer("GET", "/metrics")
    lines = text.decode().splitlines()
    assert status == 200 and kind.startswith("text/plain")
    for line in (
        'orthanc_consumer_handled_total{consumer="one",type="study.stable"} 1.0',
        'orthanc_consumer_dead_total{consumer="one",type="other"} 1.0',
        'orthanc_consumer_in_flight{consumer="one"} 0.0',
        'orthanc_consumer_duration_seconds_bucket{consumer="one",le="0.025",type="study.stable"} 0.0',
        'orthanc_consumer_duration_seconds_bucket{consumer="one",le="0.1",type="study.stable"} 1.0',
        'orthanc_consumer_duration_seconds_count{consumer="one",type="study.stable"} 1.0',
        'orthanc_consumer_lag_seconds{consumer="one"} 5.0',
        'orthanc_consumer_newest_recorded_timestamp_seconds{consumer="one"} 1.8e+09',
    ):
        assert line in lines, text.decode()
    assert b"Doe" not in text


def test_without_prometheus_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    status, _, text = Health([consumer()]).answer("GET", "/metrics")
    assert status == 501 and b"orthanc-events-bridge[metrics]" in text


def test_health_is_that_of_the_worker() -> None:
    watched = consumer()
    one, answers = worker(watched), Health([watched])
    assert answers.answer("GET", "/health/live")[0] == 200
    assert answers.answer("GET", "/health/ready")[0] == 503
    one.ready = True
    assert answers.answer("GET", "/health/ready?x=1")[0] == 200
    one._holding.ticked -= 60
    assert answers.answer("GET", "/health/live")[0] == 503
    assert answers.answer("GET", "/")[0] == 404
    assert answers.answer("POST", "/metrics")[0] == 405


def test_one_address_tells_of_all_consumers_of_a_process() -> None:
    pytest.importorskip("prometheus_client")
    one, other = consumer("one", counted()), consumer("two", counted())
    answers = Health([one, other])
    worker(one).ready = True
    status, _, text = answers.answer("GET", "/health/ready")
    assert status == 503 and text == b"two: not subscribed\n"
    worker(other).ready = True
    assert answers.answer("GET", "/health/ready") == (200, "text/plain; charset=utf-8", b"receiving events\n")
    worker(other)._holding.ticked -= 60
    assert answers.answer("GET", "/health/live")[0] == 503
    lines = answers.answer("GET", "/metrics")[2].decode().splitlines()
    for name in ("one", "two"):
        assert f'orthanc_consumer_handled_total{{consumer="{name}",type="study.stable"}} 1.0' in lines
        assert f'orthanc_consumer_lag_seconds{{consumer="{name}"}} 5.0' in lines
        assert f'orthanc_consumer_duration_seconds_count{{consumer="{name}",type="study.stable"}} 1.0' in lines
    assert len([line for line in lines if line.startswith("# TYPE orthanc_consumer_handled_total")]) == 1
    one._worker = None  # it has ended before the other
    assert answers.answer("GET", "/health/ready")[2] == b"one: not subscribed\n"


def test_it_is_told_over_http_and_an_address_in_use_is_one_sentence() -> None:
    async def main() -> bytes:
        async with health("127.0.0.1:0", consumer()) as port:
            with pytest.raises(BridgeError, match="can't be told at"):
                async with health(f"127.0.0.1:{port}", consumer("two")):
                    pass
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /health/ready HTTP/1.1\r\nHost: h\r\n\r\n")
            answer = await reader.read()
            writer.close()
            return answer

    answer = asyncio.run(main())
    assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\n") and answer.endswith(b"one: not subscribed\n")


def test_each_worker_has_a_port_of_its_own() -> None:
    app = Consumer("one", broker={"type": "memory"}, http="127.0.0.1:9100").numbered(3)
    assert app.settings.http == "127.0.0.1:9103"


def test_a_span_continues_the_trace_and_holds_no_data() -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    spans = Spans("one", "nats")
    spans._tracer = provider.get_tracer("test")
    attributes = {"traceparent": TRACE, "subject": "Doe^Jane"}
    event = Event("id-1", "urn:a", "io.x.study.stable.v1", "study.stable", None, {"tags": "Doe^Jane"}, attributes)

    def fail() -> None:
        with spans.processing(event) as span:
            span.failed("ValueError")
            raise ValueError("Doe^Jane")

    with pytest.raises(ValueError):
        fail()
    with spans.processing(Event("Doe^Jane", "Doe^Jane", "org.Doe^Jane", "org.Doe^Jane")):
        pass
    first, other = exporter.get_finished_spans()
    assert first.name == "study.stable process" and first.kind.name == "CONSUMER"
    assert first.parent is not None and f"{first.parent.trace_id:032x}" == TRACE[3:35]
    assert first.attributes is not None and first.attributes["error.type"] == "ValueError"
    assert first.attributes["messaging.system"] == "nats"
    assert other.name == "other process"
    assert "Doe" not in first.to_json() and "Doe" not in other.to_json()


def test_a_thread_that_never_ends_is_not_waited_for() -> None:
    threads, never = DaemonThreads(1, "test"), threading.Event()
    threads.submit(never.wait)
    later = threads.submit(int)
    assert any(one.daemon for one in threading.enumerate() if one.name == "test-1")
    threads.shutdown(cancel_futures=True)
    never.set()
    assert not later.done()
    with pytest.raises(RuntimeError):
        threads.submit(int)


def test_threads_are_reused_and_hand_on_what_is_raised() -> None:
    threads = DaemonThreads(4, "test")
    with pytest.raises(ZeroDivisionError):
        threads.submit(lambda: 1 / 0).result(10)
    assert [threads.submit(pow, 2, number).result(10) for number in range(3)] == [1, 2, 4]
    threads.shutdown()


# -- several workers -----------------------------------------------------------------------------------------


class Fake:
    def __init__(self) -> None:
        self.pid = 1
        self.code: int | None = None
        self.signals: list[int] = []

    def poll(self) -> int | None:
        return self.code

    def send_signal(self, sig: int, /) -> None:
        self.signals.append(sig)


class Stage:
    """Workers whose waits are the steps of a test."""

    def __init__(self, count: int, steps: Iterator[Any]) -> None:
        self.time, self.started = 0.0, list[tuple[float, int, Fake]]()
        self.workers = Workers(self.start, count, self.wait, lambda: self.time)
        self.steps = steps

    def start(self, number: int) -> Fake:
        self.started.append((self.time, number, Fake()))
        return self.started[-1][2]

    def wait(self, seconds: float) -> None:
        self.time += 0.5
        assert self.time < 100
        next(self.steps, None)


def test_a_worker_that_dies_is_started_again_later_each_time(caplog: pytest.LogCaptureFixture) -> None:
    def steps() -> Iterator[None]:
        yield
        stage.started[1][2].code = -9
        for _ in range(4):
            yield
        stage.started[2][2].code = 1
        for _ in range(8):
            yield
        stage.workers.stop()
        for _, _, one in stage.started:
            one.code = 0 if one.code is None else one.code
        yield

    stage = Stage(2, iter(()))
    stage.steps = steps()
    assert stage.workers.run() == 0
    assert [number for _, number, _ in stage.started] == [0, 1, 1, 1]
    first, second = stage.started[2][0] - stage.started[1][0], stage.started[3][0] - stage.started[2][0]
    assert 1 <= first < second
    assert "worker 1 (process 1) was killed by signal 9; it is started again in 1 s" in caplog.text
    assert stage.started[0][2].signals == [signal.SIGTERM]


def test_what_can_not_begin_is_not_started_again() -> None:
    def steps() -> Iterator[None]:
        yield
        stage.started[0][2].code = 2
        yield
        stage.started[1][2].code = 0
        yield

    stage = Stage(2, iter(()))
    stage.steps = steps()
    assert stage.workers.run() == 2
    assert stage.started[1][2].signals == [signal.SIGTERM]


def test_asked_twice_they_are_killed() -> None:
    def steps() -> Iterator[None]:
        yield
        stage.workers.stop()
        stage.workers.stop()
        stage.started[0][2].code = -9
        yield

    stage = Stage(1, iter(()))
    stage.steps = steps()
    assert stage.workers.run() == 1
    assert stage.started[0][2].signals == [signal.SIGTERM, signal.SIGKILL]


def test_an_ordered_handler_may_not_wait_long() -> None:
    app = Consumer("one", broker={"type": "memory"}, ordered=True)
    with pytest.raises(BridgeError, match="would hold up"):
        app.on("study.stable", retry=RetryPolicy(maximum=301))
