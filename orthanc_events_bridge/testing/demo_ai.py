"""``make demo-ai``: a series goes from a PACS over a gateway to an AI service, and its results back into the PACS.

Everything is real: two Orthancs, the broker, the service of ``examples/ai-service``, and ``orthanc-events dispatch`` as
its users start it. What it is at comes from the rows that ``orthanc-events workflow`` reads.
"""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from pydantic import SecretStr

from orthanc_events_bridge.testing.brokers import BROKERS
from orthanc_events_bridge.testing.dicom import measured
from orthanc_events_bridge.testing.processes import ServerError
from orthanc_events_bridge.testing.programs import MissingComponentError
from orthanc_events_bridge.testing.reacting import consumer_url
from orthanc_events_bridge.testing.ring import Ring
from orthanc_events_bridge.testing.servers import OrthancServer
from orthanc_events_bridge.testing.showing import go_on, shown
from orthanc_events_bridge.workflows.workflow import Workflow, Workflows

#: Seconds for the whole way, and to end.
_PATIENCE: Final = 120.0
#: What each state means for who looks on.
_SAYS: Final = {
    "anonymizing": "gateway: the series is stable and fits a rule; it is pseudonymised",
    "sending": "gateway → service: {anonymized} by STOW-RS",
    "waiting": "service: it has the series; results are waited for",
    "returning": "service → gateway: a result by STOW-RS; it is given back its patient",
    "delivering": "gateway → PACS: results by C-STORE",
    "done": "PACS: it has all of them",
}


@contextmanager
def _dispatching(file: Path) -> Iterator[None]:
    """``orthanc-events dispatch`` beside it all.

    :raises ServerError: it has ended by itself.
    """
    log = file.with_name("dispatch.log")
    command = [sys.executable, "-m", "orthanc_events_bridge", "dispatch", "--config", str(file)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        yield
        if process.poll() is not None:
            raise ServerError(f"orthanc-events dispatch has ended:\n{log.read_text('utf-8')}")
        process.terminate()
        process.wait(_PATIENCE)
    finally:
        process.kill()
        process.wait()


async def _watch(store: SecretStr, began: float) -> Workflow | None:
    """Print the states of the workflow as they come, until it has ended, or for as long as there is patience."""
    rows, count, found = Workflows(store, "dispatch"), 0, None
    try:
        while time.monotonic() - began < _PATIENCE:
            for found in await rows.all():
                for state, _ in found.history[count:]:
                    said = _SAYS.get(state, f"{state}: {found.reason}").format(anonymized=f"series {found.anonymized}")
                    print(f"  {time.monotonic() - began:5.1f} s  {said}", flush=True)
                count = len(found.history)
            if found is not None and found.state in ("done", "failed", "overdue"):
                return found
            await asyncio.sleep(0.1)
    finally:
        await rows.close()
    return found


def _results(pacs: OrthancServer, study: str, images: set[str], volume: float) -> bool:
    """Say where the results are; whether they are."""
    print("\nin the PACS, under the original patient and study:")
    found = {}
    for one in sorted(set(pacs.get("/instances")) - images):
        tags = pacs.get(f"/instances/{one}/simplified-tags")
        found[tags["Modality"]] = tags
        print(f"  {tags['Modality']:<4} {pacs.url}/instances/{one}", flush=True)
    if found.keys() != {"SEG", "SR"} or any(one["StudyInstanceUID"] != study for one in found.values()):
        return False
    print(f"  the report says {measured(found['SR'])} ml; the sphere in the images has {volume:.2f} ml")
    return True


def run(scratch: Path, kind: str, *, keep: bool) -> int:
    """Show it. Returns the exit code."""
    try:
        from orthanc_events_bridge.testing.phantoms import Phantom, file_of
    except ModuleNotFoundError as error:
        raise MissingComponentError(f"{error.name} is not installed: use Python 3.11 to 3.13") from error
    kinds = [one for one in BROKERS if one != "webhook"]
    if kind not in kinds:
        print(f"BROKER={kind} has no consumers; there are: {', '.join(kinds)}", file=sys.stderr)
        return 2
    print(f"Starting {BROKERS[kind].title}, a PACS, a gateway with the bridge, and the AI service …", flush=True)
    pacs = OrthancServer(scratch / "pacs", config={"DicomAet": "PACS", "DicomAlwaysAllowStore": True})
    ring = Ring(scratch, kind, pacs)
    with ring.running():
        for name, url in (("PACS", pacs.url), ("gateway", ring.gateway.url), ("service", ring.service.url)):
            print(f"  {name:<8} {url}")
        file = scratch / "dispatch" / "dispatch.yaml"
        options = ring.options(file.parent)
        file.write_text(
            f"broker: {consumer_url(ring.line.broker)}\northanc: {ring.gateway.url}\nstart: oldest\n{options}", "utf-8"
        )
        with _dispatching(file):
            phantom = Phantom()
            print("\nA CT series with a sphere in it is in the PACS:", flush=True)
            images = phantom.ct(slices=16)
            stored = [pacs.upload(file_of(one)) for one in images]
            began = time.monotonic()
            ring.send(stored[0]["ParentSeries"])
            print(f"  {time.monotonic() - began:5.1f} s  PACS → gateway: {len(images)} images by C-STORE", flush=True)
            found = asyncio.run(_watch(SecretStr(f"sqlite:///{file.with_name('dispatch.db')}"), began))
            sphere = 4 / 3 * math.pi * phantom.radius**3 / 1000
            there = _results(pacs, phantom.study_uid, {one["ID"] for one in stored}, sphere)
            if keep:
                show = f"{sys.executable} -m orthanc_events_bridge workflow list --config {file}"
                print(f"\nhow far each series is: {show}")
                go_on()
        if found is None or found.state != "done" or not there:
            print(
                f"demo-ai: it is not done: {found.reason or found.state if found else 'nothing began'}", file=sys.stderr
            )
            print(file.with_name("dispatch.log").read_text("utf-8"), file=sys.stderr)
            return 1
    print("(all of them were stopped; `make demo-ai KEEP=1` leaves them running)")
    print("where to go on: docs/consumers/ai-dispatch.md")
    return 0


def main() -> int:
    """See `shown`."""
    return shown("demo-ai", lambda scratch, kind, keep: run(scratch, kind, keep=keep))


if __name__ == "__main__":
    sys.exit(main())
