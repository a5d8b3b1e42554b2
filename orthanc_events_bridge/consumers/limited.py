"""httpx's transports, with a place for each request (`orthanc_events_bridge.consumers.limit`) until its answer is read.

Needs the extra ``orthanc``.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import cast

import httpx

from orthanc_events_bridge.consumers.limit import Limit, Place


class Limited(httpx.BaseTransport):
    """For clients of threads.

    :param wire: what sends.
    """

    def __init__(self, wire: httpx.BaseTransport, limit: Limit) -> None:
        self._wire = wire
        self._limit = limit

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send it when there is a place."""
        place = self._limit.enter()
        try:
            if not isinstance(request.stream, httpx.ByteStream):
                request = _with(request, _Written(cast("Iterable[bytes]", request.stream), place))
            answer = self._wire.handle_request(request)
        except BaseException:
            place.leave()
            raise
        if answer.is_closed:  # it is read already
            place.leave()
        else:
            place.read()
            answer.stream = _Read(cast("httpx.SyncByteStream", answer.stream), place)
        return answer

    def close(self) -> None:
        """End all connections."""
        self._wire.close()


class AsyncLimited(httpx.AsyncBaseTransport):
    """For clients of coroutines.

    :param wire: what sends.
    """

    def __init__(self, wire: httpx.AsyncBaseTransport, limit: Limit) -> None:
        self._wire = wire
        self._limit = limit

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send it when there is a place."""
        place = await self._limit.enter_async()
        try:
            if not isinstance(request.stream, httpx.ByteStream):
                request = _with(request, _AsyncWritten(cast("AsyncIterable[bytes]", request.stream), place))
            answer = await self._wire.handle_async_request(request)
        except BaseException:
            place.leave()
            raise
        if answer.is_closed:
            place.leave()
        else:
            place.read()
            answer.stream = _AsyncRead(cast("httpx.AsyncByteStream", answer.stream), place)
        return answer

    async def aclose(self) -> None:
        """End all connections."""
        await self._wire.aclose()


def _with(request: httpx.Request, stream: httpx.SyncByteStream | httpx.AsyncByteStream) -> httpx.Request:
    """The same request with another body; the one that was given may be sent again."""
    return httpx.Request(
        request.method, request.url, headers=request.headers, stream=stream, extensions=request.extensions
    )


class _Written(httpx.SyncByteStream):
    def __init__(self, stream: Iterable[bytes], place: Place) -> None:
        self._stream = stream
        self._place = place

    def __iter__(self) -> Iterator[bytes]:
        parts = iter(self._stream)
        while True:
            with self._place.ours():
                try:
                    part = next(parts)
                except StopIteration:
                    return
            yield part


class _AsyncWritten(httpx.AsyncByteStream):
    def __init__(self, stream: AsyncIterable[bytes], place: Place) -> None:
        self._stream = stream
        self._place = place

    async def __aiter__(self) -> AsyncIterator[bytes]:
        parts = aiter(self._stream)
        while True:
            with self._place.ours():
                try:
                    part = await anext(parts)
                except StopAsyncIteration:
                    return
            yield part


class _Read(httpx.SyncByteStream):
    def __init__(self, stream: httpx.SyncByteStream, place: Place) -> None:
        self._stream = stream
        self._place = place

    def __iter__(self) -> Iterator[bytes]:
        parts = iter(self._stream)
        while True:
            with self._place.theirs():
                try:
                    part = next(parts)
                except StopIteration:
                    return
            yield part

    def close(self) -> None:
        try:
            self._stream.close()
        finally:
            self._place.leave()

    def __del__(self) -> None:
        self._place.leave()  # of an answer that nobody has closed


class _AsyncRead(httpx.AsyncByteStream):
    def __init__(self, stream: httpx.AsyncByteStream, place: Place) -> None:
        self._stream = stream
        self._place = place

    async def __aiter__(self) -> AsyncIterator[bytes]:
        parts = aiter(self._stream)
        while True:
            with self._place.theirs():
                try:
                    part = await anext(parts)
                except StopAsyncIteration:
                    return
            yield part

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        finally:
            self._place.leave()

    def __del__(self) -> None:
        self._place.leave()
