"""What all tests share: real servers, folders that go away, and a look for what was left behind."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from orthanc_events_bridge.testing.guard import leftovers, scratch_folder
from orthanc_events_bridge.testing.processes import kill_all_servers, running_servers, wait_until
from orthanc_events_bridge.testing.programs import in_ci, require

_scratch = pytest.StashKey[contextlib.ExitStack]()
_left = pytest.StashKey[list[str]]()

#: Tests that stand for real servers: in CI, skipping one of them is a failure.
REAL = ("integration", "fault", "mutant", "bench")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let one of several runs side by side do in a row what shares servers: the tests of a file that has a fixture for
    all of them. All others are dealt out one by one, those of the contract suite too: each of the runs has its brokers.

    By their addresses: with pytest 9.2 a mark doesn't do it, for xdist 3.8 puts groups where that no longer looks, and
    then deals out each test alone, so that each run starts the servers.
    """
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]  # it has no types

    class BySharedServers(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if _shares_servers(config.rootpath / file) else nodeid

    return BySharedServers(config, log)


@functools.cache
def _shares_servers(path: Path) -> bool:
    return 'scope="module"' in path.read_text("utf-8")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Let every `tmp_path` lie in a folder that goes away, also if pytest is killed; --basetemp keeps it."""
    stack = config.stash[_scratch] = contextlib.ExitStack()
    config.stash[_left] = []
    if config.option.basetemp is None:
        folder = stack.enter_context(scratch_folder("orthanc-events-tests-"))
        config.option.basetemp = str(folder / "t")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove what tests have written."""
    config.stash[_scratch].close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the servers' logs with a failure; in CI, make a failure of a skip of a real server."""
    report = yield
    if report.skipped and in_ci() and not hasattr(report, "wasxfail"):
        if any(item.get_closest_marker(name) for name in REAL):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            report.outcome = "failed"
            report.longrepr = f"{reason} (in CI a real server must not be skipped)"
    elif report.failed:
        for server in running_servers():
            end = "\n".join(server.log_text().splitlines()[-60:])
            report.sections.append((f"end of {server.log}", end))
    return report


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """No process of a server may be left, nor of what servers have started."""
    if session.config.stash[_left]:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if not wait_until(lambda: not leftovers(), 10):
        for pid in leftovers():
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_text("utf-8").replace("\0", " ")
                session.config.stash[_left].append(f"{pid}: {command}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    kill_all_servers()
    if hasattr(session.config, "workeroutput"):  # one of several runs side by side, which tells the one above them
        session.config.workeroutput["left"] = session.config.stash[_left]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what one of several runs side by side has left behind."""
    node.config.stash[_left] += getattr(node, "workeroutput", {}).get("left", [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was left behind."""
    if left := config.stash[_left]:
        terminalreporter.section("processes left behind", red=True)
        terminalreporter.write_line("\n".join(left))


@pytest.fixture
def nats_server(tmp_path: Path) -> Iterator[Any]:
    """A running NATS with JetStream (`NatsServer`)."""
    require("nats-server")
    from orthanc_events_bridge.testing.servers import NatsServer

    server = NatsServer(tmp_path / "nats")
    server.start()
    try:
        yield server
    finally:
        server.close(kill=True)


@pytest.fixture
def orthanc_factory(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """A maker of Orthancs with the bridge: ``(name, *, start=True, **options)``, options of `BridgedOrthanc`.

    At the end of the test each is killed, and its bridge process has to leave by itself.
    """
    require("orthanc", "orthanc-python")
    from orthanc_events_bridge.testing.bridged import BridgedOrthanc

    with contextlib.ExitStack() as stack:

        def make(name: str = "orthanc", *, start: bool = True, **options: Any) -> BridgedOrthanc:
            server = BridgedOrthanc(tmp_path / name, **options)
            stack.callback(server.close, kill=True)
            if start:
                server.start()
            return server

        yield make


@pytest.fixture
def orthanc(orthanc_factory: Callable[..., Any], nats_server: Any) -> Any:
    """A running Orthanc with the bridge (`BridgedOrthanc`), publishing to `nats_server`."""
    return orthanc_factory(nats=nats_server.url)
