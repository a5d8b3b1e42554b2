"""Webhooks against a real receiver: what is sent, what each answer leads to, and how connections are used."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cloudevents.core.bindings.http import HTTPMessage, from_http_event, to_binary, to_structured
from cloudevents.core.formats.json import JSONFormat

from orthanc_events_bridge.bridge.config import load, parse
from orthanc_events_bridge.bridge.relay import Relay
from orthanc_events_bridge.errors import (
    EventRejectedError,
    NotConnectedError,
    RefusedError,
    TransportConfigurationError,
    TransportError,
)
from orthanc_events_bridge.events.mapping import to_event, to_outgoing
from orthanc_events_bridge.testing.brokers.webhook import PLACE, Received, WebhookServer
from orthanc_events_bridge.testing.processes import free_port
from orthanc_events_bridge.transports import webhook as module
from orthanc_events_bridge.transports.base import PublishError
from orthanc_events_bridge.transports.webhook_options import WebhookOptions
from tests.contract.harness import SECRET, event, events, run
from tests.contract.relay_tools import SHAPE, Notebook, Rows, quickly, reached, row, wait_for
from tests.integration.webhook_tools import answering, publish, receiver, refusal, webhook

pytestmark = pytest.mark.integration

KEYS = [f"study-{number}" for number in range(20)]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[WebhookServer]:
    with receiver(tmp_path / "webhook") as made:
        made.wait_log("connection")  # the one by which it was found ready
        yield made


def ids(server: WebhookServer) -> list[str]:
    return [one.headers["orthanc-event-id"] for one in server.received()]


# What is sent.


def same(one: Received, message: HTTPMessage) -> bool:
    """Whether a request is what the SDK would have sent: the same body, the same headers but for ours and HTTP's."""
    theirs = {name.lower(): value for name, value in message.headers.items()}
    mine = {name: value for name, value in one.headers.items() if name.startswith("ce-") or name == "content-type"}
    return one.body == message.body and mine == theirs


@pytest.mark.parametrize("mode", ["structured", "binary"])
def test_events_are_sent_as_the_http_binding_says(server: WebhookServer, mode: str) -> None:
    rows = [row(number) for number in range(1, 4)]
    shape = {**SHAPE, "source": 'urn:x:grüß "100 %" 😀', "site": "main"}
    sent = [to_outgoing(one, shape, Rows.recorder, binary=mode == "binary") for one in rows]
    assert run(publish(webhook(server, mode=mode), sent)) is None
    found = server.received()
    assert len(found) == 3
    for one, fact, outgoing in zip(found, rows, sent, strict=True):
        original = to_event(fact, shape, Rows.recorder)
        write = to_binary if mode == "binary" else to_structured
        assert same(one, write(original, JSONFormat()))
        read = from_http_event(HTTPMessage(one.headers, one.body), JSONFormat())
        assert read.get_data() == original.get_data()
        assert read.get_id() == original.get_id() == one.headers["orthanc-event-id"] == outgoing.id
        assert read.get_source() == shape["source"]
        assert one.headers["orthanc-address"] == f"main.instance.created.{outgoing.partition}"
        assert one.headers["user-agent"].startswith("orthanc-events-bridge/")
        assert any(name.startswith("ce-") for name in one.headers) == (mode == "binary")
        # Nothing that a browser or a script would bring along.
        assert not {"accept-encoding", "cookie", "authorization", "webhook-signature", "expect"} & one.headers.keys()


def test_headers_and_query_of_the_configuration_are_sent(server: WebhookServer) -> None:
    transport = webhook(f"{server.url}/a%20b/c?key=1%2F2&x", headers={"X-Department": "radiology, north"})
    assert run(publish(transport, events(1))) is None
    (one,) = server.received("/a%20b/c")
    assert one.headers["x-department"] == "radiology, north"
    assert "/a%20b/c?key=1%2F2&x" in server.log_text()  # of the probe


