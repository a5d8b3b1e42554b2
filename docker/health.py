#!/usr/bin/env python3
"""Tells an image's engine whether the server in it answers: exit code 0 if so.

    health.py [URL]                              Orthanc (default), or a consumer's /health/ready
    health.py --connected URL [--wait SECONDS]   every broker of the bridge's configuration is connected

Where a login is needed, it is ``orthanc`` with the password in ORTHANC_PASSWORD, or in the file that
ORTHANC_PASSWORD_FILE names. Standard library only.
"""

import argparse
import base64
import json
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

TIMEOUT = 20


def fetch(url):
    """Ask as the user ``orthanc``, if there is a password.

    :raises OSError: nobody answers, or with an error.
    """
    file = os.environ.get("ORTHANC_PASSWORD_FILE")
    password = os.environ.get("ORTHANC_PASSWORD") or (Path(file).read_text().strip() if file else "")
    request = urllib.request.Request(url)
    if password:
        login = base64.b64encode(f"orthanc:{password}".encode()).decode()
        request.add_header("Authorization", f"Basic {login}")
    # This machine's proxies lead elsewhere.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=TIMEOUT) as answer:
        return answer.read()


def trouble(options):
    """Say what is wrong; nothing if all is well."""
    try:
        answer = fetch(options.url)
        if options.connected:
            transports = json.loads(answer)["transports"]
            states = {one["name"]: one["state"] for one in transports if one["configured"]}
            if not states or set(states.values()) != {"connected"}:
                return f"not connected yet: {states}"
    except urllib.error.HTTPError as error:
        # Whoever asks for a login is alive.
        refused = error.code in (401, 403)
        if options.connected and refused:
            right = "if it was changed, restart that server, which reads it when it starts"
            return f"{options.url} refuses the password: {right}"
        if not refused:
            return f"{options.url}: {error}"
    except (OSError, LookupError, TypeError, ValueError) as error:
        return f"{options.url}: {error}"
    return ""


def main():
    """Ask once, or until it is well."""
    parser = argparse.ArgumentParser()
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8042/system")
    parser.add_argument("--connected", action="store_true")
    parser.add_argument("--wait", type=float, default=0.0)
    options = parser.parse_args()
    until = time.monotonic() + options.wait
    while (wrong := trouble(options)) and time.monotonic() < until:
        time.sleep(0.5)
    sys.exit(wrong or 0)


main()
