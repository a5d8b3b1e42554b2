"""What handlers ask Orthanc with: ``httpx`` clients that know the address, log in, try again what may be, and wait for
their turn where a burst would drown it.

Needs the extra ``orthanc``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orthanc_events_bridge.consumers.limit import Limit, limit_of
from orthanc_events_bridge.errors import OrthancError
from orthanc_events_bridge.orthanc_api import OrthancOptions, client_settings

if TYPE_CHECKING:
    import ssl

    import httpx
    from httpx_retries import Retry


class Clients:
    """One client for async handlers and one for sync ones, made when first used.

    :param options: which Orthanc; none: handlers can't ask for it.
    """

    def __init__(self, options: OrthancOptions | None) -> None:
        self._options = options
        self._async: httpx.AsyncClient | None = None
        self._sync: httpx.Client | None = None
        self._limit: Limit | None = None

    def check(self) -> None:
        """Can they be made?

        :raises OrthancError: no: no address, a file that can't be read, or httpx is not installed.
        """
        self._settings()

    def for_async(self) -> httpx.AsyncClient:
        """For handlers that are coroutine functions.

        :raises OrthancError: as `check`.
        """
        if self._async is None:
            import httpx
            from httpx_retries import RetryTransport

            from orthanc_events_bridge.consumers.limited import AsyncLimited

            settings = self._settings()
            wire = AsyncLimited(self._async_wire(settings.pop("verify"), settings.pop("limits")), self._limited())
            self._async = httpx.AsyncClient(transport=RetryTransport(wire, self._retries()), **settings)
        return self._async

    def for_sync(self) -> httpx.Client:
        """For all others, which run in threads: it may be used by several at once.

        :raises OrthancError: as `check`.
        """
        if self._sync is None:
            import httpx
            from httpx_retries import RetryTransport

            from orthanc_events_bridge.consumers.limited import Limited

            settings = self._settings()
            wire = Limited(self._sync_wire(settings.pop("verify"), settings.pop("limits")), self._limited())
            self._sync = httpx.Client(transport=RetryTransport(wire, self._retries()), **settings)
        return self._sync

    async def close(self) -> None:
        """End all connections."""
        if self._async is not None:
            await self._async.aclose()
            self._async = None
        if self._sync is not None:
            self._sync.close()
            self._sync = None

    def _settings(self) -> dict[str, Any]:
        if self._options is None:
            raise OrthancError(
                "a handler takes a second argument, and which Orthanc it is for is not said",
                "give the consumer orthanc=URL, or let the handler take the event alone",
            )
        return client_settings(self._options)

    def _limited(self) -> Limit:
        """Shared with all others of this process that ask the same Orthanc. A request that waits to be repeated has no
        place meanwhile.
        """
        if self._limit is None:
            assert self._options is not None  # `_settings` says so
            self._limit = limit_of(self._options.url, self._options.max_requests)
        return self._limit

    # What tests replace.

    def _async_wire(self, verify: ssl.SSLContext, limits: httpx.Limits) -> httpx.AsyncBaseTransport:
        import httpx

        return httpx.AsyncHTTPTransport(verify=verify, limits=limits, trust_env=False)

    def _sync_wire(self, verify: ssl.SSLContext, limits: httpx.Limits) -> httpx.BaseTransport:
        import httpx

        return httpx.HTTPTransport(verify=verify, limits=limits, trust_env=False)

    def _retries(self) -> Retry:
        """What may be asked again by itself: what changes nothing, or the same when done twice.

        RFC 9110, section 9.2.2.
        """
        from httpx_retries import Retry

        return Retry(total=4, backoff_factor=0.2, max_backoff_wait=5.0, status_forcelist=(429, 502, 503, 504))
