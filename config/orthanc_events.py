"""Loads orthanc-events-bridge into Orthanc. Written by `orthanc-events init`; name it in Orthanc's "PythonScript".

Only the standard library and the package itself are imported here, in Orthanc's process. The bridge runs beside it, with
the interpreter below.
"""

import importlib.util
import sys

import orthanc

#: The interpreter that the package is installed for; ORTHANC_EVENTS_PYTHON overrides it.
PYTHON = '/opt/orthanc-events/bin/python'
PACKAGE = '/opt/orthanc-events/package'
#: The bridge's configuration; ORTHANC_EVENTS_CONFIG overrides it.
CONFIG = '/etc/orthanc-events/orthanc-events.yaml'
#: A Python script of your own, for Orthanc to load as well. Its OnChange callback goes on working.
SCRIPT = None

try:
    spec = importlib.util.spec_from_file_location(
        "orthanc_events_bridge", PACKAGE + "/__init__.py", submodule_search_locations=[PACKAGE]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["orthanc_events_bridge"] = module
    spec.loader.exec_module(module)
    from orthanc_events_bridge.plugin import start
except Exception as error:
    orthanc.LogError("orthanc-events: changes are NOT recorded: " + PACKAGE + " can't be loaded: " + repr(error)
                     + "; install the package again, then run `orthanc-events init --shim`")
    if SCRIPT:  # yours goes on without us
        sys.path.insert(0, SCRIPT.rpartition("/")[0])
        spec = importlib.util.spec_from_file_location("orthanc_user_script", SCRIPT)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
else:
    start(python=PYTHON, config=CONFIG, script=SCRIPT)
