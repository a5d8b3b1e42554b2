"""One broker of each kind for the whole run; the tests that apply to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest

from tests.contract.harness import Harness
from tests.contract.table import TABLE


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "needs(capability): for transports that the contract suite's table says can do this"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test runs on every transport of which the table says that it can do what the test needs."""
    if "harness" in metafunc.fixturenames:
        needs = [str(mark.args[0]) for mark in metafunc.definition.iter_markers("needs")]
        names = [name for name, (_, must) in TABLE.items() if all(getattr(must, need) for need in needs)]
        metafunc.parametrize("harness", names, indirect=True)


@pytest.fixture(scope="session")
def brokers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Harness]]:
    started: dict[str, Harness] = {}
    with ExitStack() as stack:

        def get(name: str) -> Harness:
            if name not in started:
                kind, _ = TABLE[name]
                started[name] = stack.enter_context(closing(kind(tmp_path_factory.mktemp(name))))
            return started[name]

        yield get


@pytest.fixture
def harness(brokers: Callable[[str], Harness], request: pytest.FixtureRequest) -> Iterator[Harness]:
    harness = brokers(request.param)
    harness.new_place()
    yield harness
    harness.tidy()
