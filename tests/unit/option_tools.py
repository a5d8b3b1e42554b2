"""A transport's options as they stand in the bridge's file, and what is said of mistakes in them."""

from __future__ import annotations

import pytest

from orthanc_events_bridge.bridge.config import ConfigError, parse
from orthanc_events_bridge.transports.options import TransportOptions

SOURCE = "source: urn:uuid:6f1c1d0e-6f0b-4d0c-9a39-0d3a3d8f3b6e\n"


def options_of(kind: str, text: str) -> TransportOptions:
    """The options of a transport of that type, from their lines."""
    lines = "".join(f"    {line}\n" for line in text.splitlines())
    return parse(f"{SOURCE}transports:\n  - type: {kind}\n{lines}", "x.yaml", {}).transports[0]


def mistakes_of(kind: str, text: str) -> list[str]:
    """What is wrong with them: each with a remedy, and nothing chained that could hold a secret."""
    with pytest.raises(ConfigError) as caught:
        options_of(kind, text)
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    assert all(one.right for one in caught.value.problems)
    return [str(one) for one in caught.value.problems]
