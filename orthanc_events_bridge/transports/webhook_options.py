"""The options of webhooks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, Field, SecretStr

from orthanc_events_bridge.transports.options import Tls, TransportOptions, one_way_to_log_in, user_with_password
from orthanc_events_bridge.values import Duration, FileName, Place, mistake

if TYPE_CHECKING:
    from pydantic_core import PydanticCustomError

#: Headers that are ours, or HTTP's own.
_RESERVED = re.compile(
    r"authorization|proxy-.*|host|connection|keep-alive|content-.*|transfer-encoding|te|trailer|upgrade|expect"
    r"|ce-.*|webhook-(id|timestamp|signature)|orthanc-.*"
)


def _address(value: str, right: str) -> SplitResult:
    """The parts of a URL, without anything that is not to be shown in it."""
    # What stands before an @ may be a password, and what stands behind a ? a token: such a value is never shown.
    shown = None if "@" in value or "?" in value else value
    if "@" in value.split("?", 1)[0]:
        raise mistake(
            "holds credentials, which would show up in logs",
            "leave them out of the URL, and give them as user and password_file, or as token_file",
        )
    try:
        url = urlsplit(value)
        port = url.port
    except ValueError:
        raise mistake("is no URL", right, shown=shown) from None
    if re.fullmatch(r"[!-~]+", value) is None or not url.hostname or port == 0:
        raise mistake("is no URL", right, shown=shown)
    return url


def _url(value: str) -> str:
    right = "write https://HOST/PATH or http://HOST:PORT/PATH, other characters than ASCII percent-encoded"
    url = _address(value, right)
    shown = None if url.query else value
    if url.scheme not in ("http", "https"):
        raise mistake("is no URL of a webhook", right, shown=shown)
    if "#" in value:
        raise mistake("has a fragment, which is never sent", "leave out what begins with #", shown=shown)
    return value


def _proxy(value: str) -> str:
    right = "write http://HOST:PORT"
    url = _address(value, right)
    if url.scheme != "http" or url.path not in ("", "/") or url.query or url.fragment:
        raise mistake("is no URL of an HTTP proxy", right, shown=None if url.query else value)
    return value


def _headers(value: dict[str, str]) -> dict[str, str]:
    for name, content in value.items():
        if re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name) is None:
            raise mistake("holds a name that no header can have", "use letters, digits and `-`", shown=name)
        if _RESERVED.fullmatch(name.lower()):
            right = "give user, or token_file" if name.lower() == "authorization" else "leave it out"
            raise mistake("holds a header that is not for you to set", right, shown=name)
        if re.fullmatch(r"([!-~]([ -~]*[!-~])?)?", content) is None:
            raise mistake(
                "holds a value that no header can have",
                "write printable ASCII, without spaces at the ends",
                shown=name,
            )
    if len({name.lower() for name in value}) < len(value):
        raise mistake("names a header twice", "a header's name is the same in upper and lower case")
    return value


class WebhookTls(Tls):
    """TLS to the receiver. Certificates are read when connecting, so that they can be replaced in place."""

    enabled: bool | None = Field(
        default=None,
        description="Whether there is TLS. The URL says it already, by `https://` or `http://`: what contradicts it "
        "is a mistake.",
    )


class WebhookOptions(TransportOptions):
    """An HTTP endpoint, to which each event is posted. An event counts as sent once it is answered with 2xx.

    Receivers know an event that they get again by its id, in the header `orthanc-event-id` and in the event. At most
    one way to log in: `user` with a password, or a token.
    """

    type: Literal["webhook"] = Field(default="webhook", description="`webhook`.")
    url: Annotated[str, AfterValidator(_url)] = Field(
        description="Where events are posted, `http://` or `https://`. Without credentials; what stands behind a `?` "
        "is treated as a secret, the rest is shown in status and log. Redirects are not followed. Any address will do, "
        "private ones and this machine's too: that it is the right one is up to you.",
        repr=False,
        examples=["https://events.example.org/orthanc"],
    )
    signing_secret: SecretStr | None = Field(
        default=None,
        description="Secret to sign with, in the manner of Standard Webhooks (`webhook-id`, `webhook-timestamp`, "
        "`webhook-signature`): `whsec_` and base64, or any text. Several, one per line, sign each: for the time in "
        "which a receiver changes from one to another. In structured mode only.",
        examples=["${WEBHOOK_SECRET}"],
    )
    signing_secret_file: FileName | None = Field(
        default=None,
        description="File with the secrets to sign with, one per line.",
        examples=["/run/secrets/webhook-signing"],
    )
    user: str | None = Field(
        default=None, description="User name for basic authentication. Needs a password.", examples=["orthanc"]
    )
    password: SecretStr | None = Field(
        default=None, description="Password of `user`.", examples=["${WEBHOOK_PASSWORD}"]
    )
    password_file: FileName | None = Field(
        default=None, description="File with the password of `user`.", examples=["/run/secrets/webhook-password"]
    )
    token: SecretStr | None = Field(
        default=None, description="Token for bearer authentication.", examples=["${WEBHOOK_TOKEN}"]
    )
    token_file: FileName | None = Field(
        default=None, description="File with the token.", examples=["/run/secrets/webhook-token"]
    )
    headers: Annotated[dict[str, str], AfterValidator(_headers)] = Field(
        default_factory=dict,
        description="More headers, the same for every request. Nothing secret: they are not kept out of anything.",
        examples=['{X-Department: "radiology"}'],
    )
    tls: WebhookTls = Field(default_factory=WebhookTls, description="TLS to the receiver.")
    proxy: Annotated[str, AfterValidator(_proxy)] | None = Field(
        default=None,
        description="HTTP proxy to reach the receiver by. Left out: there is none, whatever the environment says.",
        examples=["http://proxy.example.org:3128"],
    )
    timeout: Annotated[float, Duration(minimum=0.1, maximum=300)] = Field(
        default=15.0,
        description="How long the receiver can take to be connected to, and then to answer, before the event is sent "
        "again.",
    )
    concurrency: int = Field(
        default=1,
        ge=1,
        le=64,
        description="How many events can be under way at the same time, over as many connections. Those of one "
        "partition key never are: they stay in order.",
    )
    probe: bool = Field(
        default=True,
        description="When connecting, ask the receiver with an `OPTIONS` request whether it is there; any answer will "
        "do. `false`: the first event shows it.",
    )
    batch: int = Field(
        default=100,
        ge=1,
        le=10000,
        description="After how many events at most the position in the outbox is noted. What is not noted yet when "
        "the bridge is killed is sent again.",
    )

    @property
    def address(self) -> str:
        """The URL without its query, which may hold a secret: for messages."""
        return self.url.split("?", 1)[0]

    @property
    def encrypted(self) -> bool:
        """Whether there is TLS."""
        return urlsplit(self.url).scheme == "https"

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[tuple[Place, PydanticCustomError]]:
        """At most one way to log in, and a whole one; TLS as the URL says; signatures over all of an event."""
        yield from super().conflicts(given)
        ways = (("user", "password", "password_file"), ("token", "token_file"))
        yield from one_way_to_log_in(given, ways, "keep one of them: user with a password, or token")
        yield from user_with_password(given)
        if isinstance(given.get("user"), str) and re.fullmatch(r"[^:\x00-\x1f\x7f]*", given["user"]) is None:
            yield ("user",), mistake("holds a character that basic authentication can't carry", "leave out the colon")
        signing = next((option for option in given if option in ("signing_secret", "signing_secret_file")), None)
        if signing and given.get("mode") == "binary":
            yield (
                (signing,),
                mistake(
                    "{0} would not cover the attributes, which {1} puts into headers",
                    "leave mode out, or don't sign",
                    options=((signing,), ("mode",)),
                ),
            )
        yield from cls._tls_conflicts(given)

    @staticmethod
    def _tls_conflicts(given: Mapping[str, Any]) -> Iterator[tuple[Place, PydanticCustomError]]:
        tls, url = given.get("tls"), given.get("url")
        if not isinstance(tls, Mapping) or not isinstance(url, str):
            return
        wanted = tls.get("enabled", True if tls else None)
        if url.startswith("http:") and wanted is True:
            option = ("tls", "enabled") if "enabled" in tls else ("tls",)
            yield (
                ("url",),
                mistake("{0} is without TLS, and {1} asks for it", "write https://", options=(("url",), option)),
            )
        if url.startswith("https:") and wanted is False:
            yield (
                ("url",),
                mistake(
                    "{0} insists on TLS, and {1} forbids it",
                    "write http://, or leave tls.enabled out",
                    options=(("url",), ("tls", "enabled")),
                ),
            )
        if tls.get("server_hostname") and given.get("proxy"):
            yield (
                ("tls", "server_hostname"),
                mistake(
                    "{0} has no effect behind {1}",
                    "write the name into the URL, or do without the proxy",
                    options=(("tls", "server_hostname"), ("proxy",)),
                ),
            )
