"""The configuration: what is valid; and for what isn't, one message per mistake, with line and remedy."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from pydantic import BaseModel, SecretStr, ValidationError

from orthanc_events_bridge import transports
from orthanc_events_bridge.bridge.config import ConfigError, Problem, find_config, parse
from orthanc_events_bridge.bridge.settings import Settings
from orthanc_events_bridge.errors import BridgeError, TransportConfigurationError
from orthanc_events_bridge.events.catalog import TYPES
from orthanc_events_bridge.mistakes import options_class
from orthanc_events_bridge.transports.kafka_options import KafkaOptions
from orthanc_events_bridge.transports.nats_options import NatsOptions
from orthanc_events_bridge.transports.options import MemoryOptions, TransportOptions
from orthanc_events_bridge.transports.rabbitmq_options import RabbitOptions
from orthanc_events_bridge.values import Duration, EventFilter, Size, format_duration, format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

FILE = "conf/orthanc-events.yaml"

#: Exactly what the README calls the smallest valid configuration: four lines.
SMALLEST = """\
source: urn:uuid:6f1c1d0e-6f0b-4d0c-9a39-0d3a3d8f3b6e
transports:
  - type: nats
    servers: ["nats://127.0.0.1:4222"]
"""


def settings(text: str, **environment: str) -> Settings:
    return parse(text, FILE, environment)


def nats(text: str = "", **environment: str) -> NatsOptions:
    """The options of a NATS transport with these lines added to the smallest file."""
    options = settings(SMALLEST + indented(text), **environment).transports[0]
    assert isinstance(options, NatsOptions)
    return options


def indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


def problems(text: str, **environment: str) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        parse(text, FILE, environment)
    # Nothing that a traceback would print may hold what the libraries say, or values.
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    for problem in caught.value.problems:
        assert problem.file == FILE
        assert problem.wrong
        assert problem.right
        assert not re.search(
            r"(?i)input should|pydantic|value error|unable to parse|extra_forbidden|<unicode", str(problem)
        )
        assert "{" not in problem.wrong.replace("${", "")
    return caught.value.problems


def problem(text: str, **environment: str) -> Problem:
    found = problems(text, **environment)
    assert len(found) == 1, "\n".join(map(str, found))
    return found[0]


class TestSmallest:
    def test_is_valid_and_complete(self) -> None:
        found = settings(SMALLEST)
        assert found.source == "urn:uuid:6f1c1d0e-6f0b-4d0c-9a39-0d3a3d8f3b6e"
        assert found.site == "main"
        assert found.drain_timeout == 4
        (transport,) = found.transports
        assert isinstance(transport, NatsOptions)
        assert transport.name == "nats"
        assert transport.servers == ("nats://127.0.0.1:4222",)
        assert transport.stream == "ORTHANC_EVENTS"
        assert transport.subject_prefix == "orthanc.events"
        assert (transport.inbox_stream, transport.inbox_prefix) == ("ORTHANC_EVENTS_INBOX", "orthanc.inbox")
        assert transport.declare
        assert transport.limits.max_age == 30 * 86400
        assert transport.limits.max_bytes == 10 * 2**30
        assert transport.limits.duplicate_window == 600
        assert not transport.tls_required

    def test_what_shapes_events(self) -> None:
        text = "data:\n  tags: [StudyDescription, Modality, Modality]\n  metadata: [RemoteAET]\n"
        shape = settings(SMALLEST + text).shape()
        assert shape == {
            "source": "urn:uuid:6f1c1d0e-6f0b-4d0c-9a39-0d3a3d8f3b6e",
            "site": "main",
            "type_prefix": "io.orthanc-events",
            "schema_base": "urn:orthanc-events:schema:",
            "tags": ["Modality", "StudyDescription"],
            "metadata": ["RemoteAET"],
        }
        assert json.loads(json.dumps(shape)) == shape

    def test_what_capture_needs(self) -> None:
        document = settings(SMALLEST).capture_document()
        rest = {"max_bytes": None, "on_full": "pause", "keep": 604800, "transports": ["nats"]}
        assert document == {"start": "now", "infer_instances": False, "log": True, "grace": 10, **rest}
        text = (
            "capture: {start: log, infer_instances: true, log: false, grace: 1m}\n"
            "outbox: {max_bytes: 1.5GiB, on_full: detach, keep: 12h}\n"
        )
        document = settings(SMALLEST + text).capture_document()
        rest = {"max_bytes": 3 * 2**29, "on_full": "detach", "keep": 43200, "transports": ["nats"]}
        assert document == {"start": "log", "infer_instances": True, "log": False, "grace": 60, **rest}
        assert json.loads(json.dumps(document)) == document

    def test_settings_are_frozen(self) -> None:
        with pytest.raises(ValidationError):
            settings(SMALLEST).site = "other"  # type: ignore[misc]

    def test_several_transports(self) -> None:
        found = settings(
            SMALLEST
            + '  - {type: nats, name: research, servers: ["tls://a.example:4223", "tls://b.example"]}\n'
            + "  - type: memory\n"
        )
        assert [transport.name for transport in found.transports] == ["nats", "research", "memory"]
        assert isinstance(found.transports[2], MemoryOptions)

    def test_a_url_in_place_of_a_transport(self) -> None:
        found = settings(f"{SMALLEST}  - amqp://a:5672,b\n  - ${{KAFKA}}\n", KAFKA="kafka://c:9092").transports
        assert [transport.type for transport in found] == ["nats", "rabbitmq", "kafka"]
        assert isinstance(found[1], RabbitOptions)
        assert found[1].servers == ("amqp://a:5672", "amqp://b")
        assert isinstance(found[2], KafkaOptions)
        assert found[2].servers == ("c:9092",)

    def test_two_of_a_kind_need_names_as_urls_too(self) -> None:
        found = problem(f"{SMALLEST}  - nats://other:4222\n")
        assert (found.line, found.option) == (5, "transports[1]")
        assert "(line 3)" in found.wrong

    def test_an_anchor_can_be_merged(self) -> None:
        found = settings(
            "source: urn:a:b\ntransports:\n"
            "  - &nats {type: nats, servers: [nats://a.example], batch: 7}\n"
            "  - {<<: *nats, name: other, batch: 8}\n"
        )
        assert [(t.name, t.batch) for t in found.transports if isinstance(t, NatsOptions)] == [
            ("nats", 7),
            ("other", 8),
        ]

    def test_an_option_with_nothing_behind_it_is_left_out(self) -> None:
        text = SMALLEST + indented("limits:\nuser:\nname:") + "events:\ndata:\n  tags:\nsite:\n"
        assert settings(text) == settings(SMALLEST)


class TestWholeFile:
    @pytest.mark.parametrize(
        ("text", "line", "words"),
        [
            ("", 1, "empty"),
            ("# only a comment\n", 1, "empty"),
            ("- a\n- b\n", 1, "a list was found"),
            ("just text\n", 1, "text was found"),
            ("5\n", 1, "a number was found"),
            (SMALLEST + "\tsite: x\n", 5, "tab"),
            (SMALLEST + "site: a: b\n", 5, "colon is not expected"),
            (SMALLEST + "site\nsource: x\n", 5, "colon behind"),
            (SMALLEST + "site: 'x\n\n\n", 5, "quote is opened and never closed"),
            (SMALLEST + 'site: "x\n', 5, "quote is opened and never closed"),
            (SMALLEST + 'site: "a\\qb"\n', 5, "backslash"),
            (SMALLEST + "---\nsite: x\n", 5, "second document"),
            (SMALLEST + "site: @x\n", 5, "can't begin with this character"),
            (SMALLEST + "site: `x`\n", 5, "can't begin with this character"),
            (SMALLEST + "data:\n  tags: []\n metadata: []\n", 7, "indentation"),
            (SMALLEST + "data: {tags: [a}\n", 5, "not closed"),
            (SMALLEST + "site: a\x01b\n", 5, "control character"),
            (SMALLEST + "data: &x {}\nevents: &x {}\n", 6, "defined twice"),
            (SMALLEST + "<<: 5\n", 5, "not valid YAML"),
            ("a: " + "[" * 5000, 1, "too deeply"),
        ],
    )
    def test_syntax(self, text: str, line: int, words: str) -> None:
        found = problem(text)
        assert (found.line, found.option) == (line, "")
        assert words in found.wrong

    def test_a_variable_in_a_list_in_brackets_wants_quotes(self) -> None:
        found = problem("source: urn:a:b\ntransports:\n  - type: nats\n    servers: [${NATS}]\n")
        assert found.line == 4
        assert "quotes" in found.right

    def test_keys_given_twice(self) -> None:
        found = problem(SMALLEST + "site: a\nsource: urn:a:b\n")
        assert (found.line, found.option) == (6, "source")
        assert "after line 1" in found.wrong
        found = problem(SMALLEST + indented("batch: 5\nbatch: 6"))
        assert (found.line, found.option) == (6, "transports[0].batch")

    def test_a_block_as_a_name(self) -> None:
        found = problem(SMALLEST + "site: {{ site }}\n")
        assert (found.line, found.option) == (5, "site")
        assert "quotes" in found.right

    def test_an_alias_to_itself(self) -> None:
        found = problem(SMALLEST + indented("events: &a\n  include: [x]\n  exclude: *a").replace("[x]", "['*']"))
        assert found.line == 5  # the node that the alias stands for
        assert "refers to the block that it is in" in found.wrong

    @pytest.mark.parametrize("tag", ["!secret x", "!!python/object:os.system x", "!!set {a}", "!!binary aGk="])
    def test_tags(self, tag: str) -> None:
        assert problem(SMALLEST + f"site: {tag}\n").line == 5

    def test_every_mistake_at_once_in_the_order_of_lines(self) -> None:
        found = problems(
            "sorce: urn:a:b\n"
            "site: a.b\n"
            "outbox:\n"
            "  keep: 7 dayz\n"
            "  on_full: paus\n"
            "transports:\n"
            "  - type: nats\n"
            "    servers: [nats://a.example, x]\n"
            "    batch: 0\n"
            "    token: a\n"
            "    user: b\n"
            "  - type: natss\n"
        )
        assert [(p.line, p.option) for p in found] == [
            (1, "sorce"),
            (2, "site"),
            (4, "outbox.keep"),
            (5, "outbox.on_full"),
            (8, "transports[0].servers[1]"),
            (9, "transports[0].batch"),
            (11, "transports[0].user"),
            (11, "transports[0].user"),
            (12, "transports[1].type"),
        ]
        assert "two ways to log in" in found[6].wrong
        assert "needs a password" in found[7].wrong

    def test_how_a_message_reads(self) -> None:
        with pytest.raises(BridgeError) as caught:
            settings(SMALLEST + "outbox:\n  max-bytes: 5\n  keep: soon\n")
        assert str(caught.value) == (
            "conf/orthanc-events.yaml:6: outbox.max-bytes: there is no such option; did you mean max_bytes?\n"
            "conf/orthanc-events.yaml:7: outbox.keep: 'soon' is no duration; write seconds as a number, or "
            'text with a unit (ms, s, m, h, d, w) such as "90s", "12h" or "7d"'
        )


class TestOptions:
    @pytest.mark.parametrize(
        ("line", "right"),
        [
            ("sites: x", "did you mean site?"),
            ("Site: x", "did you mean site?"),
            ("log-level: info", "did you mean log_level?"),
            ("tags: [Modality]", "it belongs into the block data"),
            ("max_bytes: 5", "it belongs into the block outbox"),
            ("qwertz: x", "the options here are: source, site, "),
            ("qwertz:", "the options here are: source, site, "),
        ],
    )
    def test_unknown_at_the_top(self, line: str, right: str) -> None:
        found = problem(f"{SMALLEST}{line}\n")
        assert (found.line, found.option) == (5, line.partition(":")[0])
        assert right in found.right

    @pytest.mark.parametrize(
        ("lines", "option", "right"),
        [
            ("server: x", "server", "did you mean servers?"),
            ("max_age: 3d", "max_age", "it belongs into the block limits"),
            ("ca_file: x", "ca_file", "it belongs into the block tls"),
            ("drain_timeout: 1s", "drain_timeout", "it belongs to the top of the file"),
            ("limits: {replica: 3}", "limits.replica", "did you mean replicas?"),
        ],
    )
    def test_unknown_in_a_transport(self, lines: str, option: str, right: str) -> None:
        found = problem(SMALLEST + indented(lines))
        assert (found.line, found.option) == (5, f"transports[0].{option}")
        assert right in found.right

    def test_required(self) -> None:
        found = problems("site: x\n")
        assert [(p.line, p.option, p.wrong) for p in found] == [
            (1, "source", "is required"),
            (1, "transports", "is required"),
        ]
        assert "https://pacs.example.org/orthanc/main" in found[0].right
        assert "- type: nats" in found[1].right
        found = problems("source:\ntransports:\n")
        assert [(p.line, p.option) for p in found] == [(1, "source"), (2, "transports")]

    @pytest.mark.parametrize(
        ("line", "option", "wrong", "right"),
        [
            ("data: [a]", "data", "a block of options is expected, and a list was found", "indented"),
            ("data: x", "data", "a block of options is expected, and text was found", "indented"),
            (
                "data: {tags: Modality}",
                "data.tags",
                "a list is expected, and text was found",
                'tags: ["Modality"',
            ),
            (
                "data: {tags: {a: b}}",
                "data.tags",
                "a list is expected, and a block of options was found",
                "[",
            ),
            ("data: {tags: [[a]]}", "data.tags[0]", "text is expected, and a list was found", "write text"),
            ("data: {tags: [null]}", "data.tags[0]", "text is expected, and nothing was found", "write text"),
            ("site: [a]", "site", "text is expected, and a list was found", "site: north"),
            ("site: {a: b}", "site", "text is expected, and a block of options was found", "site: north"),
            ("outbox: {keep: [7d]}", "outbox.keep", "is no duration", "7d"),
            ("outbox: {keep: true}", "outbox.keep", "is no duration", "7d"),
            (
                "outbox: {on_full: [pause]}",
                "outbox.on_full",
                "one of several words is expected",
                "pause, detach",
            ),
            ("outbox: {on_full: no}", "outbox.on_full", "is none of the choices", "pause, detach"),
            (
                "outbox: {on_full: Pause}",
                "outbox.on_full",
                "'Pause' is none of the choices",
                "did you mean pause?",
            ),
            (
                "log_level: verbose",
                "log_level",
                "'verbose' is none of the choices",
                "debug, info, warning, error",
            ),
        ],
    )
    def test_wrong_types(self, line: str, option: str, wrong: str, right: str) -> None:
        found = problem(f"{SMALLEST}{line}\n")
        assert (found.line, found.option) == (5, option)
        assert wrong in found.wrong
        assert right in found.right

    @pytest.mark.parametrize(
        ("line", "option", "wrong"),
        [
            ("declare: maybe", "declare", "true or false is expected, and text was found"),
            ("declare: 5", "declare", "true or false is expected, and a number was found"),
            ("declare: [yes]", "declare", "true or false is expected, and a list was found"),
            ("batch: many", "batch", "a whole number is expected, and text was found"),
            ("batch: 1.5", "batch", "a whole number is expected, and a number with a fraction was found"),
            ("batch: [1]", "batch", "a whole number is expected, and a list was found"),
            ("batch: 2024-01-01", "batch", "a whole number is expected, and a date was found"),
            ("batch: 0", "batch", "'0' is out of range"),
            ("batch: 10001", "batch", "'10001' is out of range"),
            ("limits: {replicas: 6}", "limits.replicas", "'6' is out of range"),
            ("tls: yes", "tls", "a block of options is expected, and true or false was found"),
            ("credentials_file: [a]", "credentials_file", "a file's name is expected, and a list was found"),
            ("servers: nats://x", "servers", "is given a second time, after line 4"),
        ],
    )
    def test_wrong_types_in_a_transport(self, line: str, option: str, wrong: str) -> None:
        found = problems(SMALLEST + indented(line))
        assert (found[0].line, found[0].option) == (5, f"transports[0].{option}")
        assert wrong in found[0].wrong

    @pytest.mark.parametrize("value", ["true", "yes", '"true"', "on"])
    def test_truth(self, value: str) -> None:
        assert nats(f"declare: {value}").declare

    @pytest.mark.parametrize(
        ("text", "wrong"),
        [
            ("transports: []", "is an empty list"),
            ("transports: nats", "a list is expected, and text was found"),
            ("transports: {type: nats}", "a list is expected, and a block of options was found"),
        ],
    )
    def test_transports(self, text: str, wrong: str) -> None:
        found = problem(f"source: urn:a:b\n{text}\n")
        assert (found.line, found.option) == (2, "transports")
        assert wrong in found.wrong
        assert "- type: nats" in found.right

    @pytest.mark.parametrize(
        ("item", "option", "wrong", "right"),
        [
            ("type: natts", ".type", "'natts' is no type of transport", "did you mean nats?"),
            ("type: NATS", ".type", "'NATS' is no type of transport", "did you mean nats?"),
            (
                "type: zmq",
                ".type",
                "'zmq' is no type of transport",
                "the types are: nats, rabbitmq, kafka, webhook, memory",
            ),
            ("type: [nats]", ".type", "has to be text", "nats, rabbitmq, kafka, webhook, memory"),
            ("name: x", ".type", "is required", "nats, rabbitmq, kafka, webhook, memory"),
            ("type:", ".type", "is required", "nats, rabbitmq, kafka, webhook, memory"),
            ("nats", "", "is no URL of a broker", "nats://HOST:4222"),
            ("http://nats:4222", "", "is no URL of a broker", "webhook"),
            ("amqp://u:p@rabbit", ".servers[0]", "holds credentials", "password_file"),
            ("", "", "a block of options is expected, and nothing was found", "indented"),
            ("[]", "", "a block of options is expected, and a list was found", "indented"),
        ],
    )
    def test_transport_types(self, item: str, option: str, wrong: str, right: str) -> None:
        found = problem(f"{SMALLEST}  - {item}\n")
        assert (found.line, found.option) == (5, f"transports[1]{option}")
        assert wrong in found.wrong
        assert right in found.right

    def test_names_are_unique_and_the_lines_are_named(self) -> None:
        found = problem(SMALLEST + "  - type: memory\n    name: nats\n")
        assert (found.line, found.option) == (6, "transports[1].name")
        assert "(line 3)" in found.wrong
        assert "(line 6)" in found.wrong
        assert "`name`" in found.right

    @pytest.mark.parametrize("name", ["a b", "a/b", "ä", '""'])
    def test_names_are_plain(self, name: str) -> None:
        assert "letters, digits" in problem(SMALLEST + indented(f"name: {name}")).right

    @pytest.mark.parametrize(
        "source",
        [
            "https://pacs.example.org/orthanc/main",
            "http://10.0.0.1:8042",
            "http://[::1]:8042/x",
            "urn:uuid:6F1C1D0E-6f0b-4d0c-9a39-0d3a3d8f3b6e",
            "urn:example:pacs",
            "tag:example.org,2026:pacs",
            "https://pacs.example.org/a%20b",
        ],
    )
    def test_sources(self, source: str) -> None:
        assert settings(SMALLEST.replace("urn:uuid:6f1c1d0e-6f0b-4d0c-9a39-0d3a3d8f3b6e", source)).source == source

    @pytest.mark.parametrize(
        ("source", "wrong"),
        [
            ("pacs", "is no absolute URI"),
            ("/orthanc/main", "is no absolute URI"),
            ("//pacs.example.org/x", "is no absolute URI"),
            ("localhost:8042", "a host and a port"),
            ("pacs.example.org:8042/x", "a host and a port"),
            ("https:///x", "without a host"),
            ("https:x", "without a host"),
            ("http://[::1", "is no absolute URI"),
            ('"https://pacs.example.org/a b"', "is no absolute URI"),
            ("https://pacs.example.org/%zz", "is no absolute URI"),
            ("https://klinik-münchen.example/", "is no absolute URI"),
            ("C:\\orthanc", "is no absolute URI"),
            ("urn:uuid", "is no URN"),
            ("urn:uuid:1234", "no UUID behind"),
            ("urn:uuid:00000000-0000-0000-0000-000000000000", "placeholder"),
            ("https://me:hunter2@pacs.example.org/x", "credentials"),
            ("5", "is no absolute URI"),
        ],
    )
    def test_no_sources(self, source: str, wrong: str) -> None:
        found = problem(SMALLEST.replace("urn:uuid:6f1c1d0e-6f0b-4d0c-9a39-0d3a3d8f3b6e", source))
        assert (found.line, found.option) == (1, "source")
        assert wrong in found.wrong
        assert "hunter2" not in str(found)

    @pytest.mark.parametrize(
        ("line", "wrong"),
        [
            ("site: a.b", "can't be used as a site"),
            ('site: ""', "can't be used as a site"),
            (f"site: {'x' * 101}", "can't be used as a site"),
            ("type_prefix: Org.Example", "prefix of event types"),
            ("type_prefix: org..example", "prefix of event types"),
            ("type_prefix: org.example.", "prefix of event types"),
            ("schema_base: https://schemas.example.org/x", "has to end in"),
            ("schema_base: schemas/", "is no absolute URI"),
            ("data: {tags: [patientID]}", "is no keyword"),
            ('data: {tags: ["0010,0010"]}', "is no keyword"),
            ('data: {metadata: ["a b"]}', "is no name of Orthanc metadata"),
            ("events: {include: [study.stabel]}", "matches no type of event"),
            ("events: {include: ['stuady.*']}", "matches no type of event"),
            ("events: {exclude: [io.orthanc-events.study.stable.v1]}", "whole event type"),
            ("events: {exclude: [Study.Stable]}", "is no pattern"),
            ("drain_timeout: 5s", "is out of range"),
        ],
    )
    def test_wrong_values(self, line: str, wrong: str) -> None:
        found = problem(f"{SMALLEST}{line}\n")
        assert found.line == 5
        assert wrong in found.wrong

    def test_a_misspelt_event_suggests_the_nearest(self) -> None:
        found = problem(SMALLEST + "events: {include: [study.stabel]}\n")
        assert found.right == "did you mean study.stable?"


class TestNats:
    @pytest.mark.parametrize("server", ["nats://h", "nats://h:4222/", "tls://10.0.0.1:4443", "nats://[::1]:4222"])
    def test_servers(self, server: str) -> None:
        options = settings(SMALLEST.replace("nats://127.0.0.1:4222", server)).transports[0]
        assert isinstance(options, NatsOptions)
        assert options.servers == (server,)
        assert options.tls_required == server.startswith("tls")

    @pytest.mark.parametrize(
        ("server", "wrong"),
        [
            ("h:4222", "is no URL of a NATS server"),
            ("127.0.0.1", "is no URL of a NATS server"),
            ("nats:h", "is no URL of a NATS server"),
            ("nats://h:port", "is no URL of a NATS server"),
            ("nats://h:99999", "is no URL of a NATS server"),
            ("nats://h:0", "is no URL of a NATS server"),
            ("nats://a,nats://b", "is no URL of a NATS server"),
            ("nats://[::1", "is no URL of a NATS server"),
            ("http://h", "is no URL of a NATS server"),
            ("ws://h", "WebSocket"),
            ("wss://h", "WebSocket"),
            ("nats://h/x", "more behind the port"),
            ("nats://me:hunter2@h", "credentials"),
            ("nats://hunter2@h", "credentials"),
            ("nats//me:hunter2@h", "credentials"),
        ],
    )
    def test_no_servers(self, server: str, wrong: str) -> None:
        found = problem(SMALLEST.replace("nats://127.0.0.1:4222", server))
        assert (found.line, found.option) == (4, "transports[0].servers[0]")
        assert wrong in found.wrong
        assert "hunter2" not in str(found)
        assert ("password_file" in found.right) == ("credentials" in wrong)

    def test_at_least_one_server(self) -> None:
        found = problem("source: urn:a:b\ntransports:\n  - type: nats\n    servers: []\n")
        assert (found.line, found.option) == (4, "transports[0].servers")
        assert "nats://127.0.0.1:4222" in found.right
        found = problem("source: urn:a:b\ntransports:\n  - type: nats\n")
        assert (found.line, found.option, found.wrong) == (3, "transports[0].servers", "is required")

    @pytest.mark.parametrize(
        "lines",
        [
            "user: a\npassword: b",
            "user: a\npassword_file: b",
            "token: a",
            "token_file: a",
            "nkey_seed: a",
            "nkey_seed_file: a",
            "credentials_file: a",
        ],
    )
    def test_ways_to_log_in(self, lines: str) -> None:
        nats(lines)

    @pytest.mark.parametrize(
        ("lines", "wrong"),
        [
            (
                "token: x1\nnkey_seed_file: y",
                "token (line 5) and nkey_seed_file (line 6) are two ways to log in",
            ),
            ("credentials_file: y\ntoken: x1", "credentials_file (line 5) and token (line 6) are two ways"),
            ("user: x1\npassword: x1\ntoken: x1", "user (line 5) and token (line 7) are two ways to log in"),
            ("token: x1\ntoken_file: y", "token (line 5) and token_file (line 6) give the same secret twice"),
            (
                "nkey_seed_file: y\nnkey_seed: x1",
                "nkey_seed (line 6) and nkey_seed_file (line 5) give the same",
            ),
            ("user: x1", "needs a password"),
            ("password: x1", "needs a user"),
            ("password_file: y", "needs a user"),
            ("tls: {cert_file: y}", "needs key_file beside it"),
            ("tls: {key_file: y}", "needs cert_file beside it"),
            (
                "tls: {enabled: false, ca_file: y}",
                "enabled (line 5) switches off what ca_file (line 5) asks for",
            ),
            ("limits: {max_age: 1m}", "is longer than max_age (1m)"),
        ],
    )
    def test_conflicts(self, lines: str, wrong: str) -> None:
        found = problem(SMALLEST + indented(lines))
        assert found.option.startswith("transports[0].")
        assert wrong in found.wrong
        assert "x1" not in str(found)

    def test_tls_that_is_off_and_insisted_on(self) -> None:
        text = SMALLEST.replace("nats://127", "tls://127") + indented("tls:\n  enabled: false")
        found = problem(text)
        assert found.wrong == "servers[0] (line 4) insists on TLS, and tls.enabled (line 6) forbids it"

    def test_when_tls_is_insisted_on(self) -> None:
        assert nats("tls: {enabled: true}").tls_required
        assert nats("tls: {ca_file: x}").tls_required
        assert not nats("tls: {enabled: false}").tls_required

    def test_unlimited(self) -> None:
        limits = nats("limits: {max_age: 0, max_bytes: 0, max_messages: 0}").limits
        assert (limits.max_age, limits.max_bytes, limits.max_messages) == (0, 0, 0)

    def test_file_names_are_relative_to_the_configuration(self) -> None:
        options = nats("user: a\npassword_file: secrets/p\ntls: {ca_file: /etc/ca.pem}")
        assert options.password_file == Path("conf/secrets/p")
        assert options.tls.ca_file == Path("/etc/ca.pem")


class TestSecrets:
    def test_are_read_from_the_configuration(self) -> None:
        options = nats("user: a\npassword: hunter2")
        assert options.secret("password") == "hunter2"
        assert options.secret("token") is None

    def test_are_never_shown(self) -> None:
        options = nats("user: a\npassword: hunter2")
        assert "hunter2" not in repr(options)
        assert "hunter2" not in options.model_dump_json()
        with pytest.raises(ValidationError) as caught:
            NatsOptions(servers=("x",), user="a", password=SecretStr("hunter2"), token=SecretStr("hunter2"))
        assert "hunter2" not in str(caught.value)

    @pytest.mark.parametrize(
        "lines",
        [
            "password: [hunter2]",
            "password: {hunter2: hunter2}",
            "passwort: hunter2",
            "user: a\npassword: hunter2\ntoken: hunter2",
            "user: a\npassword: *hunter2",
            "user: a\npassword: !hunter2",
            "user: a\npassword: 'hunter2",
            "user: a\npassword: {{ hunter2 }}",
            "user: a\npassword: @hunter2",
            "user: a\npassword: hunter2: x",
            "user: a\npassword: ${HUNTER:hunter2}",
            "servers: [hunter2@x]",
        ],
    )
    def test_mistakes_never_show_them(self, lines: str) -> None:
        for found in problems(SMALLEST + indented(lines)):
            assert "hunter2" not in str(found)

    def test_what_a_variable_holds_is_never_shown(self) -> None:
        text = SMALLEST.replace('"nats://127.0.0.1:4222"', '"${S}"') + (
            "site: ${S}\ntype_prefix: ${S}\nschema_base: ${S}\nlog_level: a${S}\ndrain_timeout: ${S}\n"
            "data: {tags: ['${S}'], metadata: ['${S}']}\nevents: {include: ['${S}']}\n"
            "outbox: {max_bytes: '${S}'}\n"
        )
        found = problems(text, S="hunter 2!")
        assert len(found) == 10
        for each in found:
            assert "the value with ${S} " in each.wrong
            assert "hunter" not in str(each)

    @pytest.mark.parametrize(
        "password", ["0123", "1e3", "no", "null", "2024-01-01", "2024-02-31", "0x1F", "1_000", "~"]
    )
    def test_are_taken_as_they_are_written(self, password: str) -> None:
        if password in ("null", "~"):
            assert problem(SMALLEST + indented(f"user: a\npassword: {password}")).option == "transports[0].user"
            assert nats('user: a\npassword: "${P}"', P=password).secret("password") == password
        else:
            assert nats(f"user: a\npassword: {password}").secret("password") == password
            assert nats("user: a\npassword: ${P}", P=password).secret("password") == password


class TestVariables:
    def test_replaced_and_typed_again(self) -> None:
        options = nats("batch: ${N}\ndeclare: ${D}\nlimits: {replicas: '${R}'}", N="7", D="false", R="3")
        assert (options.batch, options.declare, options.limits.replicas) == (7, False, 3)

    @pytest.mark.parametrize(
        ("value", "environment", "site"),
        [
            ("${X}", {"X": "north"}, "north"),
            ("${X:-south}", {"X": "north"}, "north"),
            ("${X:-south}", {}, "south"),
            ("'${X:-south}'", {}, "south"),
            ("a${X}-${Y}b", {"X": "1", "Y": "2"}, "a1-2b"),
            ("x${X:-}y", {}, "xy"),
            ("x${X:-d}y", {"X": ""}, "xy"),  # as in Orthanc: set but empty counts as set
            ("${1A-B}", {"1A-B": "north"}, "north"),  # as in Orthanc: any name
            ("${X}", {"X": "007"}, "007"),
            ("${X}", {"X": "no"}, "no"),
            ("$X", {"X": "north"}, None),
            ("${X:-}", {}, "main"),  # nothing: left out
        ],
    )
    def test_replaced(self, value: str, environment: dict[str, str], site: str | None) -> None:
        text = f"{SMALLEST}site: {value}\n"
        if site is None:
            assert "'$X' can't be used" in problem(text, **environment).wrong
        else:
            assert settings(text, **environment).site == site

    def test_a_literal(self) -> None:
        assert nats("user: a\npassword: a$${X}$${Y:-z}$b", X="x").secret("password") == "a${X}${Y:-z}$b"

    def test_not_replaced_twice(self) -> None:
        assert nats("user: a\npassword: ${X}", X="${Y}", Y="y").secret("password") == "${Y}"

    def test_no_yaml_is_put_in(self) -> None:
        assert nats("user: a\npassword: ${X}", X="b\ntoken: c # d").secret("password") == "b\ntoken: c # d"

    def test_comments_and_names_are_left_alone(self) -> None:
        assert settings(SMALLEST + "# site: ${NOT_SET}\nsite: x # ${NOT_SET}\n").site == "x"
        assert problem(SMALLEST + "${X}: y\n", X="site").option == "${X}"

    def test_not_set(self) -> None:
        found = problem(SMALLEST + "site: a${X}\n")
        assert (found.line, found.option) == (5, "site")
        assert found.wrong == "the environment variable X is not set"
        assert "${X:-…}" in found.right

    def test_not_set_is_reported_once(self) -> None:
        found = problems(
            "source: ${A}\n"
            "data: ${B}\n"
            "transports:\n"
            "  - type: nats\n"
            '    servers: ["${C}"]\n'
            "    user: x\n"
            "    password: ${D}${D}${E}\n"
            "  - type: ${F}\n"
            "  - ${G}\n"
        )
        assert [found.wrong.split()[3] for found in found] == list("ABCDEFG")

    @pytest.mark.parametrize("value", ["${X", "${}", "${X:y}", "${X:=y}"])
    def test_not_written_as_one(self, value: str) -> None:
        found = problem(f'{SMALLEST}site: "{value}"\n', X="x")
        assert "not written as one" in found.wrong


class TestQuantities:
    @pytest.mark.parametrize(
        ("value", "seconds"),
        [
            (90, 90),
            (0.5, 0.5),
            ("90", 90),
            ("90s", 90),
            ("500ms", 0.5),
            ("1.5 h", 5400),
            ("7d", 604800),
            ("2w", 1209600),
            ("1h30m", 5400),
            ("1h 30m 5s", 5405),
            (0, 0),
        ],
    )
    def test_durations(self, value: object, seconds: float) -> None:
        assert Duration().parse(value) == pytest.approx(seconds)

    @pytest.mark.parametrize(
        "value",
        ["", "d", "7 days", "-1", -1, "1h30", "5M", True, [], float("inf"), float("nan"), "1e400", "1:30"],
    )
    def test_no_durations(self, value: object) -> None:
        with pytest.raises(ValueError, match="is no duration"):
            Duration().parse(value)

    @pytest.mark.parametrize(
        ("value", "size"),
        [
            (65536, 65536),
            ("65536", 65536),
            ("10GiB", 10 * 2**30),
            ("10 gib", 10 * 2**30),
            ("1.5KiB", 1536),
            ("500MB", 500_000_000),
            ("1kB", 1000),
            ("1TiB", 2**40),
            ("7B", 7),
        ],
    )
    def test_sizes(self, value: object, size: int) -> None:
        assert Size().parse(value) == size

    @pytest.mark.parametrize("value", ["", "10G", "10K", "GiB", "-1", -1, True, [], float("inf"), "10 GiB free"])
    def test_no_sizes(self, value: object) -> None:
        with pytest.raises(ValueError, match="is no size"):
            Size().parse(value)

    def test_ranges_are_named_in_the_unit(self) -> None:
        found = problem(SMALLEST + "outbox: {max_bytes: 1KiB}\n")
        assert (found.wrong, found.right) == ("'1KiB' is out of range", "the least is 64KiB")
        assert problem(SMALLEST + "drain_timeout: 1m\n").right == "it can be 0s to 4.5s"
        assert problem(SMALLEST + indented("limits: {max_bytes: 5}")).right == "the least is 64KiB (or 0: unlimited)"
        assert "larger than any disk" in problem(SMALLEST + "outbox: {max_bytes: 99999999TiB}\n").wrong

    @pytest.mark.parametrize("text", ["7d", "12h", "90s", "1m", "4.5s", "500ms", "0s"])
    def test_durations_read_as_they_are_written(self, text: str) -> None:
        seconds = Duration().parse(text)
        assert seconds is not None
        assert Duration().parse(format_duration(seconds)) == seconds

    @pytest.mark.parametrize("text", ["10GiB", "64KiB", "1MiB", "1000", "0"])
    def test_sizes_read_as_they_are_written(self, text: str) -> None:
        size = Size().parse(text)
        assert size is not None
        assert format_size(size) == text


class TestEventFilter:
    @pytest.mark.parametrize(
        ("include", "exclude", "accepted"),
        [
            (None, None, {"study.stable", "job.failed", "server.started", "instance.created"}),
            (["study.*"], None, {"study.stable"}),
            (["*.stable", "job.*"], None, {"study.stable", "job.failed"}),
            (None, ["instance.*", "server.started"], {"study.stable", "job.failed"}),
            (["study.*"], ["*.stable"], set()),
            (["[js]*.[sf]*"], None, {"study.stable", "job.failed", "server.started"}),
            (["jo?.failed"], None, {"job.failed"}),
            ([], None, set()),
        ],
    )
    def test_accepts(self, include: list[str] | None, exclude: list[str] | None, accepted: set[str]) -> None:
        given = {"include": include, "exclude": exclude}
        found = EventFilter.model_validate({key: value for key, value in given.items() if value is not None})
        names = ("study.stable", "job.failed", "server.started", "instance.created")
        assert {name for name in names if found.accepts(name)} == accepted

    def test_by_default_everything_also_of_the_future(self) -> None:
        assert all(EventFilter().accepts(event_type.name) for event_type in TYPES)
        assert EventFilter().accepts("frame.polished")

    def test_a_transport_has_its_own(self) -> None:
        options = nats("events: {include: ['study.*']}")
        assert options.events.accepts("study.stable")
        assert not options.events.accepts("job.failed")


class TestFinding:
    def test_the_environment_goes_first(self) -> None:
        assert find_config(Path("shim"), {"ORTHANC_EVENTS_CONFIG": "/etc/x.yaml"}) == Path("/etc/x.yaml")

    @pytest.mark.parametrize("environment", [{}, {"ORTHANC_EVENTS_CONFIG": ""}])
    def test_else_beside_the_shim(self, environment: dict[str, str]) -> None:
        assert find_config(Path("shim"), environment) == Path("shim/orthanc-events.yaml")

    def test_else_it_says_so(self) -> None:
        with pytest.raises(ConfigError) as caught:
            find_config(None, {})
        assert str(caught.value) == "no configuration file is named; name it in ORTHANC_EVENTS_CONFIG"


class TestCreate:
    def test_a_missing_client_is_named_with_its_remedy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = "orthanc_events_bridge.transports.nats"
        for name in [name for name in sys.modules if name == "nats" or name.startswith(("nats.", module))]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "nats", None)
        with pytest.raises(TransportConfigurationError) as caught:
            transports.create(nats())
        assert caught.value.remedy == 'pip install "orthanc-events-bridge[nats]"'

    def test_an_unknown_type(self) -> None:
        with pytest.raises(TransportConfigurationError, match="nats, rabbitmq, kafka, webhook, memory"):
            transports.create(TransportOptions(type="zmq"))

    def test_each_registered_type_is_what_its_options_say(self) -> None:
        for name, registration in transports.REGISTERED.items():
            assert registration.options.model_fields["type"].default == name


def blocks(block: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield block
    for field in block.model_fields.values():
        inner = options_class(field.annotation)
        if inner is not None:
            yield from blocks(inner)


class TestDeclarations:
    @pytest.mark.parametrize("root", [Settings, *(r.options for r in transports.REGISTERED.values())])
    def test_every_option_is_documented(self, root: type[BaseModel]) -> None:
        for block in blocks(root):
            assert block.__doc__
            for name, field in block.model_fields.items():
                assert field.description, name
                assert field.description.endswith("."), name

    @pytest.mark.parametrize("root", [Settings, *(r.options for r in transports.REGISTERED.values())])
    def test_every_secret_has_a_file_form(self, root: type[BaseModel]) -> None:
        for block in blocks(root):
            for name, field in block.model_fields.items():
                if "SecretStr" in str(field.annotation):
                    assert f"{name}_file" in block.model_fields

    def test_examples_are_valid(self) -> None:
        document: dict[str, Any] = yaml.safe_load(SMALLEST)
        for name, field in Settings.model_fields.items():
            if field.examples:
                document[name] = field.examples[0]
        Settings.model_validate(document)
        for name, field in NatsOptions.model_fields.items():
            if field.examples and not name.startswith(("user", "password", "token", "nkey", "credentials")):
                document["transports"][0][name] = field.examples[0]
        Settings.model_validate(document)
