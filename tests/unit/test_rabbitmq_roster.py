"""Who of the subscribers of an ordered name is to have which partition at RabbitMQ."""

from __future__ import annotations

from collections import Counter

import pytest

from orthanc_events_bridge.transports.rabbitmq_roster import owners
from orthanc_events_bridge.transports.subscriptions import PARTITIONS


def names(count: int) -> list[str]:
    return [f"worker-{number}" for number in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 40, 63, 64, 65, 100])
def test_each_has_as_many_as_any_other_or_one_more(count: int) -> None:
    loads = Counter(owners(names(count)))
    assert sum(loads.values()) == PARTITIONS
    shares = [loads[worker] for worker in names(count)]
    assert max(shares) - min(shares) <= 1


def test_all_see_the_same_in_whatever_order_they_know_each_other() -> None:
    assert owners(names(8)) == owners(names(8)[::-1])


@pytest.mark.parametrize("count", [2, 4, 8, 16])
def test_few_change_when_one_comes_or_goes(count: int) -> None:
    before, after = owners(names(count)), owners(names(count + 1))
    moved = sum(one != other for one, other in zip(before, after, strict=True))
    assert moved <= 2.5 * PARTITIONS / count
