"""What the entry point leads to: options, without whatever client the transport itself may import."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from orthanc_events_bridge.transports import Registration
from orthanc_events_bridge.transports.options import TransportOptions
from orthanc_events_bridge.values import FileName


class FileOptions(TransportOptions):
    """Events as lines of a file."""

    type: Literal["file"] = Field(default="file", description="`file`.")
    mode: Literal["structured"] = Field(default="structured", description="A line has all of an event.")
    path: FileName = Field(description="The file. It is made where it isn't there, and only ever appended to.")


REGISTRATION = Registration(FileOptions, "file_transport:FileTransport")
