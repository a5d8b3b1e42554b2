"""The configuration as files: loading, secrets in files, and the files that come with the package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from orthanc_events_bridge.bridge.config import ConfigError, load, parse, template
from orthanc_events_bridge.errors import TransportConfigurationError
from orthanc_events_bridge.transports.nats_options import NatsOptions

ROOT = Path(__file__).resolve().parents[2]
SMALLEST = """\
source: urn:uuid:6f1c1d0e-6f0b-4d0c-9a39-0d3a3d8f3b6e
transports:
  - type: nats
    servers: ["nats://127.0.0.1:4222"]
"""


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    assert caught.value.__cause__ is None
    (problem,) = caught.value.problems
    assert problem.right
    return str(caught.value).removeprefix(str(path))


def nats(folder: Path, lines: str) -> NatsOptions:
    path = folder / "orthanc-events.yaml"
    path.write_text(SMALLEST + "".join(f"    {line}\n" for line in lines.splitlines()), "utf-8")
    options = load(path, {}).transports[0]
    assert isinstance(options, NatsOptions)
    return options


class TestLoading:
    def test_a_file(self, tmp_path: Path) -> None:
        assert nats(tmp_path, "").name == "nats"

    def test_a_byte_order_mark_and_windows_line_ends(self, tmp_path: Path) -> None:
        path = tmp_path / "x.yaml"
        path.write_bytes(b"\xef\xbb\xbf" + SMALLEST.replace("\n", "\r\n").encode() + b"site: n\r\n")
        assert load(path, {}).site == "n"

    def test_missing(self, tmp_path: Path) -> None:
        message = refusal(tmp_path / "x.yaml")
        assert message.startswith(": there is no such file; ")
        assert "orthanc-events init" in message

    def test_a_folder(self, tmp_path: Path) -> None:
        assert refusal(tmp_path).startswith(": this is a folder; ")

    def test_unreadable(self, tmp_path: Path) -> None:
        path = tmp_path / "loop.yaml"
        path.symlink_to(path)  # root may read everything, so that permissions prove nothing
        assert refusal(path).startswith(": the file can't be read: ")

    def test_empty(self, tmp_path: Path) -> None:
        path = tmp_path / "x.yaml"
        path.touch()
        assert refusal(path).startswith(":1: the file is empty; ")

    def test_not_utf8(self, tmp_path: Path) -> None:
        path = tmp_path / "x.yaml"
        path.write_bytes(SMALLEST.encode() + "site: münchen\n".encode("latin-1"))
        assert refusal(path).startswith(":5: the file is not UTF-8 text here; ")

    def test_the_environment_of_the_process(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TEST_SITE", "north")
        path = tmp_path / "x.yaml"
        path.write_text(SMALLEST + "site: ${TEST_SITE}\n", "utf-8")
        assert load(path).site == "north"


class TestSecretsInFiles:
    @pytest.mark.parametrize(
        ("content", "secret"),
        [
            (b"hunter2", "hunter2"),
            (b"hunter2\n", "hunter2"),
            (b"hunter2\r\n", "hunter2"),
            (b" a b \n\n", " a b \n"),
            ("grüß\n".encode(), "grüß"),
        ],
    )
    def test_read(self, tmp_path: Path, content: bytes, secret: str) -> None:
        options = nats(tmp_path, "user: a\npassword_file: p")
        (tmp_path / "p").write_bytes(content)
        assert options.secret("password") == secret

    def test_read_again_after_it_was_replaced(self, tmp_path: Path) -> None:
        options = nats(tmp_path, "token_file: t")
        (tmp_path / "t").write_text("old\n")
        assert options.secret("token") == "old"
        (tmp_path / "t").write_text("new\n")
        assert options.secret("token") == "new"

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (None, "can't be read: No such file"),
            (b"", "is empty"),
            (b"\n", "is empty"),
            (b"hunter\xff", "is not UTF-8"),
        ],
    )
    def test_what_is_wrong_is_one_clear_error(self, tmp_path: Path, content: bytes | None, words: str) -> None:
        options = nats(tmp_path, "user: a\npassword_file: p")
        if content is not None:
            (tmp_path / "p").write_bytes(content)
        with pytest.raises(TransportConfigurationError) as caught:
            options.secret("password")
        assert words in caught.value.message
        assert f"password_file {tmp_path / 'p'}" in caught.value.message
        assert caught.value.remedy
        assert "hunter" not in str(caught.value)


def json_schema() -> Any:
    return json.loads((ROOT / "orthanc_events_bridge/bridge/orthanc-events.schema.json").read_text("utf-8"))


class TestShippedFiles:
    def test_the_template_is_valid_with_a_source_of_its_own(self) -> None:
        first, second = template(), template()
        assert first != second
        assert parse(first, "x.yaml", {}).source.startswith("urn:uuid:")

    def test_the_template_with_everything_switched_on_is_valid(self) -> None:
        # "# " begins a sentence; "#" and "#  " switch an option off.
        text = re.sub(r"(?m)^( *)#(  )?(?=[ ]*[a-z_]+:)(?! [^ ])", r"\1\2", template())
        for one in ("user", "password_file", "token_file", "nkey_seed_file"):  # only one way to log in
            text = text.replace(f"    {one}:", f"    #{one}:")
        settings = parse(text, "x.yaml", {})
        assert settings.outbox.max_bytes == 10 * 2**30
        options = settings.transports[0]
        assert isinstance(options, NatsOptions)
        assert options.tls.ca_file == Path("/etc/orthanc/nats-ca.pem")

    def test_the_example_is_valid_and_can_be_set_from_outside(self) -> None:
        path = ROOT / "config" / "orthanc-events.yaml"
        assert load(path, {}).site == "main"
        options = load(path, {"ORTHANC_EVENTS_SITE": "north", "NATS_URL": "nats://nats:4222"}).transports[0]
        assert isinstance(options, NatsOptions)
        assert options.servers == ("nats://nats:4222",)

    def test_the_documents_are_up_to_date(self) -> None:
        command = [sys.executable, str(ROOT / "tools" / "generate_docs.py"), "--check"]
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr

    def test_the_examples_in_the_documents_are_valid(self) -> None:
        text = (ROOT / "docs" / "configuration.md").read_text("utf-8")
        examples = [part.partition("```")[0] for part in text.split("```yaml\n")[1:]]
        examples = [example for example in examples if "transports:" in example]
        assert len(examples) >= 3
        for example in examples:
            parse(example if "source:" in example else f"source: urn:a:b\n{example}", "docs.yaml", {})

    def test_the_json_schema_takes_what_is_valid(self) -> None:
        schema = json_schema()
        jsonschema_rs.meta.validate(schema)
        for text in (
            SMALLEST,
            template(),
            (ROOT / "config" / "orthanc-events.yaml").read_text("utf-8"),
            SMALLEST + "    batch: ${N}\n    limits: {max_age: 0, replicas: 3}\noutbox: {keep: 7d, max_bytes: 1GiB}\n",
        ):
            jsonschema_rs.validate(schema, yaml.safe_load(text))

    @pytest.mark.parametrize(
        "line", ["sorce: x", "outbox: {on_full: paus}", "outbox: {keep: soon}", "log_level: 5", "data: []"]
    )
    def test_the_json_schema_refuses_what_is_not(self, line: str) -> None:
        with pytest.raises(jsonschema_rs.ValidationError):
            jsonschema_rs.validate(json_schema(), yaml.safe_load(f"{SMALLEST}{line}\n"))
