"""What the documents claim is true today: links, commands, examples, log lines, status fields, tests."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import uuid
import zlib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from orthanc_events_bridge.bridge.config import parse
from orthanc_events_bridge.bridge.settings import Settings
from orthanc_events_bridge.cli import _parser
from orthanc_events_bridge.testing import dicom
from orthanc_events_bridge.testing.images import OFFICIAL
from orthanc_events_bridge.testing.line import Line
from orthanc_events_bridge.values import Options
from tests.integration.whole import started
from tools import matrix_table

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "orthanc_events_bridge"
SCHEMAS = PACKAGE / "events" / "schemas"
OPERATING = ROOT / "docs" / "operating.md"
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS])


def text_of(path: Path) -> str:
    return path.read_text("utf-8")


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks in a language, without the indentation of a list."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text_of(path), re.MULTILINE | re.DOTALL)
    return [re.sub(rf"(?m)^{indent}", "", block) for indent, block in found]


def prose(path: Path) -> str:
    """The text without fenced blocks."""
    return re.sub(r"^( *)```.*?^ *```$", "", text_of(path), flags=re.MULTILINE | re.DOTALL)


def codes(text: str) -> list[str]:
    """What stands in backquotes, also across the end of a line."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def part_of(heading: str) -> str:
    """A section of operating.md."""
    text = prose(OPERATING)
    begin = text.index(f"## {heading}\n")
    end = text.find("\n## ", begin)
    return text[begin:end]


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# -- links and names ------------------------------------------------------------------------------------------


@each_document
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), target
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), f"{target} is not there"
        assert ROOT in found.parents
        if anchor:
            assert anchor in anchors(found), f"{found.name} has no heading {anchor}"


@each_document
def test_every_test_that_is_named_is_there(path: Path) -> None:
    named = [re.fullmatch(r"(?:tests/)?(\w+/test_\w+\.py)(?:::(test_\w+))?", code) for code in codes(prose(path))]
    for match in filter(None, named):
        file, test = match.groups()
        text = text_of(ROOT / "tests" / file)
        assert test is None or f"def {test}(" in text, f"{file} has no {test}"
    if path.name == "guarantees.md":
        assert len(list(filter(None, named))) > 20
    assert prose(path).count("::test_") == sum(bool(match and match[2]) for match in named), "one is misspelt"


@each_document
def test_every_file_of_the_tree_that_is_named_is_there(path: Path) -> None:
    made_later = {"benchmarks/RESULTS.md", "tests/bare/"}
    folders = "benchmarks|config|docs|orthanc_events_bridge|scripts|tests|tools|transports|testing"
    for name in re.findall(rf"(?<![\w/.-])((?:{folders})/[\w/.-]*[\w/])", text_of(path)):
        if "NAME" in name or name in made_later:
            continue
        places = (ROOT, PACKAGE, path.parent)
        assert any((place / name).exists() for place in places), name


@each_document
def test_every_option_with_a_dot_is_one(path: Path) -> None:
    blocks_of = {
        name: annotation
        for name, field in Settings.model_fields.items()
        if isinstance(annotation := field.annotation, type) and issubclass(annotation, Options)
    }
    fields = set(codes(part_of("Looking at it") + part_of("Without the plugin")))  # of the status
    for code in codes(prose(path)):
        block, dot, option = code.partition(":")[0].partition(".")
        if dot and block in blocks_of and re.split(r"\W", option)[0] not in ("db", "py", "lock") and code not in fields:
            assert option in blocks_of[block].model_fields, code


# -- commands ------------------------------------------------------------------------------------------------


def commands(path: Path) -> Iterator[list[str]]:
    """Each command of the shell blocks, and each in the text that is one of ours."""
    lines = [line for block in blocks(path, "sh") for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *(code for code in codes(prose(path)) if re.match(r"(make|orthanc-events) ", code))]:
        for part in line.split(" && "):
            yield shlex.split(part, comments=True)


