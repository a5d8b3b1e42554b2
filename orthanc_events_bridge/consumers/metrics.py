"""What a worker counts, in Prometheus' format. Needs the extra ``metrics``."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Final

from orthanc_events_bridge.consumers.meter import BUCKETS, OUTCOMES, Meter

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

#: What the answer is written in.
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX: Final = "orthanc_consumer"


class Collector:
    """Reads the meter when it is asked: nothing is counted twice."""

    def __init__(self, meter: Meter, consumer: str) -> None:
        self._meter = meter
        self._consumer = consumer

    def collect(self) -> Iterator[Metric]:
        """The numbers of now."""
        from prometheus_client.metrics_core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
        )

        meter, one, typed = self._meter, ["consumer"], ["consumer", "type"]
        for outcome, text in OUTCOMES.items():
            counter = CounterMetricFamily(f"{_PREFIX}_{outcome}", text, labels=typed)
            for (kind, name), number in sorted(meter.counts.items()):
                if kind == outcome:
                    counter.add_metric([self._consumer, name], number)
            yield counter
        gauge = GaugeMetricFamily(f"{_PREFIX}_in_flight", "Events whose handlers run.", labels=one)
        gauge.add_metric([self._consumer], meter.in_flight)
        yield gauge
        gauge = GaugeMetricFamily(
            f"{_PREFIX}_waiting", "Events that wait for a place of retries or dead letters that takes none.", labels=one
        )
        gauge.add_metric([self._consumer], meter.waiting)
        yield gauge
        histogram = HistogramMetricFamily(
            f"{_PREFIX}_duration_seconds", "Time in the handlers of an event.", labels=typed
        )
        for name, classes in sorted(meter.durations.items()):
            bounds = [*(str(bound) for bound in BUCKETS), "+Inf"]
            histogram.add_metric(
                [self._consumer, name], list(zip(bounds, accumulate(classes), strict=True)), meter.seconds[name]
            )
        yield histogram
        if meter.newest is not None:
            newest = GaugeMetricFamily(
                f"{_PREFIX}_newest_recorded_timestamp_seconds",
                "When the newest event that is handled was recorded, since the epoch.",
                labels=one,
            )
            newest.add_metric([self._consumer], meter.newest)
            yield newest
            lag = GaugeMetricFamily(
                f"{_PREFIX}_lag_seconds", "Between recording and the end of handling, of the newest event.", labels=one
            )
            lag.add_metric([self._consumer], meter.lag)
            yield lag


def metrics_text(meter: Meter, consumer: str) -> bytes:
    """All of them.

    :raises ImportError: ``prometheus_client`` is not installed.
    """
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector(meter, consumer))
    return generate_latest(registry)
