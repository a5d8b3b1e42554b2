"""The options of webhooks: what is valid, and one clear line per mistake."""

from __future__ import annotations

import pytest

from orthanc_events_bridge.transports.webhook_options import WebhookOptions
from tests.unit.option_tools import mistakes_of, options_of

URL = "url: https://hook.example.org/orthanc\n"


def options(text: str) -> WebhookOptions:
    found = options_of("webhook", text)
    assert isinstance(found, WebhookOptions)
    return found


def mistakes(text: str) -> list[str]:
    return mistakes_of("webhook", text)


def mistake(text: str) -> str:
    (found,) = mistakes(text)
    return found


def test_smallest() -> None:
    found = options(URL)
    assert (found.name, found.mode, found.concurrency, found.probe) == ("webhook", "structured", 1, True)
    assert found.encrypted and found.address == "https://hook.example.org/orthanc"


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://127.0.0.1", "http://127.0.0.1"),
        ("http://[::1]:8080/a?b=c", "http://[::1]:8080/a"),
        ("https://hook.example.org:8443/a/b?key=x@y?z", "https://hook.example.org:8443/a/b"),
        ("https://hook.example.org/gr%C3%BC%C3%9Fe", "https://hook.example.org/gr%C3%BC%C3%9Fe"),
    ],
)
def test_urls(url: str, address: str) -> None:
    found = options(f'url: "{url}"')
    assert found.url == url and found.address == address
    assert found.encrypted == url.startswith("https")
    assert url not in repr(found)


@pytest.mark.parametrize(
    ("url", "wrong"),
    [
        ("hook.example.org", "is no URL"),
        ("/orthanc", "is no URL"),
        ("ftp://hook.example.org/", "is no URL of a webhook"),
        ("HTTPS//hook.example.org/", "is no URL"),
        ("https://", "is no URL"),
        ("https:///orthanc", "is no URL"),
        ("https://hook.example.org:port/", "is no URL"),
        ("https://hook.example.org:0/", "is no URL"),
        ("https://hook.example.org:70000/", "is no URL"),
        ("https://[::1/", "is no URL"),
        ("https://hook.example.org/a b", "is no URL"),
        ("https://hook.example.org/ä", "is no URL"),
        ("https://user:canary@hook.example.org/", "holds credentials"),
        ("https://canary@hook.example.org/", "holds credentials"),
        ("https://hook.example.org/#a", "has a fragment"),
        ("ftp://hook.example.org/?token=canary", "is no URL of a webhook"),
        ("https://hook.example.org/?token=canary#a", "has a fragment"),
        ("https://hook.example.org/?token=canary ä", "is no URL"),
    ],
)
def test_urls_that_are_none(url: str, wrong: str) -> None:
    found = mistake(f'url: "{url}"')
    assert wrong in found and "x.yaml:4: transports[0].url" in found
    assert "canary" not in found


@pytest.mark.parametrize(
    ("headers", "wrong"),
    [
        ("{Authorization: x}", "not for you to set"),
        ("{content-TYPE: x}", "not for you to set"),
        ("{Host: x}", "not for you to set"),
        ("{ce-id: x}", "not for you to set"),
        ("{webhook-id: x}", "not for you to set"),
        ("{orthanc-event-id: x}", "not for you to set"),
        ("{X Y: x}", "no header can have"),
        ('{"": x}', "no header can have"),
        ('{X-Y: "a\\r\\nb"}', "no header can have"),
        ('{X-Y: " a"}', "no header can have"),
        ("{X-Y: ä}", "no header can have"),
        ("{X-Y: a, x-y: b}", "twice"),
        ("[X-Y]", "names and values are expected"),
        ("X-Y", "names and values are expected"),
    ],
)
def test_headers_that_can_not_be_sent(headers: str, wrong: str) -> None:
    assert wrong in mistake(f"{URL}headers: {headers}")


def test_headers() -> None:
    assert options(f'{URL}headers: {{X-Department: "a b", webhook-kind: ""}}').headers == {
        "X-Department": "a b",
        "webhook-kind": "",
    }


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("user: a", "user: needs a password"),
        ("password: canary", "password: needs a user"),
        ("user: a:b\npassword: canary", "can't carry"),
        ("user: a\npassword: canary\ntoken: canary", "user (line 5) and token (line 7) are two ways to log in"),
        ("token: canary\ntoken_file: t", "give the same secret twice"),
        ("signing_secret: canary\nsigning_secret_file: t", "give the same secret twice"),
        ("mode: binary\nsigning_secret: canary", "would not cover the attributes, which mode (line 5)"),
        ("signing_secret_file: x\nmode: binary", "would not cover the attributes, which mode (line 6)"),
        ("tls: {enabled: false}", "url (line 4) insists on TLS, and tls.enabled (line 5) forbids it"),
        ("proxy: http://p:1\ntls: {server_hostname: x}", "has no effect behind proxy (line 5)"),
        ("proxy: https://p:1", "is no URL of an HTTP proxy"),
        ("proxy: http://p:1/path", "is no URL of an HTTP proxy"),
        ("proxy: http://a:canary@p:1", "holds credentials"),
        ("proxy: p:1", "is no URL"),
        ("timeout: 0", "is out of range"),
        ("timeout: 10m", "is out of range"),
        ("concurrency: 0", "is out of range"),
        ("concurrency: 65", "is out of range"),
        ("batch: 0", "is out of range"),
        ("servers: [x]", "there is no such option"),
        ("timeuot: 5s", "did you mean timeout?"),
    ],
)
def test_mistakes(text: str, wrong: str) -> None:
    found = mistake(URL + text)
    assert wrong in found
    assert "canary" not in found


@pytest.mark.parametrize("tls", ["{enabled: true}", "{ca_file: x}", "{server_hostname: x}"])
def test_tls_that_the_url_does_not_ask_for(tls: str) -> None:
    assert "url (line 4) is without TLS" in mistake(f"url: http://hook.example.org/\ntls: {tls}")


def test_tls_that_agrees_with_the_url() -> None:
    assert options("url: http://hook.example.org/\ntls: {enabled: false}").tls.enabled is False
    assert options(f"{URL}tls: {{enabled: true, ca_file: x}}").tls.enabled is True
    assert not options("url: http://hook.example.org/\ntls: {}").encrypted


def test_every_mistake_at_once() -> None:
    found = mistakes('url: "https://hook.example.org/#a"\nuser: a\ntimeout: soon\nheaders: {Host: x}\nproxy: p')
    assert len(found) == 5
