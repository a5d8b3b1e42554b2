"""What the consumers of a worker count, in Prometheus' format. Needs the extra ``metrics``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Final

from orthanc_events_bridge.consumers.limit import Limit, limits
from orthanc_events_bridge.consumers.meter import BUCKETS, OUTCOMES, Meter

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from orthanc_events_bridge.consumers.health import Watched

#: What the answer is written in.
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX: Final = "orthanc_consumer"


class Collector:
    """Reads the meters when it is asked: nothing is counted twice."""

    def __init__(self, consumers: Sequence[Watched]) -> None:
        self._consumers = consumers

    def collect(self) -> Iterator[Metric]:
        """The numbers of now."""
        from prometheus_client.metrics_core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
        )

        one, typed = ["consumer"], ["consumer", "type"]
        for outcome, text in OUTCOMES.items():
            counter = CounterMetricFamily(f"{_PREFIX}_{outcome}", text, labels=typed)
            for name, meter in self._meters():
                for (kind, event), number in sorted(meter.counts.items()):
                    if kind == outcome:
                        counter.add_metric([name, event], number)
            yield counter
        histogram = HistogramMetricFamily(
            f"{_PREFIX}_duration_seconds", "Time in the handlers of an event.", labels=typed
        )
        bounds = [*(str(bound) for bound in BUCKETS), "+Inf"]
        for name, meter in self._meters():
            for event, classes in sorted(meter.durations.items()):
                buckets = list(zip(bounds, accumulate(classes), strict=True))
                histogram.add_metric([name, event], buckets, meter.seconds[event])
        yield histogram
        for what, (text, read) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"{_PREFIX}_{what}", text, labels=one)
            for name, meter in self._meters():
                if (value := read(meter)) is not None:
                    gauge.add_metric([name], value)
            yield gauge
        for what, (text, number_of) in _OF_ORTHANCS.items():
            gauge = GaugeMetricFamily(f"{_PREFIX}_{what}", text, labels=["orthanc"])
            for limit in limits():
                gauge.add_metric([limit.name], number_of(limit))
            yield gauge

    def _meters(self) -> Iterator[tuple[str, Meter]]:
        return ((one.name, one.meter) for one in self._consumers)


#: What each gauge tells, and where that is found; none: nothing is known yet.
_GAUGES: Final[dict[str, tuple[str, Callable[[Meter], float | None]]]] = {
    "in_flight": ("Events whose handlers run.", lambda meter: meter.in_flight),
    "waiting": (
        "Events that wait for a place of retries or dead letters that takes none.",
        lambda meter: meter.waiting,
    ),
    "newest_recorded_timestamp_seconds": (
        "When the newest event that is handled was recorded, since the epoch.",
        lambda meter: meter.newest,
    ),
    "lag_seconds": (
        "Between recording and the end of handling, of the newest event.",
        lambda meter: None if meter.newest is None else meter.lag,
    ),
}


#: The same of each Orthanc that the process asks.
_OF_ORTHANCS: Final[dict[str, tuple[str, Callable[[Limit], int]]]] = {
    "orthanc_requests": ("Requests that it has now.", lambda limit: limit.taken),
    "orthanc_requests_waiting": ("Requests that wait, for it has enough.", lambda limit: limit.waiting),
}


def metrics_text(consumers: Sequence[Watched]) -> bytes:
    """All of them.

    :raises ImportError: ``prometheus_client`` is not installed.
    """
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector(consumers))
    return generate_latest(registry)
