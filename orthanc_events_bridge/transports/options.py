"""The options that transports share, each with its documentation; a broker's own are in ``{broker}_options.py``.

Importing these imports no broker's client.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, PrivateAttr, SecretStr

from orthanc_events_bridge.errors import TransportConfigurationError
from orthanc_events_bridge.secret import from_file, given_twice
from orthanc_events_bridge.values import EventFilter, FileName, Options, Place, mistake

if TYPE_CHECKING:
    from pydantic_core import PydanticCustomError


def _name(value: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9_.-]+", value) is None:
        raise mistake("can't be used as a name", "use letters, digits, `_`, `.` and `-` only", shown=value)
    return value


class TransportOptions(Options):
    """What every transport has. `type` selects the broker; the other options depend on it."""

    type: str = Field(description="The kind of broker.")
    name: Annotated[str, AfterValidator(_name)] = Field(
        # Pydantic hands over what is validated so far, and `type` comes first.
        default_factory=lambda data: str(data.get("type", "")),
        description="The name of this transport in the status, in logs and in commands. It must be unique, "
        "so it is needed where two are of the same type. The position in the outbox belongs to the name: a "
        "renamed transport begins as a new one.",
        examples=["research"],
    )
    events: EventFilter = Field(
        default_factory=EventFilter,
        description="A filter of this transport's own, behind the one for all: an event has to pass both.",
    )

    start: Literal["oldest", "now"] = Field(
        default="oldest",
        description="Where a transport begins that is new here, or was forgotten: with the oldest event that the "
        "outbox keeps, or with the next one. Later it goes on where it was.",
    )
    mode: Literal["structured", "binary"] = Field(
        default="structured",
        description="How a CloudEvent becomes a message. `structured`: all of it is JSON in the body. `binary`: the "
        "body is `data` alone, and the attributes are headers.",
    )

    _limits_as_found: bool = PrivateAttr(default=False)

    @property
    def limits_as_found(self) -> bool:
        """Whether how much an existing place keeps is taken as it is found, and not compared."""
        return self._limits_as_found

    def for_consumer(self) -> Self:
        """The same for who receives events: limits are the bridge's affair, unless they are said here too."""
        found = self.model_copy()
        found._limits_as_found = not self.model_fields_set & {"limits", "partitions"}
        return found

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[tuple[Place, PydanticCustomError]]:
        """A secret is given either in the configuration or in a file."""
        yield from given_twice(given)

    def secret(self, option: str) -> str | None:
        """Give a secret, from the configuration or from its file.

        The file is read at every call, and that is when connecting.

        :param option: the secret's name without ``_file``.
        :return: the secret, or None where neither form is given.
        :raises TransportConfigurationError: the file can't be read, isn't UTF-8 or is empty.
        """
        inline: SecretStr | None = getattr(self, option)
        if inline is not None:
            return inline.get_secret_value()
        path = getattr(self, f"{option}_file")
        if path is None:
            return None
        place = f"transport {self.name}: {option}_file"
        return from_file(place, path, TransportConfigurationError, "put the file there, and let our user read it")


def one_way_to_log_in(
    given: Mapping[str, Any], ways: Sequence[tuple[str, ...]], remedy: str
) -> Iterator[tuple[Place, PydanticCustomError]]:
    """Say which options belong to a second way to log in.

    :param ways: the options of each way.
    """
    # The first option of each way that is given, in the order of the file.
    order = list(given)
    firsts = [next(option for option in order if option in way) for way in ways if set(way) & given.keys()]
    firsts.sort(key=order.index)
    for option in firsts[1:]:
        yield (
            (option,),
            mistake("{0} and {1} are two ways to log in", remedy, options=((firsts[0],), (option,))),
        )


def user_with_password(given: Mapping[str, Any]) -> Iterator[tuple[Place, PydanticCustomError]]:
    """Say which of the two is missing beside the other."""
    passwords = [option for option in ("password", "password_file") if option in given]
    if "user" in given and not passwords:
        yield ("user",), mistake("needs a password", "give password_file (or password) too")
    if passwords and "user" not in given:
        yield (passwords[0],), mistake("needs a user", "give user too")


class Tls(Options):
    """TLS to the server. Certificates are read when connecting, so that they can be replaced in place."""

    enabled: bool | None = Field(
        default=None,
        description="`true` insists on TLS, `false` forbids it. Left out: TLS is insisted on if a server's "
        "URL begins with `tls://` or another option of this block is given; otherwise it is used if the "
        "server asks for it.",
    )
    ca_file: FileName | None = Field(
        default=None,
        description="PEM file with the certificates of the authorities to trust, in place of the system's.",
        examples=["/etc/orthanc/broker-ca.pem"],
    )
    cert_file: FileName | None = Field(
        default=None,
        description="PEM file with the bridge's own certificate, for servers that verify their clients "
        "(mutual TLS). Needs `key_file`.",
        examples=["/etc/orthanc/bridge.pem"],
    )
    key_file: FileName | None = Field(
        default=None,
        description="PEM file with the private key of `cert_file`, not encrypted.",
        examples=["/etc/orthanc/bridge-key.pem"],
    )
    server_hostname: str | None = Field(
        default=None,
        description="The name that the server's certificate must carry, if it is not the host in the URL.",
        examples=["broker.example.org"],
    )

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[tuple[Place, PydanticCustomError]]:
        """A certificate needs its key, and TLS that is off needs nothing."""
        if given.get("enabled") is False:
            other = next((option for option in given if option != "enabled"), None)
            if other:
                yield (
                    ("enabled",),
                    mistake(
                        "{0} switches off what {1} asks for",
                        "leave one of them out",
                        options=(("enabled",), (other,)),
                    ),
                )
            return
        for one, other in (("cert_file", "key_file"), ("key_file", "cert_file")):
            if one in given and other not in given:
                yield (one,), mistake(f"needs {other} beside it", f"give {other} too, or leave both out")


class MemoryOptions(TransportOptions):
    """Events stay in the bridge's memory and are gone with it. For tests."""

    type: Literal["memory"] = Field(default="memory", description="`memory`.")
