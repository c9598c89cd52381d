"""The main job end to end: real files, ordinary readers, ordinary apps, one process - and what can go wrong."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from client.beginning import begin
from client.finetune_config import FromCheckpoint
from server.simulate_command import INTERRUPTED, main
from unimiss_core import checkpoint

pytestmark = pytest.mark.usefixtures("narrow")

STUDY = {
    "name": "toy",
    "model": {"prototypes": 16, "image_size": [64, 64], "volume_size": [16, 64, 64]},
    "plan": {"volume_spacing_mm": [8.0, 8.0, 8.0], "image_longest_side": 64},
    "views": {"image_size": [33, 40], "volume_size": [13, 33, 36]},
    "schedule": {"rounds": 2, "local_steps": 2},
    "batch": {"images": 4, "volumes": 2},
    "optimiser": {"warmup_steps": 1},
}
PHANTOM = {"volume_shape": [16, 32, 36], "volume_spacing_mm": [16.0, 10.0, 10.0]}


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hospitals written once, for all tests of this file."""
    from client.phantoms import PhantomConfig, write_hospital
    from unimiss_core.config import parse

    folder = tmp_path_factory.mktemp("hospitals")
    for seed, (kind, patients) in enumerate({"cr": 6, "ct": 3, "mixed": 3}.items()):
        raw = {"kind": kind, "patients": patients, "seed": seed, **PHANTOM}
        write_hospital(parse(PhantomConfig, raw, where="test"), folder / kind)
    return folder


def simulation(tmp_path: Path, hospitals: Path, **changes: object) -> Path:
    """A simulation file over the hospitals: one site for each."""
    sites = [_site(hospitals, kind) for kind in ("cr", "ct", "mixed")]
    raw = {"study": "study.yaml", "sites": sites, "quorum": {"min_sites": 1}, **changes}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    path = tmp_path / "simulation.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def _site(hospitals: Path, kind: str) -> dict[str, object]:
    return {"name": f"{kind}-site", "data": [_source(hospitals / kind)]}


def _source(folder: Path) -> dict[str, object]:
    return {"folder": str(folder), "table": {"path": str(folder / "labels.csv"), "patient": "patient"}}


def run(config: Path, out: Path, *options: str) -> int:
    return main([str(config), "--out", str(out), *options])


def rows(out: Path) -> list[Mapping]:  # type: ignore[type-arg]
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same_weights(a: Path, b: Path) -> bool:
    ours, theirs = checkpoint.load(a), checkpoint.load(b)
    return all(
        torch.equal(x[name], y[name])
        for x, y in ((ours.student, theirs.student), (ours.teacher, theirs.teacher))
        for name in y
    )


