"""`Consumer`: handlers by event type, and what runs them."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from orthanc_events_bridge.consumers import stores
from orthanc_events_bridge.consumers.clients import Clients
from orthanc_events_bridge.consumers.configuration import BROKER_ENVIRONMENT, Configuration, configure
from orthanc_events_bridge.consumers.effects import Effects
from orthanc_events_bridge.consumers.event import Event
from orthanc_events_bridge.consumers.health import address_of, health
from orthanc_events_bridge.consumers.leaving import logs, run_until_told
from orthanc_events_bridge.consumers.meter import Meter
from orthanc_events_bridge.consumers.once import KEEP, LEASE, Turns, only_once
from orthanc_events_bridge.consumers.publishing import Publisher
from orthanc_events_bridge.consumers.retry import RetryPolicy
from orthanc_events_bridge.consumers.routes import Dead, Route, check_terms, incomplete, no_handler, route
from orthanc_events_bridge.consumers.settings import LONGEST_ORDERED_RETRY, ConsumerSettings
from orthanc_events_bridge.consumers.terms import Terms
from orthanc_events_bridge.consumers.worker import Worker
from orthanc_events_bridge.errors import BridgeError, OrthancError
from orthanc_events_bridge.orthanc_api import OrthancApi, OrthancOptions
from orthanc_events_bridge.transports import create
from orthanc_events_bridge.transports.options import TransportOptions
from orthanc_events_bridge.transports.subscriptions import boot_time

if TYPE_CHECKING:
    import httpx

    from orthanc_events_bridge.testing.kit import Trial
    from orthanc_events_bridge.transports.base import Transport

_H = TypeVar("_H", bound=Callable[..., Any])


class Consumer(Effects):
    """Handles the events of an Orthanc outside of it. Started as often as wanted: all of one name share the events.

    ::

        app = Consumer("hello", broker="nats://127.0.0.1:4222", orthanc="http://127.0.0.1:8042")

        @app.on("study.stable")
        async def hello(event, orthanc):
            print((await orthanc.get(f"/studies/{event.study_id}")).json())

        app.run()

    What is left out here comes from a file, or has a default (docs/consumer-configuration.md): the command line comes
    before the environment, that before the file, and that before the code.

    :param name: letters, digits, ``_`` and ``-``. What was settled under this name is not given to it again.
    :param config: a YAML file with further options; ``ORTHANC_EVENTS_CONSUMER`` names another.
    :param broker: its URL, or a block of options (`orthanc_events_bridge.consumers.broker`);
        ``ORTHANC_EVENTS_BROKER`` names another.
    :param orthanc: where Orthanc's REST API is, for handlers that take a second argument; or
        `orthanc_events_bridge.orthanc_api.OrthancOptions`, with TLS and a login. What the environment says
        (``ORTHANC_EVENTS_ORTHANC_URL`` …) comes first.
    :param start: where the name's very first start begins: with the next event (``new``, if nothing is said), or with
        the oldest that the broker keeps. Later ones go on where it was.
    :param concurrency: how many events one worker handles at a time. Of one key it is always one at a time.
    :param prefetch: how many events one worker holds, those that are being handled among them; 0: twice `concurrency`.
        Few: an even share for workers with long handlers. Many: less waiting for the broker with short ones.
    :param ordered: the events of one key (a study, with its series and instances) stay in order across all workers,
        retries included: while one waits for its retry, 1/64 of all keys waits with it.
    :param retry: what becomes of events whose handlers fail.
    :param ack_wait: seconds without a sign of life behind which a worker's events are given to others.
    :param longest: seconds that a handler may take at most, where the broker has a limit of its own (RabbitMQ: half an
        hour, if nothing is said here).
    :param drain: seconds that handlers have to end when the worker stops.
    :param http: ``HOST:PORT`` at which health and metrics are told.
    :param store: where it is noted which effects are done (`once`): ``sqlite:////FOLDER/FILE`` for the workers of one
        machine, ``postgresql://USER@HOST/DATABASE``, ``nats://HOST:PORT`` (2.11 or newer), a block of NATS' options, or
        ``broker``: the consumer's own NATS, which it also is if nothing is said.
    :param store_file: a file with the URL of a database, in place of `store`.
    :raises ConfigError: something of that makes no sense; with every mistake.
    """

    def __init__(
        self,
        name: str,
        *,
        config: Path | str | None = None,
        broker: str | Mapping[str, Any] | TransportOptions | None = None,
        orthanc: str | Mapping[str, Any] | OrthancOptions | None = None,
        start: Literal["new", "oldest"] | None = None,
        concurrency: int | None = None,
        prefetch: int | None = None,
        ordered: bool | None = None,
        retry: RetryPolicy | None = None,
        ack_wait: float | None = None,
        longest: float | None = None,
        drain: float | None = None,
        http: str | None = None,
        store: str | Mapping[str, Any] | None = None,
        store_file: Path | str | None = None,
    ) -> None:
        said = {name: value for name, value in locals().items() if name not in ("self", "config")}
        self._begin(configure(said, config))

    @classmethod
    def configured(cls, found: Configuration[Any], *, inbox_only: bool = False) -> Self:
        """One whose configuration is put together already.

        :param found: by `orthanc_events_bridge.consumers.configuration.configure`.
        :param inbox_only: it gets what is sent to its inbox, and nothing of what everybody gets.
        """
        self = cls.__new__(cls)
        self._begin(found, inbox_only)
        return self

    def _begin(self, found: Configuration[Any], inbox_only: bool = False) -> None:
        self.settings: ConsumerSettings = found.settings
        self.name = found.settings.name
        self.broker = found.settings.broker
        self.meter = Meter()
        chosen = self.settings.chosen_store()
        self._turns = Turns(self.name, None if chosen is None else lambda: stores.make(chosen))
        self._publisher = Publisher(self._connection)
        self._orthanc = found.orthanc
        self._routes: list[Route] = []
        self._worker: Worker | None = None
        self._terms = Terms(
            name=self.name,
            oldest=self.settings.start == "oldest",
            ordered=self.settings.ordered,
            inbox_only=inbox_only,
            concurrency=self.settings.concurrency,
            prefetch=self.settings.prefetch or 2 * self.settings.concurrency,
            retry=self.settings.policy(),
            ack_wait=self.settings.ack_wait,
            longest=self._held_for(self.settings.longest),
            drain=self.settings.drain,
        )

    @property
    def ready(self) -> bool:
        """Whether it is subscribed now."""
        return self._worker is not None and self._worker.ready

    @property
    def stuck(self) -> bool:
        """Whether all that it may hold waits for a place of retries or dead letters that takes none."""
        return self._worker is not None and self._worker.stuck

    @property
    def ticked(self) -> float:
        """When it last looked at the clock, while it works (`orthanc_events_bridge.transports.subscriptions`)."""
        return self._worker.ticked if self._worker is not None else boot_time()

    @property
    def handlers(self) -> list[tuple[str, tuple[str, ...]]]:
        """Of each handler its name and its patterns."""
        return [(one.name, one.patterns) for one in self._routes]

    def on(
        self,
        *patterns: str,
        where: Callable[[Event], bool] | None = None,
        retry: RetryPolicy | None = None,
        once: str | None = None,
        on_dead: Dead | None = None,
    ) -> Callable[[_H], _H]:
        """Have a function called for every event of these types.

        It takes the event, or the event and an ``httpx`` client for Orthanc (``AsyncClient`` for a coroutine function,
        else ``Client``: it runs in a thread). Where several are for one event they are called one behind the other, in
        the order of their registration, and the event is settled once: when one fails, all are called again.

        :param patterns: short names, with wildcards: ``study.stable``, ``*.stable``, ``job.*``; or the whole type of
            another producer's events.
        :param where: says whether it wants an event of these types.
        :param retry: its own policy.
        :param once: a name for what it does: it is then done once for each event, as by `once` with its defaults.
        :param on_dead: a coroutine function that is called with the event and the reason before an event of these types
            goes among the dead letters, so that it can be told (`publish`). Where the broker does not take what it
            publishes, the event is held until it does; anything else that it raises is logged, and holds up nothing.
        :raises BridgeError: a pattern matches nothing, or the function can't be called so.
        """
        check_terms(patterns, where, retry)
        if retry is not None:
            self._check_order(retry)
        if once is not None:
            self._turns.check(once, LEASE, KEEP)

        def register(handler: _H) -> _H:
            found = route(patterns, handler, where, retry, on_dead)
            if once is not None:
                found = replace(found, handler=only_once(handler, lambda event: self.once(event, once)))
            self._routes.append(found)
            return handler

        return register

    def test(self) -> Trial:
        """Run the handlers against a broker in memory, on a clock that only tests move (docs/testing.md).

        ::

            with app.test() as kit:  # or: async with
                kit.send(event("study.stable"))
                assert not kit.dead

        Needs the extra ``testing`` where handlers ask Orthanc.
        """
        from orthanc_events_bridge.testing.kit import Trial

        return Trial(self._terms, self._routes, self._orthanc, self._turns, self._publisher)

    def _held_for(self, longest: float) -> float:
        """Seconds that one delivery may be held; 0: what the broker allows. In order, all its waits are among them."""
        waits = self.settings.policy().longest if self.settings.ordered else 0.0
        return longest + waits if waits < math.inf else longest

    def _check_order(self, retry: RetryPolicy) -> None:
        if self._terms.ordered and retry.maximum > LONGEST_ORDERED_RETRY:
            raise BridgeError(
                f"consumer {self.name}: ordered, a retry of {retry.maximum:g} s would hold up 1/64 of all events",
                f"give a RetryPolicy whose maximum is at most {LONGEST_ORDERED_RETRY:g} s",
            )

    def numbered(self, number: int) -> Self:
        """The same, as one of several workers on this machine: with a port of its own for health and metrics.

        :param number: of the worker, from 0.
        :raises ConfigError: there is no such port.
        """
        self.settings = self.settings.model_copy(update={"http": address_of(self.name, self.settings.http, number)})
        return self

    def run(self) -> None:
        """Work until SIGTERM or SIGINT; then end what runs, give back what has not begun, and return.

        A second signal, or a handler that blocks the event loop for longer than `drain`, ends the process at once.

        :raises BridgeError: it can't begin.
        """
        logs(self.settings.log_level)
        run_until_told(self.name, self.serve, self.stop, self.settings.drain, lambda: self.running)

    @property
    def running(self) -> list[str]:
        """What handlers are at, for logs."""
        return self._worker.running if self._worker is not None else []

    async def serve(self) -> None:
        """Work until `stop` is called, in a loop of the caller's own.

        :raises BridgeError: it can't begin.
        """
        clients = Clients(self._orthanc)
        self._turns.loop = asyncio.get_running_loop()
        transport, system = self._transport(clients), self.broker.type if self.broker else ""
        self._worker = worker = Worker(transport, self._terms, self._routes, clients, self.meter, system=system)
        try:
            async with health(self.settings.http, self):
                await worker.run()
        finally:
            self._worker = None
            await clients.close()
            await self._turns.close()
            await self._publisher.close()

    @contextlib.asynccontextmanager
    async def asking(self) -> AsyncGenerator[httpx.AsyncClient]:
        """The client for Orthanc that handlers get, outside of them.

        :raises OrthancError: which Orthanc is not said, or it can't be asked.
        """
        clients = Clients(self._orthanc)
        try:
            yield clients.for_async()
        finally:
            await clients.close()

    async def check(self, *, store: bool = False) -> list[str]:
        """Connect to the broker, to the store where one is said, and to Orthanc where a handler asks it; leave again.

        :param store: to the store in any case.
        :return: what was found, in a few lines.
        :raises BridgeError: it can't begin, or can't connect.
        """
        clients = Clients(self._orthanc)
        transport = self._transport(clients)
        found = [f"consumer {self.name}: {name} handles {', '.join(patterns)}" for name, patterns in self.handlers]
        try:
            await transport.connect()
            found += [f"{transport.name}: {line}" for line in await transport.describe()]
            if store or self.settings.store is not None or self.settings.store_file is not None:
                await self._turns.store()
                found.append("store: it can be noted what is done once")
            if any(one.wants_orthanc for one in self._routes) and self._orthanc is not None:
                found.append(await asyncio.to_thread(_ask, self._orthanc))
        finally:
            await transport.close()
            await clients.close()
            await self._turns.close()
        return found

    def _transport(self, clients: Clients) -> Transport:
        """The broker's, when nothing is missing.

        :raises BridgeError: something is.
        """
        if not self._routes:
            raise no_handler(self.name)
        if any(one.wants_orthanc for one in self._routes):
            try:
                clients.check()
            except OrthancError as error:
                raise incomplete(self.name, "orthanc", error.message, error.remedy) from None
        return self._connection()

    def _connection(self) -> Transport:
        """To the broker, not connected yet.

        :raises BridgeError: which one is not said, or it can't be consumed from, or its client is not installed.
        """
        if self.broker is None:
            wrong = "which broker its events come from is not said"
            right = f"give Consumer(broker=URL), `broker` in its file, or {BROKER_ENVIRONMENT}"
            raise incomplete(self.name, "broker", wrong, right)
        transport = create(self.broker)
        if not transport.capabilities.subscribable:
            wrong = f"there is nothing to be received from a transport of type {self.broker.type}"
            raise incomplete(self.name, "broker", wrong, "use NATS, RabbitMQ or Kafka")
        return transport

    def complete(self) -> None:
        """Is all said that it needs to begin? Nothing is connected.

        :raises BridgeError: no.
        """
        self._transport(Clients(self._orthanc))

    def stop(self) -> None:
        """Begin to stop; to be called in the loop that it works in."""
        if self._worker is not None:
            self._worker.stop()


def _ask(options: OrthancOptions) -> str:
    with OrthancApi(options) as api:
        return f"orthanc: {options.place} answers, version {api.json('/system').get('Version', 'unknown')}"
