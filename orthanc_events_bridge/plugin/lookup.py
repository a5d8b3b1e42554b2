"""What only Orthanc knows, asked at the moment of the change: parents, job snapshots, allow-listed tags."""

from __future__ import annotations

import contextlib
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from orthanc_events_bridge.changes.model import Callback, Fact
from orthanc_events_bridge.errors import GoneError, LogUnavailableError, PassedOverError
from orthanc_events_bridge.plugin.unanswered import Unanswered

_ABOVE: Final = {"instance": "series", "series": "study", "study": "patient"}
_ROUTES: Final = {"patient": "patients", "study": "studies", "series": "series", "instance": "instances"}
#: Where a resource's answer holds the main DICOM tags: its own, and for a study also its patient's.
_TAG_FIELDS: Final = ("MainDicomTags", "PatientMainDicomTags")
_CACHE: Final = 10_000
#: So many new instances at once, and it is their series that are asked for.
_TOGETHER: Final = 3

#: What of a job may leave Orthanc, and under which name: nothing here can hold patient data.
_JOB_FIELDS: Final = {
    "Type": "type",
    "State": "state",
    "Progress": "progress",
    "ErrorCode": "errorCode",
    "CreationTime": "created",
    "CompletionTime": "completed",
    "EffectiveRuntime": "runtime",
}
_JOB_CONTENT: Final = {
    "LocalAet": "localAet",
    "RemoteAet": "remoteAet",
    "TargetAet": "targetAet",
    "ParentResources": "parentResources",
}
#: Numbers, which Orthanc's own jobs spell as such, and those of the DICOMweb plugin as text.
_JOB_COUNTS: Final = {"InstancesCount": "instances", "FailedInstancesCount": "failedInstances"}


