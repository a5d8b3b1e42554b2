"""Every change of an Orthanc DICOM server as a CloudEvent on your broker.

This module is loaded inside Orthanc's own process too: it imports the standard library only.
"""

__version__ = "0.1.0"
