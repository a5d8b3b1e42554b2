"""Behind the answer: series that are complete are measured one after the other, and their results sent by STOW-RS."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import httpx
from pydicom import dcmread

from ai_service.faults import Faults
from ai_service.measure import UnfitError, measure
from ai_service.multipart import join, kind_of
from ai_service.results import make
from ai_service.settings import Settings
from ai_service.store import State, Store

LOG: Final = logging.getLogger("ai_service")


class SendError(Exception):
    """The receiver has not taken the results. The message repeats nothing of what it has answered but codes."""


def compute(paths: Sequence[Path]) -> bytes:
    """Return the results of the images in some files, as a body of ``multipart/related``.

    :raises UnfitError: there won't ever be any.
    :raises OSError: a file can't be read; another time it may be.
    """
    try:
        return join(make(measure([dcmread(path) for path in paths])))
    except (ArithmeticError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        # The message may repeat what is in the image.
        raise UnfitError(f"no results can be made of it ({type(error).__name__})") from error


async def send(client: httpx.AsyncClient, settings: Settings, body: bytes) -> None:
    """Store results at the receiver. It knows them by their UIDs, and so may get them again.

    :raises SendError: it has not stored all of them.
    """
    headers = {"Content-Type": kind_of(body), "Accept": "application/dicom+json"}
    if settings.results_authorization:
        headers["Authorization"] = settings.results_authorization
    url = f"{settings.results_url}/studies"
    try:
        answer = await client.post(url, content=body, headers=headers, timeout=settings.answer_seconds)
    except httpx.HTTPError as error:
        raise SendError(f"the receiver was not reached ({type(error).__name__})") from error
    reasons = _reasons(answer)
    if answer.status_code != 200 or reasons:
        raise SendError(f"the receiver answered {answer.status_code}{reasons and f', failure reasons {reasons}'}")


def _reasons(answer: httpx.Response) -> str:
    """The failure reasons in an answer, in hexadecimal: also a 200 may have some."""
    try:
        items = answer.json()["00081198"]["Value"]
        return ", ".join(f"{int(item['00081197']['Value'][0]):04X}" for item in items)
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, ValueError):
        return ""


class Worker:
    """Takes series out of the store, one at a time, so that a burst needs no more memory than the largest.

    :param clock: seconds since 1970.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        faults: Faults,
        client: httpx.AsyncClient,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings, self._store, self._faults = settings, store, faults
        self._client, self._clock = client, clock

    async def run(self) -> None:
        """Work until cancelled. A full disk, say, ends nothing: it is said, and tried again."""
        while True:
            try:
                await self.round()
            except OSError as error:
                LOG.error("the folder can't be used (%s): is the disk full?", error.strerror)
            await asyncio.sleep(0.2)

    async def round(self) -> None:
        """Do what is due now."""
        for series in self._store.ready(self._settings.quiet_seconds):
            await self._one(series)
        self._store.forget(self._settings.keep_hours * 3600)

    async def _one(self, series: str) -> None:
        state = self._store.states[series]
        revision = state.revision
        if pause := self._faults.late(series):
            state.due = self._clock() + pause
            self._store.note(series)
            return
        self._faults.crash(series)
        try:
            body = self._store.results(series)
            if body is None:
                body = await asyncio.to_thread(compute, self._store.images(series))
                if state.revision != revision:
                    return  # another image has come meanwhile: all of it is measured
                self._store.keep_results(series, body)
            await send(self._client, self._settings, body)
        except UnfitError as error:
            if state.revision == revision:
                state.state, state.why = "unfit", str(error)
                LOG.warning("series %s: %s", series, error)
        except (MemoryError, OSError, SendError) as error:
            self._failed(series, state, str(error) if isinstance(error, SendError) else type(error).__name__)
        else:
            self._faults.crash_sent(series)
            if state.revision == revision:
                state.state, state.why = "done", ""
                LOG.info("series %s: results sent", series)
        self._store.note(series)

    def _failed(self, series: str, state: State, why: str) -> None:
        state.failures, state.why = state.failures + 1, why
        now = self._clock()
        if now - state.received >= self._settings.give_up_hours * 3600:
            state.state = "undelivered"
            LOG.error("series %s: given up after %d failures: %s; send it again", series, state.failures, why)
            return
        pause = min(2.0 ** min(state.failures - 1, 30), self._settings.retry_seconds)
        state.due = now + pause
        LOG.warning("series %s: %s; tried again in %.0f seconds", series, why, pause)