def test_nothing_is_read_back_and_nobody_subscribes(server: WebhookServer) -> None:
    async def main() -> None:
        transport = webhook(server)
        await transport.connect()
        for oldest in (False, True):
            async with contextlib.aclosing(transport.tail(oldest=oldest)) as reading:
                with pytest.raises(TransportConfigurationError, match="look at the outbox"):
                    await anext(reading)
        with pytest.raises(TransportConfigurationError, match="can't subscribe"):
            await transport.subscribe("someone")
        await transport.close()

    run(main())


def test_description_says_how_events_are_sent(server: WebhookServer) -> None:
    async def describe(**options: Any) -> str:
        transport = webhook(f"{server.url}{PLACE}?key={SECRET}", **options)
        await transport.connect()
        lines = await transport.describe()
        await transport.close()
        return "\n".join(lines)

    text = run(describe())
    for word in (f"{server.url}{PLACE},", "without TLS", "structured", "not signed", "one event at a time", "204"):
        assert word in text
    assert SECRET not in text
    text = run(describe(signing_secret="a\nb", concurrency=4, probe=False))
    assert "2 key(s)" in text and "4 events at a time" in text and "OPTIONS" not in text
    assert "binary" in run(describe(mode="binary"))


# What answers lead to.


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *((status, EventRejectedError) for status in (400, 413, 415, 422)),
        *((status, RefusedError) for status in (408, 425, 429, 500, 501, 502, 503, 504, 507, 599)),
        *((status, TransportConfigurationError) for status in (401, 403, 404, 405, 407, 410)),
        *(
            (status, TransportConfigurationError)
            for status in (402, 409, 418, 426, 451, 300, 301, 302, 303, 304, 307, 308)
        ),
    ],
)
def test_each_answer(server: WebhookServer, status: int, kind: type[TransportError]) -> None:
    server.control(answers=[{}, {"status": status, "body": SECRET if status != 304 else ""}])
    error = run(publish(webhook(server), events(4)))
    assert error is not None
    assert type(error.error) is kind and str(status) in str(error)
    assert error.confirmed == 1 and not error.stored
    assert ids(server) == [one.id for one in events(1)]
    assert run(publish(webhook(server), events(3, start=1))) is None


@pytest.mark.parametrize("status", [200, 201, 202, 203, 204, 206, 299])
def test_each_2xx_confirms(server: WebhookServer, status: int) -> None:
    server.control(always={"status": status, "body": "" if status == 204 else "thanks"})
    assert run(publish(webhook(server), events(3))) is None
    assert ids(server) == [one.id for one in events(3)]


def test_redirects_are_not_followed(server: WebhookServer) -> None:
    location = f"{server.url}/other?token={SECRET}"
    server.control(always={"status": 307, "headers": {"Location": location}})
    text = refusal(webhook(server), events(1), TransportConfigurationError)
    assert f"a redirect to {server.url}/other, which is not followed" in text
    assert server.received("/other") == [] and "/other" not in server.log_text()


