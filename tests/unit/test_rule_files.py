"""The files of the finished consumers: what is said of what is wrong in them, and their schemas for editors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import jsonschema_rs
import pytest
import yaml

from orthanc_events_bridge.cli import main
from orthanc_events_bridge.consumers.configuration import CommandLine, configure_as
from tools.generate_docs import PROGRAMS, Program

ROOT: Final = Path(__file__).parents[2]
SECRET: Final = "hunter2"
_BOTH: Final = "broker: nats://127.0.0.1:1\northanc: http://127.0.0.1:1\n"
#: Files that are right, by their command; what is wrong is put in, or put behind.
RIGHT: Final = {
    "route": f"{_BOTH}destinations:\n  pacs: {{modality: pacs}}\nrules:\n  - name: all\n    to: [pacs]\n",
    "anonymize": f"{_BOTH}store: sqlite:////tmp/a.db\nprojects:\n  one: {{secret_file: secret}}\n"
    "rules:\n  - name: all\n    to: [one]\n",
    "dispatch": f"{_BOTH}store: sqlite:////tmp/d.db\nanonymize: {{secret_file: secret}}\n"
    "service: {dicomweb: ai}\nresults: {to: {modality: pacs}}\nrules:\n  - name: all\n",
    "derive": f"{_BOTH}rules:\n  - name: all\n    quiet: 1m\n",
    "retry-jobs": f"{_BOTH}resubmit: {{attempts: 3}}\n",
}
WITH_RULES: Final = ("route", "anonymize", "dispatch", "derive")

Say = Callable[..., tuple[int, str]]


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """What a command says of a file, in a folder of its own, and its exit code."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_text("x" * 32, "utf-8")
    for name in ("ORTHANC_EVENTS_BROKER", "ORTHANC_EVENTS_CONSUMER", "ORTHANC_EVENTS_ORTHANC_URL"):
        monkeypatch.delenv(name, raising=False)

    def command(name: str, content: str | bytes | None = None, *more: str) -> tuple[int, str]:
        line = [name, *more]
        if content is not None:
            path = tmp_path / "rules.yaml"
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
            line += ["--config", str(path), "--only-load"]
        try:
            code = main(line)
        except SystemExit as error:  # argparse's own
            code = int(str(error.code))
        captured = capsys.readouterr()
        return code, captured.err.replace(f"{tmp_path}/", "")

    return command


def check(found: tuple[int, str], words: str, code: int = 2) -> None:
    """It is refused with these words; whatever is said has a remedy, and nothing that is secret."""
    status, said = found
    errors = [line for line in said.splitlines() if line.startswith("orthanc-events")]
    assert status == code and errors, f"{status}: {said}"
    assert words in said
    for error in errors:
        assert any(mark in error for mark in ("; ", " (", "did you mean", "error: ")), f"no remedy: {error}"
    assert "Traceback" not in said and SECRET not in said


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_taken(say: Say, name: str) -> None:
    assert say(name, RIGHT[name]) == (0, "")


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "rules.yaml:1: the file is empty; give at least"),
        (b"# nothing\n", "rules.yaml:1: the file is empty; give at least"),
        (b"- a\n", "rules.yaml:1: options are expected, and a list was found; give at least"),
        (b"hello\n", "rules.yaml:1: options are expected, and text was found"),
        (b"broker:\n\ttype: nats\n", "rules.yaml:2: a tab can't be used here; indent with spaces"),
        (b"rules: [\n", "rules.yaml:2: this is not valid YAML; check the indentation"),
        (b"broker: x\n  orthanc: y\n", "rules.yaml:2: a colon is not expected here; check the indentation"),
        (b"a: 1\n---\nb: 2\n", "rules.yaml:2: a second document begins here; keep one"),
        (b"name: \xff\n", "rules.yaml:1: the file is not UTF-8 text here; save it as UTF-8"),
        (b"name: \x00\n", "rules.yaml:1: a control character is in the file; remove it"),
        (b"rules: &a [*a]\n", "rules[0]: an alias (`*`) refers to the block that it is in; write"),
        (b"name: !!python/object:os.system x\n", "rules.yaml:1: name: begins with a YAML tag"),
        (b"? [a]\n: b\n", "rules.yaml:1: a block in braces stands where an option's name is expected; put"),
    ],
)
def test_what_is_no_such_file(say: Say, name: str, content: bytes, words: str) -> None:
    check(say(name, content), words)


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("", "orthanc: http://x\n", "orthanc: is given a second time, after line 2; keep one"),
        ("", "http: ${NO_SUCH_VARIABLE}\n", "http: the environment variable NO_SUCH_VARIABLE is not set; set it"),
        ("", "concurency: 3\n", "concurency: there is no such option; did you mean concurrency?"),
        ("", "concurrency: many\n", "concurrency: a whole number is expected, and text was found; write"),
        ("", "retry: 3\n", "retry: a block of options is expected, and a number was found; write its options"),
        ("", "retry: {initial: 1h, maximum: 1m}\n", "is shorter than initial"),
        ("", "ack_wait: 5 minutes\n", "ack_wait: '5 minutes' is no duration; write seconds"),
        ("", "start: later\n", "start: 'later' is none of the choices; write one of: new, oldest"),
        ("", "prefetch: 1\n", "is less than concurrency; give at least as many"),
        ("", "store_file: a\nstore: broker\n", " give the same secret twice; keep one"),
        ("orthanc: http://127.0.0.1:1\n", "", "rules.yaml: orthanc: which Orthanc is asked is not said; give its URL"),
        ("broker: nats://127.0.0.1:1\n", "", "rules.yaml: broker: where events come from is not said; give its URL"),
        ("http://127.0.0.1:1", "ftp://h", "rules.yaml:2: orthanc.url: ftp://h is no URL of an Orthanc; write https"),
        ("http://127.0.0.1:1", f"http://u:{SECRET}@h", "rules.yaml:2: orthanc.url: the URL of Orthanc holds"),
        ("http://127.0.0.1:1", "[a]", "rules.yaml:2: orthanc: a block of options is expected, and a list was found"),
        (
            "http://127.0.0.1:1",
            "{url: 'http://h', user: u}",
            "rules.yaml:2: orthanc: Orthanc at http://h: a user needs",
        ),
        (
            "http://127.0.0.1:1",
            "{url: 'http://h', max_requests: 0}",
            "rules.yaml:2: orthanc.max_requests: '0' is out of",
        ),
    ],
)
def test_what_every_file_has(say: Say, name: str, old: str, new: str, words: str) -> None:
    text = RIGHT[name].replace("store: sqlite:////tmp/a.db\n", "") if "store" in new else RIGHT[name]
    assert old in text
    check(say(name, text.replace(old, new, 1) if old else text + new), words)


