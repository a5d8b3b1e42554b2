"""Pseudonyms: what stands for a patient's and for a thing's identifier, made with a secret, always the same.

Each is an HMAC-SHA256 of what it is for: without the secret nobody can make it again, or try which identifier gives it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import uuid
from typing import Final

#: The least length of a secret, in bytes.
SHORTEST: Final = 16


class Pseudonyms:
    """Those of one project.

    :param project: its name, which patients' pseudonyms begin with.
    :param secret: at least `SHORTEST` bytes.
    """

    def __init__(self, project: str, secret: bytes) -> None:
        self._project = project
        self._secret = secret

    def patient(self, identifier: str) -> str:
        """What stands for a PatientID: the project's name, and 80 bits as 16 letters and digits."""
        return f"{self._project}-{base64.b32encode(self._digest('patient', identifier)[:10]).decode()}"

    def uid(self, uid: str) -> str:
        """What stands for a UID: one that is made of a UUID (PS3.5, section B.2)."""
        return self._uid("uid", uid)

    def result(self, uid: str) -> str:
        """The UID of what is given back its patient, by the UID that it came with."""
        return self._uid("result", uid)

    def days(self, identifier: str, most: int) -> int:
        """By how many days a patient's dates are moved back: 1 to `most`."""
        return 1 + int.from_bytes(self._digest("days", identifier)[:8], "big") % most

    @property
    def fingerprint(self) -> str:
        """By which it is seen that the secret is another one; it tells nothing of the secret."""
        return self._digest("fingerprint", "").hex()[:32]

    def _uid(self, purpose: str, uid: str) -> str:
        # Version 5, a UUID by a hash: of those that Python's `uuid` makes it is the nearest (RFC 9562, section 5.5).
        return f"2.25.{uuid.UUID(bytes=self._digest(purpose, uid)[:16], version=5).int}"

    def _digest(self, purpose: str, value: str) -> bytes:
        return hmac.digest(self._secret, f"{purpose}\0{value}".encode(), hashlib.sha256)
