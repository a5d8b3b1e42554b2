"""The package's page in an index such as PyPI: README.md, with links that lead somewhere from there.

A hook that hatchling runs whenever the package is built or installed. ``REPOSITORY_URL`` says where the repository is,
and ``REPOSITORY_REF`` which state of it is meant (default: the newest); the release's workflow sets both, and a source
distribution has them in its own metadata. Where nobody says, what is a link to a file becomes its text.
"""

from __future__ import annotations

import os
import re
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

#: A link to a file of the repository: its text, and the file.
_LINK = re.compile(r"\[([^\]]*)\]\((?!https?://|#)([^)\s]+)\)")


def linked(text: str, repository: str, ref: str) -> str:
    """The page with its links.

    :param repository: its address; empty where that is not known.
    """
    return _LINK.sub(
        lambda found: f"[{found[1]}]({repository}/blob/{ref}/{found[2]})" if repository else found[1], text
    )


class IndexPage(MetadataHookInterface):
    """Gives the package its page and addresses."""

    def update(self, metadata: dict[str, Any]) -> None:
        """As hatchling asks for it."""
        root = Path(self.root)
        made = root / "PKG-INFO"  # this is a source distribution: a wheel of it says the same
        if made.is_file():
            told = HeaderParser().parsestr(made.read_text("utf-8"))
            page = told.get_payload()
            addresses = dict(line.split(", ", 1) for line in told.get_all("Project-URL", []))
        else:
            repository = os.environ.get("REPOSITORY_URL", "").rstrip("/")
            ref = os.environ.get("REPOSITORY_REF", "HEAD")
            page = linked((root / "README.md").read_text("utf-8"), repository, ref)
            addresses = {
                "Changelog": f"{repository}/blob/{ref}/CHANGELOG.md",
                "Documentation": f"{repository}/blob/{ref}/README.md",
                "Issues": f"{repository}/issues",
                "Source": repository,
            }
            if not repository:
                addresses = {}
        metadata["readme"] = {"content-type": "text/markdown", "text": page}
        metadata["urls"] = addresses
