"""Which of the announced studies are not in Orthanc's list of studies: a quick look, in pages of ids.

What is missing in the list need not be gone: pages shift while something is deleted. It has to be asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from orthanc_events_bridge.changes.model import Resource

#: Ids in a page, of Orthanc's list and of ours: some milliseconds.
PAGE: Final = 500


class Listing:
    """One look. It holds the ids of all studies meanwhile, about 100 bytes each.

    :param studies: so many ids of studies that Orthanc has, from an index on.
    :param announced: so many of the announced studies, behind an id.
    """

    def __init__(
        self, studies: Callable[[int, int], Sequence[str]], announced: Callable[[str, int], Sequence[Resource]]
    ) -> None:
        self._studies = studies
        self._announced = announced
        self._there: set[str] = set()
        self._read = 0
        self._listed = False
        self._after = ""

    def step(self) -> list[Resource] | None:
        """A page.

        :return: announced studies that were not listed; none when the look is over.
        :raises LogUnavailableError: Orthanc can't answer now; call again.
        """
        if not self._listed:
            page = self._studies(self._read, PAGE)
            self._there.update(page)
            self._read += len(page)
            self._listed = not page
            return []
        known = self._announced(self._after, PAGE)
        if not known:
            return None
        self._after = known[-1].id
        return [one for one in known if one.id not in self._there]
