"""``orthanc-events schema``: what events look like, for machines. (What configurations look like is in `cli`.)"""

from __future__ import annotations

import argparse
import json
from typing import Any, Final

from orthanc_events_bridge.cli_options import UsageError
from orthanc_events_bridge.errors import BridgeError

EPILOG: Final = """\
examples:
  orthanc-events schema study.stable                    of that event's data
  orthanc-events schema io.orthanc-events.job.failed.v1 the same, by the full type
  orthanc-events schema cloudevent                      of a whole event: its attributes
  orthanc-events schema derived-cloudevent              of one that a consumer has published
  orthanc-events schema --all | jq keys                 which there are
  orthanc-events schema --asyncapi > asyncapi.yaml      what is where on each broker
  orthanc-events schema > orthanc-events.schema.json    for editors: of the bridge's configuration

Events have JSON Schemas of 2020-12, and an AsyncAPI document of 3.0; all show the
defaults of `type_prefix` and `schema_base`. docs/events.html is the same for people."""


def options(one_of: Any) -> None:
    """Add the options.

    :param one_of: the group of options of which only one can be given.
    """
    one_of.add_argument("type", metavar="TYPE", nargs="?", help="of an event's data: study.stable")
    one_of.add_argument("--all", action="store_true", help="of all events' data: one JSON object, by their types")
    one_of.add_argument("--asyncapi", action="store_true", help="the AsyncAPI document, in YAML")


def is_named(options: argparse.Namespace) -> bool:
    """Whether they ask for events rather than for a configuration."""
    return bool(options.type or options.all or options.asyncapi)


def run(options: argparse.Namespace) -> int:
    """Print what they ask for.

    :raises UsageError: there is no such event.
    """
    from orthanc_events_bridge.events import described

    if options.asyncapi:
        print(described.asyncapi_text(), end="")
    elif options.all:
        print(json.dumps({name: described.schema(name) for name in described.names()}, indent=2, ensure_ascii=False))
    else:
        try:
            print(described.schema_text(options.type), end="")
        except BridgeError as error:
            raise UsageError(error.message, error.remedy) from error
    return 0
