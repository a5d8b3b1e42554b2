"""Requests to one webhook, by httpx, for `orthanc_events_bridge.transports.webhook`.

httpx's transport without its client: there are no redirects, no cookies, no environment's proxies, and no log line
with the URL, whose query may be a secret. What goes wrong comes back as a value, so that no exception of httpx, which
holds the request with its headers, is chained to one of ours.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import re
import socket
import ssl
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import httpx

from orthanc_events_bridge import __version__
from orthanc_events_bridge.errors import NotConnectedError, TransportConfigurationError, TransportError
from orthanc_events_bridge.transports.reasons import causes, reason, tls_failure
from orthanc_events_bridge.transports.tls import client_context
from orthanc_events_bridge.transports.webhook_options import WebhookOptions

#: How much of an answer's body is read to keep the connection, in bytes, and for how long, in seconds.
_BODY: Final = 64 * 1024
_BODY_SECONDS: Final = 1.0
#: How many timeouts all of it can take: to connect, to agree on TLS, and to answer, byte by byte.
_PATIENCE: Final = 3
#: Seconds after which an unused connection isn't used again: what lies between may have forgotten it.
_UNUSED: Final = 60.0
#: Seconds that closing may take.
_CLOSING: Final = 0.5

#: What happens behind a request without an answer, by its method; or what may help.
_NEXT: Final = {
    "POST": "the events are sent again",
    "OPTIONS": "if it takes no OPTIONS requests, set probe to false",
}

Header = tuple[bytes, bytes]

# At debug level it writes down answers' headers, and a redirect repeats our query.
logging.getLogger("httpcore").setLevel(logging.INFO)


class Answer(NamedTuple):
    """What a receiver said; of its body, nothing."""

    status: int
    headers: httpx.Headers


class Client:
    """Connections to the receiver, made when they are needed and kept alive.

    Secrets and certificates are read now, so that replaced ones are used.

    :raises TransportConfigurationError: they can't be read or used.
    """

    def __init__(self, options: WebhookOptions) -> None:
        self._options = options
        self._place = f"the webhook at {options.address}"
        try:
            self._url = httpx.URL(options.url)
            str(self._url.host)  # internationalised names are looked at only then
        except (httpx.InvalidURL, UnicodeError):
            raise TransportConfigurationError(f"{self._place} has no valid address", "check `url`") from None
        self._headers: list[Header] = [
            (b"User-Agent", f"orthanc-events-bridge/{__version__}".encode()),
            *((name.encode(), value.encode()) for name, value in options.headers.items()),
            *_login(options),
        ]
        # Cancelled in the middle of a TLS handshake, httpcore would leave the socket open.
        self._extensions: dict[str, Any] = {
            "timeout": dict.fromkeys(("connect", "read", "write", "pool"), options.timeout)
        }
        if options.tls.server_hostname:
            self._extensions["sni_hostname"] = options.tls.server_hostname  # the certificate is checked against it
        self._http = httpx.AsyncHTTPTransport(
            verify=client_context(options.tls, self._place) if options.encrypted else _no_tls(),
            trust_env=False,
            limits=httpx.Limits(
                max_connections=options.concurrency,
                max_keepalive_connections=options.concurrency,
                keepalive_expiry=_UNUSED,
            ),
            proxy=options.proxy,
            socket_options=list(_keep_alive()),
        )
        self._stream: Any = None
        self._cut = False
        #: When the receiver last answered, by the event loop's clock.
        self.answered = 0.0

    @property
    def hung_up(self) -> bool:
        """Whether the receiver has ended the connection that it last answered over."""
        return self._stream is None or bool(self._stream.get_extra_info("is_readable"))

    async def ask(self, method: str, headers: list[Header], body: bytes | None = None) -> Answer | TransportError:
        """Send one request.

        :return: the answer; or why there is none: a `NotConnectedError` or a `TransportConfigurationError`.
        """
        request = httpx.Request(
            method, self._url, headers=[*self._headers, *headers], content=body, extensions=self._extensions
        )
        try:
            async with asyncio.timeout(_PATIENCE * self._options.timeout):
                response = await self._http.handle_async_request(request)
        except (TimeoutError, httpx.TimeoutException):
            return NotConnectedError(
                f"{self._place} has not answered within {self._options.timeout:g} s",
                f"check the receiver; {_NEXT[method]}",
            )
        except (httpx.TransportError, OSError, UnicodeError) as error:  # the last: of a name that none can be
            return self._problem(error, _NEXT[method])
        try:
            await self._finish(response)
        finally:
            await response.aclose()
        self._stream = response.extensions.get("network_stream")
        self.answered = asyncio.get_running_loop().time()
        return Answer(response.status_code, response.headers)

    async def probe(self) -> Answer | TransportError:
        """Ask whether it is there: as `ask`."""
        for _ in range(2):
            self._cut = False
            answer = await self.ask("OPTIONS", [])
            if not self._cut or not self._options.encrypted:
                return answer
        # From TLS 1.3 on a server looks at our certificate when the handshake is over for us.
        return TransportConfigurationError(
            f"{self._place} ends the connection when TLS is agreed on",
            "give tls.cert_file and tls.key_file if it verifies its clients; see its log",
        )

    @staticmethod
    async def _finish(response: httpx.Response) -> None:
        """Read the body, so that the connection can be used again; the answer is one without it, too."""
        assert isinstance(response.stream, httpx.AsyncByteStream)
        size = 0
        with contextlib.suppress(TimeoutError, httpx.TransportError, OSError):
            async with asyncio.timeout(_BODY_SECONDS):
                async for chunk in response.stream:
                    size += len(chunk)
                    if size > _BODY:
                        return

    async def close(self) -> None:
        """End all connections. Never raises."""
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._http.aclose(), _CLOSING)

    def _problem(self, error: Exception, then: str) -> TransportError:
        """Which of our errors it is that there is no answer."""
        chain = list(causes(error))
        if why := tls_failure(chain):
            return TransportConfigurationError(
                f"{self._place}: TLS failed: {why}",
                "check `url`, tls.ca_file, the names and dates in the certificates, and tls.cert_file",
            )
        if isinstance(error, httpx.ProxyError):
            return self._proxy_problem(str(error))
        if isinstance(error, httpx.RemoteProtocolError) and "illegal" in str(error):
            return TransportConfigurationError(
                f"{self._place} does not answer in HTTP", "check host and port in `url`, and whether it is https://"
            )
        if isinstance(error, httpx.ConnectError | UnicodeError):
            by = f" by the proxy {self._options.proxy}" if self._options.proxy else ""
            return NotConnectedError(
                f"{self._place} can't be reached{by}: {reason(chain)}", "start the receiver, or check `url`"
            )
        self._cut = True
        return NotConnectedError(
            f"{self._place} ended the connection without an answer",
            f"see the receiver's log; {then}",
        )

    def _proxy_problem(self, text: str) -> TransportError:
        status = int(text[:3]) if re.match(r"[1-9]\d\d\b", text) else 0
        said = f"{self._place} can't be reached: the proxy {self._options.proxy} answered {status or 'illegibly'}"
        if 400 <= status < 500:
            return TransportConfigurationError(said, "check `proxy`, and what it permits")
        return NotConnectedError(said, "check `proxy` and the receiver")


def _login(options: WebhookOptions) -> Iterator[Header]:
    """Credentials, read now, so that rotated ones are used.

    :raises TransportConfigurationError: they can't be read, or can't be sent.
    """
    token, password = options.secret("token"), options.secret("password")
    if token is not None:
        if re.fullmatch(r"[!-~]+", token) is None:
            raise TransportConfigurationError(
                f"transport {options.name}: the token holds characters that no header can have",
                "give the token alone: printable ASCII, without spaces and line breaks",
            )
        yield b"Authorization", b"Bearer " + token.encode()
    elif password is not None:
        yield b"Authorization", b"Basic " + base64.b64encode(f"{options.user}:{password}".encode())


def _no_tls() -> ssl.SSLContext:
    """In place of the one that httpx would make, at the cost of reading all authorities, and that nobody needs."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _keep_alive() -> Iterator[tuple[int, int, int]]:
    """Socket options with which the system notices, while nothing is sent, that a connection has died."""
    yield socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1
    for name, seconds in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # macOS has other names
            yield socket.IPPROTO_TCP, getattr(socket, name), seconds
