"""What users get wrong: one clear error with its place and a remedy, the right exit code, no traceback, no secret.

Each case is what is written on the command line, in the environment, in a file, or in the user's own module. What only
real brokers and processes show: integration/test_consume.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from orthanc_events_bridge import transports
from orthanc_events_bridge.cli import main
from orthanc_events_bridge.consumers import configuration
from orthanc_events_bridge.transports.memory import MemoryTransport

SECRET: Final = "hunter2"
#: A module up to its handler; what is wrong is put in.
_APP: Final = 'app = Consumer("one", broker={{"type": "memory"}}{})\n'
_MEMORY: Final = _APP.format("")
_HANDLER: Final = '\n@app.on("study.stable")\ndef handler(event): ...\n'

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run a command as in a folder of its own; its exit code, and what it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(configuration.command_line, "file", None)  # so that it is put back
    monkeypatch.setattr(configuration.command_line, "options", None)
    before = {*sys.modules}

    def command(*arguments: str) -> tuple[int, str]:
        try:
            code = main(arguments)
        except SystemExit as error:  # argparse's own
            code = int(str(error.code))
        captured = capsys.readouterr()
        return code, captured.err

    yield command
    for name in {*sys.modules} - before:
        del sys.modules[name]


def check(found: tuple[int, str], words: str, code: int = 2) -> None:
    """One error, with these words; behind a line of argparse's usage, maybe."""
    status, said = found
    errors = [line for line in said.splitlines() if line.startswith("orthanc-events")]
    assert status == code and len(errors) == 1, f"{status}: {said}"
    assert words in errors[0]
    assert any(mark in errors[0] for mark in ("; ", " (", "argument")), f"no remedy: {errors[0]}"
    assert "Traceback" not in said and SECRET not in said


