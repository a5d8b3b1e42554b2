"""Where it is noted which effects are begun and done (`orthanc_events_bridge.consumers.once`): one file per store.

A store's client is imported when it is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from pydantic import SecretStr, ValidationInfo

from orthanc_events_bridge.consumers.stores.base import Begun, Store, StoreError
from orthanc_events_bridge.consumers.stores.database import Database
from orthanc_events_bridge.consumers.stores.sql import SqlStore
from orthanc_events_bridge.secret import from_file
from orthanc_events_bridge.transports.blocks import transport_of
from orthanc_events_bridge.transports.nats_options import NatsOptions
from orthanc_events_bridge.transports.options import TransportOptions
from orthanc_events_bridge.values import mistake

__all__ = ["BROKER", "STORES", "Begun", "Database", "Store", "StoreError", "database", "make", "option"]

#: What is written for the consumer's own broker.
BROKER: Final = "broker"
#: What to write, for messages.
STORES: Final = (
    'write "sqlite:////FOLDER/FILE", "postgresql://USER@HOST/DATABASE", "nats://HOST:4222", or "broker" with NATS'
)
#: How URLs begin.
_POSTGRESQL: Final = ("postgresql://", "postgres://")
_NATS: Final = ("nats://", "tls://")


def option(value: object, info: ValidationInfo) -> SecretStr | NatsOptions:
    """Read the option ``store``.

    :param value: the URL of a database; ``broker``; a URL of NATS, or a block of its options.
    :return: the URL of a database or ``broker``, secret since it may hold a password; or how to reach NATS.
    :raises PydanticCustomError: it is none of these. Nothing secret is in the message.
    """
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if isinstance(value, str):
        if value == BROKER or _database(value):
            return SecretStr(value)
        if not value.startswith(_NATS):
            raise mistake("is no URL of a store", STORES)
    elif not isinstance(value, Mapping | TransportOptions):
        raise mistake("is no store", STORES)
    options = transport_of(value, info)
    if not isinstance(options, NatsOptions):
        raise mistake(f"{options.type} can't note what is done once", STORES)
    return options


def _database(url: str) -> bool:
    try:
        found = urlsplit(url)
    except ValueError:
        return False
    if found.scheme == "sqlite":
        return not found.netloc and len(found.path) > 1
    return url.startswith(_POSTGRESQL)


def make(store: SecretStr | Path | NatsOptions) -> Store:
    """The store, not opened yet.

    :param store: the URL of a database, the file that holds that, or how to reach NATS.
    :raises StoreError: its client is not installed, or the file can't be used.
    """
    if isinstance(store, NatsOptions):
        try:
            from orthanc_events_bridge.consumers.stores.nats import NatsStore
        except ImportError as error:
            raise StoreError(
                f"the client library for NATS can't be loaded: {error}", 'pip install "orthanc-events-bridge[nats]"'
            ) from error
        return NatsStore(store)
    return SqlStore(database(store))


def database(store: SecretStr | Path) -> Database:
    """The database that such a URL is of, not opened yet.

    :param store: its URL, or the file that holds that.
    :raises StoreError: its client is not installed, or the file can't be used.
    """

    def read() -> str:
        if isinstance(store, SecretStr):
            return store.get_secret_value()
        return from_file("store_file", store, StoreError, "put the file there, and let our user read it")

    url = read()
    if not _database(url):
        raise StoreError(
            f"store_file {store} holds no URL of a database", "write postgresql://USER:PASSWORD@HOST/DATABASE"
        )
    if urlsplit(url).scheme == "sqlite":
        from orthanc_events_bridge.consumers.stores.sqlite import SqliteDatabase

        return SqliteDatabase(unquote(urlsplit(url).path)[1:])
    try:
        from orthanc_events_bridge.consumers.stores.postgresql import PostgresDatabase
    except ImportError as error:
        raise StoreError(
            f"the client library for PostgreSQL can't be loaded: {error}",
            'pip install "orthanc-events-bridge[postgresql]"',
        ) from error
    return PostgresDatabase(read)
