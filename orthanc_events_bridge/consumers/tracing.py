"""A span for each event that is handled, where ``opentelemetry-api`` is installed (extra ``tracing``).

It continues the event's ``traceparent``, and has the attributes of OpenTelemetry's semantic conventions for messaging
and for CloudEvents. None of them can hold patient data: of an event of another producer only that it is one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from orthanc_events_bridge import __version__

if TYPE_CHECKING:
    from orthanc_events_bridge.consumers.event import Event

try:
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:
    _ON = False
else:
    _ON = True

_OTHER: Final = "other"


class Spans:
    """Makes them, or does nothing where nobody has set up OpenTelemetry when the worker begins.

    :param consumer: its name.
    :param system: the kind of broker, as its transport is called.
    """

    def __init__(self, consumer: str, system: str) -> None:
        self._consumer = consumer
        self._system = system
        # As long as nobody has said where spans go, they would cost more than all else that is done for an event.
        there = _ON and not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
        self._tracer = trace.get_tracer("orthanc_events_bridge", __version__) if there else None

    @property
    def on(self) -> bool:
        """Whether they are made."""
        return self._tracer is not None

    @contextlib.contextmanager
    def processing(self, event: Event) -> Iterator[Span]:
        """The time in which an event's handlers run. Only where it is on."""
        assert self._tracer is not None
        carrier = {name: event.attributes.get(name, "") for name in ("traceparent", "tracestate")}
        parent = TraceContextTextMapPropagator().extract(carrier)
        with self._tracer.start_as_current_span(
            f"{event.name if event.ours else _OTHER} process",
            context=parent,
            kind=trace.SpanKind.CONSUMER,
            attributes=self._attributes(event),
            record_exception=False,  # what it says can hold patient data
            set_status_on_exception=False,
        ) as span:
            yield Span(span)

    def _attributes(self, event: Event) -> dict[str, str | int]:
        found: dict[str, str | int] = {
            "messaging.system": self._system,
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.consumer.group.name": self._consumer,
            "orthanc.attempt": event.attempt,
        }
        if event.ours:
            found |= {
                "messaging.message.id": event.id,
                "cloudevents.event_id": event.id,
                "cloudevents.event_source": event.source,
                "cloudevents.event_spec_version": "1.0",
                "cloudevents.event_type": event.type,
            }
        return found


class Span:
    """One of them."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    def failed(self, kind: str) -> None:
        """Its handler failed.

        :param kind: the type of what it raised.
        """
        self._span.set_attribute("error.type", kind)
        self._span.set_status(trace.Status(trace.StatusCode.ERROR, kind))