@pytest.mark.parametrize("name", RIGHT)
def test_files_that_are_not_there_and_what_goes_with_no_file(say: Say, tmp_path: Path, name: str) -> None:
    check(say(name, None, "--config", str(tmp_path)), "this is a folder; name the file in it")
    check(say(name, None, "--config", "nowhere.yaml"), "nowhere.yaml: there is no such file; write one")
    check(say(name, None, "--workers", "0"), "--workers 0 makes no sense (give 1 to 256)")
    wrong = "broker: where events come from" if name == "retry-jobs" else "which file it works by"
    check(say(name), f"{wrong} is not said")
    if name in WITH_RULES:
        check(say(name, None, "--json"), "--json says how to answer (say --explain ID")
        check(say(name, None, "--check", "--dry-run"), "not allowed with argument --check")


@pytest.mark.parametrize("name", WITH_RULES)
@pytest.mark.parametrize(
    ("when", "words"),
    [
        ("", ".when: has nothing behind it; write something there, or remove the line"),
        ("CT", ".when: a list is expected, and text was found; write a list of blocks, each beginning with `- tag: …`"),
        ("{}", ".when: it says nothing; write one of tag, metadata, label, all, any, not"),
        ("{tag: 0008, is: CT}", ".when.tag: '0008' is no keyword of a DICOM attribute; write its keyword"),
        ("[{tag: A..B, is: CT}]", ".when[0].tag: 'A..B' is no keyword of a DICOM attribute; write its keyword"),
        ("{tag: Modality}", ".when: it doesn't say what it has to be; add one of is, glob"),
        ("{tag: Modality, is: }", ".when: it doesn't say what it has to be; add one of is, glob"),
        ("{tag: Modality, is: []}", ".when.is: is an empty list; name at least one; write it as in"),
        ("{tag: Modality, is: {a: b}}", ".when.is: text is expected, and a block of options was found; write it as in"),
        ("{tag: Modality, is: CT, glob: C*}", ".when: it has is and glob; keep one"),
        ("{tag: Modality, regex: '('}", ".when.regex: '(' is no regular expression: missing ), unterminated"),
        ("{tag: Modality, above: big}", ".when.above: a number is expected, and text was found; write a number"),
        ("{tag: Modality, above: .nan}", ".when.above: a number with an end is expected"),
        ("{tag: Modality, exists: maybe}", ".when.exists: true or false is expected, and text was found; write true"),
        ("{tag: Modality, equals: CT}", ".when.equals: there is no such option; the options here are: tag, metadata"),
        ("{tag: Modality, label: x, is: CT}", ".when: it has tag and label; write one of"),
        ("{label: x, is: y}", ".when.is: does not go with label; leave it out"),
        ("{metadata: '', is: y}", ".when.metadata: is empty; write it as in `metadata: RemoteAET`"),
        ("{not: []}", ".when.not: is an empty list; name at least one"),
    ],
)
def test_conditions(say: Say, name: str, when: str, words: str) -> None:
    text = RIGHT[name].replace("  - name: all\n", f"  - name: all\n    when: {when}\n")
    line = text[: text.index("when:")].count("\n") + 1
    found = say(name, text)
    check(found, f"rules.yaml:{line}: rules[0]{words}")
    assert found[1].count("\n") == (2 if "equals" in when else 1)