#: In the module: what is written, and what is said.
MODULES: Final[dict[str, tuple[str, str]]] = {
    "no consumer": ("x = 1\n", "there is no consumer in {folder}/mine.py (make one"),
    "two consumers": (_MEMORY + _MEMORY.replace("app", "other"), "write mine:name; there are: app, other"),
    "raises": ("x = 0\n1 / x\n", "mine can't be imported: {folder}/mine.py:3 raises ZeroDivisionError"),
    "syntax": ("def (\n", "mine can't be imported: {folder}/mine.py:2 raises SyntaxError: invalid syntax"),
    "exits": ("raise SystemExit(0)\n", "{folder}/mine.py:2 raises SystemExit"),
    "missing module": ("import nothing_like_it\n", "{folder}/mine.py:2 needs the module nothing_like_it (install it)"),
    "missing name": ("from os import nothing\n", "raises ImportError: cannot import name 'nothing'"),
    "unknown option": (
        _APP.format(", concurency=3"),
        "raises TypeError: Consumer.__init__() got an unexpected keyword",
    ),
    "no name": ("app = Consumer()\n", "raises TypeError: Consumer.__init__() missing 1 required positional argument"),
    "wrong name": ('app = Consumer("o ne")\n', "the consumer o ne: name: 'o ne' can't be the name of a consumer; use"),
    "none": (_APP.format(", concurrency=0"), "the consumer one: concurrency: '0' is out of range; it has to be"),
    "negative": (_APP.format(", drain=-1"), "the consumer one: drain: '-1' is no duration; write seconds"),
    "endless": (_APP.format(', ack_wait=float("inf")'), "the consumer one: ack_wait: 'inf' is no duration; write"),
    "no number": (_APP.format(', concurrency="many"'), "concurrency: a whole number is expected, and text was found"),
    "start": (_APP.format(', start="later"'), "start: 'later' is none of the choices; write one of: new, oldest"),
    "no policy": (_APP.format(", retry=3"), "the consumer one: retry: a block of options is expected, and a number"),
    "policy": (_APP.format(", retry=RetryPolicy(jitter=-1)"), "{folder}/mine.py:2: RetryPolicy: jitter=-1 makes no"),
    "policy's type": (_APP.format(', retry=RetryPolicy(initial="1s")'), "RetryPolicy: initial='1s' is no number"),
    "policy's option": (_APP.format(', retry={"max_atempts": 3}'), "retry.max_atempts: there is no such option; did"),
    "order": (_APP.format(", ordered=True, retry=RetryPolicy(maximum=3600)"), "retry.maximum: in order, a retry of 1h"),
    "http": (_APP.format(', http="here"'), "http: 'here' is no address to listen at; write 127.0.0.1:9100"),
    "port": (_APP.format(', http=":99999"'), "http: ':99999' has a port that there isn't; write one of"),
    "broker": ('app = Consumer("one", broker="http://h")\n', "broker: is no URL of a broker; write nats://HOST:4222"),
    "broker's login": (
        f'app = Consumer("one", broker="amqp://u:{SECRET}@h")\n',
        "the consumer one: broker.servers[0]: holds credentials",
    ),
    "broker's type": ('app = Consumer("one", broker={"servers": []})\n', "broker.type: is required; write one of"),
    "broker's option": (
        'app = Consumer("one", broker={"type": "nats", "servers": ["nats://h"], "usr": "x"})\n',
        "broker.usr: there is no such option; did you mean user?",
    ),
    "no broker": ('app = Consumer("one")\n' + _HANDLER, "consumer one: broker: which broker its events come from is"),
    "webhook": (
        'app = Consumer("one", broker={"type": "webhook", "url": "https://h/x"})\n' + _HANDLER,
        "consumer one: broker: there is nothing to be received from a transport of type webhook; use NATS",
    ),
    "orthanc": (_APP.format(', orthanc="ftp://h"'), "orthanc.url: ftp://h is no URL of an Orthanc; write https://"),
    "orthanc's login": (_APP.format(f', orthanc="http://u:{SECRET}@h"'), "orthanc.url: the URL of Orthanc holds"),
    "two logins": (
        _APP.format(f', orthanc={{"url": "http://h", "token": "{SECRET}", "user": "u", "password": "{SECRET}"}}'),
        "orthanc: Orthanc at http://h: password and token are given; keep one of them",
    ),
    "no orthanc": (_MEMORY + _HANDLER.replace("event", "event, orthanc"), "which Orthanc it is for is not said; give"),
    "no token": (
        _APP.format(', orthanc={"url": "http://h", "token_file": "/nowhere"}')
        + _HANDLER.replace("event", "event, orthanc"),
        "consumer one: orthanc: token_file /nowhere can't be read: No such file or directory; let our user",
    ),
    "no authorities": (
        _APP.format(', orthanc={"url": "https://h", "ca_file": "/nowhere"}')
        + _HANDLER.replace("event", "event, orthanc"),
        "consumer one: orthanc: Orthanc at https://h: ca_file can't be used: No such file or directory; give",
    ),
    "store": (_APP.format(', store="redis://h"'), "the consumer one: store: is no URL of a store; write"),
    "no store": (
        _MEMORY + _HANDLER.replace('stable"', 'stable", once="x"'),
        "{folder}/mine.py:4: consumer one: where to note what is done once is not said",
    ),
    "effect": (
        'app = Consumer("one", broker="nats://h")\n' + _HANDLER.replace('stable"', 'stable", once=True'),
        "{folder}/mine.py:4: True can't be the name of an effect (use",
    ),
    "file": (_APP.format(', config="/nowhere.yaml"'), "/nowhere.yaml: there is no such file; write one"),
    "no handler": (_MEMORY, "consumer one: there is no handler; write @app.on"),
    "no parentheses": (
        _MEMORY + "@app.on\ndef handler(event): ...\n",
        "{folder}/mine.py:3: @app.on is given something",
    ),
    "no pattern": (_MEMORY + _HANDLER.replace('"study.stable"', ""), "{folder}/mine.py:4: a handler is for no event"),
    "pattern": (
        _MEMORY + _HANDLER.replace("stable", "stabel"),
        "no event is called 'study.stabel' (did you mean study",
    ),
    "three arguments": (_MEMORY + _HANDLER.replace("event", "a, b, c"), "the handler handler(a, b, c) can't be called"),
    "no argument": (_MEMORY + _HANDLER.replace("event", ""), "the handler handler() can't be called (it takes"),
    "no function": (_MEMORY + 'app.on("study.stable")(3)\n', "{folder}/mine.py:3: 3 can't be called (a handler is"),
    "generator": (_MEMORY + _HANDLER.replace("...", "yield"), "the handler handler has `yield` in it: it would never"),
    "where": (_MEMORY + _HANDLER.replace('stable"', 'stable", where="CT"'), "@app.on: where is no function that says"),
    "its policy": (_MEMORY + _HANDLER.replace('stable"', 'stable", retry=3'), "@app.on: retry is no policy (write"),
}


