"""The bundle is the installed code, its bytes follow from that alone, and Flower makes the same of the folder."""

import hashlib
import io
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.cli.install import install_from_fab
from flwr.common.config import get_fused_config_from_fab
from flwr.supercore.run import Run

from unimiss_core import bundle

ROOT = Path(__file__).parents[1]
PACKAGES = ("client", "server", "unimiss_core")
old_patterns = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
"""Flower picks a bundle's files by a class of patterns that its library is about to drop."""


@old_patterns
def test_flower_makes_the_same_bundle_of_the_folder(tmp_path: Path) -> None:
    assert build_fab_from_disk(bundle.write(tmp_path / "federated-unimiss")) == bundle.fab()
    assert bundle.fab_hash() == hashlib.sha256(bundle.fab()).hexdigest()


def test_it_follows_from_the_code_alone(tmp_path: Path) -> None:
    """A copy of the packages elsewhere, without pyproject and configs, makes the same; any change of code another."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    assert said_by(tmp_path) == bundle.fab_hash()  # and by now Python has left its __pycache__ there
    assert said_by(tmp_path) == bundle.fab_hash()
    (new := tmp_path / "client" / "new.py").write_text("")
    assert said_by(tmp_path) != bundle.fab_hash()
    new.unlink()
    with (tmp_path / "client" / "terms.py").open("a") as file:
        file.write("# another\n")
    assert said_by(tmp_path) != bundle.fab_hash()


def test_it_holds_every_module_and_nothing_else() -> None:
    with zipfile.ZipFile(io.BytesIO(bundle.fab())) as archive:
        names = archive.namelist()
    modules = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert sorted(names) == sorted({"pyproject.toml", ".info/CONTENT"} | modules)


def test_flower_installs_it_and_reads_the_run_configuration(tmp_path: Path) -> None:
    installed = install_from_fab(bundle.fab(), tmp_path, skip_prompt=True)
    assert (installed / "client" / "app.py").read_bytes() == (ROOT / "client" / "app.py").read_bytes()
    assert get_fused_config_from_fab(bundle.fab(), Run.create_empty(1)) == bundle.RUN_CONFIG


def test_its_version_and_entry_points_are_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    with zipfile.ZipFile(io.BytesIO(bundle.fab())) as archive:
        bundled = tomllib.loads(archive.read("pyproject.toml").decode())
    assert bundled["project"]["version"] == project["project"]["version"] == bundle.VERSION
    assert bundled["project"]["dependencies"] == [d for d in project["project"]["dependencies"] if d.startswith("flwr")]
    app, ours = bundled["tool"]["flwr"]["app"], project["tool"]["flwr"]["app"]
    assert (app["publisher"], app["components"]) == (ours["publisher"], ours["components"])
    assert app["config"].items() <= ours["config"].items()


@old_patterns
def test_writing_replaces_what_an_older_version_left(tmp_path: Path) -> None:
    folder = bundle.write(tmp_path / "federated-unimiss")
    (folder / "client" / "gone.py").write_text("x = 1\n")
    assert build_fab_from_disk(bundle.write(folder)) == bundle.fab()


def said_by(folder: Path) -> str:
    """The hash that the copy in `folder` gives its bundle."""
    code = "from unimiss_core import bundle; print(bundle.fab_hash())"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env={}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
