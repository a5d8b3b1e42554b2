"""Where the outbox is, found without any YAML; and what kind of disk it is on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orthanc_events_bridge.errors import FolderError
from orthanc_events_bridge.folder import Folder, _with_variables, _without_comments, file_system, find

BASE = Path("/etc/orthanc")


def test_files_of_a_folder() -> None:
    folder = Folder(Path("/x"))
    assert (folder.outbox, folder.bridge, folder.lock) == (
        Path("/x/outbox.db"),
        Path("/x/bridge.db"),
        Path("/x/bridge.lock"),
    )


@pytest.mark.parametrize(
    ("configuration", "expected"),
    [
        ({}, "/etc/orthanc/OrthancStorage/orthanc-events"),
        ({"StorageDirectory": "/var/s"}, "/var/s/orthanc-events"),
        ({"StorageDirectory": "/var/s", "IndexDirectory": "/var/i"}, "/var/i/orthanc-events"),
        ({"IndexDirectory": "rel"}, "/etc/orthanc/rel/orthanc-events"),
        ({"IndexDirectory": "/i", "OrthancEvents": {"Outbox": "/var/o"}}, "/var/o"),
        ({"IndexDirectory": "/i", "OrthancEvents": {"Outbox": "rel"}}, "/etc/orthanc/rel"),
        ({"IndexDirectory": "/i", "OrthancEvents": {}}, "/i/orthanc-events"),
        ({"IndexDirectory": "/i", "OrthancEvents": {"Outbox": ""}}, "/i/orthanc-events"),
        ({"IndexDirectory": "/i", "OrthancEvents": "a mistake"}, "/i/orthanc-events"),
        ({"IndexDirectory": ""}, "/etc/orthanc/OrthancStorage/orthanc-events"),
    ],
)
def test_orthanc_s_configuration_says_where(configuration: dict[str, Any], expected: str) -> None:
    assert find(configuration, BASE, {}).path == Path(expected)


def test_environment_says_it_first() -> None:
    configuration = {"OrthancEvents": {"Outbox": "/var/o"}}
    assert find(configuration, BASE, {"ORTHANC_EVENTS_OUTBOX": "/env"}).path == Path("/env")
    assert find(None, BASE, {"ORTHANC_EVENTS_OUTBOX": "/env"}).path == Path("/env")
    assert find(configuration, BASE, {"ORTHANC_EVENTS_OUTBOX": ""}).path == Path("/var/o")


def test_nothing_says_it() -> None:
    with pytest.raises(FolderError, match="say --outbox DIR, or set ORTHANC_EVENTS_OUTBOX"):
        find(None, BASE, {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${A}", "one"),
        ("x${A}y${A}", "xoneyone"),
        ("${B}", ""),
        ("${B:-two}", "two"),
        ("${A:-two}", "one"),
        ("${B:-}", ""),
        ("${B:-a/b c}", "a/b c"),
        ("$A {A} $ {A}", "$A {A} $ {A}"),
    ],
)
def test_variables_as_orthanc_reads_them(text: str, expected: str) -> None:
    assert _with_variables(text, {"A": "one"}) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1} // b', '{"a": 1} '),
        ('/* x\n * y */{"a": 1}', '{"a": 1}'),
        ('{"u": "http://h"}', '{"u": "http://h"}'),
        (r'{"u": "\"// no comment"}', r'{"u": "\"// no comment"}'),
        ('{"u": "/* none */"} // "one"', '{"u": "/* none */"} '),
        ("// only\n1", "\n1"),
    ],
)
def test_comments_as_jsoncpp_allows_them(text: str, expected: str) -> None:
    assert _without_comments(text) == expected


MOUNTS = """\
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
22 21 0:20 / /proc rw - proc proc rw
30 21 0:30 / /nowhere rw,relatime shared:9 - nfs4 server:/export rw
31 30 0:31 / /nowhere/local rw - xfs /dev/sdb rw
32 21 0:32 / /with\\040blank rw - cifs //server/share rw
33 21 0:33 / /over rw - ext4 /dev/sdc rw
34 33 0:34 / /over rw - nfs server:/x rw
a line that is none
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/elsewhere/deep", "ext4"),
        ("/nowhere", "nfs4"),
        ("/nowhere/deep/er", "nfs4"),
        ("/nowhere-else", "ext4"),
        ("/nowhere/local/x", "xfs"),
        ("/with blank/x", "cifs"),
        ("/over/x", "nfs"),
    ],
)
def test_file_system_is_that_of_the_nearest_mount(path: str, kind: str) -> None:
    assert file_system(Path(path), MOUNTS) == kind


def test_file_system_that_nobody_tells() -> None:
    assert file_system(Path("/x"), "") == ""


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "fuse.sshfs", "glusterfs"])
def test_network_file_systems_are_refused_by_name(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", lambda self, **options: None)
    monkeypatch.setattr(Path, "iterdir", lambda self: iter([Path("/x/of-others")]))
    monkeypatch.setattr("orthanc_events_bridge.folder.file_system", lambda path: kind)
    with pytest.raises(FolderError, match=rf"network file system \({kind}\).*name a folder on a local disk"):
        Folder(Path("/x")).prepare()


def test_folder_that_can_not_be_made_is_said_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(self: Path, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(FolderError, match=r"can't be made: Permission denied .*ORTHANC_EVENTS_OUTBOX"):
        Folder(Path("/x")).prepare()
