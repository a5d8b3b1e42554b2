"""What DICOM's dictionary says of keywords that somebody has written."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator


def odd(paths: Iterable[str]) -> Iterator[str]:
    """Say which keywords DICOM doesn't know, each with what may be meant. Without pydicom nobody can tell.

    It is no mistake by itself: Orthanc can be told of further ones (its ``Dictionary``).

    :param paths: keywords; inside of sequences with dots between.
    """
    try:
        from pydicom._dicom_dict import DicomDictionary
        from pydicom.datadict import tag_for_keyword
    except ImportError:
        return
    for keyword in sorted({part for path in paths for part in path.split(".")}):
        if tag_for_keyword(keyword) is None:
            near = difflib.get_close_matches(keyword, [entry[4] for entry in DicomDictionary.values()], 1, 0.8)
            yield f"DICOM knows no attribute {keyword}" + (f" (did you mean {near[0]}?)" if near else "")
