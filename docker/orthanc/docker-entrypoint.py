#!/usr/bin/python3
"""Puts Orthanc's configuration together as orthancteam's images do, and becomes Orthanc.

First come the files of /etc/orthanc, in the order of their names, then the variables that begin with ``ORTHANC__``:
``ORTHANC__DICOM_WEB__ENABLE=true`` is ``{"DicomWeb": {"Enable": true}}``. A value is JSON if it can be read as that,
else text. ``ORTHANC_PASSWORD`` is the password of a user ``orthanc``. The program's argument is the file to write.
"""

import json
import os
import re
import sys
from pathlib import Path

#: What applies if nothing else is said, as in orthancteam's images.
DEFAULTS = {
    "AuthenticationEnabled": True,
    "IndexDirectory": "/var/lib/orthanc/db",
    "Plugins": ["/usr/share/orthanc/plugins"],
    "RemoteAccessAllowed": True,
    "StorageDirectory": "/var/lib/orthanc/db",
}


def read(path):
    """Read one of Orthanc's files: JSON with comments."""
    text = re.sub(
        r'"(?:\\.|[^"\\])*"|//[^\n]*|/\*.*?\*/',
        lambda found: found[0] if found[0].startswith('"') else " ",
        path.read_text("utf-8"),
        flags=re.DOTALL,
    )
    try:
        return json.loads(text)
    except ValueError as error:
        sys.exit(f"{path} is no JSON: {error}")


def merge(under, over):
    """Put blocks together; of what both say, the second applies."""
    for name, value in over.items():
        if isinstance(value, dict) and isinstance(under.get(name), dict):
            merge(under[name], value)
        else:
            under[name] = value


def of_variable(name, text):
    """Spell a variable's name as Orthanc spells its options."""
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    for part in reversed(name.split("__")[1:]):
        value = {"".join(word.capitalize() for word in part.split("_")): value}
    return value


def main(target):
    """Write the configuration, and become Orthanc."""
    configuration = dict(DEFAULTS)
    for path in sorted(Path("/etc/orthanc").glob("*.json")):
        merge(configuration, read(path))
    for name, text in sorted(os.environ.items()):
        if name.startswith("ORTHANC__"):
            merge(configuration, of_variable(name, text))
    if os.environ.get("ORTHANC_PASSWORD"):
        merge(configuration, {"RegisteredUsers": {"orthanc": "${ORTHANC_PASSWORD}"}})
    os.umask(0o077)
    Path(target).write_text(json.dumps(configuration, indent=2), "utf-8")
    verbose = ["--verbose"] if os.environ.get("VERBOSE_ENABLED") == "true" else []
    os.execvp("Orthanc", ["Orthanc", *verbose, target])


main(*sys.argv[1:])
