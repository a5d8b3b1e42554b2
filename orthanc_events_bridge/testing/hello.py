"""``make hello``: a broker, an Orthanc with the bridge, and `examples/hello/hello.py` beside them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from orthanc_events_bridge.testing.brokers import BROKERS
from orthanc_events_bridge.testing.line import Line
from orthanc_events_bridge.testing.processes import ServerError
from orthanc_events_bridge.testing.reacting import consumer_url
from orthanc_events_bridge.testing.showing import go_on, shown

EXAMPLE: Final = Path(__file__).parents[2] / "examples" / "hello" / "hello.py"
#: Seconds that it may take to say hello, and to end.
_PATIENCE: Final = 60.0


@contextmanager
def started(environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Start the example; it ends by SIGTERM.

    :raises ServerError: it does not end so, or with another exit code than 0.
    """
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLE)], env=os.environ | environment, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
        process.terminate()
        process.communicate(timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        raise ServerError(f"hello.py has not ended within {_PATIENCE:.0f} s") from None
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        raise ServerError(f"hello.py has ended with exit code {process.returncode}")


def run(scratch: Path, kind: str, *, keep: bool) -> int:
    """Show it. Returns the exit code."""
    kinds = [one for one in BROKERS if one != "webhook"]
    if kind not in kinds:
        print(f"BROKER={kind} has no consumers; there are: {', '.join(kinds)}", file=sys.stderr)
        return 2
    print(f"Starting {BROKERS[kind].title}, and Orthanc with the bridge …", flush=True)
    with Line(scratch, broker=kind) as line:
        environment = {"BROKER_URL": consumer_url(line.broker), "ORTHANC_URL": line.orthanc.url}
        spelt = " ".join(f"{name}={value}" for name, value in environment.items())
        print(f"{spelt} python examples/hello/hello.py", flush=True)
        with started(environment) as process:
            assert process.stdout is not None
            said = process.stdout.readline()
            print(said, end="", flush=True)
            if keep and said:
                go_on(lambda: process.poll() is None)
    return 0 if said.startswith("hello, ") else 1


def main() -> int:
    """See `shown`."""
    return shown("hello", lambda scratch, kind, keep: run(scratch, kind, keep=keep))


if __name__ == "__main__":
    sys.exit(main())
