"""A stand-in for the module ``orthanc`` that Orthanc's Python plugin gives to its script: for tests of such scripts.

What the plugin's own C code does is not in it: see docs/testing.md for what it is good for.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import re
import sys
import tempfile
import types
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

from orthanc_events_bridge.changes.model import ChangeKind, ResourceLevel

#: ``OrthancPluginErrorCode``: what the script can be told.
_UNKNOWN_RESOURCE: Final = 17

#: As Orthanc itself names them.
ChangeType: Final = ChangeKind
ResourceType: Final = ResourceLevel


class OrthancException(Exception):  # noqa: N818 -- Orthanc's name
    """As Orthanc raises it: with the number of the error and its words."""


class Answer(NamedTuple):
    """What a REST callback of the script answered.

    :ivar status: of HTTP.
    :ivar body: its bytes.
    :ivar mime: its type.
    """

    status: int
    body: bytes
    mime: str = ""

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


class RestOutput:
    """What a REST callback answers to."""

    def __init__(self) -> None:
        self.answer: Answer | None = None

    def AnswerBuffer(self, buffer: str | bytes, mime: str, /) -> None:  # noqa: N802
        self.answer = Answer(200, _bytes(buffer), mime)

    def SendHttpStatus(self, status: int, body: str | bytes, /) -> None:  # noqa: N802
        self.answer = Answer(status, _bytes(body))

    def SendMethodNotAllowed(self, allowed: str, /) -> None:  # noqa: N802
        self.answer = Answer(405, allowed.encode())


class FakeOrthanc:
    """The module ``orthanc`` for as long as the context lasts.

    ::

        with FakeOrthanc() as orthanc:
            orthanc.rest["GET", "/studies/1"] = {"ID": "1"}
            import my_script
            orthanc.change(orthanc.ChangeType.STABLE_STUDY, orthanc.ResourceType.STUDY, "1")
            assert "stable" in orthanc.log[-1]

    At its end ORTHANC_STOPPED is called back, and then what was registered with `atexit` meanwhile, as Orthanc does
    when it stops. Modules that the script has imported stay imported: load each script anew (`run`).

    The bridge itself can be in the script: changes are then recorded in a temporary folder, and no process is started
    that would tell them.

    :param configuration: what ``GetConfiguration`` gives.
    :ivar rest: (method, path) → the answer: JSON, bytes, an exception, or what a function of the request's body
        returns. What is not in it does not exist. Wildcards as in `fnmatch`.
    :ivar asked: (method, path, body) of each request.
    :ivar log: every line that was logged, ``I``, ``W`` or ``E`` in front.
    """

    ChangeType = ChangeType
    ResourceType = ResourceType
    OrthancException = OrthancException
    RestOutput = RestOutput

    def __init__(self, configuration: Mapping[str, Any] | None = None) -> None:
        self.configuration: dict[str, Any] = dict(configuration or {})
        self.rest: dict[tuple[str, str], Any] = {}
        self.asked: list[tuple[str, str, bytes]] = []
        self.log: list[str] = []
        self._on_change: Callable[[int, int, str], object] | None = None
        self._routes: list[tuple[str, Callable[..., object]]] = []
        self._atexit: list[Callable[[], object]] = []
        self._stack = ExitStack()
        self._number = 0
        self._changes: list[dict[str, Any]] = []

    # What a test does.

    def change(self, change: int, level: int = ResourceLevel.NONE, resource: str = "") -> object:
        """Something has changed: call the script back.

        :param change: `ChangeType`.
        :param level: `ResourceType`.
        :param resource: Orthanc's id of it.
        :return: what the callback returned, if there is one.
        """
        return None if self._on_change is None else self._on_change(int(change), int(level), resource)

    def request(self, path: str, method: str = "GET", body: bytes = b"", **more: Any) -> Answer:
        """Ask the script's own REST callbacks.

        :param path: that it is asked for.
        :param method: ``GET`` and so on.
        :param body: of the request.
        :param more: further keywords for the callback: ``headers``, ``get`` …
        :return: 404 where it has none for that path.
        """
        for pattern, callback in self._routes:
            match = re.fullmatch(pattern, path)
            if match is not None:
                output = RestOutput()
                given = {"method": method, "groups": match.groups(), "headers": {}, "get": {}, "body": body, **more}
                callback(output, path, **given)
                return output.answer or Answer(200, b"")
        return Answer(404, b"")

    def run(self, script: str | Path) -> types.ModuleType:
        """Load a script as Orthanc does: by its file, its folder in front on the path.

        :raises Exception: what the script raises; Orthanc would not start.
        """
        path = Path(script).absolute()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is not a Python script")
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(path.parent))
        self._stack.callback(sys.path.remove, str(path.parent))
        sys.modules[path.stem] = module
        self._stack.callback(sys.modules.pop, path.stem, None)
        spec.loader.exec_module(module)
        return module

    def __enter__(self) -> Self:
        before = sys.modules.get("orthanc")
        module = types.ModuleType("orthanc", "A stand-in for tests (orthanc_events_bridge.testing.FakeOrthanc).")
        for name in dir(type(self)):
            if name[0].isupper():
                setattr(module, name, getattr(self, name))
        sys.modules["orthanc"] = module
        self._stack.callback(_put_back, before)
        self.configuration.setdefault("IndexDirectory", self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._stack.callback(_set_environment, "ORTHANC_EVENTS_PYTHON", os.environ.get("ORTHANC_EVENTS_PYTHON"))
        _set_environment("ORTHANC_EVENTS_PYTHON", os.devnull)
        register = atexit.register
        atexit.register = self._register_atexit  # type: ignore[assignment]
        self._stack.callback(setattr, atexit, "register", register)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            try:
                self.change(ChangeKind.ORTHANC_STOPPED)
            finally:
                while self._atexit:
                    self._atexit.pop()()

    def _register_atexit(self, function: Callable[..., object], *args: Any, **keywords: Any) -> Any:
        self._atexit.append(lambda: function(*args, **keywords))
        return function

    # What the script finds in the module.

    def RegisterOnChangeCallback(self, callback: Callable[[int, int, str], None], /) -> None:  # noqa: N802
        """`change` calls the callback from then on.

        :raises RuntimeError: there is one already, as Orthanc says it.
        """
        if self._on_change is not None:
            raise RuntimeError("Can only register one Python on-changes callback")
        self._on_change = callback

    def RegisterRestCallback(self, pattern: str, callback: Callable[..., None], /) -> None:  # noqa: N802
        """`request` calls the callback for paths that fit the pattern."""
        self._routes.append((pattern, callback))

    def RegisterStorageArea(  # noqa: N802
        self, create: Callable[..., Any], read: Callable[..., Any], remove: Callable[..., Any], /
    ) -> None:
        """None of create, read and remove is ever called: nothing is stored here."""

    def LogInfo(self, message: str, /) -> None:  # noqa: N802
        """The message is in `log`."""
        self.log.append(f"I {message}")

    def LogWarning(self, message: str, /) -> None:  # noqa: N802
        """The message is in `log`."""
        self.log.append(f"W {message}")

    def LogError(self, message: str, /) -> None:  # noqa: N802
        """The message is in `log`."""
        self.log.append(f"E {message}")

    def GetConfiguration(self) -> str:  # noqa: N802
        """What the stand-in was made with, as JSON."""
        return json.dumps(self.configuration)

    def GetConfigurationPath(self) -> str:  # noqa: N802
        """A folder that is there until the end."""
        return str(self.configuration["IndexDirectory"])

    def GenerateRestApiAuthorizationToken(self) -> str:  # noqa: N802
        """Another one each time; nobody checks it."""
        return f"Bearer {uuid.uuid4()}"

    def RestApiGet(self, path: str, /) -> bytes:  # noqa: N802
        """What `rest` has for GET and the path.

        :raises OrthancException: it has nothing.
        """
        return self._ask("GET", path)

    def RestApiPost(self, path: str, body: str | bytes, /) -> bytes:  # noqa: N802
        """The same for POST, with a body; see `RestApiGet` for the path."""
        return self._ask("POST", path, body)

    def RestApiPut(self, path: str, body: str | bytes, /) -> bytes:  # noqa: N802
        """The same for PUT, with a body; see `RestApiGet` for the path."""
        return self._ask("PUT", path, body)

    def RestApiDelete(self, path: str, /) -> None:  # noqa: N802
        """The same for DELETE; see `RestApiGet` for the path."""
        self._ask("DELETE", path)

    def _ask(self, method: str, path: str, body: str | bytes = b"") -> bytes:
        self.asked.append((method, path, _bytes(body)))
        for (wanted, pattern), answer in self.rest.items():
            if wanted == method and (path == pattern or fnmatchcase(path, pattern)):
                return _answer(answer, _bytes(body))
        raise OrthancException(_UNKNOWN_RESOURCE, "Unknown resource")


def _answer(answer: Any, body: bytes) -> bytes:
    if callable(answer):
        answer = answer(body)
    if isinstance(answer, BaseException):
        raise answer
    return _bytes(answer) if isinstance(answer, str | bytes) else json.dumps(answer).encode()


def _bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


def _put_back(before: types.ModuleType | None) -> None:
    if before is None:
        sys.modules.pop("orthanc", None)
    else:
        sys.modules["orthanc"] = before


def _set_environment(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