class Lookup:
    """Asks Orthanc's REST API, as seldom as possible.

    What Orthanc can't say of a single resource, although it answers else, is asked a few times and then passed over.

    :param get: a GET; raises `GoneError` for a resource that isn't there, and anything else when it can't
        answer.
    :param tip: the counter of Orthanc's log.
    :param now: seconds, monotonic.
    :param say: told what is wrong with each question that is passed over, once.
    """

    def __init__(
        self,
        get: Callable[[str], bytes | str],
        tip: Callable[[], int],
        now: Callable[[], float],
        say: Callable[[str], None],
    ) -> None:
        self._get = get
        self.tip = tip
        self._unanswered = Unanswered(tip, now, say)
        self._tags: list[str] = []
        self._metadata: list[str] = []
        self._above: OrderedDict[str, str] = OrderedDict()
        self._foreseen: dict[str, str] = {}
        self._jobs: dict[Callback, dict[str, Any] | None] = {}

    def allow(self, settings: str) -> None:
        """Take over the allow-lists of the settings (a JSON document)."""
        document = json.loads(settings)
        self._tags, self._metadata = document.get("tags", []), document.get("metadata", [])

    def _ask(self, path: str) -> dict[str, Any] | None:
        """The answer, or none when the resource is gone.

        :raises LogUnavailableError: Orthanc can't answer now.
        """
        try:
            answer = self._get(path)
            text = answer if isinstance(answer, str) else answer.decode("utf-8", "replace")
            return dict(json.loads(text))
        except GoneError:
            return None
        except Exception as error:
            raise LogUnavailableError(f"Orthanc can't be asked for {path.split('/')[1]}: {error}") from error

    def _describe(self, path: str) -> dict[str, Any] | None:
        """The answer about a resource or a job, or none when it is gone.

        :raises LogUnavailableError: Orthanc can't answer now.
        :raises PassedOverError: it can't answer this, though it was asked several times and answers else.
        """
        self._unanswered.check(path)
        try:
            answer = self._ask(path)
        except LogUnavailableError as error:
            raise self._unanswered.failed(path, error) from error
        self._unanswered.answered(path)
        return answer

    def database(self) -> str | None:
        """The plugin that keeps Orthanc's index; none for Orthanc's own SQLite.

        :raises LogUnavailableError: Orthanc can't answer now.
        """
        backend = (self._ask("/system") or {}).get("DatabaseBackendPlugin")
        return str(backend) if backend else None

    def resource(self, level: str, resource: str) -> dict[str, Any] | None:
        """Orthanc's answer about a resource; none when it is gone.

        :raises LogUnavailableError: Orthanc can't answer now.
        :raises PassedOverError: it can't answer this, though it was asked several times and answers else.
        """
        return self._describe(f"/{_ROUTES[level]}/{resource}")

    def studies(self, since: int, limit: int) -> list[str]:
        """The ids of some of Orthanc's studies, from an index on.

        :raises LogUnavailableError: Orthanc can't answer now.
        """
        try:
            return list(json.loads(self._get(f"/studies?since={since}&limit={limit}")))
        except Exception as error:
            raise LogUnavailableError(f"Orthanc can't be asked for its studies: {error}") from error

    def count_studies(self) -> int:
        """How many studies Orthanc has.

        :raises LogUnavailableError: Orthanc can't answer now.
        """
        return int((self._ask("/statistics") or {}).get("CountStudies", 0))

    def received(self, instance: str) -> str | None:
        """When Orthanc received an instance, as it spells dates (UTC); empty where it can't say, none when it is gone.

        :raises LogUnavailableError: Orthanc can't answer now.
        :raises PassedOverError: it can't answer this, though it was asked several times and answers else.
        """
        found = self._describe(f"/instances/{instance}/metadata?expand")
        return None if found is None else str(found.get("ReceptionDate") or "")

    # -- parents ---------------------------------------------------------------------------------------------

    def parents(self, level: str, resource: str) -> dict[str, str] | None:
        """Level → id of the parents; none when the resource is gone, or nobody can say.

        Parents are remembered without a check: an id is a hash over the parents' identifiers and never moves.
        """
        found: dict[str, str] = {}
        while level in _ABOVE:
            above = self._above.get(resource) or self._foreseen.get(resource)
            if above is None:
                try:
                    answer = self.resource(level, resource)
                except PassedOverError:
                    answer = None
                if answer is None:
                    return found or None
                above = str(answer[f"Parent{_ABOVE[level].capitalize()}"])
                if level != "instance":
                    self._keep(resource, above)
            level = _ABOVE[level]
            found[level] = resource = above
        return found

    def foresee(self, facts: Iterable[Fact]) -> None:
        """Ask for the series of new instances that come together, in place of each of them: it names them all.

        For `parents`, until the next call. Worth it where a question takes long.

        :raises LogUnavailableError: Orthanc can't answer now.
        """
        unknown = {str(fact.resource): None for fact in facts if fact.change == "NewInstance" and fact.parents is None}
        self._foreseen = {}
        while len(unknown) >= _TOGETHER:
            first = next(iter(unknown))
            del unknown[first]
            try:
                series = str((self.resource("instance", first) or {}).get("ParentSeries", ""))
                answer = self.resource("series", series) if series else None
            except PassedOverError:
                continue
            if answer is None:
                continue
            self._keep(series, str(answer["ParentStudy"]))
            below = {first, *(unknown.keys() & set(answer["Instances"]))}
            self._foreseen.update(dict.fromkeys(below, series))
            unknown = {one: None for one in unknown if one not in below}

    def _keep(self, resource: str, above: str) -> None:
        self._above[resource] = above
        if len(self._above) > _CACHE:
            self._above.popitem(last=False)

    # -- jobs ------------------------------------------------------------------------------------------------

    def take_job(self, callback: Callback) -> bool:
        """Snapshot the job of a callback, once; false when Orthanc has forgotten it already, or can't describe it.

        :raises LogUnavailableError: Orthanc can't answer now.
        """
        if callback in self._jobs:
            return True
        try:
            answer = self._describe(f"/jobs/{callback.resource}")
        except PassedOverError:
            answer = None
        self._jobs[callback] = job_snapshot(answer) if answer is not None else None
        return answer is not None

    def job_taken(self, callback: Callback) -> dict[str, Any] | None:
        """The snapshot; none where there is none."""
        return self._jobs.get(callback)

    def forget_jobs(self) -> None:
        """The batch that they were taken for is recorded."""
        self._jobs.clear()

    # -- tags and metadata -----------------------------------------------------------------------------------

    def describe(self, facts: Iterable[Fact]) -> None:
        """Add the allow-listed tags and metadata to facts about resources that still exist.

        What Orthanc can't describe, though it answers else, goes without any.

        :raises LogUnavailableError: Orthanc can't answer now.
        """
        if not self._tags and not self._metadata:
            return
        seen: dict[str, dict[str, Any]] = {}
        for fact in facts:
            if fact.resource is None or fact.level not in _ROUTES or fact.change == "Deleted":
                continue
            if fact.resource not in seen:
                seen[fact.resource] = self._described(fact.level, fact.resource)
            fact.extra.update(seen[fact.resource])

    def _described(self, level: str, resource: str) -> dict[str, Any]:
        described: dict[str, Any] = {}
        if self._tags:
            with contextlib.suppress(PassedOverError):
                described["tags"] = self._tags_of(level, resource)
        if self._metadata:
            with contextlib.suppress(PassedOverError):
                found = self._describe(f"/{_ROUTES[level]}/{resource}/metadata?expand") or {}
                described["metadata"] = {name: found[name] for name in self._metadata if name in found}
        return described

    def _tags_of(self, level: str, resource: str) -> dict[str, str]:
        """From Orthanc's index alone: main DICOM tags of the resource and of its parents, nearest first.

        :raises PassedOverError: there is something that Orthanc can't describe, and nothing else is known.
        """
        tags: dict[str, str] = {}
        unknown: PassedOverError | None = None
        chain = [(level, resource), *(self.parents(level, resource) or {}).items()]
        for at_level, identifier in chain:
            missing = [tag for tag in self._tags if tag not in tags]
            if not missing:
                break
            try:
                answer = self.resource(at_level, identifier) or {}
            except PassedOverError as error:  # what others say is known all the same
                unknown = error
                continue
            for field in _TAG_FIELDS:
                known: Mapping[str, str] = answer.get(field, {})
                tags.update((tag, known[tag]) for tag in missing if tag in known and tag not in tags)
        if unknown is not None and not tags:
            raise unknown
        return {tag: tags[tag] for tag in self._tags if tag in tags}


def job_snapshot(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What of ``/jobs/{id}`` an event may say; see `_JOB_FIELDS`, `_JOB_CONTENT` and `_JOB_COUNTS`."""
    snapshot = {name: answer[field] for field, name in _JOB_FIELDS.items() if field in answer}
    content = answer.get("Content")
    if isinstance(content, Mapping):
        snapshot.update((name, content[field]) for field, name in _JOB_CONTENT.items() if field in content)
        counts = {name: str(content.get(field)) for field, name in _JOB_COUNTS.items()}
        snapshot.update((name, int(count)) for name, count in counts.items() if count.isdecimal())
        peer = content.get("Peer")
        # Orthanc spells a peer as a list whose first item is the URL, or, with options, as an object.
        url = peer.get("Url") if isinstance(peer, Mapping) else peer[0] if isinstance(peer, list) and peer else peer
        if isinstance(url, str):
            snapshot["peer"] = without_user(url)
    return snapshot


def without_user(url: str) -> str:
    """A URL without user, password, query and fragment; a bare name stays as it is."""
    scheme, mark, rest = re.split(r"[?#]", url, maxsplit=1)[0].rpartition("://")
    return f"{scheme}{mark}{rest.rpartition('@')[2]}"
