"""Handlers outside Orthanc, with retry, order and scaling that mean the same on every broker (docs/consumers.md)."""

from orthanc_events_bridge.consumers.app import Consumer
from orthanc_events_bridge.consumers.event import Event
from orthanc_events_bridge.consumers.retry import Reject, Retry, RetryPolicy

__all__ = ["Consumer", "Event", "Reject", "Retry", "RetryPolicy"]