@pytest.mark.parametrize("name", WITH_RULES)
def test_text_that_yaml_takes_for_something_else_is_meant_as_it_is_written(say: Say, name: str) -> None:
    for value in ("YES", "[YES, 2024-01-01]", "0123", "2024-01-01"):
        when = f"    when: {{tag: PatientIdentityRemoved, is: {value}}}\n"
        assert say(name, RIGHT[name].replace("  - name: all\n", f"  - name: all\n{when}")) == (0, "")


_RULES: Final = re.compile(r"rules:\n.*", re.DOTALL)


@pytest.mark.parametrize("name", WITH_RULES)
@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ("", "rules: is required; write a list of blocks, each beginning with `- name: …`"),
        ("rules:\n", "rules: is required; write a list of blocks"),
        ("rules: []\n", "rules: is an empty list; name at least one; write a list of blocks"),
        ("rules: {name: a}\n", "rules: a list is expected, and a block of options was found; write a list of blocks"),
        ("rules: [all]\n", "rules[0]: a block of options is expected, and text was found; write its options"),
        ("rules: [{when: {label: x}}]\n", "rules[0].name: is required; write it as in `name: "),
        ("rules: [{name: ''}]\n", "rules[0].name: '' can't be the name of a rule; write some words"),
        ('rules: [{name: "a\\nb"}]\n', "rules[0].name: 'a�b' can't be the name of a rule; write some words"),
    ],
)
def test_rules(say: Say, name: str, rules: str, words: str) -> None:
    check(say(name, _RULES.sub("", RIGHT[name]) + rules), words)


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("route", "[pacs]", "[pcs]", ":7: rules[0].to[0]: 'pcs' is no destination; the destinations are: pacs"),
        ("route", "[pacs]", "pacs", ":7: rules[0].to: a list is expected, and text was found; write it as in"),
        ("route", "{modality: pacs}", "{}", ":4: destinations.pacs: where it sends to is not said; give one of"),
        ("route", "{modality: pacs}", "{modality: a, peer: b}", ":4: destinations.pacs: it is modality and peer; give"),
        ("route", "{modality: pacs}", "{modalty: a}", ":4: destinations.pacs.modalty: there is no such option; did"),
        ("route", "{modality: pacs}", "{peer: a/b}", ":4: destinations.pacs.peer: 'a/b' can't be a name in Orthanc's"),
        (
            "route",
            "{modality: pacs}",
            "{orthanc: {user: a}}",
            ":4: destinations.pacs.orthanc: where it is is not said;",
        ),
        (
            "route",
            "{modality: pacs}",
            "{orthanc: {url: 'http://h', user: a}}",
            ":4: destinations.pacs.orthanc: Orthanc at http://h: a user needs a password, and a password a user; give",
        ),
        (
            "route",
            "  pacs: {modality: pacs}",
            "  - a",
            ":3: destinations: names and values are expected, and a list was",
        ),
        ("route", "broker", f"name: {'n' * 128}\nbroker", "would be too long for the name of a consumer; use at most"),
        ("anonymize", "[one]", "[two]", "rules[0].to[0]: 'two' is no project; the projects are: one"),
        ("anonymize", "sqlite:////tmp/a.db", "broker", ":3: store: is no database, and what stands for what has to be"),
        ("anonymize", "{secret_file: secret}", "{sekret: x}", ":5: projects.one.sekret: there is no such option; the"),
        (
            "anonymize",
            "{secret_file: secret}",
            "{profile: basc}",
            ":5: projects.one.profile: 'basc' is no profile; the",
        ),
        ("anonymize", "rules", "profiles: {p: {keep: [Nothing]}}\nrules", ":6: profiles.p.keep[0]: 'Nothing' is no"),
        ("anonymize", "rules", "profiles: {p: {keep: [PatientID]}}\nrules", "is always made by the anonymizer; leave"),
        ("anonymize", "rules", "profiles: {p: {private: {X: zz}}}\nrules", ":6: profiles.p.private.X: 'zz' is no"),
        ("anonymize", "rules", "profiles: {p: {replace: {Rows: '3'}}}\nrules", ":6: profiles.p.replace.Rows: 'Rows'"),
        ("anonymize", "rules", "profiles: {p: {dates: shfit}}\nrules", "did you mean shift? Write one of: remove"),
        ("anonymize", "rules", "profiles: {basic: {dates: keep}}\nrules", ":6: profiles.basic: is there by itself"),
        ("dispatch", "sqlite:////tmp/d.db", "broker", ":3: store: is no database, and"),
        ("dispatch", "dicomweb: ai", "deadline: 1h", ":5: service:"),
        ("dispatch", "dicomweb: ai", "dicomweb: ai, answers: http://x", ":5: service:"),
        ("dispatch", "dicomweb: ai", "dicomweb: ai, deadline: 0s", ":5: service.deadline:"),
        (
            "dispatch",
            "modality: pacs",
            "modalty: pacs",
            ":6: results.to.modalty: there is no such option; did you mean",
        ),
        ("derive", "1m", "soon", ":5: rules[0].quiet: 'soon' is no duration; write seconds as a number, or text"),
        ("derive", "1m", "2h", "rules[0].deadline is shorter than rules[0].quiet (line 5); give a longer deadline"),
        ("derive", "quiet: 1m", "series: [a]", ":5: rules[0].series: names and values are expected, and a list was"),
        ("derive", "quiet: 1m", "series: {t1: T1}", ":5: rules[0].series.t1: a list is expected, and text was found;"),
        ("derive", "quiet: 1m", "instances: {}", ":5: rules[0].instances: it has to be known in one way; write one of"),
        ("derive", "quiet: 1m", "instances: {tag: a}", ":5: rules[0].instances.tag: 'a' is no keyword of a DICOM"),
        (
            "derive",
            "rules",
            "ordered: true\nrules",
            ":3: ordered: would hold up all others while a study is waited for",
        ),
        ("retry-jobs", "3", "0", ":3: resubmit.attempts: '0' is out of range; it has to be at least 1"),
        ("retry-jobs", "attempts: 3", "initial: 2d", "maximum is shorter than initial (line 3); give at least as long"),
        ("retry-jobs", "attempts", "atempts", ":3: resubmit.atempts: there is no such option; did you mean attempts?"),
        (
            "retry-jobs",
            "resubmit",
            "types: []\nresubmit",
            ":3: types: is an empty list; name at least one; write it as",
        ),
        ("retry-jobs", "resubmit", "source: ''\nresubmit", ":3: source: is empty; write it as in `source: https://"),
        ("retry-jobs", "nats", "amqp", ":1: store: where to note how often something has failed is not said, and"),
    ],
)
def test_what_one_has(say: Say, name: str, old: str, new: str, words: str) -> None:
    assert old in RIGHT[name]
    check(say(name, RIGHT[name].replace(old, new, 1)), words)


