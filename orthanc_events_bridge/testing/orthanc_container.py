"""Orthanc with the bridge in a container: the same class as for a process, run in another way.

It has its own folder under the same path, and the package that is running here mounted read-only, so that what is
tested is what is installed. The image has Orthanc with its Python plugin, and a Python with what the bridge needs
(`_INTERPRETERS`); capture runs in the plugin's Python, the bridge in that one. Where the container has this machine's
network, status and outbox can be read from outside too: the kernel, and thereby SQLite's locks and shared memory, are
the same.

``TEST_ORTHANC=containers`` lets every `orthanc_events_bridge.testing.line.Line` have one.
"""

from __future__ import annotations

import json
import shlex
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import httpx

import orthanc_events_bridge
from orthanc_events_bridge.bridge.config import parse
from orthanc_events_bridge.consumers import Event
from orthanc_events_bridge.consumers.broker import broker_options
from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.testing.bridged import SOURCE, BridgedOrthanc
from orthanc_events_bridge.testing.contained import BrokerContainer, ContainerServer
from orthanc_events_bridge.testing.dicom import Study, make_study
from orthanc_events_bridge.testing.programs import PLUGIN_FOLDERS
from orthanc_events_bridge.testing.watching import events_until

_PACKAGE: Final = Path(orthanc_events_bridge.__file__).parent
#: Where images have the bridge's Python: ours for tests (``docker/orthanc/Dockerfile``), and ``docker/Dockerfile``.
_INTERPRETERS: Final = ("/opt/bridge/bin/python", "/opt/orthanc-events/bin/python")
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
for python in {" ".join(_INTERPRETERS)}; do
    if [ -x "$python" ]; then
        PYTHONDONTWRITEBYTECODE=1 PYTHONPATH={shlex.quote(str(_PACKAGE.parent))} exec "$python" "$@"
    fi
done
echo "This image has no Python for the bridge at any of: {" ".join(_INTERPRETERS)}" >&2
exit 1
"""


class OrthancContainer(BridgedOrthanc, ContainerServer):
    """Orthanc with the bridge in a container. As a context manager it is started, and removed with all that it has.

    With a broker given it is ready when the bridge is connected to it. It lets in everybody from this machine, and
    takes C-STORE from the application entity ``STORESCU``.

    :param broker: to which the bridge sends, running already: a container of `testing.containers`; its URL as consumers
        have it; or a transport's options, as in the bridge's file.
    :param settings: more of the bridge's file: ``{"data": {"tags": ["StudyInstanceUID"]}}``.
    :param orthanc: options of Orthanc's configuration, over those set here.
    :param stable_age: after how many seconds without news a resource is stable.
    :param image: another one than ``ORTHANC_EVENTS_IMAGE_ORTHANC`` or the default.
    :param folder: where it keeps everything; a temporary one by default.
    :param options: of `BridgedOrthanc`, for our own tests.
    :raises MissingComponentError: no container engine answers, or there is no image.
    :raises BridgeError: the broker is none.
    """

    kind = "orthanc"

    def __init__(
        self,
        broker: BrokerContainer | str | Mapping[str, Any] | None = None,
        *,
        settings: Mapping[str, Any] | None = None,
        orthanc: Mapping[str, Any] | None = None,
        stable_age: int = 1,
        image: str | None = None,
        folder: Path | None = None,
        **options: Any,
    ) -> None:
        folder = self._prepare(folder, image)
        folder.mkdir(parents=True, exist_ok=True)
        script = options.get("user_script")
        self._scripts = {Path(script).parent: "rw"} if script else {}
        config = dict(options.pop("config", None) or orthanc or {})
        not_said = [name for name in _SAID if name not in (options.get("environment") or {})]
        super().__init__(
            folder,
            python=str(_program(folder / "python-in-the-image", _BRIDGE)),
            binary=_program(folder / "start-in-the-image", _START.replace("NOT_SAID", " ".join(not_said))),
            plugins=[folder / _PLUGIN],
            stable_age=stable_age,
            config=config,
            **options,
        )
        if self.published:  # requests from this machine come from the engine's proxy
            self.config |= {"RemoteAccessAllowed": True, "DicomCheckModalityHost": False} | config
        #: The broker as this machine reaches it, to read what the bridge has sent; none without a broker.
        self.broker: Mapping[str, Any] | str | None = None
        if broker is not None:
            self.broker, inner = self._addresses(broker)
            document = json.dumps({"source": SOURCE, "transports": [inner], **(settings or {})}, indent=2)
            parse(document, "the container's configuration", {})
            self.config_path.write_text(document, "utf-8")  # JSON is YAML too

    def _addresses(self, broker: BrokerContainer | str | Mapping[str, Any]) -> tuple[str | Mapping[str, Any], ...]:
        """The broker for who is on this machine, and for the bridge."""
        if not isinstance(broker, BrokerContainer):
            broker_options(broker)
            return broker, broker
        if broker.published != self.published:
            raise BridgeError(
                f"of {broker.title} and Orthanc one has this machine's network and the other one hasn't",
                "give both the same way",
            )
        return broker.get_url(), broker.get_inner_url()

    def get_url(self) -> str:
        """Where Orthanc's REST API is, for a consumer's ``orthanc``."""
        return self.url

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

        :param name: without prefix and version: ``study.stable`` (docs/events.md).
        :param study: Orthanc's id: only events of this study, of its series and instances count, and are returned.
        :param where: a condition that it has to meet as well.
        :param timeout: seconds.
        :raises TimeoutError: it did not come; the message says what did.
        :raises BridgeError: there is no broker, or it does not let events be read back.
        """
        if self.broker is None:
            raise BridgeError("this Orthanc was given no broker", "OrthancContainer(broker)")

        def counts(event: Event) -> bool:
            return study in (None, event.study_id)

        found = events_until(self.broker, lambda event: event.name == name and counts(event) and where(event), timeout)
        return [event for event in found if counts(event)]

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
        states = [transport["state"] for transport in document["transports"]]
        return document["capture"]["state"] == "following" and states == ["connected"]

    def _listen(self) -> list[int]:
        return [self.port, self.dicom_port]

    def _mounts(self) -> dict[Path, str]:
        return {**super()._mounts(), **self._scripts, _PACKAGE: "ro"}


def _program(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path
