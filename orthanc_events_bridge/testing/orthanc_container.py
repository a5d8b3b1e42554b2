"""Orthanc with the bridge in a container: the same class as for a process, run in another way.

It has its own folder under the same path, and the package that is running here mounted read-only, so that what is
tested is what is installed. The image has Orthanc with its Python plugin, and a Python with what the bridge needs
(`engine.INTERPRETERS`); capture runs in the plugin's Python, the bridge in that one. Where the container has this
machine's network, status and outbox can be read from outside too: the kernel, and thereby SQLite's locks and shared
memory, are the same.

``TEST_ORTHANC=containers`` lets every `orthanc_events_bridge.testing.line.Line` have one.
"""

from __future__ import annotations

import json
import shlex
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import httpx

import orthanc_events_bridge
from orthanc_events_bridge.bridge.config import parse
from orthanc_events_bridge.consumers import Event
from orthanc_events_bridge.consumers.broker import broker_options
from orthanc_events_bridge.consumers.routes import check_pattern
from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.testing.bridged import SOURCE, BridgedOrthanc
from orthanc_events_bridge.testing.contained import BrokerContainer, ContainerServer
from orthanc_events_bridge.testing.dicom import Study, make_study
from orthanc_events_bridge.testing.engine import INTERPRETERS
from orthanc_events_bridge.testing.programs import PLUGIN_FOLDERS
from orthanc_events_bridge.testing.watching import events_until
from orthanc_events_bridge.transports.blocks import block_of

_PACKAGE: Final = Path(orthanc_events_bridge.__file__).parent
_PLUGIN: Final = "libOrthancPython.so"
#: What an image may say for whoever starts it without a configuration of their own, as ``docker/Dockerfile`` does.
_SAID: Final = ("ORTHANC_EVENTS_CONFIG", "ORTHANC_EVENTS_OUTBOX", "ORTHANC_EVENTS_PYTHON")

_START: Final = f"""\
#!/bin/sh
# Orthanc finds its Python plugin under one name, wherever the image has it.
here=$(dirname "$0")
unset NOT_SAID
for folder in {" ".join(PLUGIN_FOLDERS)}; do
    if [ -f "$folder/{_PLUGIN}" ]; then
        ln -sfn "$folder/{_PLUGIN}" "$here/{_PLUGIN}"
        exec Orthanc "$@"
    fi
done
echo "This image has no {_PLUGIN} in any of: {" ".join(PLUGIN_FOLDERS)}" >&2
exit 1
"""

_BRIDGE: Final = f"""\
#!/bin/sh
# The image's Python with what the bridge needs, and the package that is mounted.
for python in {" ".join(INTERPRETERS)}; do
    if [ -x "$python" ]; then
        PYTHONDONTWRITEBYTECODE=1 PYTHONPATH={shlex.quote(str(_PACKAGE.parent))} exec "$python" "$@"
    fi
done
echo "This image has no Python for the bridge at any of: {" ".join(INTERPRETERS)}" >&2
exit 1
"""