# For editors.


def example(program: Program) -> Path:
    return ROOT / "config" / f"{program.name}.yaml"


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda one: one.name)
def test_the_schema_takes_the_example_and_not_what_the_command_refuses(program: Program) -> None:
    schema = json.loads(program.schema.read_text("utf-8"))
    jsonschema_rs.meta.validate(schema)
    found: dict[str, Any] = yaml.safe_load(example(program).read_text("utf-8"))
    for right in (found, yaml.safe_load(RIGHT[program.command])):
        jsonschema_rs.validate(schema, right)
    mistakes: tuple[dict[str, Any], ...] = (
        {"concurency": 3},
        {"rules": [], "types": []},
        {"orthanc": {"max_requests": "many"}},
    )
    for wrong in mistakes:
        with pytest.raises(jsonschema_rs.ValidationError):
            jsonschema_rs.validate(schema, found | wrong)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda one: one.name)
def test_the_schema_is_printed_and_named_where_an_editor_looks(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["schema", f"--{program.name}"]) == 0
    assert capsys.readouterr().out == program.schema.read_text("utf-8")
    first = example(program).read_text("utf-8").partition("\n")[0]
    place = first.removeprefix("# yaml-language-server: $schema=")
    assert (example(program).parent / place).resolve() == program.schema


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda one: one.name)
def test_the_example_is_right(program: Program) -> None:
    found = configure_as(program.settings, {}, example(program), {}, CommandLine())
    assert found.settings.broker is not None and found.orthanc is not None
