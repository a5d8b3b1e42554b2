"""Orthanc's REST API as everything outside of Orthanc's process asks it: over HTTP, with TLS and a login.

Needs the extra ``orthanc`` (httpx). Errors name the address, which holds no credentials, and never a header.
"""

from __future__ import annotations

import json
import logging
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import urlsplit

from orthanc_events_bridge import __version__
from orthanc_events_bridge.errors import (
    BridgeError,
    GoneError,
    LogUnavailableError,
    OrthancError,
    TransportConfigurationError,
)
from orthanc_events_bridge.secret import from_file
from orthanc_events_bridge.transports.reasons import causes, reason, tls_failure
from orthanc_events_bridge.transports.tls import client_context

#: In front of each option's name, in capitals, in the environment.
ENVIRONMENT: Final = "ORTHANC_EVENTS_ORTHANC_"
_TIMEOUT: Final = 30.0
#: Requests at once: less than half of what Orthanc has threads for (``HttpThreadsCount``, 50).
MAX_REQUESTS: Final = 24
#: Seconds that a connection may be idle. Orthanc ends it after 0.5 or 1, and a request that meets that has no answer.
_IDLE: Final = 0.25
_LOGIN: Final = ("user", "password", "password_file", "token", "token_file")


@dataclass(frozen=True, slots=True)
class OrthancOptions:
    """Where an Orthanc is, and how to log in. Files are read when a client is made, so that they can be replaced.

    :ivar url: of its REST API, ``https://HOST/PATH`` or ``http://HOST:PORT``, without credentials.
    :ivar user: for basic authentication, with `password` or `password_file`.
    :ivar token: for bearer authentication; or `token_file`.
    :ivar ca_file: PEM file with the authorities to trust, in place of the system's.
    :ivar cert_file: PEM file with our own certificate (mutual TLS), with `key_file`, not encrypted.
    :ivar timeout: seconds to connect, and to wait for each piece of an answer.
    :ivar max_requests: at once, of all consumers of one command together.
    """

    url: str
    user: str | None = None
    password: str | None = None
    password_file: Path | None = None
    token: str | None = None
    token_file: Path | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    timeout: float = _TIMEOUT
    max_requests: int = MAX_REQUESTS

    def __repr__(self) -> str:
        return f"OrthancOptions({self.url!r})"  # nothing secret

    @classmethod
    def find(cls, given: Mapping[str, Any], environment: Mapping[str, str], *defaults: Mapping[str, Any]) -> Self:
        """From the command line, or else the environment, option by option; a login is never put together from both.

        :param given: option → value, none where it isn't given.
        :param environment: ``ORTHANC_EVENTS_ORTHANC_URL`` and so on, as `ENVIRONMENT` says.
        :param defaults: as `given`, for what neither says: the first that has it.
        :raises OrthancError: an option is wrong or missing.
        """
        found_outside = {}
        for field in fields(cls):
            value = environment.get(ENVIRONMENT + field.name.upper())
            if value:
                found_outside[field.name] = Path(value) if field.name.endswith("_file") else value
        options: dict[str, Any] = {}
        for place in (given, found_outside, *defaults):
            login = any(name in options for name in _LOGIN)
            for name, value in place.items():
                if value is not None and name not in options and not (login and name in _LOGIN):
                    options[name] = value
        if not options.get("url"):
            raise OrthancError("which Orthanc is not said", f"say --orthanc URL, or set {ENVIRONMENT}URL")
        try:
            options["timeout"] = float(options.get("timeout", _TIMEOUT))
        except ValueError:
            wrong = f"{ENVIRONMENT}TIMEOUT is no number of seconds: {options['timeout']}"
            raise OrthancError(wrong, "write 30, say") from None
        try:
            options["max_requests"] = int(options.get("max_requests", MAX_REQUESTS))
        except ValueError:
            wrong = f"{ENVIRONMENT}MAX_REQUESTS is no whole number: {options['max_requests']}"
            raise OrthancError(wrong, f"write {MAX_REQUESTS}, say") from None
        found = cls(**options)
        found.check()
        return found

    @property
    def place(self) -> str:
        """The address, for messages."""
        return f"Orthanc at {self.url}"

    def check(self) -> None:
        """Look for what can't be right whatever is at the address.

        :raises OrthancError: something is wrong.
        """
        right = "write https://HOST/PATH or http://HOST:PORT"
        if "@" in self.url:
            raise OrthancError(
                "the URL of Orthanc holds credentials, which would show up in logs",
                "give them apart: a user, and a file with the password",
            )
        try:
            url = urlsplit(self.url)
            url.port  # noqa: B018 -- it is looked at here
        except ValueError:
            raise OrthancError(f"{self.url} is no URL", right) from None
        if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment:
            raise OrthancError(f"{self.url} is no URL of an Orthanc", right)
        if re.fullmatch(r"[!-~]+", self.url) is None:
            raise OrthancError("the URL of Orthanc holds characters that no URL has", right)
        if not self.timeout > 0:
            raise OrthancError(f"{self.place}: the timeout is {self.timeout:g} s", "give more than 0")
        if self.max_requests < 1:
            raise OrthancError(f"{self.place}: max_requests is {self.max_requests}", "give 1 or more")
        ways = [name for name in _LOGIN if name != "user" and getattr(self, name) is not None]
        if len(ways) > 1:
            raise OrthancError(f"{self.place}: {' and '.join(ways)} are given", "keep one of them")
        if (self.user is not None) != any(way.startswith("password") for way in ways):
            raise OrthancError(f"{self.place}: a user needs a password, and a password a user", "give both")
        if (self.cert_file is None) != (self.key_file is None):
            raise OrthancError(f"{self.place}: a certificate needs its key", "give both files, or none")

    def secret(self, name: str) -> str | None:
        """The password or the token, whichever way it is given.

        :param name: ``password`` or ``token``.
        :return: none where neither form is given.
        :raises OrthancError: its file can't be read, or is empty.
        """
        inline: str | None = getattr(self, name)
        path: Path | None = getattr(self, f"{name}_file")
        if inline is not None or path is None:
            return inline
        return from_file(f"{name}_file", path, OrthancError, "let our user read it")


