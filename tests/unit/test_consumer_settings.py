"""A consumer's configuration: what comes before what, and what is said of mistakes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from orthanc_events_bridge.consumers import RetryPolicy
from orthanc_events_bridge.consumers.configuration import CommandLine, configure, configure_as
from orthanc_events_bridge.consumers.stores import StoreError, make
from orthanc_events_bridge.consumers.stores.sql import SqlStore
from orthanc_events_bridge.loading import ConfigError
from orthanc_events_bridge.orthanc_api import OrthancOptions
from orthanc_events_bridge.transports.nats_options import NatsOptions
from orthanc_events_bridge.workflows.router_settings import RouterSettings

ROOT = Path(__file__).resolve().parents[2]
NOTHING = CommandLine()


def written(folder: Path, text: str) -> Path:
    path = folder / "consumer.yaml"
    path.write_text(text, "utf-8")
    return path


def servers(found: Any) -> tuple[str, ...]:
    assert isinstance(found.settings.broker, NatsOptions)
    return found.settings.broker.servers


def test_the_command_line_the_environment_the_file_and_the_code(tmp_path: Path) -> None:
    path = written(tmp_path, "broker: nats://file:4222\nconcurrency: 4\n")
    code = {"name": "one", "broker": "nats://code:4222", "concurrency": 2, "drain": 3.0}
    assert servers(configure(code, None, {}, NOTHING)) == ("nats://code:4222",)
    found = configure(code, path, {}, NOTHING)
    assert servers(found) == ("nats://file:4222",)
    assert (found.settings.name, found.settings.concurrency, found.settings.drain) == ("one", 4, 3.0)
    environment = {"ORTHANC_EVENTS_CONSUMER": str(path), "ORTHANC_EVENTS_BROKER": "nats://environment:4222"}
    assert servers(configure(code, "no such file", environment, NOTHING)) == ("nats://environment:4222",)
    line = CommandLine(None, {"broker": "nats://line:4222"})
    assert servers(configure(code, None, environment, line)) == ("nats://line:4222",)


def test_the_policy_is_put_together(tmp_path: Path) -> None:
    path = written(tmp_path, "retry: {initial: 5s}\n")
    code = {"name": "one", "retry": RetryPolicy(max_attempts=3)}
    policy = configure(code, path, {}, NOTHING).settings.policy()
    assert (policy.max_attempts, policy.initial, policy.maximum) == (3, 5.0, 900.0)
    assert configure({"name": "one", "ordered": True}, None, {}, NOTHING).settings.policy().maximum == 300
    assert configure({"name": "one"}, None, {}, NOTHING).settings.policy() == RetryPolicy()
    unlimited = RetryPolicy(max_attempts=None, max_age=None)
    assert configure({"name": "one", "retry": unlimited}, None, {}, NOTHING).settings.policy() == unlimited


def test_an_orthanc_is_put_together_and_a_login_is_not(tmp_path: Path) -> None:
    path = written(tmp_path, "orthanc: {user: file, password_file: p, timeout: 5s}\n")
    code = {"name": "one", "orthanc": OrthancOptions("http://code:8042", token="secret")}
    found = configure(code, path, {}, NOTHING).orthanc
    assert found == OrthancOptions("http://code:8042", "file", password_file=tmp_path / "p", timeout=5)
    found = configure(code, path, {"ORTHANC_EVENTS_ORTHANC_TOKEN": "t"}, NOTHING).orthanc
    assert found == OrthancOptions("http://code:8042", token="t", timeout=5)
    assert configure({"name": "one"}, None, {}, NOTHING).orthanc is None
    assert configure({"name": "one", "orthanc": "http://h:1"}, None, {}, NOTHING).orthanc == OrthancOptions(
        "http://h:1"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("concurency: 4", ":1: concurency: there is no such option; did you mean concurrency?"),
        ("a: 1\nstart: old", ":2: start: 'old' is none of the choices"),
        ("broker: http://h", ":1: broker: is no URL of a broker"),
        ("broker:\n  type: nats\n  servres: []", ":3: broker.servres: there is no such option; did you mean servers?"),
        ("ordered: true\nretry:\n  maximum: 1h", ":3: retry.maximum: in order, a retry of 1h would hold up"),
        ("retry: {initial: 5s, maximum: 1s}", "is shorter than"),
        ("concurrency: 8\nprefetch: 4", ":2: prefetch: prefetch (line 2) is less than concurrency (line 1)"),
        ("http: here", ":1: http: 'here' is no address to listen at"),
        ("orthanc: ftp://h", "is no URL of an Orthanc"),
        ("orthanc: http://u:hidden@h", "holds credentials"),
        ("drain: soon", ":1: drain: 'soon' is no duration"),
        ("store: redis://h", ":1: store: is no URL of a store"),
        ("store: [x]", ":1: store: is no store"),
        ("store: broker\nbroker: amqp://h", ":1: store: rabbitmq can't note what is done once"),
        ("store: broker", ":1: store: no broker can't note what is done once"),
        ("store: {type: kafka, servers: ['h:1']}", ":1: store: kafka can't note what is done once"),
        ("store: {type: nats, servres: []}", ":1: store.servres: there is no such option; did you mean servers?"),
        ("store: postgresql://u:hidden@h/d\nstore_file: f", ":2: store_file: store (line 1) and store_file (line 2)"),
        ("store: nats://u:hidden@h", ":1: store.servers[0]: "),
        ("- 1", "options are expected, and a list was found"),
    ],
)
def test_each_mistake_has_its_line_and_its_remedy(tmp_path: Path, text: str, words: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        configure({"name": "one"}, path, {}, NOTHING)
    assert words in str(caught.value)
    assert all(problem.right and problem.file == str(path) for problem in caught.value.problems)
    assert "hidden" not in str(caught.value)


def test_all_mistakes_are_said_with_the_place_that_they_are_in(tmp_path: Path) -> None:
    path = written(tmp_path, "start: old\n")
    line = CommandLine(path, {"http": "x"})
    with pytest.raises(ConfigError) as caught:
        configure({"name": "one", "drain": -1.0}, None, {"ORTHANC_EVENTS_BROKER": "http://secret"}, line)
    found = {(problem.file, problem.line, problem.option) for problem in caught.value.problems}
    assert found == {
        (str(path), 1, "start"),
        ("the consumer one", None, "drain"),
        ("ORTHANC_EVENTS_BROKER", None, "broker"),
        ("--http", None, "http"),
    }
    assert "secret" not in str(caught.value)


def database(found: Any) -> str:
    store = found.settings.chosen_store()
    assert isinstance(store, SecretStr)
    return store.get_secret_value()


def test_a_store_is_said_in_one_place(tmp_path: Path) -> None:
    path = written(tmp_path, "store: postgresql://file/d\n")
    code = {"name": "one", "broker": "kafka://h", "store_file": "code"}
    assert database(configure(code, path, {}, NOTHING)) == "postgresql://file/d"
    assert configure(code, None, {}, NOTHING).settings.chosen_store() == Path("code")
    assert configure({"name": "one", "broker": "kafka://h"}, None, {}, NOTHING).settings.chosen_store() is None
    outside = {"ORTHANC_EVENTS_STORE": "sqlite:////environment"}
    assert database(configure(code, path, outside, NOTHING)) == "sqlite:////environment"
    outside = {"ORTHANC_EVENTS_STORE_FILE": "environment"}
    found = configure(code, path, outside, NOTHING).settings
    assert found.chosen_store() == Path.cwd() / "environment" and found.store is None
    path = written(tmp_path, "store_file: beside\n")
    assert configure(code, path, {}, NOTHING).settings.chosen_store() == tmp_path / "beside"
    with pytest.raises(ConfigError, match=r"ORTHANC_EVENTS_STORE_FILE: store_file: store and store_file give"):
        configure(code, path, outside | {"ORTHANC_EVENTS_STORE": "sqlite:////x"}, NOTHING)


def test_a_store_is_the_broker_where_that_is_nats() -> None:
    for store in (None, "broker"):
        found = configure({"name": "one", "broker": "nats://h", "store": store}, None, {}, NOTHING).settings
        assert found.chosen_store() is found.broker is not None
    found = configure({"name": "one", "broker": "kafka://h", "store": "tls://a,b:2"}, None, {}, NOTHING).settings
    nats = found.chosen_store()
    assert isinstance(nats, NatsOptions) and nats.servers == ("tls://a", "tls://b:2")


def test_a_stores_password_is_shown_nowhere(tmp_path: Path) -> None:
    path = written(tmp_path, "broker: kafka://h\nstore: '${STORE}'\n")
    found = configure({"name": "one"}, path, {"STORE": "postgresql://u:hidden@h/d"}, NOTHING)
    assert database(found) == "postgresql://u:hidden@h/d"
    assert "hidden" not in f"{found!r}{found.settings.model_dump()}{found.settings.model_dump_json()}"


def test_what_a_store_is_made_of(tmp_path: Path) -> None:
    file = tmp_path / "url"
    with pytest.raises(StoreError, match=r"store_file .*/url can't be read: No such file"):
        make(file)
    file.write_text("postgres:hidden@h", "utf-8")
    with pytest.raises(StoreError, match="holds no URL of a database") as caught:
        make(file)
    assert "hidden" not in str(caught.value)
    file.write_text(f"sqlite:///{tmp_path}/once.db\n", "utf-8")
    for store in (file, SecretStr(f"sqlite:///{tmp_path}/once.db")):
        made = make(store)
        assert isinstance(made, SqlStore)
        asyncio.run(made.open())
        assert (tmp_path / "once.db").stat().st_mode & 0o777 == 0o600
        asyncio.run(made.close())


def test_a_router_has_the_same_option(tmp_path: Path) -> None:
    rest = "rules: [{name: all, to: [out]}]\ndestinations: {out: {peer: out}}\n"
    for text in ("broker: nats://h\n", "broker: kafka://h\nstore: sqlite:////f\n", "broker: amqp://h\nstore_file: f\n"):
        found = configure_as(RouterSettings, {}, written(tmp_path, text + rest), {}, NOTHING).settings
        assert found.chosen_store() is not None
    with pytest.raises(ConfigError, match=r"store: where to note what has been sent is not said, and kafka can't"):
        configure_as(RouterSettings, {}, written(tmp_path, "broker: kafka://h\n" + rest), {}, NOTHING)


def test_the_example_is_valid() -> None:
    found = configure({}, ROOT / "config" / "consumer.yaml", {"CONSUMER_NAME": "north"}, NOTHING)
    assert found.settings.name == "north" and servers(found) == ("nats://127.0.0.1:4222",)
    assert found.settings.policy() == RetryPolicy()
    assert found.orthanc == OrthancOptions("http://127.0.0.1:8042")


def test_the_example_fits_the_schema_for_editors() -> None:
    import json

    import jsonschema_rs
    import yaml

    schema = json.loads((ROOT / "orthanc_events_bridge/consumers/orthanc-consumer.schema.json").read_text("utf-8"))
    jsonschema_rs.meta.validate(schema)
    jsonschema_rs.validate(schema, yaml.safe_load((ROOT / "config" / "consumer.yaml").read_text("utf-8")))
    jsonschema_rs.validate(schema, {"broker": {"type": "nats", "servers": ["nats://h"]}, "orthanc": "http://h"})
    for wrong in ({"broker": {"type": "nats", "x": 1}}, {"concurrency": "many"}, {"nmae": "x"}):
        with pytest.raises(jsonschema_rs.ValidationError):
            jsonschema_rs.validate(schema, wrong)
