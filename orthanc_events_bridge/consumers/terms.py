"""How a worker works."""

from __future__ import annotations

from dataclasses import dataclass, field

from orthanc_events_bridge.consumers.retry import RetryPolicy


@dataclass(frozen=True, slots=True)
class Terms:
    """What `orthanc_events_bridge.consumers.settings` come to.

    :ivar name: of its consumer.
    :ivar oldest: where the consumer's very first start begins: with the oldest event that the broker keeps.
    :ivar ordered: whether events of one key stay in order across all workers.
    :ivar concurrency: how many events are handled at a time.
    :ivar prefetch: how many deliveries may be held, those that are being handled among them.
    :ivar retry: for handlers without a policy of their own.
    :ivar ack_wait: seconds without a word from us behind which the broker may give a delivery to another.
    :ivar longest: seconds that a handler may take, with its waits; 0: what the broker allows by itself.
    :ivar inbox_only: whether it gets nothing of what everybody gets, only what is sent to its inbox.
    :ivar drain: seconds that handlers have to end when the worker stops.
    """

    name: str
    oldest: bool = False
    ordered: bool = False
    inbox_only: bool = False
    concurrency: int = 16
    prefetch: int = 64
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    ack_wait: float = 30.0
    longest: float = 0.0
    drain: float = 25.0
