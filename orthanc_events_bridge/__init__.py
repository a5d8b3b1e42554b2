"""Every change of an Orthanc DICOM server as a CloudEvent on your broker.

This module is loaded inside Orthanc's own process too: it imports the standard library only.
"""

try:
    from orthanc_events_bridge._version import __version__
except ImportError:  # files as git has them, which were never built or installed
    __version__ = "0.0.0"

__all__ = ["__version__"]