def client_settings(options: OrthancOptions) -> dict[str, Any]:
    """What an httpx client for this Orthanc is made with. There are no proxies of the environment's.

    :raises OrthancError: credentials or certificates can't be used, or httpx is not installed.
    """
    try:
        import httpx
    except ImportError as error:
        raise OrthancError(
            f"asking Orthanc over HTTP needs httpx ({error})", 'pip install "orthanc-events-bridge[orthanc]"'
        ) from error
    options.check()
    for noisy in ("httpx", "httpcore"):  # a line for each request; at debug level with headers
        logging.getLogger(noisy).setLevel(logging.WARNING)
    headers = {"User-Agent": f"orthanc-events-bridge/{__version__}"}
    token, password = options.secret("token"), options.secret("password")
    if token is not None:
        if re.fullmatch(r"[!-~]+", token) is None:
            wrong = f"{options.place}: the token holds characters that no header can have"
            raise OrthancError(wrong, "give the token alone: printable ASCII, without spaces")
        headers["Authorization"] = f"Bearer {token}"
    return {
        "base_url": options.url,
        "headers": headers,
        "auth": (options.user or "", password) if password is not None else None,
        "verify": _context(options),
        "timeout": options.timeout,
        "limits": httpx.Limits(keepalive_expiry=_IDLE),
        "trust_env": False,
    }


def _context(options: OrthancOptions) -> ssl.SSLContext:
    if not options.url.startswith("https:"):
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # unused; httpx would read all authorities for its own
    try:
        return client_context(options, options.place, "")
    except TransportConfigurationError as error:
        raise OrthancError(error.message, error.remedy) from error


class OrthancApi:
    """Asks one Orthanc. To be used by any thread; connections are kept alive.

    There are no redirects, no cookies, and no proxies of the environment's.

    :raises OrthancError: credentials or certificates can't be used, or httpx is not installed.
    """

    def __init__(self, options: OrthancOptions) -> None:
        settings = client_settings(options)
        import httpx

        self._place = options.place
        self._httpx = httpx
        try:
            self._client = httpx.Client(**settings)
        except httpx.InvalidURL:
            raise OrthancError(f"{options.url} is no URL", "write https://HOST/PATH or http://HOST:PORT") from None

    def get(self, path: str) -> bytes:
        """The answer to a GET.

        :param path: with a slash in front, and with its query.
        :raises GoneError: Orthanc says that there is no such thing (404).
        :raises LogUnavailableError: it can't be reached or can't answer now; asked again later, it may.
        :raises OrthancError: it refuses, until a person changes something.
        """
        try:
            answer = self._client.get(path)
        except (self._httpx.HTTPError, self._httpx.InvalidURL, OSError, UnicodeError) as error:
            raise self._problem(error) from None  # the exception holds the request, and that the credentials
        status = answer.status_code
        if status == 200:
            return answer.content
        asked = f"{self._place} answers {status} to GET {path.partition('?')[0]}"
        if status == 404:
            raise GoneError(asked)
        if status in (401, 403):
            raise OrthancError(asked, "check the user and password, or the token, and what they permit")
        if status >= 500 or status in (408, 425, 429):
            raise LogUnavailableError(asked, "see its log; asked again later, it may answer")
        raise OrthancError(asked, "check the URL: it has to lead to Orthanc's REST API itself")

    def json(self, path: str) -> Any:
        """The answer to a GET, as JSON.

        :raises BridgeError: as `get`; an `OrthancError` where the answer isn't JSON.
        """
        answer = self.get(path)
        try:
            return json.loads(answer)
        except ValueError:
            raise OrthancError(
                f"{self._place} does not answer GET {path.partition('?')[0]} in JSON",
                "check the URL: it has to lead to Orthanc's REST API itself, past any page to log in",
            ) from None

    def close(self) -> None:
        """End all connections."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _problem(self, error: Exception) -> BridgeError:
        """Which of our errors it is that there is no answer."""
        chain = list(causes(error))
        if why := tls_failure(chain):
            return OrthancError(
                f"{self._place}: TLS failed: {why}",
                "check the URL, the CA file, the names and dates in the certificates, and our own certificate",
            )
        if isinstance(error, self._httpx.TimeoutException):
            return LogUnavailableError(f"{self._place} has not answered in time", "check that it runs, or allow more")
        if isinstance(error, self._httpx.ConnectError | UnicodeError):
            return LogUnavailableError(f"{self._place} can't be reached: {reason(chain)}", "start it, or check the URL")
        if isinstance(error, self._httpx.RemoteProtocolError) and "illegal" in str(error):
            return OrthancError(
                f"{self._place} does not answer in HTTP", "check host and port in the URL, and whether it is https://"
            )
        return LogUnavailableError(f"{self._place} ended the connection without an answer", "see its log")
