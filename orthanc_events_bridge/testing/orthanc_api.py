"""An Orthanc that answers handlers what a test has recorded, by respx (extra ``testing``)."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

from orthanc_events_bridge.consumers.clients import Clients
from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.orthanc_api import OrthancOptions

if TYPE_CHECKING:
    import httpx
    import respx
    from httpx_retries import Retry


class RecordedClients(Clients):
    """Handlers' clients as ever, with nothing behind them but what is recorded; repeated requests wait for nothing.

    :param url: of the Orthanc that handlers believe to ask. No login is needed, and none is looked for.
    :ivar unknown: what was asked for and is not recorded, a sentence for each.
    """

    def __init__(self, url: str) -> None:
        super().__init__(OrthancOptions(url))
        self._url = url
        self._router: respx.MockRouter | None = None
        self.unknown: list[str] = []

    def router(self) -> respx.MockRouter:
        """What to record in.

        :raises BridgeError: respx is not installed.
        """
        if self._router is None:
            try:
                import respx
            except ImportError as error:
                raise BridgeError(
                    f"to record an Orthanc for tests, respx is needed ({error})",
                    'pip install "orthanc-events-bridge[testing]"',
                ) from error
            self._router = respx.MockRouter(base_url=self._url, assert_all_called=False)
        return self._router

    def _async_wire(self, verify: ssl.SSLContext, limits: httpx.Limits) -> httpx.AsyncBaseTransport:
        import httpx

        async def answer(request: httpx.Request) -> httpx.Response:
            try:
                return await self.router().async_handler(request)
            except AssertionError:
                self._note(request)
                raise

        return httpx.MockTransport(answer)

    def _sync_wire(self, verify: ssl.SSLContext, limits: httpx.Limits) -> httpx.BaseTransport:
        import httpx

        def answer(request: httpx.Request) -> httpx.Response:
            try:
                return self.router().handler(request)
            except AssertionError:
                self._note(request)
                raise

        return httpx.MockTransport(answer)

    def _note(self, request: httpx.Request) -> None:
        path = str(request.url).removeprefix(self._url)
        self.unknown.append(
            f"a handler asked Orthanc for {request.method} {path}, and nothing is recorded for that:"
            f' kit.orthanc.{request.method.lower()}("{path}").respond(json=…)'
        )

    def _retries(self) -> Retry:
        found = super()._retries()
        found.backoff_factor, found.respect_retry_after_header = 0.0, False
        return found
