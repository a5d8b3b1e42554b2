"""The anonymizer's file: rules, projects with their secrets, profiles."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, Literal

from pydantic import Field, SecretStr
from pydantic_core import PydanticCustomError

from orthanc_events_bridge.consumers.settings import ConsumerName, ConsumerSettings
from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.values import FileName, Options, Place, mistake
from orthanc_events_bridge.workflows.profile import Profile
from orthanc_events_bridge.workflows.pseudonyms import SHORTEST
from orthanc_events_bridge.workflows.rules import Rule, mistakes

#: The profile that is there without being written: the basic profile of PS3.15.
BASIC: Final = "basic"

#: Of a database.
_RIGHT: Final = 'write "sqlite:////FOLDER/FILE" for the workers of one machine, or "postgresql://USER@HOST/DATABASE"'


class Secret(Options):
    """Where the secret of a project is."""

    secret_file: FileName | None = Field(
        default=None,
        description="A file with the secret that pseudonyms are made with, at least 16 characters. Left out: the "
        "environment, `ORTHANC_EVENTS_SECRET_` and the project's name in capitals, `_` for `-`.",
        examples=["/etc/orthanc-events/trial-7.secret"],
    )

    def secret(self, project: str, environment: Mapping[str, str] = os.environ) -> bytes:
        """The secret.

        :raises BridgeError: there is none, or it is too short.
        """
        variable = f"ORTHANC_EVENTS_SECRET_{project.upper().replace('-', '_')}"
        try:
            found = self.secret_file.read_bytes() if self.secret_file else environment.get(variable, "").encode()
        except OSError as error:
            raise BridgeError(
                f"the secret of the project {project} can't be read: {self.secret_file}: {error.strerror}",
                "let our user read it",
            ) from error
        found = found.strip()
        if len(found) < SHORTEST:
            right = f"write at least {SHORTEST} characters into {self.secret_file or variable}: openssl rand -hex 32"
            raise BridgeError(f"the project {project} has no secret, or too short a one", right)
        return found


class Project(Secret):
    """Whose pseudonyms they are: of another project they are others, for the same patient too."""

    profile: str = Field(default=BASIC, description="The name of a profile; `basic` is there by itself.")


class Remembering(ConsumerSettings):
    """What remembers what stands for what has a database for it."""

    def contradictions(self) -> Iterator[tuple[Place, PydanticCustomError]]:
        """The store is a database."""
        yield from super().contradictions()
        if self.memory is None:
            yield ("store",), mistake("is no database, and what stands for what has to be remembered in one", _RIGHT)

    @property
    def memory(self) -> SecretStr | Path | None:
        """The database in which it is remembered what stands for what: as a URL, or in a file that holds that."""
        chosen = self.chosen_store() if self.store_file or self.store else None
        return chosen if isinstance(chosen, SecretStr | Path) else None


def check_project(name: str, place: Place) -> Iterator[tuple[Place, PydanticCustomError]]:
    """What is wrong with the name of a project."""
    if re.fullmatch(r"[A-Za-z0-9-]{1,32}", name) is None:
        yield place, mistake("can't be the name of a project", "use letters, digits and -, at most 32", shown=name)


class AnonymizerSettings(Remembering):
    """An anonymizer's file: the options of every consumer, and these."""

    name: ConsumerName = Field(default="anonymizer", description="Of the consumer.")
    concurrency: int = Field(default=2, ge=1, le=256, description="How many studies one worker is at, at a time.")
    event: Literal["study.stable", "series.stable"] = Field(
        default="study.stable", description="What is looked at: studies or series."
    )
    match: Literal["all", "first"] = Field(
        default="all", description="`all`: every rule that fits counts. `first`: the first one that does, and no other."
    )
    rules: tuple[Rule, ...] = Field(min_length=1, description="What is pseudonymised for which projects.")
    projects: dict[str, Project] = Field(min_length=1, description="Whose pseudonyms, by names of your own.")
    profiles: dict[str, Profile] = Field(default_factory=dict, description="What is kept and what not, by names.")
    audit: FileName | None = Field(
        default=None,
        description="A file to which a line of JSON is appended for all that is done. Orthanc's ids of what it was "
        "done to, no patient data, and not what stands for what.",
        examples=["/var/log/anonymizer-audit.jsonl"],
    )

    def contradictions(self) -> Iterator[tuple[Place, PydanticCustomError]]:
        """Names that lead to nothing."""
        yield from super().contradictions()
        yield from mistakes(self.rules, self.projects, "project")
        if BASIC in self.profiles:
            yield ("profiles", BASIC), mistake("is there by itself, as DICOM has it", "give yours another name")
        for name, project in self.projects.items():
            yield from check_project(name, ("projects", name))
            if project.profile != BASIC and project.profile not in self.profiles:
                right = f"the profiles are: {', '.join({BASIC: 0} | self.profiles)}"
                yield ("projects", name, "profile"), mistake("is no profile", right, shown=project.profile)