class OrthancContainer(BridgedOrthanc, ContainerServer):
    """Orthanc with the bridge in a container. As a context manager it is started, and removed with all that it has.

    With a broker given it is ready when the bridge is connected to it; without one it is an Orthanc without the bridge,
    to send studies to, say (`get_modality`). It lets in everybody from this machine, and
    takes C-STORE from the application entity ``STORESCU``.

    :param broker: to which the bridge sends, running already: a container of `testing.containers`; its URL as consumers
        have it; or a transport's options, as in the bridge's file.
    :param transport: more of the transport's options: ``{"mode": "binary"}``.
    :param settings: more of the bridge's file: ``{"data": {"tags": ["StudyInstanceUID"]}}``.
    :param orthanc: options of Orthanc's configuration, over those set here.
    :param user_script: a Python script of your own for Orthanc, which the bridge's loads as well.
    :param stable_age: after how many seconds without news a resource is stable.
    :param image: another one than ``ORTHANC_EVENTS_IMAGE_ORTHANC`` or the default.
    :param mounts: files and folders that it sees too, under their own paths, and can't change: Lua scripts, password
        files, certificates.
    :param folder: where it keeps everything, its log too; a temporary one by default.
    :param options: of `BridgedOrthanc`, for our own tests.
    :raises MissingComponentError: no container engine answers, or there is no image.
    :raises BridgeError: the broker is none.
    """

    kind = "orthanc"

    def __init__(
        self,
        broker: BrokerContainer | str | Mapping[str, Any] | None = None,
        *,
        transport: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        orthanc: Mapping[str, Any] | None = None,
        user_script: Path | None = None,
        stable_age: int = 1,
        image: str | None = None,
        mounts: Iterable[str | Path] = (),
        folder: Path | None = None,
        **options: Any,
    ) -> None:
        folder = self._prepare(folder, image, mounts)
        folder.mkdir(parents=True, exist_ok=True)
        self._scripts = {user_script.absolute().parent: "rw"} if user_script else {}
        config = dict(options.pop("config", None) or orthanc or {})
        not_said = [name for name in _SAID if name not in (options.get("environment") or {})]
        super().__init__(
            folder,
            python=str(_program(folder / "python-in-the-image", _BRIDGE)),
            binary=_program(folder / "start-in-the-image", _START.replace("NOT_SAID", " ".join(not_said))),
            plugins=[folder / _PLUGIN],
            stable_age=stable_age,
            user_script=user_script and user_script.absolute(),
            config=config,
            **options,
        )
        if self.published:  # requests from this machine come from the engine's proxy
            self.config |= {"RemoteAccessAllowed": True, "DicomCheckModalityHost": False} | config
        #: The broker as this machine reaches it, to read what the bridge has sent; none without a broker.
        self.broker: Mapping[str, Any] | None = None
        if broker is not None:
            self.broker, inner = self._addresses(broker, transport or {})
            document = json.dumps({"source": SOURCE, "transports": [inner], **(settings or {})}, indent=2)
            parse(document, "the container's configuration", {})
            self.config_path.write_text(document, "utf-8")  # JSON is YAML too
        elif not self.config_path.stat().st_size and "PythonScript" not in config:
            del self.config["PythonScript"]
            if user_script:
                self.config["PythonScript"] = str(user_script.absolute())

    def _addresses(
        self, broker: BrokerContainer | str | Mapping[str, Any], transport: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """The broker for who is on this machine, and for the bridge, with more of a transport's options."""
        if not isinstance(broker, BrokerContainer):
            block = _block(broker, transport)
            return block, block
        if broker.published != self.published:
            raise BridgeError(
                f"of {broker.title} and Orthanc one has this machine's network and the other one hasn't",
                "give both the same way",
            )
        return _block(broker.get_url(), transport), _block(broker.get_inner_url(), transport)

    def get_url(self) -> str:
        """Where Orthanc's REST API is, for a consumer's ``orthanc``."""
        return self.url

    def get_modality(self) -> tuple[str, str, int]:
        """Its place in another container's ``DicomModalities``: title, host and port.

        It takes what comes only where it has a modality of the sender's title, or ``"DicomAlwaysAllowStore": True``.
        """
        host = self.alias if self.published else "127.0.0.1"
        return str(self.config["DicomAet"]), host, int(self.config["DicomPort"])

    # What tests do with it.

    def upload_study(self, study: Study | None = None, **options: Any) -> Study:
        """Upload a study, instance by instance.

        :param study: made by `orthanc_events_bridge.testing.dicom.make_study`; a new one by default.
        :param options: of `make_study`: ``series``, ``instances`` (of each series), ``modality`` …
        :return: the study; ``id``, ``series`` and ``patient`` are Orthanc's ids.
        :raises NotAcknowledgedError: no answer, or a status of 500 and above.
        """
        study = study or make_study(**options)
        for instance in study:
            self.upload(instance.data)
        return study

    def events_until(
        self,
        name: str,
        *,
        study: str | None = None,
        where: Callable[[Event], bool] = lambda event: True,
        timeout: float = 60.0,
    ) -> list[Event]:
        """Wait for an event, and return what the broker has told until then, in the order in which it came.

        What was sent before counts too, so that nothing is missed between an upload and this. In a coroutine it is
        ``await asyncio.to_thread(orthanc.events_until, …)``.

        :param name: without prefix and version: ``study.stable`` (docs/events.md); or a pattern, ``study.*``.
        :param study: Orthanc's id: only events of this study, of its series and instances count, and are returned.
        :param where: a condition that it has to meet as well.
        :param timeout: seconds.
        :raises TimeoutError: it did not come; the message says what did.
        :raises BridgeError: there is no broker, or it does not let events be read back; or no event is called so.
        """
        if self.broker is None:
            raise BridgeError("this Orthanc was given no broker", "OrthancContainer(broker)")
        check_pattern(name)

        def counts(event: Event) -> bool:
            return study in (None, event.study_id)

        try:
            return events_until(self.broker, name, counts, where, timeout)
        except TimeoutError as error:
            raise TimeoutError(f"{error}{self._state()}") from None

    def wait_for_event(
        self,
        name: str,
        *,
        study: str | None = None,
        where: Callable[[Event], bool] = lambda event: True,
        timeout: float = 60.0,
    ) -> Event:
        """Wait for an event; see `events_until`."""
        return self.events_until(name, study=study, where=where, timeout=timeout)[-1]

    # How it is run.

    def _is_ready(self) -> bool:
        return super()._is_ready() and (self.broker is None or self._is_connected())

    def _is_connected(self) -> bool:
        try:
            document = self.status()
        except (httpx.HTTPError, ValueError):
            return False
        if "transports" not in document:  # there is no outbox yet
            return False
        states = [transport["state"] for transport in document["transports"]]
        return document["capture"]["state"] == "following" and states == ["connected"]

    def _state(self) -> str:
        """What the bridge says about its broker, as the end of a message."""
        try:
            (transport,) = self.status()["transports"]
        except (httpx.HTTPError, LookupError, ValueError) as error:
            return f"Orthanc does not say how the bridge is: {type(error).__name__}"
        last = transport["last_error"] or {"message": "none"}
        return f"The bridge: {transport['state']}, {transport['pending']} rows behind, last error: {last['message']}"

    def _listen(self) -> list[int]:
        return [self.port, self.dicom_port]

    def _mounts(self) -> dict[Path, str]:
        return {**super()._mounts(), **self._scripts, _PACKAGE: "ro"}


def _block(broker: str | Mapping[str, Any], more: Mapping[str, Any]) -> Mapping[str, Any]:
    """A transport's options.

    :raises BridgeError: they are none.
    """
    broker_options(broker)  # before a URL is read
    block = {**(block_of(broker) if isinstance(broker, str) else broker), **more}
    broker_options(block)
    return block


def _program(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path
