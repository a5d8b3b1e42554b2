"""``multipart/related`` as DICOMweb has it (PS3.18, section 8.6.1.2; RFC 2387): read as it comes in, and written."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from email.message import Message


class MultipartError(Exception):
    """The body is not what its content type says. The message may be shown to whoever has sent it."""


class TooLargeError(MultipartError):
    """One part, or what stands around parts, is larger than permitted."""


def boundary_of(content_type: str) -> bytes:
    """Return the boundary of a body of DICOM files.

    :raises MultipartError: the content type is another.
    """
    message = Message()
    message["Content-Type"] = content_type
    kind = message.get_param("type", "application/dicom")
    if message.get_content_type() != "multipart/related" or kind != "application/dicom":
        raise MultipartError('the content type has to be multipart/related; type="application/dicom"')
    boundary = message.get_boundary()
    if not boundary:
        raise MultipartError("the content type names no boundary")
    return boundary.encode()


async def parts(body: AsyncIterable[bytes], boundary: bytes, largest: int) -> AsyncIterator[bytes]:
    """Give the content of each part, however the body is cut. What is given is let go of; one part at a time is held.

    :param largest: the most bytes of a part.
    :raises MultipartError: the body ends early, or has no parts.
    :raises TooLargeError: a part is larger.
    """
    delimiter = b"\r\n--" + boundary
    buffer, begun, given, looked = bytearray(b"\r\n"), False, False, 0
    async for chunk in body:
        buffer += chunk
        # Behind a delimiter at least two more bytes are needed: an end (--) or the end of the line.
        while (found := buffer.find(delimiter, looked)) >= 0 and len(buffer) >= found + len(delimiter) + 2:
            if found > largest:
                break
            if begun:
                given = True
                yield _content(bytes(buffer[:found]))
            begun = True
            del buffer[: found + len(delimiter)]
            looked = 0
            if buffer.startswith(b"--"):
                if not given:
                    raise MultipartError("the body has no parts")
                return
        looked = max(0, len(buffer) - len(delimiter) - 2)
        if len(buffer) > largest:
            raise TooLargeError(f"a part has more than {largest} bytes")
    raise MultipartError("the body ends before its last boundary")


def _content(part: bytes) -> bytes:
    head, separator, content = part.partition(b"\r\n\r\n")
    if not separator:
        raise MultipartError("a part has no end of its headers")
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-type" and value.split(b";")[0].strip().lower() != b"application/dicom":
            raise MultipartError("a part is not application/dicom")
    return content


def join(files: Iterable[bytes]) -> bytes:
    """Return the body that has these DICOM files."""
    boundary = uuid.uuid4().hex.encode()
    pieces = [b"--%b\r\nContent-Type: application/dicom\r\n\r\n%b\r\n" % (boundary, content) for content in files]
    return b"".join([*pieces, b"--%b--\r\n" % boundary])


def kind_of(body: bytes) -> str:
    """Return the content type of a body that `join` has made: its first line is the boundary."""
    boundary = body[: body.index(b"\r\n")].removeprefix(b"--").decode()
    return f'multipart/related; type="application/dicom"; boundary={boundary}'