@pytest.mark.parametrize(
    ("headers", "least", "most"),
    [
        ({"Retry-After": "120"}, 120.0, 120.0),
        ({"Retry-After": "Sun, 06 Nov 1994 08:51:37 GMT", "Date": "Sun, 06 Nov 1994 08:49:37 GMT"}, 120.0, 120.0),
        ({"Retry-After": "Fri, 06 Nov 2500 08:51:37 GMT"}, 3600.0, 3600.0),
        ({"Retry-After": "soon"}, 0.0, 0.05),
        ({}, 0.0, 0.05),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_the_relay_waits_as_long_as_the_receiver_asks(
    server: WebhookServer, status: int, headers: dict[str, str], least: float, most: float
) -> None:
    server.control(answers=[{}, {"status": status, "headers": headers}])
    waits: list[float] = []

    async def main() -> None:
        async def sleep(seconds: float) -> None:
            waits.append(seconds)

        relay = relay_to(server, Rows(5), Notebook(), sleep=sleep)
        relay.drain()
        await relay.run()

    run(main())
    assert len(waits) == 1 and least <= waits[0] <= most
    assert len(ids(server)) == 5 and server.log_text().count("connection\n") <= 3


def relay_to(server: WebhookServer, rows: Rows, notebook: Notebook, **options: Any) -> Relay:
    sleep = options.pop("sleep", quickly)
    return Relay(
        "there", lambda: webhook(server, **options), "webhook", 50, lambda name: True, rows, notebook, sleep=sleep
    )


def test_expired_token_sets_nothing_aside_and_a_new_one_is_picked_up(server: WebhookServer, tmp_path: Path) -> None:
    file, rows, notebook = tmp_path / "token", Rows(600), Notebook()
    file.write_text(f"{SECRET}1\n")
    server.control(authorization=[f"Bearer {SECRET}1"])

    async def main() -> None:
        relay = relay_to(server, rows, notebook, token_file=str(file))
        running = asyncio.create_task(relay.run())
        await asyncio.to_thread(wait_for, lambda: reached(relay, 100))
        server.control(authorization=[f"Bearer {SECRET}2"])
        rows.all.extend(row(position) for position in range(601, 701))
        relay.wake()
        await asyncio.to_thread(wait_for, lambda: relay.status()["state"] == "needs attention")
        status = relay.status()["last_error"]
        assert "401" in status["message"] and "token" in status["remedy"]
        file.write_text(f"{SECRET}2\n")
        relay.drain()
        await running
        assert relay.status()["state"] == "connected"

    run(main())
    assert notebook.aside == []
    assert [json.loads(one.body)["sequence"] for one in server.received()] == [f"{n:020d}" for n in range(1, 701)]


@pytest.mark.parametrize("body", ["x" * 1000, "x" * 10_000_000])
def test_the_text_of_an_answer_is_of_no_matter(server: WebhookServer, body: str) -> None:
    server.control(always={"status": 200, "body": body})
    assert run(publish(webhook(server), events(3))) is None
    assert ids(server) == [one.id for one in events(3)]


def test_a_confirmation_whose_text_never_ends_is_one(server: WebhookServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orthanc_events_bridge.transports.webhook_client._BODY_SECONDS", 0.05)
    server.control(always={"status": 200, "length": 1000, "body": "x"})
    assert run(publish(webhook(server), events(3))) is None
    assert ids(server) == [one.id for one in events(3)]


# How connections are used.


def connections(server: WebhookServer) -> int:
    return server.log_text().count("connection\n")


def test_one_connection_is_enough(server: WebhookServer) -> None:
    before = connections(server)
    assert run(publish(webhook(server), events(300))) is None
    assert connections(server) - before == 1
    assert server.log_text().count(f"OPTIONS {PLACE}") == 1


def test_a_receiver_that_ends_each_connection_is_served_as_well(server: WebhookServer) -> None:
    server.control(always={"status": 200, "headers": {"Connection": "close"}, "close": True})
    assert run(publish(webhook(server), events(20))) is None
    assert ids(server) == [one.id for one in events(20)]


@pytest.mark.parametrize("stored", [False, True])
def test_a_receiver_that_hangs_up_without_an_answer(server: WebhookServer, stored: bool) -> None:
    server.control(answers=[{}, {}, {"hang_up": True, "store": stored}])

    async def main() -> None:
        transport = webhook(server)
        await transport.connect()
        with pytest.raises(PublishError) as caught:
            await transport.publish(events(5))
        assert type(caught.value.error) is NotConnectedError and caught.value.confirmed == 2
        await transport.connect()
        await transport.publish(events(3, start=2))
        await transport.close()

    run(main())
    expected = [one.id for one in events(5)]
    assert ids(server) == (expected[:3] + expected[2:] if stored else expected)


def test_a_receiver_that_does_not_answer_in_time(server: WebhookServer) -> None:
    server.control(answers=[{}, {"delay": 30}])
    error = run(publish(webhook(server, timeout=0.5), events(3)))
    assert error is not None and type(error.error) is NotConnectedError and error.confirmed == 1
    assert "within 0.5 s" in str(error)


def test_without_a_probe_the_first_event_shows_what_is_wrong(server: WebhookServer) -> None:
    assert run(publish(webhook(server, probe=False), events(2))) is None
    assert "OPTIONS" not in server.log_text()
    server.kill()

    async def main() -> None:
        transport = webhook(server, probe=False)
        assert await transport.connect() == ""
        with pytest.raises(PublishError) as caught:
            await transport.publish(events(2))
        assert type(caught.value.error) is NotConnectedError and "Connection refused" in str(caught.value)
        await transport.close()

    run(main())
    server.start()


def test_any_answer_to_the_probe_will_do(server: WebhookServer) -> None:
    server.control(authorization=["none has this"])

    async def main() -> None:
        transport = webhook(server)
        await transport.connect()
        assert "401 (Unauthorized)" in "\n".join(await transport.describe())
        await transport.close()

    run(main())


def test_an_idle_receiver_that_has_gone_is_noticed(server: WebhookServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK", 0.0)

    async def main() -> None:
        transport = webhook(server)
        await transport.connect()
        await transport.publish(events(1))
        for _ in range(3):  # while the connection lasts there is nothing to ask
            await transport.connect()
        assert server.log_text().count("OPTIONS") == 1
        server.kill()
        for _ in range(2):
            with pytest.raises(NotConnectedError, match="can't be reached"):
                await transport.connect()
        server.start()
        await transport.connect()
        await transport.publish(events(1, start=1))
        await transport.close()

    run(main())
    assert ids(server) == [one.id for one in events(2)]


@pytest.mark.parametrize("answer", [b"220 mail.example.org ESMTP\r\n\r\n", b"\x15\x03\x01\x00\x02\x02P", b"\0" * 100])
def test_what_is_no_http_server_is_named(answer: bytes) -> None:
    with answering(answer) as url:
        text = refusal(webhook(url), events(1), TransportConfigurationError)
    assert "does not answer in HTTP" in text and url in text


def test_nobody_is_there() -> None:
    text = refusal(webhook(f"http://127.0.0.1:{free_port()}/"), events(1), NotConnectedError)
    assert "Connection refused" in text


@pytest.mark.parametrize("host", ["256.1.1.1", "xn--a.invalid"])
def test_addresses_that_can_not_be(host: str) -> None:
    assert host in refusal(webhook(f"http://{host}/"), events(1), TransportConfigurationError)


def test_cookies_are_not_kept(server: WebhookServer) -> None:
    server.control(always={"status": 200, "headers": {"Set-Cookie": "a=b"}})
    assert run(publish(webhook(server), events(3))) is None
    assert all("cookie" not in one.headers for one in server.received())


# A proxy.


def test_a_proxy_is_used_where_it_is_configured(server: WebhookServer) -> None:
    """What a proxy is asked for is the whole URL: the receiver itself can answer that."""
    transport = webhook(f"http://receiver.example.org{PLACE}", proxy=server.url)
    assert run(publish(transport, events(1))) is None
    assert f"OPTIONS http://receiver.example.org{PLACE}\n" in server.log_text()
    assert ids(server) == [one.id for one in events(1)]


def test_the_environments_proxy_is_not(server: WebhookServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    assert run(publish(webhook(server), events(1))) is None


@pytest.mark.parametrize(
    ("status", "kind"),
    [(b"407", TransportConfigurationError), (b"403", TransportConfigurationError), (b"502", NotConnectedError)],
)
def test_a_proxy_that_refuses(status: bytes, kind: type[TransportError]) -> None:
    with answering(b"HTTP/1.1 %b x\r\nContent-Length: 0\r\n\r\n" % status) as url:
        text = refusal(webhook("https://receiver.example.org/", proxy=url), events(1), kind)
    assert url in text and status.decode() in text


def test_a_proxy_that_is_not_there(server: WebhookServer) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert f"by the proxy {url}" in refusal(webhook(server, proxy=url), events(1), NotConnectedError)


# Several at a time.


def one_per_lane(count: int) -> list[str]:
    """Keys of which no two are in one partition modulo the count."""
    keys: dict[int, str] = {}
    number = 0
    while len(keys) < count:
        one = event(0, f"key-{number}")
        keys.setdefault(int(one.partition) % count, one.key)
        number += 1
    return list(keys.values())


def test_several_events_are_under_way_at_once(server: WebhookServer) -> None:
    """Each of them is answered only when all are there."""
    server.control(together=8)
    assert run(publish(webhook(server, concurrency=8), events(8, keys=one_per_lane(8)))) is None
    assert len(ids(server)) == 8


@pytest.mark.parametrize("concurrency", [1, 8])
def test_those_of_one_key_are_not(server: WebhookServer, concurrency: int) -> None:
    server.control(together=2)
    error = run(publish(webhook(server, concurrency=concurrency, timeout=1), events(8)))
    assert error is not None and type(error.error) is NotConnectedError
    assert ids(server) == []


def check_order(server: WebhookServer, sequences: set[int]) -> None:
    """Everything, each key in the order of its sequence: by the first copies."""
    by_key: dict[str, list[int]] = {}
    for one in server.received():
        document = json.loads(one.body)
        numbers = by_key.setdefault(document["partitionkey"], [])
        if int(document["sequence"]) not in numbers:
            numbers.append(int(document["sequence"]))
    assert {number for numbers in by_key.values() for number in numbers} == sequences
    assert [key for key, numbers in by_key.items() if numbers != sorted(numbers)] == []


def test_several_at_a_time_lose_nothing_and_keep_each_keys_order(server: WebhookServer) -> None:
    large = {40, 41, 333, 777}
    rows, notebook = Rows(2000, large=frozenset(large)), Notebook()
    server.control(largest=100_000)

    async def main() -> None:
        relay = relay_to(server, rows, notebook, concurrency=8, timeout=1)
        relay.drain()
        running = asyncio.create_task(relay.run())
        for moment in (300, 900, 1500):
            await asyncio.to_thread(wait_for, partial(reached, relay, moment))
            server.kill()
            server.start()
        await running

    run(main(), seconds=120)
    assert {position for position, _, _ in notebook.aside} == large
    assert notebook.kept.position == 2000
    check_order(server, {*range(1, 2001)} - large)


@pytest.mark.parametrize(("status", "kind"), [(422, EventRejectedError), (503, RefusedError)])
def test_what_is_confirmed_behind_a_refusal_is_told(
    server: WebhookServer, status: int, kind: type[TransportError]
) -> None:
    sent = events(8, keys=one_per_lane(8))
    server.control(unwelcome={sent[2].id: status}, together=8)
    error = run(publish(webhook(server, concurrency=8), sent))
    assert error is not None and type(error.error) is kind
    assert error.confirmed == 2 and error.stored == {3, 4, 5, 6, 7}
    assert set(ids(server)) == {one.id for one in sent if one is not sent[2]}


@pytest.mark.parametrize("without", ["confirm", "order"])
def test_what_a_protection_prevents(server: WebhookServer, without: str) -> None:
    """Without the one a refused event is lost; without the other those of one key are under way at once."""
    transport = webhook(server, concurrency=8)
    transport.without = frozenset({without})
    server.control(**{"always": {"status": 503}} if without == "confirm" else {"together": 8})
    assert run(publish(transport, events(8))) is None
    assert len(ids(server)) == (0 if without == "confirm" else 8)


# The example of a configuration.

EXAMPLE = Path(__file__).resolve().parents[2] / "config" / "webhook.yaml"


def test_the_example_is_valid_and_can_be_set_from_outside() -> None:
    assert load(EXAMPLE, {}).transports[0].name == "webhook"
    options = load(EXAMPLE, {"WEBHOOK_URL": "https://hook.example.org/"}).transports[0]
    assert isinstance(options, WebhookOptions) and options.encrypted


def test_the_example_with_everything_switched_on_is_valid() -> None:
    text = re.sub(r"(?m)^    #( *[a-z_]+:)", r"    \1", EXAMPLE.read_text("utf-8"))
    for other in ("user", "password_file", "mode"):  # one way to log in; no signatures in binary mode
        text = re.sub(rf"(?m)^    {other}:.*\n", "", text)
    options = parse(text, str(EXAMPLE), {"WEBHOOK_URL": "https://hook.example.org/"}).transports[0]
    assert isinstance(options, WebhookOptions)
    assert options.concurrency == 8 and options.tls.ca_file == Path("/etc/orthanc/webhook-ca.pem")
    assert options.proxy and options.signing_secret_file and options.token_file
