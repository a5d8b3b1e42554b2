"""``python -m orthanc_events_bridge``: the same as ``orthanc-events``."""

import sys

from orthanc_events_bridge.cli import main

if __name__ == "__main__":
    sys.exit(main())