@pytest.fixture(scope="module")
def finished(hospitals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole run with a probe, which several tests look at."""
    folder = tmp_path_factory.mktemp("finished")
    probe = {"name": "lesion", "rank": 2, "label": "lesion", "positive": ["1"], "data": [_source(hospitals / "cr")]}
    assert run(simulation(folder, hospitals, probe=[probe], probe_every=1), folder / "out") == 0
    return folder / "out"


def test_three_hospitals_train_one_encoder(finished: Path) -> None:
    assert [row["round"] for row in rows(finished)] == [1, 2]
    for row in rows(finished):
        assert {name: site["status"] for name, site in row["sites"].items()} == {
            "cr-site": "ok",
            "ct-site": "ok",
            "mixed-site": "ok",
        }
        assert set(row["sites"]["cr-site"]["losses"]) == {"image"}
        assert set(row["sites"]["ct-site"]["losses"]) == {"volume", "slices", "volume_to_slices", "slices_to_volume"}
        assert len(row["sites"]["mixed-site"]["losses"]) == 5
        assert all(value > 0 for value in row["global"]["update_norm"].values())
    before = checkpoint.load(finished / "checkpoints" / "round-0000").student
    after = checkpoint.load(finished / "checkpoints" / "round-0002").student
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("weight"))


def test_a_site_with_x_rays_only_moves_no_byte_of_three_dimensional_tensors(finished: Path) -> None:
    layout_bytes = rows(finished)[0]["sites"]
    manifest = checkpoint.read_manifest(finished / "checkpoints" / "round-0002")
    values = sum(int(np.prod(shape)) for name, shape in manifest.tensors.items() if "3d" not in name.split("."))
    assert layout_bytes["cr-site"]["bytes_up"] == layout_bytes["cr-site"]["bytes_down"] == 2 * values


def test_the_second_objective_trains_a_federation_by_configuration_alone(
    tmp_path: Path, hospitals: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {
        "model": {**STUDY["model"], "reconstruction": True},  # type: ignore[dict-item]
        "objective": {"name": "unimiss_plus"},
    }
    out = tmp_path / "out"
    probe = {"name": "lesion", "rank": 2, "label": "lesion", "positive": ["1"], "data": [_source(hospitals / "cr")]}
    assert run(simulation(tmp_path, hospitals, overrides=changes, probe=[probe]), out) == 0
    of_images = {"image", "image_reconstruction"}
    of_volumes = {"volume", "radiograph_to_volume", "slices_to_volume", "volume_reconstruction"}
    of_volumes |= {"radiograph_reconstruction"}
    manifest = checkpoint.read_manifest(out / "checkpoints" / "round-0002")
    values = sum(int(np.prod(shape)) for name, shape in manifest.tensors.items() if "3d" not in name.split("."))
    assert [row["round"] for row in rows(out)] == [1, 2]
    for row in rows(out):
        assert {site["status"] for site in row["sites"].values()} == {"ok"}
        assert set(row["sites"]["cr-site"]["losses"]) == of_images
        assert set(row["sites"]["ct-site"]["losses"]) == of_volumes
        assert set(row["sites"]["mixed-site"]["losses"]) == of_images | of_volumes
        # A site with X-rays only neither receives nor sends a three-dimensional tensor.
        assert row["sites"]["cr-site"]["bytes_up"] == row["sites"]["cr-site"]["bytes_down"] == 2 * values
    before, after = (checkpoint.load(out / "checkpoints" / f"round-000{n}") for n in (0, 2))
    drawn = {name for name in before.student if name.startswith("reconstruction.")}
    assert len(drawn) == 4
    assert all(not torch.equal(before.student[name], after.student[name]) for name in drawn)
    assert all(not torch.equal(before.teacher[name], after.teacher[name]) for name in drawn)
    assert manifest.model.reconstruction
    encoder = begin(FromCheckpoint(folder=out / "checkpoints" / "round-0002")).encoder()
    assert not [name for name, _ in encoder.named_parameters() if "reconstruction" in name]
    mean = re.search(r"round 2 of 2: .* ct-site ([0-9.]+)", capsys.readouterr().out)
    losses = rows(out)[1]["sites"]["ct-site"]["losses"]
    compared = [losses[name] for name in of_volumes if not name.endswith("_reconstruction")]
    assert mean is not None
    assert float(mean[1]) == pytest.approx(sum(compared) / 3, abs=0.01)


def test_artefacts_are_all_there(finished: Path) -> None:
    for name in ("study.yaml", "metrics.jsonl", "report.html", "report/probe-before.json", "report/probe-after.json"):
        assert (finished / name).stat().st_size > 0, name
    assert "sha256 of this study" in (finished / "study.yaml").read_text()
    assert not list(finished.rglob("*.partial"))
    probed = json.loads((finished / "report" / "probe-after.json").read_text())
    assert "lesion" in probed
    told = [row["global"]["probe"] for row in rows(finished)]
    assert told[1] == probed
    assert told[0].keys() == told[1].keys()


def test_no_invented_identifier_or_path_of_a_scan_is_in_any_artefact(finished: Path, hospitals: Path) -> None:
    planted = [b"PHANTOM-", str(hospitals).encode()]
    for path in finished.rglob("*"):
        local = {"sites", "coordinator.yaml", "study-requested.yaml"} & set(path.relative_to(finished).parts)
        if path.is_file() and not local:
            assert not [text for text in planted if text in path.read_bytes()], path.name


def test_a_resumed_run_ends_bit_identical_to_an_unbroken_one(
    tmp_path: Path, hospitals: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed after round 1: sites keep optimiser, teacher and centre; round 2 gives the same bits."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "checkpoints" / "round-0002")
    probe = {"name": "lesion", "rank": 2, "label": "lesion", "positive": ["1"], "data": [_source(hospitals / "cr")]}
    assert run(simulation(tmp_path, hospitals, probe=[probe]), out, "--resume") == 0
    assert same_weights(out / "checkpoints" / "round-0002", finished / "checkpoints" / "round-0002")
    assert [row["round"] for row in rows(out)] == [1, 2]
    assert run(tmp_path / "simulation.yaml", out) == 2
    told = capsys.readouterr().err
    assert "holds a run already; resume it" in told
    assert told.rstrip().endswith("--resume")


def test_in_int8_a_resumed_run_ends_bit_identical_and_a_site_with_a_new_disk_goes_on(
    tmp_path: Path, hospitals: Path
) -> None:
    changes = {"wire": {"dtype": "int8"}, "schedule": {"rounds": 3, "local_steps": 2}}
    sites = [_site(hospitals, kind) for kind in ("cr", "ct")]
    config, out = simulation(tmp_path, hospitals, overrides=changes, sites=sites), tmp_path / "out"
    assert run(config, out) == 0
    sent = [row["sites"]["ct-site"]["bytes_down"] for row in rows(out)]
    steps, whole = sent[1], sent[0]
    assert sent == [whole, steps, steps]
    assert [row["sites"]["ct-site"]["bytes_up"] for row in rows(out)] == [steps] * 3
    for copy in ("killed", "new-disk"):
        shutil.copytree(out, tmp_path / copy)
        shutil.rmtree(tmp_path / copy / "checkpoints" / "round-0003")
    shutil.rmtree(tmp_path / "new-disk" / "sites" / "ct-site" / "state" / "runs")
    for copy in ("killed", "new-disk"):
        assert run(config, tmp_path / copy, "--resume") == 0
        assert {site["status"] for site in rows(tmp_path / copy)[2]["sites"].values()} == {"ok"}
    last = Path("checkpoints") / "round-0003"
    assert same_weights(tmp_path / "killed" / last, out / last)
    assert rows(tmp_path / "new-disk")[2]["sites"]["ct-site"]["bytes_down"] == steps + 2 * whole


def test_sites_tied_to_a_student_train_and_resume_to_the_same_bits(tmp_path: Path, hospitals: Path) -> None:
    """FedProx and FedEMA at sites of every kind; the second round once whole, once asked again after a crash."""
    local = {"proximal": 0.1, "divergence_scale": 0.6}
    config, out, again = simulation(tmp_path, hospitals, overrides={"local": local}), tmp_path / "out", tmp_path / "b"
    assert run(config, out) == 0
    told = [[site["diagnostics"] for site in row["sites"].values()] for row in rows(out)]
    assert [[figures["own_share"] for figures in one] for one in told] == [[0.0] * 3, [pytest.approx(0.6)] * 3]
    assert all(figures["global_distance"] > 0 for one in told for figures in one)
    shutil.copytree(out, again)
    shutil.rmtree(again / "checkpoints" / "round-0002")
    assert run(config, again, "--resume") == 0
    assert same_weights(again / "checkpoints" / "round-0002", out / "checkpoints" / "round-0002")


def test_the_run_goes_on_without_sites_that_cannot_take_part(
    tmp_path: Path, hospitals: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    junk = tmp_path / "junk"
    junk.mkdir()
    (junk / "letter-of-JANE-DOE.dcm").write_bytes(b"no image at all")
    sites = [
        {"name": "good", "data": [{"folder": str(hospitals / "ct" / "scans")}]},
        {"name": "gone", "data": [{"folder": str(tmp_path / "nowhere")}]},
        {"name": "empty", "data": [{"folder": str(tmp_path / "empty")}]},
        {"name": "junk", "data": [{"folder": str(junk)}]},
    ]
    out = tmp_path / "out"
    assert run(simulation(tmp_path, hospitals, sites=sites), out) == 0
    for row in rows(out):
        told = {name: (site["status"], site["reason"]) for name, site in row["sites"].items()}
        assert told == {
            "good": ("ok", ""),
            "gone": ("refused", "site_setup"),
            "empty": ("refused", "no_usable_scans"),
            "junk": ("refused", "no_usable_scans"),
        }
    shown = capsys.readouterr()
    assert "gone cannot take part: site_setup" in shown.out
    assert "JANE" not in shown.out + shown.err + (out / "report.html").read_text()


def test_a_site_that_raises_in_mid_round_costs_that_site_its_round(
    tmp_path: Path, hospitals: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from client import batches

    draw = batches.draw_views

    def fails_on_images(scans, *rest, **named):  # type: ignore[no-untyped-def]
        if scans[0].rank == 2:
            raise RuntimeError("cannot read /archive/JANE-DOE.dcm")
        return draw(scans, *rest, **named)

    monkeypatch.setattr(batches, "draw_views", fails_on_images)
    out = tmp_path / "out"
    assert run(simulation(tmp_path, hospitals), out) == 0
    for row in rows(out):
        assert row["sites"]["ct-site"]["status"] == "ok"
        for name in ("cr-site", "mixed-site"):
            assert (row["sites"][name]["status"], row["sites"][name]["reason"]) == ("error", "failed")
    shown = capsys.readouterr()
    assert "JANE" not in shown.out + shown.err + (out / "metrics.jsonl").read_text()


def test_a_round_that_cannot_be_completed_ends_with_its_own_exit_code(
    tmp_path: Path, hospitals: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sites = [{"name": "gone", "data": [{"folder": str(tmp_path / "nowhere")}]}]
    began = time.monotonic()
    assert run(simulation(tmp_path, hospitals, sites=sites), tmp_path / "out") == 5
    assert time.monotonic() - began < 20  # nobody waits for a folder to appear
    assert "0 of at least 1 sites are there; gone: site_setup" in capsys.readouterr().err
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"stes": []}, "unknown key 'stes' (did you mean 'sites'?)"),
        ({"sites": []}, "'sites'"),
        ({"overrides": {"schedule": {"ronds": 3}}}, "unknown key 'schedule.ronds' (did you mean 'rounds'?)"),
        ({"sites": [{"name": "a"}]}, "give either data (folders that exist) or phantom"),
    ],
)
def test_a_mistake_in_the_files_is_told_with_exit_code_2(
    tmp_path: Path, hospitals: Path, changes: dict[str, object], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(simulation(tmp_path, hospitals, **changes), tmp_path / "out") == 2
    assert told in capsys.readouterr().err


def test_a_file_in_the_way_of_the_output_is_told(
    tmp_path: Path, hospitals: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("mine")
    config = simulation(tmp_path, hospitals)
    for out in (tmp_path / "taken", tmp_path / "taken" / "below"):
        assert run(config, out) == 2
        assert "is a file; give another folder" in capsys.readouterr().err
    assert (tmp_path / "taken").read_text() == "mine"


NARROW_COMMAND = """
import sys
from tests.federation import NARROW
from unimiss_core.model import ARCHITECTURES
ARCHITECTURES["nano"] = NARROW
from server.simulate_command import main
sys.exit(main())
"""
"""`unimiss-simulate`, whose runs this process can go on with: its models are as narrow."""


def test_ctrl_c_leaves_a_run_that_can_be_resumed(tmp_path: Path, hospitals: Path) -> None:
    config = simulation(tmp_path, hospitals, overrides={"schedule": {"rounds": 2, "local_steps": 8}})
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", NARROW_COMMAND, str(config), "--out", str(out)],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As a terminal starts it; where the suite itself was started in the background, SIGINT would be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    give_up = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert process.poll() is None
        assert time.monotonic() < give_up
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED
    assert "Go on with: " in err
    assert err.rstrip().endswith("--resume")
    assert "Traceback" not in err
    assert run(config, out, "--resume") == 0
    assert [row["round"] for row in rows(out)] == [1, 2]


def test_a_simulation_whose_only_site_holds_nothing_ends_as_its_help_says(
    hospitals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    sites = [{"name": "empty", "data": [{"folder": "empty"}]}]
    assert run(simulation(tmp_path, hospitals, sites=sites), tmp_path / "out") == 5
    assert "no_usable_scans" in capsys.readouterr().err