@pytest.mark.parametrize("name", MODULES)
def test_in_the_module(run: Run, tmp_path: Path, name: str) -> None:
    text, words = MODULES[name]
    (tmp_path / "mine.py").write_text(
        f"from orthanc_events_bridge.consumers import Consumer, RetryPolicy\n{text}", "utf-8"
    )
    check(run("consume", "mine", "--check"), words.replace("{folder}", str(tmp_path)))


def test_a_where_that_has_to_be_awaited(run: Run, tmp_path: Path) -> None:
    text = "from orthanc_events_bridge.consumers import Consumer\nasync def wanted(event): ...\n" + _MEMORY
    (tmp_path / "mine.py").write_text(text + _HANDLER.replace('stable"', 'stable", where=wanted'), "utf-8")
    check(run("consume", "mine", "--check"), "@app.on: where is no function that says at once (write")


@pytest.mark.parametrize(
    ("line", "environment", "words"),
    [
        (["nothere"], {}, "there is no module nothere: looked for nothere.py"),
        (["mine.py"], {}, "'mine.py' names no consumer (write module:name"),
        (["./mine:app"], {}, "'./mine:app' names no consumer"),
        (["mine:app:more"], {}, "'mine:app:more' names no consumer"),
        ([""], {}, "'' names no consumer"),
        ([], {}, "the following arguments are required: MODULE:NAME"),
        (["mine:nothing"], {}, "mine.py has no nothing (there are: app)"),
        (["mine:handler"], {}, "mine:handler is no Consumer: its type is function (there are: app)"),
        (["mine", "--workers", "0"], {}, "--workers 0 makes no sense (give 1 to 256)"),
        (["mine", "--workers", "-3"], {}, "--workers -3 makes no sense"),
        (["mine", "--workers", "many"], {}, "argument --workers: invalid int value: 'many'"),
        (["mine", "--broker", "http://h"], {}, "--broker: broker: is no URL of a broker; write"),
        (["mine", "--broker", f"nats://u:{SECRET}@h"], {}, "--broker: broker.servers[0]: holds credentials"),
        (["mine", "--broker", ""], {}, "--broker: broker: is empty; write"),
        (["mine", "--http", "here"], {}, "--http: http: 'here' is no address to listen at; write"),
        (["mine", "--http", ":65535", "--worker", "1"], {}, "http: the port of worker 1 would be 65536, which there"),
        (["mine", "--log-level", "loud"], {}, "argument --log-level: invalid choice: 'loud'"),
        (["mine", "--nothing"], {}, "unrecognized arguments: --nothing"),
        (["mine", "--config", "nowhere.yaml"], {}, "nowhere.yaml: there is no such file; write one"),
        (["mine", "--config", "."], {}, ": this is a folder; name the file in it"),
        (["mine"], {"ORTHANC_EVENTS_CONSUMER": "/nowhere"}, "/nowhere: there is no such file; write one"),
        (["mine"], {"ORTHANC_EVENTS_BROKER": f"x://{SECRET}@h"}, "ORTHANC_EVENTS_BROKER: broker: is no URL of"),
        (["mine"], {"ORTHANC_EVENTS_STORE": f"x://{SECRET}@h"}, "ORTHANC_EVENTS_STORE: store: is no URL of a store"),
        (["mine"], {"ORTHANC_EVENTS_ORTHANC_URL": "ftp://h"}, "ORTHANC_EVENTS_ORTHANC_URL: orthanc: ftp://h is no URL"),
        (
            ["mine"],
            {"ORTHANC_EVENTS_ORTHANC_URL": "http://h", "ORTHANC_EVENTS_ORTHANC_TIMEOUT": "soon"},
            "ORTHANC_EVENTS_ORTHANC_TIMEOUT is no number of seconds: soon; write",
        ),
        (
            ["mine"],
            {"ORTHANC_EVENTS_ORTHANC_URL": "http://h", "ORTHANC_EVENTS_ORTHANC_TOKEN": f"{SECRET} \n"},
            "consumer one: orthanc: Orthanc at http://h: the token holds characters that no header can have; give",
        ),
    ],
)
def test_on_the_command_line_and_in_the_environment(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: list[str], environment: dict[str, str], words: str
) -> None:
    handler = _HANDLER.replace("event", "event, orthanc") if "TOKEN" in "".join(environment) else _HANDLER
    text = f"from orthanc_events_bridge.consumers import Consumer\n{_MEMORY}{handler}"
    (tmp_path / "mine.py").write_text(text, "utf-8")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check(run("consume", *line, "--check"), words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("concurency: 4", ":1: concurency: there is no such option; did you mean concurrency?"),
        ("broker:\n\ttype: nats", ":2: a tab can't be used here; indent"),
        ("", ":1: the file is empty; give at least the broker"),
        ("- 1", ":1: options are expected, and a list was found; give"),
        (
            "broker: ${NO_SUCH_VARIABLE}",
            ":1: broker: the environment variable NO_SUCH_VARIABLE is not set; set it where",
        ),
        ("start: new\nstart: oldest", ":2: start: is given a second time, after line 1; keep one"),
        ("retry: 3", ":1: retry: a block of options is expected, and a number was found; write"),
        ("retry: {maximum: soon}", ":1: retry.maximum: 'soon' is no duration; write"),
        ("longest: 45 minutes", ":1: longest: '45 minutes' is no duration; write"),
        ("\udcff", ":1: the file is not UTF-8 text here; save it"),
    ],
)
def test_in_the_file(run: Run, tmp_path: Path, content: str, words: str) -> None:
    text = f"from orthanc_events_bridge.consumers import Consumer\n{_MEMORY}{_HANDLER}"
    (tmp_path / "mine.py").write_text(text, "utf-8")
    (tmp_path / "consumer.yaml").write_bytes(content.encode("utf-8", "surrogateescape"))
    check(run("consume", "mine", "--config", "consumer.yaml", "--check"), f"{tmp_path}/consumer.yaml{words}")


