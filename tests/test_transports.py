"""One federation over each transport: in-process grid, Flower's simulation engine (Ray), Flower's deployment engine.

Two sites that can train and one whose site file is wrong; after round 1 the coordinator is killed, and started again.
Over the simulation engine another copy of the project goes on then. Over deployment a site is killed too, in the last
round. What must hold is the same for all.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from server.simulate import prepare, read_simulation
from server.simulate_command import main
from tests.federation import metric_rows
from tests.flower_deployment import ROOT, Deployment, Flower
from unimiss_core import checkpoint
from unimiss_core.groups import group_of

pytestmark = pytest.mark.timeout(1200)  # a message between machines starts a process that imports torch

ROUNDS = 2
ROUND_S = 300.0
"""How long a round may take: on two idle cores some 15 s over deployment, a minute where a site is gone."""

STUDY = {
    "name": "toy",
    "model": {"prototypes": 16},
    "plan": {"volume_spacing_mm": [8.0, 8.0, 8.0], "image_longest_side": 64},
    "views": {"image_size": [33, 40], "volume_size": [13, 33, 36]},
    "schedule": {"rounds": ROUNDS, "local_steps": 2},
    "batch": {"images": 2, "volumes": 1},
    "optimiser": {"warmup_steps": 1},
}
PHANTOM = {"patients": 3, "volume_shape": [16, 32, 36], "volume_spacing_mm": [16.0, 10.0, 10.0]}
ON_ONE_THREAD = {"devices": "cpu", "threads": 1}
"""Sums in another number of threads differ in their last bit."""
LOSS_OF_COPY = 77.0
"""What the sites of a copy of the project say that each of their losses is."""


@dataclass(frozen=True)
class Journey:
    """A run that ended.

    whole: rounds in which every site that can train did. by_copy: rounds of the copy of the project.
    """

    out: Path
    whole: int = ROUNDS
    by_copy: tuple[int, ...] = ()


@pytest.fixture(scope="module")
def simulation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simulation")
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY))
    return _written(folder / "simulation.yaml")


def _written(path: Path, gone: str = "") -> Path:
    """A simulation file; the site `gone` lost its scans."""
    nowhere = {"data": [{"folder": str(path.parent / "nowhere")}]}
    kinds = {"a": "cr", "b": "ct"}
    sites: list[dict[str, object]] = [
        {"name": name, **(nowhere if name == gone else {"phantom": {"kind": kind, **PHANTOM}})}
        for name, kind in kinds.items()
    ]
    sites.append({"name": "misled", **nowhere})
    quorum = {"min_sites": 1 if gone else 2}
    raw = {"study": "study.yaml", "sites": [site | ON_ONE_THREAD for site in sites], "quorum": quorum}
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture(scope="module")
def unbroken(simulation: Path) -> Path:
    """The same study over the in-process grid, in one go: what every journey is compared with."""
    out = simulation.parent / "unbroken"
    assert main([str(simulation), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def without_b(simulation: Path, unbroken: Path) -> Path:
    """As `unbroken`, but the last round is site a's alone."""
    out = simulation.parent / "without-b"
    shutil.copytree(unbroken, out)
    shutil.rmtree(out / "checkpoints" / checkpoint.folder_name(ROUNDS))
    assert main([str(_written(simulation.with_name("gone.yaml"), gone="b")), "--out", str(out), "--resume"]) == 0
    return out


@pytest.fixture(scope="module", params=["in_process", "simulation_engine", "deployment_engine"])
def journey(request: pytest.FixtureRequest, simulation: Path) -> Iterator[Journey]:
    travelled = {"in_process": _in_process, "simulation_engine": _simulated, "deployment_engine": _deployed}
    with travelled[request.param](simulation, simulation.parent / request.param) as journey:
        yield journey


@contextmanager
def _in_process(simulation: Path, folder: Path) -> Iterator[Journey]:
    out = folder / "out"
    command = [sys.executable, "-m", "server.simulate_command", str(simulation), "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        give_up = time.monotonic() + ROUND_S
        while not _is_done(out, 1):
            assert process.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=20)
    assert main([str(simulation), "--out", str(out), "--resume"]) == 0
    yield Journey(out)


@contextmanager
def _simulated(simulation: Path, folder: Path) -> Iterator[Journey]:
    """As a researcher types it: Flower starts a SuperLink for its engine by itself, which stays for the second run."""
    out = folder / "out"
    config = {"simulation": str(simulation), "out": str(out)}
    with Flower.opened(folder) as flower:
        run = flower.submit(config, sites=3)
        _wait_for_round(1, flower, run, out)
        flower.kill("flwr-simulation")
        run = flower.submit(config | {"resume": True}, project=_copy(folder / "copy"), sites=3)
        _wait_for_round(ROUNDS, flower, run, out)
        _assert_completed(flower, run)
        yield Journey(out, by_copy=(2,))