@each_document
def test_every_command_is_one(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    extras = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    for command in commands(path):
        program = Path(command[0]).name if command else ""
        if program == "make":
            assert targets >= {word for word in command[1:] if "=" not in word}, command
        elif program == "orthanc-events":
            try:  # in the text, a command can be named without its arguments
                if len(command) == 2:
                    command = [*command, "--help"]
                _parser().parse_args(command[1:])
            except SystemExit as ended:
                if not ended.code:
                    continue
                pytest.fail(f"{shlex.join(command)}: {capsys.readouterr().err}")
        elif program == "pip":
            for extra in re.findall(r"\[(\w+)\]", shlex.join(command)):
                assert extra in extras


def test_the_readme_has_the_two_commands() -> None:
    first, second = next(block for block in blocks(ROOT / "README.md", "sh") if "make" in block).splitlines()
    assert (first, second) == ("make demo", "make test")


def test_every_target_of_make_is_explained_to_contributors() -> None:
    told = {command[1] for command in commands(ROOT / "CONTRIBUTING.md") if command[:1] == ["make"]}
    targets = set(re.findall(r"^([a-z-]+):.*## ", text_of(ROOT / "Makefile"), re.MULTILINE))
    assert targets - told <= {"help", "lock", "clean"}


# -- examples ------------------------------------------------------------------------------------------------

#: Of every event but the server's; those have no subject.
ATTRIBUTES = {
    "specversion", "id", "source", "type", "subject", "time", "datacontenttype", "dataschema", "recorder", "sequence",
    "partitionkey", "recordedtime", "traceparent", "data",
}  # fmt: skip


def sample(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = next(json.loads(block) for block in blocks(path, "json") if "specversion" in block)
    return found


def schema_of(event: dict[str, Any]) -> dict[str, Any]:
    name = event["dataschema"].removeprefix(Settings.model_fields["schema_base"].default)
    document: dict[str, Any] = json.loads(text_of(SCHEMAS / f"{name}.json"))
    return document


@pytest.mark.parametrize("name", ["README.md", "docs/events.md"])
def test_the_sample_event_is_as_the_contract_says(name: str) -> None:
    event = sample(ROOT / name)
    assert event.keys() == ATTRIBUTES
    schema = schema_of(event)
    assert schema["$id"] == event["dataschema"]
    jsonschema_rs.Draft202012Validator(schema).validate(event["data"])
    assert event["data"].keys() <= schema["properties"].keys()
    asyncapi = yaml.safe_load(text_of(SCHEMAS / "asyncapi.yaml"))
    jsonschema_rs.Draft202012Validator(asyncapi["components"]["schemas"]["CloudEvent"]).validate(event)

    # It is a real one: what is derived fits.
    data = event["data"]
    date = datetime.fromisoformat(event["time"]).strftime("%Y%m%dT%H%M%S")
    spelt = [event["source"], str(data["seq"]), date, data["change"], data["level"].capitalize(), data["id"]]
    namespace = uuid.UUID("8be797cd-5573-46b7-8097-bea664a99a80")
    assert event["id"] == str(uuid.uuid5(namespace, "\n".join(spelt)))
    assert event["type"].endswith(f".{schema['title']}.v1")
    assert event["subject"] == f"studies/{data['id']}"
    assert event["partitionkey"] == data["id"]
    subject = f"orthanc.events.main.{schema['title']}.{zlib.crc32(event['partitionkey'].encode()) % 64:02d}"
    assert f"`{subject}`" in text_of(ROOT / name)
    if name == "docs/events.md":
        assert "\n".join(spelt) + "\n" in blocks(ROOT / name, "text")


def test_the_sample_of_a_derived_event_follows_from_the_other() -> None:
    cause, event = (json.loads(block) for block in blocks(ROOT / "docs" / "events.md", "json"))
    asyncapi = yaml.safe_load(text_of(SCHEMAS / "asyncapi.yaml"))
    rules = asyncapi["components"]["schemas"]["DerivedCloudEvent"]
    jsonschema_rs.Draft202012Validator(rules).validate(event)
    assert event.keys() == rules["properties"].keys()
    jsonschema_rs.Draft202012Validator(schema_of(event)).validate(event["data"])
    assert (event["causationid"], event["correlationid"]) == (cause["id"], cause["id"])
    assert event["traceparent"].split("-")[1] == cause["traceparent"].split("-")[1]
    for name in ("source", "subject", "partitionkey"):
        assert event[name] == cause[name]


def test_the_worked_example_of_the_partition_is_right() -> None:
    text = " ".join(text_of(ROOT / "docs" / "events.md").split())
    match = re.search(r"CRC-32 of `(\S+)` is (\d+) \((0x[0-9a-f]+)\), and (\d+) modulo 64 is (\d+)\.", text)
    assert match is not None
    key, number, digits, again, partition = match.groups()
    assert zlib.crc32(key.encode()) == int(number) == int(digits, 16) == int(again)
    assert int(number) % 64 == int(partition)
    assert key == sample(ROOT / "docs" / "events.md")["partitionkey"]


def test_the_page_of_events_names_the_attributes_of_the_contract() -> None:
    text = text_of(ROOT / "docs" / "events.md")
    table = text[text.index("## Attributes") : text.index("## Data")]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == ATTRIBUTES - {"data"}
    table = text[text.index("## Data") : text.index("## Types")]
    told = {name for cell in re.findall(r"^\| (`.+?`) \|", table, re.MULTILINE) for name in codes(cell)}
    derived = text[text.index("## Derived events") : text.index("## On NATS")]
    properties, attributes = derived.split("| property |")[1].split("| attribute |")
    told |= set(re.findall(r"^\| `(\w+)` \|", properties, re.MULTILINE))
    different = {name for cell in re.findall(r"^\| (`.+?`) \|", attributes, re.MULTILINE) for name in codes(cell)}
    assert {"producer", "causationid", "correlationid"} == different - ATTRIBUTES
    schemas = [json.loads(text_of(path)) for path in SCHEMAS.glob("*.*.v1.json")]
    assert told == {name for schema in schemas for name in schema["properties"]}
    fields = json.loads(text_of(SCHEMAS / "job.failed.v1.json"))["properties"]["job"]["properties"]
    (row,) = re.findall(r"^\| `job` \| (.+) \|$", table, re.MULTILINE)
    assert fields.keys() == set(codes(row))


def test_the_smallest_configuration_is_valid_and_the_same_everywhere() -> None:
    (smallest,) = blocks(ROOT / "README.md", "yaml")
    settings = parse(smallest, "README.md", {})
    assert [transport.type for transport in settings.transports] == ["nats"]
    assert smallest == blocks(ROOT / "docs" / "configuration.md", "yaml")[0]


def test_the_lines_for_orthancs_configuration_are_those_that_init_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = _parser().parse_args(["init", str(tmp_path)])
    assert options.run(options) == 0
    _, plugins, rest = capsys.readouterr().out.partition('"Plugins"')
    printed = json.loads("{" + plugins + rest + "}")
    for path in (ROOT / "README.md", ROOT / "docs" / "operating.md"):
        (lines,) = (block for block in blocks(path, "json") if "PythonScript" in block)
        document = json.loads("{" + lines + "}")
        assert document.keys() == printed.keys()
        assert Path(document["PythonScript"]).name == "orthanc_events.py"


# -- what operating.md explains ---------------------------------------------------------------------------------------


def strings() -> set[str]:
    """Every text in the package's code, with an ellipsis for what is filled in."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(re.sub(r"%[sd]|%\.\df", "…", node.value))
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.add("".join(map(str, parts)))
    return found


def test_every_log_line_that_is_explained_can_be_written() -> None:
    lines = re.findall(r"^\| [EWI] `(.+?)` \|", part_of("The log"), re.MULTILINE)
    assert len(lines) > 15
    known = strings()
    for line in lines:
        pattern = re.compile(".*".join(map(re.escape, line.split("…"))) + "$", re.DOTALL)
        assert any(pattern.match(text) for text in known), line


def test_every_state_that_is_explained_is_one() -> None:
    known = strings()
    for field in ("capture.state", r"transports\[\].state"):
        (row,) = re.findall(rf"^\| `{field}` \| (.+) \|$", part_of("Looking at it"), re.MULTILINE)
        states = set(codes(row)) - {"problem"}
        assert len(states) >= 7
        assert not {state for state in states if state not in known}


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    with started(tmp_path_factory.mktemp("docs") / "line") as line:
        yield line


@pytest.mark.integration
def test_every_field_of_the_status_is_explained(line: Line) -> None:
    cells = re.findall(r"^\| (`.+?`) \| .+ \|$", part_of("Looking at it"), re.MULTILINE)
    told = {name for cell in cells for name in codes(cell)}
    actual = set()
    for key, value in line.status().items():
        if isinstance(value, dict):
            actual |= {f"{key}.{name}" for name in value}
        elif key == "transports":
            actual |= {f"transports[].{name}" for name in value[0]}
        else:
            actual.add(key)
    assert told - {"problem"} == actual


@pytest.mark.integration
def test_the_subscriber_on_the_page_of_events_works(line: Line, tmp_path: Path) -> None:
    (code,) = blocks(ROOT / "docs" / "events.md", "python")
    script = tmp_path / "subscriber.py"
    script.write_text(code, "utf-8")
    study = dicom.make_study()
    line.orthanc.upload(study.instances[0].data)
    environment = {**os.environ, "NATS_URL": line.broker.url}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().split()[1] == f"studies/{study.id}"
        finally:
            process.kill()


def test_the_table_of_versions_is_what_the_last_recorded_run_says() -> None:
    readme = text_of(matrix_table.README)
    cells = json.loads(text_of(matrix_table.RESULT))
    assert len(cells) >= 10
    assert matrix_table.PLACE.search(readme)
    assert matrix_table.with_table(readme, cells) == readme


def test_the_images_of_containers_are_those_that_are_named() -> None:
    testing = text_of(ROOT / "docs" / "testing.md")
    assert not [image for kind, image in OFFICIAL.items() if kind != "webhook" and f"`{image}`" not in testing]
    assert f"ARG ORTHANC={OFFICIAL['orthanc']}\n" in text_of(ROOT / "docker" / "Dockerfile")
