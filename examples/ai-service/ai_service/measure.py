"""What is computed: a segmentation by a threshold, its volume in ml and its mean in real units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

#: Hounsfield units from which a voxel of a CT counts: bone and contrast agent.
CT_THRESHOLD = 200.0


class UnfitError(Exception):
    """The series can't be measured, and never will. The message has no patient data."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was found in a series."""

    #: The images, in the order of the slices in ``mask``.
    images: tuple[Dataset, ...]
    #: Slices, rows, columns.
    mask: NDArray[np.bool_]
    threshold: float
    #: In millilitres, and in Hounsfield units for CT, without unit else; the mean of nothing is None.
    volume: float
    mean: float | None


def measure(images: Sequence[Dataset]) -> Measurement:
    """Segment a series of single-frame CT or MR images, and measure what was found.

    The distance of slices is that of their positions along the normal of the image plane, which `SliceThickness`
    need not be (PS3.3, C.7.6.2.1.1); the thickness counts only where there is a single slice.

    :raises UnfitError: it has no geometry, several of them, or gaps.
    """
    ordered, distance = _ordered(images)
    first = ordered[0]
    values = np.stack([_real(image) for image in ordered])
    threshold = CT_THRESHOLD if first.Modality == "CT" else otsu(values)
    mask = values >= threshold
    row, column = (float(one) for one in first.PixelSpacing)
    volume = int(mask.sum()) * row * column * distance / 1000.0
    return Measurement(tuple(ordered), mask, threshold, volume, float(values[mask].mean()) if mask.any() else None)


def otsu(values: NDArray[np.float64]) -> float:
    """Return the threshold between the two classes of values whose variances are smallest (Otsu, 1979)."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        return float(np.nextafter(high, np.inf))  # nothing stands out
    counts, edges = np.histogram(values, bins=256, range=(low, high))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1].astype(np.float64)
    above = counts.sum() - below
    sums = np.cumsum(counts * centres)
    means_below = sums[:-1] / np.maximum(below, 1)
    means_above = (sums[-1] - sums[:-1]) / np.maximum(above, 1)
    return float(edges[1:-1][int(np.argmax(below * above * (means_below - means_above) ** 2))])


def _real(image: Dataset) -> NDArray[np.float64]:
    try:
        pixels = image.pixel_array.astype(np.float64)
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        raise UnfitError(f"pixels can't be read ({type(error).__name__})") from error
    return pixels * float(image.get("RescaleSlope", 1)) + float(image.get("RescaleIntercept", 0))


def _ordered(images: Sequence[Dataset]) -> tuple[list[Dataset], float]:
    if not images:
        raise UnfitError("there are no images")
    needed = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "FrameOfReferenceUID", "PixelData")
    for image in images:
        if image.get("Modality") not in ("CT", "MR") or int(image.get("NumberOfFrames") or 1) != 1:
            raise UnfitError("only single-frame CT and MR are measured")
        if missing := [name for name in needed if not image.get(name)]:
            raise UnfitError(f"an image has no {', '.join(missing)}")
    if len({(image.get("StudyInstanceUID"), image.get("PatientID")) for image in images}) != 1:
        raise UnfitError("the images don't share one study and patient")
    shapes = {
        (image.Rows, image.Columns, image.FrameOfReferenceUID, *image.PixelSpacing, *image.ImageOrientationPatient)
        for image in images
    }
    if len(shapes) != 1:
        raise UnfitError("the images don't share one geometry")
    orientation = np.array(images[0].ImageOrientationPatient, dtype=np.float64)
    normal = np.cross(orientation[:3], orientation[3:])
    places = [float(np.dot(normal, np.array(image.ImagePositionPatient, dtype=np.float64))) for image in images]
    order = np.argsort(places, kind="stable")
    if len(images) == 1:
        thickness = float(images[0].get("SliceThickness") or 0)
        if thickness <= 0:
            raise UnfitError("a single image has no SliceThickness")
        return [images[0]], thickness
    steps = np.diff(np.array(places)[order])
    if steps.min() <= 0 or steps.max() - steps.min() > 0.01 * steps.mean():
        raise UnfitError("the slices are not evenly spaced: one is missing, or there twice")
    return [images[n] for n in order], float(steps.mean())
