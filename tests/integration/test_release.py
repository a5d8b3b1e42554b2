"""What is released: made from a tag by ``python -m build``, and used from where pip puts it, not from this tree."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
VERSION = "7.8.9"
REPOSITORY = "https://git.example.org/orthanc-events-bridge"
#: Of pip's own, so that nothing is fetched but what is locked. nkeys comes as a source distribution only.
EXTRAS = "nats,rabbitmq,kafka,webhook,consumers,metrics,tracing,anonymizer,postgresql"
#: What doesn't belong to the tree.
LEFT = (".git", ".venv*", ".cache", "__pycache__", ".*_cache", "dist", "build", "_version.py", "*.log")
GIT = ("git", "-c", "user.name=nobody", "-c", "user.email=nobody@example.org", "-c", "commit.gpgsign=false")
#: Neither the tree nor what is set for it.
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("PYTHON", "REPOSITORY_", "SETUPTOOLS_SCM"))
}


def run(command: Sequence[str | Path], folder: Path, **more: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=ENVIRONMENT | more)
    assert done.returncode == 0, f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}"
    return done.stdout


def copy(folder: Path, *, tag: str | None = None, git: bool = True) -> Path:
    """This tree, in a repository of its own: the build writes into it."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT))
    if git:
        for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "All"], *([["tag", tag]] if tag else [])):
            run([*GIT, *command], folder)
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution and, made from that, the wheel."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed: apt-get install git")
    folder = tmp_path_factory.mktemp("release")
    tree = copy(folder / "tree", tag=f"v{VERSION}")
    build: list[str | Path] = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", tree]
    run(build, folder, REPOSITORY_URL=REPOSITORY, REPOSITORY_REF=f"v{VERSION}")
    (source,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return source, wheel


def environment(folder: Path, *arguments: str | Path) -> Path:
    """An interpreter of its own, with what pip is told to install."""
    run([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
    python = folder / "bin" / "python"
    run([sys.executable, "-m", "pip", "--quiet", "--python", python, "install", "--no-input", *arguments], folder)
    return python


@pytest.fixture(scope="module")
def installed(released: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, with everything that it can be used with."""
    folder = tmp_path_factory.mktemp("installed")
    lock = (ROOT / "requirements" / "dev.txt").read_text("utf-8")
    (folder / "constraints.txt").write_text("\n".join(re.findall(r"^[\w.-]+==[^\s\\]+", lock, re.MULTILINE)), "utf-8")
    constraints = ("--only-binary", ":all:", "--constraint", folder / "constraints.txt")
    return environment(folder / "venv", *constraints, f"{released[1]}[{EXTRAS}]")


def command(python: Path, *arguments: str | Path, folder: Path) -> str:
    return run([python.with_name("orthanc-events"), *arguments], folder)


def test_both_have_the_tag_s_version_and_what_belongs_into_them(released: tuple[Path, Path]) -> None:
    source, wheel = released
    assert source.name == f"orthanc_events_bridge-{VERSION}.tar.gz"
    assert wheel.name == f"orthanc_events_bridge-{VERSION}-py3-none-any.whl"
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "orthanc_events_bridge").rglob("*") if path.is_file()}
    package = {name for name in package if "__pycache__" not in name} | {"orthanc_events_bridge/_version.py"}
    with ZipFile(wheel) as opened:
        assert {name for name in opened.namelist() if ".dist-info/" not in name} == package
        (metadata,) = (opened.read(name).decode() for name in opened.namelist() if name.endswith("/METADATA"))
        assert any(name.endswith("/licenses/LICENSE") for name in opened.namelist())
    assert "License-Expression: Apache-2.0" in metadata
    with tarfile.open(source) as opened_source:
        names = {name.partition("/")[2] for name in opened_source.getnames()}
    # What it is made from again, tested with, and read.
    needed = {"pyproject.toml", "Makefile", "requirements/dev.txt", "tests/conftest.py", "tools/generate_docs.py"}
    assert names >= package | needed | {"docs/events.md", "config/all.yaml", "LICENSE", "CHANGELOG.md"}
    # Everything that git has, what only Docker Compose looks for too.
    tracked = run(["git", "ls-files"], ROOT).split("\n") if (ROOT / ".git").exists() else [".env", ".ci/run"]
    assert names >= {name for name in tracked if (ROOT / name).is_file()}


def test_the_page_in_an_index_leads_to_the_repository(released: tuple[Path, Path], tmp_path: Path) -> None:
    source, wheel = released

    def metadata(file: Path) -> str:
        with ZipFile(file) as opened:
            return next(opened.read(name).decode() for name in opened.namelist() if name.endswith("/METADATA"))

    page = metadata(wheel)
    assert f"Project-URL: Source, {REPOSITORY}\n" in page
    assert f"]({REPOSITORY}/blob/v{VERSION}/docs/configuration.md)" in page
    assert [link for link in re.findall(r"\]\((.*?)\)", page) if not link.startswith("https://")] == []
    # A wheel that somebody makes of the source distribution says the same; one of files alone has no links to files.
    build = [sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    run([*build, tmp_path / "again", source], tmp_path)
    assert metadata(next((tmp_path / "again").iterdir())) == page
    run([*build, tmp_path / "alone", copy(tmp_path / "tree", git=False)], tmp_path)
    alone = metadata(next((tmp_path / "alone").iterdir()))
    assert "Project-URL" not in alone
    assert [link for link in re.findall(r"\]\((.*?)\)", alone) if not link.startswith("https://")] == []


@pytest.mark.parametrize(("git", "version"), [(True, r"0\.0\.1\.dev\d+\+g[0-9a-f]+"), (False, r"0\.0\.0")])
def test_it_can_be_built_from_a_clone_without_tags_and_from_files_without_git(
    tmp_path: Path, git: bool, version: str
) -> None:
    if git and shutil.which("git") is None:
        pytest.skip("git is not installed: apt-get install git")
    tree = copy(tmp_path / "tree", git=git)
    run([sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path / "dist", tree], tmp_path)
    (wheel,) = (tmp_path / "dist").iterdir()
    assert re.fullmatch(rf"orthanc_events_bridge-{version}-py3-none-any\.whl", wheel.name)


def test_what_is_installed_is_used_and_knows_its_version(installed: Path, tmp_path: Path) -> None:
    found = run([installed, "-c", "import orthanc_events_bridge as it; print(it.__file__)"], tmp_path)
    assert Path(found.strip()).is_relative_to(installed.parents[1])
    assert command(installed, "--version", folder=tmp_path) == f"orthanc-events {VERSION}\n"


def test_every_command_can_be_had(installed: Path, tmp_path: Path) -> None:
    overview = command(installed, "--help", folder=tmp_path)
    names = re.findall(r"^    ([a-z-]+)(?:  |$)", overview, re.MULTILINE)
    assert len(names) > 15
    for name in names:
        assert command(installed, name, "--help", folder=tmp_path).startswith(f"usage: orthanc-events {name}")


def test_each_example_of_a_configuration_is_right(installed: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "config", tmp_path / "config")
    files = [
        path for path in (tmp_path / "config").glob("*.yaml") if "transports" in yaml.safe_load(path.read_text("utf-8"))
    ]
    assert len(files) >= 5
    for path in files:
        assert command(installed, "check", path, folder=tmp_path).startswith("the configuration is right: ")


def test_a_configuration_can_be_begun(installed: Path, tmp_path: Path) -> None:
    command(installed, "init", "own", folder=tmp_path)
    command(installed, "check", "own/orthanc-events.yaml", folder=tmp_path)
    assert str(installed) in (tmp_path / "own" / "orthanc_events.py").read_text("utf-8")


def test_what_the_workflows_use_is_one_state_of_it() -> None:
    files = list((ROOT / ".github" / "workflows").glob("*.yml"))
    assert len(files) == 2
    for path in files:
        for used in re.findall(r"uses: (.*)", path.read_text("utf-8")):
            assert used.startswith("./") or re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", used), used


def test_the_schemas_are_there(installed: Path, tmp_path: Path) -> None:
    stored = {
        path.name.removesuffix(".v1.json"): json.loads(path.read_text("utf-8"))
        for path in (ROOT / "orthanc_events_bridge" / "events" / "schemas").glob("*.json")
    }
    assert json.loads(command(installed, "schema", "--all", folder=tmp_path)) == stored
    assert yaml.safe_load(command(installed, "schema", "--asyncapi", folder=tmp_path))["asyncapi"] == "3.0.0"


#: As Orthanc does: its own module is there, and nobody else's.
LOAD = """
import sys, types
sys.modules["orthanc"] = types.ModuleType("orthanc")
import orthanc_events_bridge.plugin
ours = {name for name in sys.modules if name.startswith("orthanc_events_bridge")}
own = {*sys.stdlib_module_names, "orthanc", "__main__", "sitecustomize"}
print([name for name in sys.modules if name.partition(".")[0] not in own and name not in ours])
"""


def test_the_plugin_needs_the_standard_library_only(released: tuple[Path, Path], tmp_path: Path) -> None:
    bare = environment(tmp_path / "bare", "--no-deps", released[1])
    assert run([bare, "-c", LOAD], tmp_path).strip() == "[]"