def _copy(folder: Path) -> Path:
    """A copy of the project whose sites say that they are its own."""
    for name in ("server", "client", "unimiss_core", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    changed, told = folder / "client" / "trainer.py", "losses=figures.losses() if"
    assert told in changed.read_text()
    changed.write_text(changed.read_text().replace(told, f"losses=dict.fromkeys(figures.losses(), {LOSS_OF_COPY}) if"))
    return folder


@contextmanager
def _deployed(simulation: Path, folder: Path) -> Iterator[Journey]:
    out = folder / "out"
    prepare(read_simulation(simulation), out, resume=False)
    coordinator = yaml.safe_load((out / "coordinator.yaml").read_text()) | {"wait_s": 60.0, "deadline_s": ROUND_S}
    (out / "coordinator.yaml").write_text(yaml.safe_dump(coordinator))
    config = {"coordinator": str(out / "coordinator.yaml")}
    with Flower.opened(folder) as flower:
        deployment = Deployment(flower)
        deployment.start_sites({name: out / "sites" / name / "site.yaml" for name in ("a", "b", "misled")})
        run = flower.submit(config)
        _wait_for_round(1, flower, run, out)
        flower.kill("flwr-serverapp")
        run = flower.submit(config | {"resume": True})
        asked = f"[RUN {run}, ROUND 2]"  # not by the first run, which may have come as far
        flower.wait_until(lambda: asked in deployment.heard_by("b"), "b is asked", timeout_s=ROUND_S, run=run)
        deployment.kill_site("b")
        _wait_for_round(ROUNDS, flower, run, out)
        _assert_completed(flower, run)
        yield Journey(out, whole=1)


def _wait_for_round(round: int, flower: Flower, run: int, out: Path) -> None:
    """poll_s: what is killed when a round has ended must not have time for the next one."""
    is_done = partial(_is_done, out, round)
    flower.wait_until(is_done, f"round {round} ends", timeout_s=2 * ROUND_S, run=run, poll_s=0.05)


def _is_done(out: Path, round: int) -> bool:
    return (out / "checkpoints" / checkpoint.folder_name(round)).exists()


def _assert_completed(flower: Flower, run: int) -> None:
    told = ["running"]

    def is_closed() -> bool:
        if flower.has_ended(run):
            told.append(flower.status(run))
        return told[-1] != "running"

    flower.wait_until(is_closed, "Flower closes the run", timeout_s=60.0)
    assert told[-1] == "finished:completed", flower.logs()


def test_every_round_is_there_once_and_all_who_can_train_count(journey: Journey) -> None:
    rows = metric_rows(journey.out)
    assert [row["round"] for row in rows] == list(range(1, ROUNDS + 1))
    for row in rows[: journey.whole]:
        assert [row["sites"][name]["status"] for name in ("a", "b")] == ["ok", "ok"]
    assert (journey.out / "report.html").stat().st_size > 0


def test_a_site_that_cannot_take_part_stands_there_with_its_reason(journey: Journey) -> None:
    """Over deployment as its node: it never came to say its name."""
    for row in metric_rows(journey.out):
        (misled,) = row["sites"].keys() - {"a", "b"}
        assert misled == "misled" or misled.startswith("node-")
        assert (row["sites"][misled]["status"], row["sites"][misled]["reason"]) == ("refused", "site_setup")


def test_the_model_is_that_of_an_unbroken_run_bit_for_bit(journey: Journey, unbroken: Path, without_b: Path) -> None:
    """Before the coordinator is killed, and after: whatever carries the messages, only bytes of them count. A round
    without b is that of sites without it."""
    for round in range(1, ROUNDS + 1):
        ours, theirs = (
            checkpoint.load(out / "checkpoints" / checkpoint.folder_name(round))
            for out in (journey.out, unbroken if round <= journey.whole else without_b)
        )
        for name, value in theirs.student.items():
            assert torch.equal(ours.student[name], value), (round, name)
            assert torch.equal(ours.teacher[name], theirs.teacher[name]), (round, name)


def test_each_copy_of_the_project_runs_its_own_code(journey: Journey) -> None:
    """Flower's engine has been seen to run the first copy's ClientApp for every later run."""
    for row in metric_rows(journey.out)[: journey.whole]:
        losses = [loss for name in ("a", "b") for loss in row["sites"][name]["losses"].values()]
        assert [loss == LOSS_OF_COPY for loss in losses] == [row["round"] in journey.by_copy] * 5


def test_a_site_that_is_killed_in_mid_round_costs_itself_alone(journey: Journey) -> None:
    if journey.whole == ROUNDS:
        pytest.skip("of a site that runs in the same process, test_faults.py has the case")
    last = metric_rows(journey.out)[-1]["sites"]
    assert (last["a"]["status"], last["b"]["status"], last["b"]["reason"]) == ("ok", "absent", "no_reply")
    before, after = (checkpoint.load(journey.out / "checkpoints" / f"round-000{n}") for n in (1, 2))
    for name, value in before.student.items():
        assert torch.equal(after.student[name], value) == (group_of(name) == "3d"), name
