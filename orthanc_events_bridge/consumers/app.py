"""`Consumer`: handlers by event type, and what runs them."""

from __future__ import annotations

import asyncio
import logging
import re
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from orthanc_events_bridge.consumers import stores
from orthanc_events_bridge.consumers.broker import broker_options
from orthanc_events_bridge.consumers.clients import Clients
from orthanc_events_bridge.consumers.event import Event
from orthanc_events_bridge.consumers.meter import Meter
from orthanc_events_bridge.consumers.once import KEEP, LEASE, Once, Turns, only_once
from orthanc_events_bridge.consumers.retry import RetryPolicy
from orthanc_events_bridge.consumers.routes import Route, route
from orthanc_events_bridge.consumers.worker import Terms, Worker
from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.orthanc_api import OrthancOptions
from orthanc_events_bridge.transports import create
from orthanc_events_bridge.transports.options import TransportOptions

if TYPE_CHECKING:
    from orthanc_events_bridge.testing.kit import Trial

log = logging.getLogger(__name__)

_H = TypeVar("_H", bound=Callable[..., Any])

#: With ``ordered`` a retry keeps its partition waiting: longer ones are refused (design, section 6).
LONGEST_ORDERED_RETRY = 300.0


class Consumer:
    """Handles the events of an Orthanc outside of it. Started as often as wanted: all of one name share the events.

    ::

        app = Consumer("hello", broker="nats://127.0.0.1:4222", orthanc="http://127.0.0.1:8042")

        @app.on("study.stable")
        async def hello(event, orthanc):
            print((await orthanc.get(f"/studies/{event.study_id}")).json())

        app.run()

    :param name: letters, digits, ``_`` and ``-``. What was settled under this name is not given to it again.
    :param broker: its URL, or a block of options (`orthanc_events_bridge.consumers.broker.broker_options`).
    :param orthanc: where Orthanc's REST API is, for handlers that take a second argument; or
        `orthanc_events_bridge.orthanc_api.OrthancOptions`, with TLS and a login. None: they are looked for in the
        environment (``ORTHANC_EVENTS_ORTHANC_URL`` …).
    :param start: where the name's very first start begins: with the next event, or with the oldest that the broker
        keeps. Later ones go on where it was.
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
    :param store: where it is noted which effects are done (`once`): ``sqlite:////FOLDER/FILE`` for the workers of one
        machine, ``postgresql://USER@HOST/DATABASE``, ``nats://HOST:PORT`` (2.11 or newer), a block of NATS' options, or
        ``broker``: the consumer's own NATS.
    :raises BridgeError: something of that makes no sense.
    """

    def __init__(
        self,
        name: str,
        *,
        broker: str | Mapping[str, Any] | TransportOptions,
        orthanc: str | OrthancOptions | None = None,
        start: Literal["new", "oldest"] = "new",
        concurrency: int = 16,
        prefetch: int = 0,
        ordered: bool = False,
        retry: RetryPolicy | None = None,
        ack_wait: float = 30.0,
        longest: float = 0.0,
        drain: float = 25.0,
        store: str | Mapping[str, Any] | None = None,
    ) -> None:
        if re.fullmatch(r"[A-Za-z0-9_-]{1,128}", name) is None:
            raise BridgeError(f"{name!r} can't be the name of a consumer", "use letters, digits, _ and -, at most 128")
        for option, right in (
            ("start", start in ("new", "oldest")),
            ("concurrency", 1 <= concurrency <= 10_000),
            ("prefetch", prefetch == 0 or concurrency <= prefetch <= 65535),
            ("ack_wait", 1 <= ack_wait <= 86400),
            ("longest", longest >= 0),
            ("drain", drain >= 0),
        ):
            if not right:
                raise BridgeError(f"consumer {name}: {option}={locals()[option]!r} makes no sense", _RIGHT[option])
        self.name = name
        self.broker = broker_options(broker)
        self.meter = Meter()
        chosen = None if store is None else stores.check(store, self.broker)
        self._turns = Turns(name, None if chosen is None else lambda: stores.make(chosen))
        self._orthanc = OrthancOptions(orthanc) if isinstance(orthanc, str) else orthanc
        self._routes: list[Route] = []
        self._worker: Worker | None = None
        self._terms = Terms(
            name=name,
            oldest=start == "oldest",
            ordered=ordered,
            concurrency=concurrency,
            prefetch=prefetch or 2 * concurrency,
            retry=retry or (RetryPolicy(maximum=LONGEST_ORDERED_RETRY) if ordered else RetryPolicy()),
            ack_wait=ack_wait,
            longest=longest,
            drain=drain,
        )
        self._check_order(self._terms.retry)

    def on(
        self,
        *patterns: str,
        where: Callable[[Event], bool] | None = None,
        retry: RetryPolicy | None = None,
        once: str | None = None,
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
        :raises BridgeError: a pattern matches nothing, or the function can't be called so.
        """
        if retry is not None:
            self._check_order(retry)

        if once is not None:
            self._turns.check(once, LEASE, KEEP)

        def register(handler: _H) -> _H:
            found = route(patterns, handler, where, retry)
            if once is not None:
                found = replace(found, handler=only_once(handler, lambda event: self.once(event, once)))
            self._routes.append(found)
            return handler

        return register

    def once(self, event: Event, effect: str, *, lease: float = LEASE, keep: float = KEEP) -> Once:
        """Do something once for an event, although events come at least once, to any worker of this name.

        ::

            async with app.once(event, "anonymize") as first:
                if first:
                    await orthanc.post(f"/studies/{event.study_id}/anonymize", json={})

        In handlers that are no coroutine functions it is ``with``. Where another worker is at it, `Retry` is raised
        until that one's lease is over or the effect is done. What is raised inside gives the effect free for the next
        attempt. What is promised, and what not: docs/once.md.

        :param effect: a name for it, letters, digits, ``_`` and ``-``. Several effects of one event have several.
        :param lease: seconds behind which another may begin it, once this worker gives no sign of life any more. It is
            renewed for as long as the effect takes.
        :param keep: seconds for which it is remembered that it is done; at least as long as the broker keeps events.
        :raises BridgeError: the consumer has no store, or a value makes no sense.
        :raises StoreError: on entering: the store can't be asked. Nothing is begun then.
        """
        return Once(self._turns, event, effect, lease, keep)

    def test(self) -> Trial:
        """Run the handlers against a broker in memory, on a clock that only tests move (docs/testing.md).

        ::

            with app.test() as kit:  # or: async with
                kit.send(event("study.stable"))
                assert not kit.dead

        Needs the extra ``testing`` where handlers ask Orthanc.
        """
        from orthanc_events_bridge.testing.kit import Trial

        return Trial(self._terms, self._routes, self._orthanc, self._turns)

    def _check_order(self, retry: RetryPolicy) -> None:
        if self._terms.ordered and retry.maximum > LONGEST_ORDERED_RETRY:
            raise BridgeError(
                f"consumer {self.name}: ordered, a retry of {retry.maximum:g} s would hold up 1/64 of all events",
                f"give a RetryPolicy whose maximum is at most {LONGEST_ORDERED_RETRY:g} s",
            )

    def run(self) -> None:
        """Work until SIGTERM or SIGINT; then end what runs, give back what has not begun, and return.

        :raises BridgeError: it can't begin.
        """
        if not logging.getLogger().handlers:
            logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        asyncio.run(self._run())

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        await self.serve()

    async def serve(self) -> None:
        """Work until `stop` is called, in a loop of the caller's own.

        :raises BridgeError: it can't begin.
        """
        if not self._routes:
            raise BridgeError(f"consumer {self.name}: there is no handler", 'write @app.on("study.stable") above one')
        clients = Clients(self._orthanc)
        if any(one.wants_orthanc for one in self._routes):
            clients.check()
        self._turns.loop = asyncio.get_running_loop()
        self._worker = Worker(create(self.broker), self._terms, self._routes, clients, self.meter)
        try:
            await self._worker.run()
        finally:
            self._worker = None
            await clients.close()
            await self._turns.close()

    def stop(self) -> None:
        """Begin to stop; to be called in the loop that it works in."""
        if self._worker is not None:
            self._worker.stop()


_RIGHT = {
    "start": "it is 'new' or 'oldest'",
    "concurrency": "give 1 to 10000",
    "prefetch": "give at least as many as concurrency, at most 65535; or 0",
    "ack_wait": "give 1 to 86400 seconds",
    "longest": "give seconds, or 0",
    "drain": "give seconds, 0 or more",
}
