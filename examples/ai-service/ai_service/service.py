"""The HTTP side: STOW-RS in, results out, by either way; and how things are."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Final

import httpx
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ai_service.arrivals import MEGABYTE, NOT_AUTHORIZED, OUT_OF_RESOURCES, Arrivals, Limits, receive
from ai_service.faults import Faults
from ai_service.measure import UnfitError
from ai_service.multipart import MultipartError, TooLargeError, boundary_of, kind_of
from ai_service.settings import Settings
from ai_service.store import Store
from ai_service.worker import Worker, compute

LOG: Final = logging.getLogger("ai_service")
DICOM_JSON: Final = "application/dicom+json"


class RefusedError(Exception):
    """A request is answered with an error, and nothing is kept of it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Service:
    """The endpoints.

    :param sleep: waits for so many seconds.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        faults: Faults,
        worker: Worker,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._settings, self._store, self._faults, self._worker = settings, store, faults, worker
        self._sleep = sleep
        self._reading = asyncio.Semaphore(settings.max_requests)
        self._measuring = asyncio.Semaphore(1)
        self._working: asyncio.Task[None] | None = None

    def app(self) -> Starlette:
        """Return the application. While it lives, results are sent behind the answers if there is where to."""
        routes = [
            Route("/health", self._health),
            Route("/series/{series}", self._series),
            Route("/studies", _guarded(self._studies), methods=["POST"]),
            Route("/studies/{study}", _guarded(self._studies), methods=["POST"]),
            Route("/results", _guarded(self._results), methods=["POST"]),
        ]
        return Starlette(routes=routes, lifespan=self._lifespan, exception_handlers={HTTPException: _unrouted})

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        if self._settings.results_url:
            self._working = asyncio.create_task(self._worker.run())
        try:
            yield
        finally:
            if self._working is not None:
                self._working.cancel()
                await asyncio.gather(self._working, return_exceptions=True)

    async def _health(self, _: Request) -> Response:
        """200, or 503 where nothing is worked on any more."""
        dead = self._working is not None and self._working.done()
        failing = sum(state.state == "open" and state.failures > 0 for state in self._store.states.values())
        content = {"status": "failed" if dead else "ok", "series": {**self._store.counts(), "failing": failing}}
        return JSONResponse(content, 503 if dead else 200)

    async def _series(self, request: Request) -> Response:
        """How far a series is that came by STOW-RS."""
        state = self._store.states.get(request.path_params["series"])
        if state is None:
            return _error(404, "there is no such series: it never came, or it is done and forgotten")
        return JSONResponse({"state": state.state, "failures": state.failures, "why": state.why})

    async def _studies(self, request: Request) -> Response:
        """STOW-RS: keep what comes, answer, and do the rest behind the answer."""
        if not self._settings.results_url:
            raise RefusedError(501, "AI_SERVICE_RESULTS_URL is not set: set it, or POST to /results")
        _acceptable(request, DICOM_JSON)
        async with self._received(request) as arrivals:
            for series, instances in arrivals.series().items():
                there = {path.stem for path in self._store.images(series)}
                if len(there | {one.sop for one in instances}) > self._settings.max_instances:
                    arrivals.fail(instances, OUT_OF_RESOURCES)
                elif self._faults.refuses(series):
                    arrivals.fail(instances, NOT_AUTHORIZED)
                else:
                    self._store.add(series, [(one.sop, one.path) for one in instances])
            return JSONResponse(arrivals.report(), arrivals.status, media_type=DICOM_JSON)

    async def _results(self, request: Request) -> Response:
        """Measure one series, and answer with its results. Nothing is kept."""
        _acceptable(request, "multipart/related")
        async with self._received(request) as arrivals:
            series = arrivals.series()
            for one, instances in series.items():
                if self._faults.refuses(one):
                    arrivals.fail(instances, NOT_AUTHORIZED)
            # What a part of a series measures is not what the series does.
            if arrivals.failed or arrivals.others:
                arrivals.accepted.clear()
                return JSONResponse(arrivals.report(), arrivals.status, media_type=DICOM_JSON)
            if len(series) != 1:
                raise RefusedError(400, f"one series at a time is measured, and these are {len(series)}")
            (uid,) = series
            self._faults.crash(uid)
            async with self._measuring:
                try:
                    # Each once, as in the store.
                    paths = {one.sop: one.path for one in series[uid]}.values()
                    body = await asyncio.to_thread(compute, list(paths))
                except UnfitError as error:
                    raise RefusedError(422, str(error)) from error
        await self._sleep(self._faults.late(uid))
        return Response(body, headers={"Content-Type": kind_of(body)})

    @contextlib.asynccontextmanager
    async def _received(self, request: Request) -> AsyncIterator[Arrivals]:
        """Read the instances of a request into files, which go away with the context."""
        settings = self._settings
        limits = Limits(settings.max_body_mb * MEGABYTE, settings.max_instance_mb * MEGABYTE, settings.max_instances)
        try:
            boundary = boundary_of(request.headers.get("content-type", ""))
        except MultipartError as error:
            raise RefusedError(415, str(error)) from error
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > limits.body:
            raise RefusedError(413, f"the body has more than {limits.body} bytes")
        with self._store.staging() as folder:
            async with self._reading:
                try:
                    study = request.path_params.get("study")
                    arrivals = await receive(request.stream(), boundary, Path(folder), limits, study)
                except TooLargeError as error:
                    raise RefusedError(413, str(error)) from error
                except MultipartError as error:
                    raise RefusedError(400, str(error)) from error
            yield arrivals


def _guarded(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Make one clear answer of every error. Messages of others' errors may repeat patient data: they are not logged."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except RefusedError as error:
            LOG.warning("%d: %s", error.status, error)
            return _error(error.status, str(error))
        except ClientDisconnect:
            return _error(400, "the client has gone")
        except (MemoryError, OSError) as error:
            LOG.error("503: %s", type(error).__name__)
            return _error(503, "there is not enough room now, try again later", {"Retry-After": "30"})
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            LOG.error("500: %s at %s:%s", type(error).__name__, Path(place.filename).name, place.lineno)
            return _error(500, "an error of the service, see its log")

    return answer


async def _unrouted(_: Request, error: Exception) -> Response:
    """There is no such path, or not with this method."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers) if error.headers else None
    return _error(error.status_code, f"{error.detail}: POST /studies or /results, GET /health or /series/…", headers)


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": message}, status, headers)


def _acceptable(request: Request, kind: str) -> None:
    """Refuse whoever takes other answers only."""
    taken = re.findall(r"(?:^|,)\s*([^\s;,]+)", request.headers.get("accept", "*/*").lower())
    if not {kind, f"{kind.split('/')[0]}/*", "*/*"} & set(taken):
        raise RefusedError(406, f"the answer is {kind}: accept that")


@contextlib.asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Service]:
    """Give the service with all that it needs.

    :raises InUseError: another process uses its folder.
    """
    store = Store(settings.folder)
    try:
        async with httpx.AsyncClient(follow_redirects=False) as client:
            faults = Faults(settings, settings.folder)
            yield Service(settings, store, faults, Worker(settings, store, faults, client))
    finally:
        store.close()
