"""Headers of NATS are read as nats-py reads them, which takes longer."""

from __future__ import annotations

import pytest
from nats.aio.client import Client

from orthanc_events_bridge.transports.nats_listening import Listening


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\r\n",
        b"Nats-Msg-Id: 5:6\r\ncontent-type: application/cloudevents+json\r\n\r\n",
        b"a:b\r\nc:\t d \r\n e : f\r\nno colon\r\ntwo words: g\r\na: again\r\nnone:\r\n",
        "grün: a\r\nname: grün\r\nspace: \u00a0b\u00a0\r\nline: a\u2028b\r\n".encode(),
        b"\xff: a\r\nname: \xff\xfe\r\nother: a\nb\r\n",
    ],
)
def test_headers_are_read_as_nats_py_reads_them(raw: bytes) -> None:
    assert Listening._parse_header_lines(raw) == Client._parse_header_lines(raw)
