"""``python -m ai_service``: run the service until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import warnings
from urllib.parse import urlsplit

import uvicorn

from ai_service.service import LOG, opened
from ai_service.settings import Settings, SettingsError, explain, read
from ai_service.store import InUseError


def main() -> int:
    """Return 0, 1 where it can't run, 2 where its settings are wrong."""
    argparse.ArgumentParser(
        prog="python -m ai_service",
        description="A small AI service: takes DICOM series by STOW-RS, and returns segmentation and measurements.",
        epilog=f"environment:\n{explain()}\n\nexample:\n"
        "  AI_SERVICE_RESULTS_URL=http://localhost:8042/dicom-web python -m ai_service",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    quieten()
    try:
        settings = read(os.environ)
        asyncio.run(_serve(settings))
    except SettingsError as error:
        print(f"ai_service: {error}", file=sys.stderr)
        return 2
    except (InUseError, OSError) as error:
        print(f"ai_service: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # by uvicorn, when it has ended in good order
        pass
    return 0


def quieten() -> None:
    """Keep the libraries out of the log: pydicom's warnings repeat values of images, which are patient data."""
    warnings.simplefilter("ignore")
    for name in ("highdicom", "httpcore", "httpx", "pydicom"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)  # theirs below it too, which `disabled` leaves out


async def _serve(settings: Settings) -> None:
    if settings.faults:
        LOG.warning("FOR TESTS ONLY: it is told to misbehave at series %s", sorted(settings.faults))
    if settings.results_url:
        LOG.info("results of POST /studies are sent to %s", urlsplit(settings.results_url).netloc)
    else:
        LOG.info("results are the answers to POST /results; AI_SERVICE_RESULTS_URL is not set for POST /studies")
    async with opened(settings) as service:
        # Paths have UIDs in them: no access log.
        options = uvicorn.Config(
            service.app(), settings.host, settings.port, access_log=False, log_config=None, timeout_graceful_shutdown=10
        )
        await uvicorn.Server(options).serve()


if __name__ == "__main__":
    sys.exit(main())
