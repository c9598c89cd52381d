"""The coordinator's probe between rounds: of the teacher it is given, beside that of round 0, and told in words."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from server.probing import Yardstick, read_probe_set, tell_of_sets
from server.report import write_report
from server.run_folder import RunFolder
from tests.run_artefacts import round_records, write_run
from unimiss_core import checkpoint
from unimiss_core.errors import ConfigError
from unimiss_core.network import build_network, tensors_of
from unimiss_core.probe import probe
from unimiss_core.progress import Event, Note, listen
from unimiss_core.study import ModelConfig, PlanConfig

NANO = ModelConfig(prototypes=16)


def a_set(path: Path) -> Path:
    """Fine and coarse noise of 24 patients, 40 x 44."""
    scans = []
    for number in range(24):
        grain = [1, 8][number % 2]
        cells = np.random.default_rng(number).normal(0, 1, (48 // grain, 48 // grain))
        scans.append(np.kron(cells, np.ones((grain, grain)))[None, :40, :44])
    np.savez(path, scans=np.float16(scans), labels=np.arange(24) % 2, patients=np.arange(24))
    return path


def run_folder(out: Path) -> RunFolder:
    """Of a run whose initial weights are those of seed 0."""
    first = tensors_of(build_network(NANO, seed=0))
    folder, facts = out / "checkpoints" / "round-0000", {"study_digest": "0" * 64, "model": NANO, "plan": PlanConfig()}
    folder.parent.mkdir(parents=True)
    checkpoint.save(folder, origin="federation", round=0, student=first, teacher=first, **facts)
    (out / "report").mkdir()
    return RunFolder(out)


def auc_of(seed: int, path: Path) -> float:
    found = read_probe_set(path)
    with torch.no_grad():
        features = build_network(NANO, seed=seed).backbone.eval()(found.scans.float()).numpy()
    area = probe(features, found.labels, found.patients).auc()
    assert area is not None
    return area


def test_a_teacher_between_rounds_is_measured_beside_the_first_and_told(tmp_path: Path) -> None:
    path, folder = a_set(tmp_path / "noise.npz"), run_folder(tmp_path / "out")
    told: list[Event] = []
    measure = Yardstick(folder, [path], NANO)
    with listen(told.append):
        figures = measure(tensors_of(build_network(NANO, seed=5)), is_last=False)["noise"]
    assert figures["auc"] == pytest.approx(auc_of(5, path), abs=0.01)
    assert figures["gain"] == pytest.approx(auc_of(5, path) - auc_of(0, path), abs=0.02)
    assert not list(folder.report.iterdir())
    words = [event.text for event in told if isinstance(event, Note)]
    low, high = figures["interval"]
    assert words[1].startswith(
        f"probe noise: AUC {figures['auc']:.3f} ({low:.3f} to {high:.3f}), {figures['gain']:+.3f} ("
    )
    again = measure(tensors_of(build_network(NANO, seed=0)), is_last=True)["noise"]
    assert (again["gain"], again["gain_interval"]) == (0.0, (0.0, 0.0))
    before = json.loads((folder.report / "probe-before.json").read_text())
    assert before["noise"]["auc"] == again["auc"] == pytest.approx(auc_of(0, path), abs=0.01)


def test_the_report_draws_the_probe_over_the_rounds_where_there_was_more_than_one(tmp_path: Path) -> None:
    records, title = round_records(4), "AUC of the probe over rounds."
    for record in records[1::2]:
        record["global"]["probe"] = {
            "noise": {"auc": 0.5 + record["round"] / 10},
            "odd": "no figures",
            "none": {"auc": None},
        }
    write_run(tmp_path, records, rounds=4)
    (tmp_path / "report" / "probe-after.json").write_text(json.dumps({"noise": {"task": "noise", "auc": 0.9, "n": 24}}))
    write_report(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert f"{title} noise" in text
    del records[1]["global"]["probe"]
    write_run(tmp_path, records, rounds=4)
    write_report(tmp_path)
    assert title not in (tmp_path / "report.html").read_text()


def test_the_classes_of_a_set_are_told_before_a_run_and_with_its_figures(tmp_path: Path) -> None:
    path, told = a_set(tmp_path / "noise.npz"), list[Event]()
    with listen(told.append):
        tell_of_sets([path])
    assert [event.text for event in told if isinstance(event, Note)] == [
        "probe noise: 24 scans of 24 patients; classes 0 12, 1 12"
    ]
    measure = Yardstick(run_folder(tmp_path / "out"), [path], NANO)
    assert measure(tensors_of(build_network(NANO, seed=0)), is_last=False)["noise"]["classes"] == {"0": 12, "1": 12}
    with np.load(path) as held:
        np.savez(path, scans=held["scans"], labels=np.array([f"JANE {n}" for n in range(24)]), patients=np.arange(24))
    with listen(told.append):
        tell_of_sets([path])
    assert isinstance(told[-1], Note)
    assert told[-1].text == "probe noise: 24 scans of 24 patients; 24 classes"


def test_a_file_that_is_no_set_is_told_before_a_run(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_text("no archive")
    with pytest.raises(ConfigError, match=r"expected an \.npz with scans, labels and patients"):
        tell_of_sets([tmp_path / "x.npz"])


def test_the_report_says_how_many_scans_are_of_each_class(tmp_path: Path) -> None:
    write_run(tmp_path, round_records(4), rounds=4)
    figures = {"task": "noise", "auc": 0.9, "n": 24, "classes": {"-1.0": 4, "1.0": 20}}
    (tmp_path / "report" / "probe-after.json").write_text(json.dumps({"noise": figures}))
    write_report(tmp_path)
    assert "noise: -1.0 4, 1.0 20." in (tmp_path / "report.html").read_text()


def test_what_is_no_set_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_text("no archive")
    with pytest.raises(ConfigError, match=r"expected an \.npz with scans, labels and patients"):
        Yardstick(run_folder(tmp_path / "out"), [tmp_path / "x.npz"], NANO)(
            tensors_of(build_network(NANO, seed=0)), is_last=True
        )
