"""`flwr run .` as a researcher types it: Flower starts a SuperLink for its simulation engine (Ray) by itself.

That the engine gives the models of the other transports is told in test_transports.py.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from benchmarks.deployed import STUDY
from tests.federation import metric_rows
from tests.flower_deployment import ROOT, Flower

PHANTOM = {"volume_shape": [16, 32, 36], "volume_spacing_mm": [16.0, 10.0, 10.0]}
RUN_S = 240.0
"""How long a run may take; half a minute on a machine with nothing else to do."""


@pytest.fixture(scope="module")
def flower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    with Flower.opened(tmp_path_factory.mktemp("flower") / "home") as flower:
        (flower.folder / "study.yaml").write_text(yaml.safe_dump(STUDY))
        sites = [{"name": n, "phantom": {"kind": k, "patients": 3, **PHANTOM}} for n, k in (("a", "cr"), ("b", "ct"))]
        (flower.folder / "simulation.yaml").write_text(yaml.safe_dump({"study": "study.yaml", "sites": sites}))
        yield flower


def run(flower: Flower, project: Path, out: Path) -> None:
    """Flower starts a SuperLink by itself for the first run, which stays for the second."""
    config = {"simulation": str(flower.folder / "simulation.yaml"), "out": str(out)}
    begun = flower.submit(config, project=project, sites=2)
    flower.wait_until((out / "report.html").exists, "the run ends", timeout_s=RUN_S, run=begun)


@pytest.fixture(scope="module")
def first_run(flower: Flower) -> Path:
    run(flower, ROOT, flower.folder / "out")
    return flower.folder / "out"


def test_flwr_run_trains_and_leaves_the_artefacts(first_run: Path) -> None:
    assert [{name: site["status"] for name, site in row["sites"].items()} for row in metric_rows(first_run)] == [
        {"a": "ok", "b": "ok"},
        {"a": "ok", "b": "ok"},
    ]
    assert (first_run / "report.html").stat().st_size > 0


@pytest.mark.usefixtures("first_run")
def test_a_second_copy_of_the_project_runs_its_own_code(flower: Flower) -> None:
    """Flower's engine has been seen to run the first copy's ClientApp for every later run."""
    copy = flower.folder / "copy"
    for name in ("server", "client", "unimiss_core", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    changed = copy / "client" / "site_config.py"
    loads = "    site = anchored(load(SiteConfig, path), path.resolve().parent)"
    assert loads in changed.read_text()
    renames = f"{loads[: -len('.parent)')]}.parent).model_copy(update={{'name': path.parent.name + '-copy'}})"
    changed.write_text(changed.read_text().replace(loads, renames))
    run(flower, copy, flower.folder / "out-of-copy")
    assert {name for row in metric_rows(flower.folder / "out-of-copy") for name in row["sites"]} == {"a-copy", "b-copy"}
