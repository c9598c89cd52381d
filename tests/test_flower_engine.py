"""The same two apps under `flwr run .`, with Flower's simulation engine (Ray) and a SuperLink of its own."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from server.simulate_command import main
from unimiss_core import checkpoint

ROOT = Path(__file__).parents[1]
PHANTOM = {"volume_shape": [16, 32, 36], "volume_spacing_mm": [16.0, 10.0, 10.0]}
STUDY = {
    "name": "toy",
    "model": {"prototypes": 16},
    "plan": {"volume_spacing_mm": [8.0, 8.0, 8.0], "image_longest_side": 64},
    "schedule": {"rounds": 2, "local_steps": 2},
    "batch": {"images": 4, "volumes": 2},
    "optimiser": {"warmup_steps": 1},
}


@dataclass(frozen=True)
class Flower:
    """A Flower installation of the test's own: its SuperLink starts, on the first run, in an empty folder.

    A SuperLink that starts in a project's folder makes later runs of other copies use that folder's code.
    """

    folder: Path
    environment: Mapping[str, str]

    def run(self, project: Path, out: Path) -> None:
        config = f'simulation="{self.folder / "simulation.yaml"}" out="{out}"'
        engine = "num-supernodes=2 client-resources-num-cpus=1 init-args-num-cpus=2"
        command = [Path(sys.executable).with_name("flwr"), "run", project, "--stream", "-c", config]
        subprocess.run(
            [*command, "--federation-config", engine],
            cwd=self.folder / "empty",
            env=dict(self.environment),
            check=True,
            capture_output=True,
            timeout=240,
        )


@pytest.fixture(scope="module")
def flower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    folder = tmp_path_factory.mktemp("flower")
    (folder / "empty").mkdir()
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY))
    sites = [{"name": n, "phantom": {"kind": k, "patients": 3, **PHANTOM}} for n, k in (("a", "cr"), ("b", "ct"))]
    (folder / "simulation.yaml").write_text(yaml.safe_dump({"study": "study.yaml", "sites": sites}))
    quiet = dict(
        line.split("=", 1) for line in (ROOT / "configs" / "flower.env").read_text().splitlines() if "=" in line
    )
    environment = {
        **os.environ,
        **{key: value for key, value in quiet.items() if not key.startswith("#")},
        "HOME": str(folder),
        "FLWR_HOME": str(folder / "flwr"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(_free_port()),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    try:
        yield Flower(folder, environment)
    finally:
        _end_processes_of(folder / "flwr")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end_processes_of(flwr_home: Path) -> None:
    """End what `flwr run` left running: the processes whose environment names this test's own Flower folder."""
    mark = f"FLWR_HOME={flwr_home}".encode()
    for number in [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]:
        try:
            if mark in Path(f"/proc/{number}/environ").read_bytes().split(b"\0"):
                os.kill(number, signal.SIGTERM)
        except OSError:
            continue
    time.sleep(1)


def rows(out: Path) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def first_run(flower: Flower) -> Path:
    flower.run(ROOT, flower.folder / "out")
    return flower.folder / "out"


def test_flwr_run_trains_and_leaves_the_artefacts(first_run: Path) -> None:
    assert [{name: site["status"] for name, site in row["sites"].items()} for row in rows(first_run)] == [
        {"a": "ok", "b": "ok"},
        {"a": "ok", "b": "ok"},
    ]
    assert (first_run / "report.html").stat().st_size > 0


def test_engine_and_in_process_grid_give_the_same_model(first_run: Path, flower: Flower) -> None:
    """But for the last bit: Ray's workers run with another number of threads, and bf16 may round the other way."""
    assert main([str(flower.folder / "simulation.yaml"), "--out", str(flower.folder / "here")]) == 0
    ours, theirs = (checkpoint.load(out / "checkpoints" / "round-0002") for out in (flower.folder / "here", first_run))
    start = checkpoint.load(first_run / "checkpoints" / "round-0000").student
    for name, tensor in ours.student.items():
        torch.testing.assert_close(tensor, theirs.student[name], rtol=0, atol=5e-4)
    moved = sum(float((ours.student[name] - start[name]).norm()) for name in start)
    apart = sum(float((ours.student[name] - theirs.student[name]).norm()) for name in start)
    assert apart < 0.02 * moved


@pytest.mark.usefixtures("first_run")
def test_a_second_copy_of_the_project_runs_its_own_code(flower: Flower) -> None:
    """Flower's engine has been seen to run the first copy's ClientApp for every later run."""
    copy = flower.folder / "copy"
    for name in ("server", "client", "unimiss_core", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    changed = copy / "client" / "site_config.py"
    loads = "    return anchored(load(SiteConfig, path), path.resolve().parent)"
    assert loads in changed.read_text()
    renames = f"{loads[: -len('.parent)')]}.parent).model_copy(update={{'name': path.parent.name + '-copy'}})"
    changed.write_text(changed.read_text().replace(loads, renames))
    flower.run(copy, flower.folder / "out-of-copy")
    assert {name for row in rows(flower.folder / "out-of-copy") for name in row["sites"]} == {"a-copy", "b-copy"}
