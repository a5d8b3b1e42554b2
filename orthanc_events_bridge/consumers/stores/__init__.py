"""Where it is noted which effects are begun and done (`orthanc_events_bridge.consumers.once`): one file per store.

A store's client is imported when it is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

from orthanc_events_bridge.consumers.broker import broker_options
from orthanc_events_bridge.consumers.stores.base import Begun, Store, StoreError
from orthanc_events_bridge.consumers.stores.database import Database
from orthanc_events_bridge.consumers.stores.sql import SqlStore
from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.transports.nats_options import NatsOptions
from orthanc_events_bridge.transports.options import TransportOptions

__all__ = ["Begun", "Database", "Store", "StoreError", "check", "database", "make"]

_RIGHT = 'write "sqlite:////FOLDER/FILE", "postgresql://USER@HOST/DATABASE", "nats://HOST:4222", or "broker" with NATS'


def check(store: str | Mapping[str, Any], broker: TransportOptions | None) -> str | NatsOptions:
    """Read what a consumer is given as its store.

    :param store: a URL; ``broker``: the consumer's own, where that is NATS; or a block of NATS' options.
    :param broker: the consumer's own, where it is said.
    :return: the URL of a database, or how to reach NATS.
    :raises StoreError: it is none of these. Nothing secret is in the message.
    """
    if store == "broker":
        if not isinstance(broker, NatsOptions):
            raise StoreError(f"{broker.type if broker else 'no broker'} can't note what is done once", _RIGHT)
        return broker
    if isinstance(store, str):
        scheme = urlsplit(store).scheme
        if scheme == "sqlite" and not urlsplit(store).netloc and len(urlsplit(store).path) > 1:
            return store
        if scheme in ("postgresql", "postgres"):
            return store
        if scheme not in ("nats", "tls"):
            raise StoreError("the consumer's store is no URL of one", _RIGHT)
    try:
        options = broker_options(store)
    except BridgeError as error:  # in its words it is a broker
        raise StoreError(error.message.replace("the broker", "the consumer's store", 1), error.remedy) from None
    if not isinstance(options, NatsOptions):
        raise StoreError(f"{options.type} can't note what is done once", _RIGHT)
    return options


def make(store: str | NatsOptions) -> Store:
    """The store, not opened yet.

    :param store: as `check` gives it.
    :raises StoreError: its client is not installed.
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


def database(url: str) -> Database:
    """The database that such a URL is of, not opened yet.

    :param url: ``sqlite:`` or ``postgresql:``, as `check` gives it.
    :raises StoreError: its client is not installed.
    """
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
    return PostgresDatabase(url)