ONE: Final = ["--consumer", "one", "--broker", "nats://h"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["burn"], "argument ACTION: invalid choice: 'burn'"),
        (["list"], "whose dead letters is not said (say --consumer NAME"),
        (["list", "--consumer", "one"], "at which broker is not said (say --broker URL"),
        (["list", "--consumer", "o ne", "--broker", "nats://h"], "--consumer: name: 'o ne' can't be the name of a"),
        (["list", "--consumer", "", "--broker", "nats://h"], "--consumer: name: '' can't be the name"),
        (
            ["list", "--consumer", "one", "--broker", f"x://{SECRET}@h"],
            "--broker: broker: is no URL of a broker; write",
        ),
        (["list", "--config", "nowhere.yaml"], "nowhere.yaml: there is no such file; write"),
        (["list", *ONE, "--older", "soon"], "argument --older: 'soon' is no duration: write 90s, 12h or 7d"),
        (["list", *ONE, "--newer", ""], "argument --newer: '' is no duration: write"),
        (["list", *ONE, "--older=-5"], "argument --older: '-5' is no duration: write"),
        (["list", *ONE, "--older", "2d", "--newer", "1d"], "no dead letter is older than 2d and newer than 1d (give"),
        (["list", *ONE, "--type", ""], "argument --type: is empty: say which are meant"),
        (["show", *ONE, "--id", ""], "argument --id: is empty: say which are meant"),
        (["redrive", *ONE, "--reason", ""], "argument --reason: is empty: say which"),
        (["redrive", *ONE], "which dead letters to redrive is not said (choose some"),
        (["discard", *ONE], "which dead letters to discard is not said (choose some"),
        (["redrive", *ONE, "--all", "--yes"], "unrecognized arguments: --yes"),
    ],
)
def test_of_dead_letters(run: Run, line: list[str], words: str) -> None:
    check(run("dlq", *line), words)


def test_a_webhook_has_no_dead_letters(run: Run, tmp_path: Path) -> None:
    (tmp_path / "consumer.yaml").write_text("name: one\nbroker: {type: webhook, url: 'https://h/x'}\n", "utf-8")
    check(run("dlq", "list", "--config", "consumer.yaml"), "no dead letters at a transport of type webhook (name the")


@pytest.mark.parametrize("action", [["show"], ["show", "--json"], ["redrive"], ["discard"]], ids=" ".join)
def test_an_id_that_no_dead_letter_has(run: Run, monkeypatch: pytest.MonkeyPatch, action: list[str]) -> None:
    monkeypatch.setattr(transports, "create", lambda options: MemoryTransport(options))
    check(
        run("dlq", *action, *ONE, "--id", "f40e8d8b"),
        "consumer one has no dead letter that fits with the id f40e8d8b",
        1,
    )


def test_a_type_that_is_almost_one(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Types of other producers are free: only a hint can be given."""
    said: list[Any] = []
    monkeypatch.setattr(transports, "create", lambda options: MemoryTransport(options))
    monkeypatch.setattr("builtins.print", lambda *words, **_: said.append(words[0]))
    assert run("dlq", "list", *ONE, "--type", "study.stabel")[0] == 0
    assert said == ["consumer one: no dead letters that fit (did you mean --type study.stable?)"]
