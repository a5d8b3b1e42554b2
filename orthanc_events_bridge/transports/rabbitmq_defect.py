"""What is said where something of ours fails that should not."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path

from orthanc_events_bridge.errors import NotConnectedError, TransportError

log = logging.getLogger(__name__)


def defect(url: str, error: BaseException) -> TransportError:
    """Why a connection is given up: what it was about would not be done, and nobody would see it.

    :param url: of the server.
    :return: the error itself where it says by itself what to do.
    """
    log.debug("a connection to RabbitMQ", exc_info=error)
    if isinstance(error, TransportError):
        return error
    # Not what it says: that can hold patient data.
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = "".join(f" in {Path(one.filename).name}, line {one.lineno}" for one in place)
    return NotConnectedError(
        f"the connection to RabbitMQ at {url} is given up for a defect: {type(error).__name__}{where}",
        "please report this; what was held comes again over a new one",
    )
