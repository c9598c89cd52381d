"""`unimiss probe`: its figures against scikit-learn's on the features of `unimiss embed`, from every kind of DATA."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.preprocessing import StandardScaler

from client.beginning import begin
from client.finetune_config import FromCheckpoint
from client.nifti import write_nifti
from client.pictures import write_png
from client.probe_sources import source_of
from client.research_command import main
from server.probing import read_probe_set
from tests.series_files import write_series
from tests.test_finetune import QUICK, pictures
from tests.test_predict import BALL, untrained
from tests.test_research_command import nano_checkpoint
from unimiss_core.network import build_network
from unimiss_core.probe import neighbours, probe
from unimiss_core.scan import Scan
from unimiss_core.study import ModelConfig


def figures_of(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    out = tmp_path / "figures.json"
    out.unlink(missing_ok=True)
    assert main(["probe", *arguments, "--out", str(out)]) == 0
    return json.loads(out.read_text())  # type: ignore[no-any-return]


def table_with_split(tmp_path: Path) -> Path:
    """36 pictures of fine and coarse noise; the last 12 lines test. Class 'fine' comes last of both by its name."""
    pictures(tmp_path, 36)
    lines = (tmp_path / "t.csv").read_text().splitlines()
    told = [f"{line},{'train' if number < 24 else 'test'}" for number, line in enumerate(lines[1:])]
    (tmp_path / "pictures" / "kinds.csv").write_text("\n".join([f"{lines[0]},split", *told]))
    return tmp_path / "pictures" / "kinds.csv"


def embedded(tmp_path: Path, checkpoint: Path) -> NDArray[np.float32]:
    """Features of secret0.png, secret1.png, ..., as `unimiss embed` writes them."""
    out = tmp_path / "features.npz"
    assert main(["embed", str(checkpoint), str(tmp_path / "pictures"), "--out", str(out), "--show-paths"]) == 0
    found = np.load(out)
    order = {str(file): row for row, file in enumerate(found["files"])}
    return found["features"][[order[f"secret{k}.png"] for k in range(len(order))]]  # type: ignore[no-any-return]


def test_the_figures_are_scikit_learns_on_the_features_that_embed_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, table = nano_checkpoint(tmp_path / "round-0001"), table_with_split(tmp_path)
    (told,) = figures_of(tmp_path, str(folder), "--data", str(table))
    said = capsys.readouterr()
    x, fine = embedded(tmp_path, folder), np.arange(36) % 2 == 0
    scaler = StandardScaler().fit(x[:24].astype(np.float64))
    model = LogisticRegression(C=0.1, max_iter=2000).fit(scaler.transform(x[:24].astype(np.float64)), fine[:24])
    chances = model.predict_proba(scaler.transform(x[24:].astype(np.float64)))[:, 1]
    linear = told["figures"]["linear"]["this encoder"]
    assert linear["auc"]["value"] == pytest.approx(roc_auc_score(fine[24:], chances))
    assert linear["ap"]["value"] == pytest.approx(average_precision_score(fine[24:], chances))
    assert linear["accuracy"]["value"] == pytest.approx(((chances > 0.5) == fine[24:]).mean())
    each = told["figures"]["linear"]
    difference = linear["auc"]["value"] - each["random encoder"]["auc"]["value"]
    assert each["gain"]["auc"]["value"] == pytest.approx(difference)
    assert each["gain"]["auc"]["low"] <= difference <= each["gain"]["auc"]["high"]
    assert (told["scans"], told["judged"], told["patients"]) == (36, 12, 36)
    assert f"{linear['auc']['value']:.3f} (" in said.out
    assert not any(name in said.out + said.err + json.dumps(told) for name in ("miller", "secret"))


def test_without_a_split_each_scan_is_judged_by_a_model_of_other_patients(tmp_path: Path) -> None:
    """Oracle: the core's probe, which tests hold to that, on the features of `unimiss embed`."""
    folder, told = nano_checkpoint(tmp_path / "round-0001"), pictures(tmp_path)
    assert told
    (one,) = figures_of(tmp_path, str(folder), "--data", str(tmp_path / "t.csv"), "--root", str(tmp_path / "pictures"))
    x, labels = embedded(tmp_path, folder), np.array(["fine", "coarse"] * 15)
    patients = np.array([f"miller{k}" for k in range(30)])
    for name, of in {"linear": probe, "neighbours": neighbours}.items():
        found = of(x, labels, patients)  # type: ignore[operator]
        assert one["figures"][name]["this encoder"]["auc"]["value"] == pytest.approx(found.auc(), abs=0.02)
    assert one["judged"] == 30


def test_folders_label_what_lies_below_them_and_dicom_says_whose_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, chance = tmp_path / "data", np.random.default_rng(0)
    for number in range(14):
        label, size = ["plain", "rough"][number % 2], [1, 8][number % 2]
        cells = chance.integers(0, 900, (14, 40 // size, 40 // size)).astype(np.int16)
        voxels = np.kron(cells, np.ones((1, size, size), np.int16))
        whose = {"PatientID": f"Miller-{number if number < 12 else number - 2}"}  # two have two series
        write_series(data / label / f"s{number}", voxels, attributes=whose)
    for number in range(12):
        write_png(data / ["plain", "rough"][number % 2] / f"p{number // 2}-{number}.png", noise((40, 44), number))
    write_png(data / "astray.png", noise((40, 44), 99))
    (data / "rough" / "notes.txt").write_text("no scan")
    told = figures_of(tmp_path, "scratch", "--data", str(data))
    said = capsys.readouterr()
    assert [(one["rank"], one["scans"], one["patients"]) for one in told] == [(2, 12, 12), (3, 14, 12)]
    assert told[1]["classes"] == {"plain": 7, "rough": 7}
    assert "gain" not in told[1]["figures"]["linear"]  # scratch is the random encoder
    assert "left out: 1 scan(s) that lie in no label's folder" in said.err
    assert "left out: 1 not_an_image" in said.err
    assert "Miller" not in said.out + said.err
    named = figures_of(tmp_path, "scratch", "--data", str(data), "--patient-pattern", "/(?P<patient>p[0-9]+)-")
    assert [(one["rank"], one["scans"], one["patients"]) for one in named] == [(2, 12, 6)]


def noise(shape: tuple[int, ...], seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)


def test_volumes_that_do_not_say_what_they_are_are_told_and_read_as_the_model_read_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """NIfTI in folders, in a table, in a fine-tuning's file; a model that took its own for CT takes these for CT."""
    data, lines = tmp_path / "data", ["scan,label,patient"]
    for number in range(12):
        label = ["plain", "rough"][number % 2]
        values = np.random.default_rng(number).normal(0, 200 + 800 * (number % 2), (1, 8, 16, 16)).astype(np.float32)
        (data / label).mkdir(parents=True, exist_ok=True)
        write_nifti(data / label / f"{number}.nii.gz", Scan(values, (2.0, 2.0, 2.0), "OT"))
        lines.append(f"{label}/{number}.nii.gz,{label},p{number}")
    (data / "t.csv").write_text("\n".join(lines))
    task = {"name": "classification", "rank": 3, "classes": ["plain", "rough"]}
    raw = {"name": "x", "task": task, "init": {"name": "scratch"}, "data": {"table": "t.csv", "folder": "."}}
    (data / "x.yaml").write_text(yaml.safe_dump({**raw, "split": {"folds": 3, "validation": 0.5}}))
    unsaid = "12 scan(s) do not say what they are; where they are CT, say so: with "
    for source, way_out in (("", "--modality CT"), ("t.csv", "--modality CT"), ("x.yaml", "data.modality: CT")):
        figures_of(tmp_path, "scratch", "--data", str(data / source))
        assert f"{unsaid}{way_out}" in capsys.readouterr().err
    known = untrained(tmp_path / "known", BALL, modality="CT")
    figures_of(tmp_path, str(known), "--data", str(data / "t.csv"))
    assert unsaid not in capsys.readouterr().err
    for source in ("", "t.csv", "x.yaml"):
        for model, read_as in ((known, "CT"), (untrained(tmp_path / f"other{source}", BALL), "OT")):
            beginning = begin(FromCheckpoint(folder=model))
            found = source_of(data / source).scans(beginning.plan, beginning.modality)
            assert {one.scan.modality for one in found} == {read_as}


def test_a_medmnist_file_and_a_fine_tunings_file_are_judged_by_their_own_split(tmp_path: Path) -> None:
    arrays = {}
    for seed, (part, count) in enumerate({"train": 16, "val": 8, "test": 10}.items()):
        arrays[f"{part}_images"] = noise((count, 34, 35), seed)
        arrays[f"{part}_labels"] = (np.arange(count) % 2)[:, None]
    np.savez(tmp_path / "mnist.npz", **arrays)
    (one,) = figures_of(tmp_path, "scratch", "--data", str(tmp_path / "mnist.npz"))
    assert (one["question"], one["rank"], one["scans"], one["judged"]) == ("mnist", 2, 34, 10)
    assert one["classes"] == {"0": 17, "1": 17}
    (tmp_path / "p").mkdir()
    lines = ["scan,patient,Edema,Mass"]
    for number in range(30):
        write_png(tmp_path / "p" / f"{number}.png", noise((40, 44), number))
        lines.append(f"{number}.png,{number},{number % 2},{int(number % 3 == 0)}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    task = {"name": "classification", "kind": "multi_label", "rank": 2, "classes": ["Edema", "Mass"]}
    raw = {"name": "x", "task": task, "data": {"table": "t.csv", "folder": "p"}, "split": {"folds": 3}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({**raw, "init": {"name": "scratch"}, "training": QUICK}))
    told = figures_of(tmp_path, "scratch", "--data", str(tmp_path / "x.yaml"))
    assert [(one["question"], one["judged"], one["classes"]) for one in told] == [
        ("Edema", 10, {"no": 15, "yes": 15}),
        ("Mass", 10, {"no": 20, "yes": 10}),
    ]


def test_what_a_coordinator_probes_with_is_what_was_probed(tmp_path: Path) -> None:
    folder, _ = nano_checkpoint(tmp_path / "round-0001"), pictures(tmp_path)
    asked = ("--data", str(tmp_path / "t.csv"), "--root", str(tmp_path / "pictures"))
    (one,) = figures_of(tmp_path, str(folder), *asked, "--set-out", str(tmp_path / "noise.npz"))
    found = read_probe_set(tmp_path / "noise.npz")
    assert found.scans.shape == (30, 1, *ModelConfig().image_size)
    assert not any("miller" in patient for patient in found.patients)
    features = build_network(ModelConfig(prototypes=16), seed=1).backbone(found.scans.float()).detach().numpy()
    expected = probe(features, found.labels, found.patients).auc()
    assert one["figures"]["linear"]["this encoder"]["auc"]["value"] == pytest.approx(expected, abs=0.03)


def test_what_cannot_be_probed_is_told_in_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures(tmp_path, 6)
    table, root = str(tmp_path / "t.csv"), str(tmp_path / "pictures")

    def refused(told: str, *arguments: str, code: int = 2) -> None:
        assert main(["probe", *arguments]) == code
        heard = capsys.readouterr()
        assert told in heard.err, heard.err
        assert "PATIENT-" not in heard.err + heard.out

    nowhere = str(tmp_path / "nowhere")
    refused(f"CHECKPOINT {nowhere}: does not exist; give 'scratch', a checkpoint's folder", nowhere, "--data", root)
    refused("nowhere: does not exist", "scratch", "--data", nowhere)
    refused("nowhere: is no folder", "scratch", "--data", table, "--root", str(tmp_path / "nowhere"))
    refused("has no column kind; give --scan, --label or --patient", "scratch", "--data", table, "--label", "kind")
    refused("holds one class alone", "scratch", "--data", write(tmp_path / "one.csv", "scan,label,patient\na.png,x,1"))
    header = write(tmp_path / "header.csv", "scan,label,patient\n")
    refused("table header.csv: holds no rows", "scratch", "--data", header)
    refused("table void.csv: holds no rows", "scratch", "--data", write(tmp_path / "void.csv", ""))
    bare = write(tmp_path / "bare.csv", "scan,label,patient\na.png,x,1\nb.png,,2\nc.png,y,3\nd.png, ,4\n")
    refused("table bare.csv: 2 line(s) have no label in column 'label', as line 3", "scratch", "--data", bare)
    torn = "scan,label,patient,split\na.png,x,1,train\nb.png,y,1,test"
    refused("1 patient(s) stand in the test part and in another", "scratch", "--data", write(tmp_path / "b.csv", torn))
    refused("needs a group named patient", "scratch", "--data", root, "--patient-pattern", "x")
    refused("is a folder; give the name of a file", "scratch", "--data", root, "--out", str(tmp_path))
    refused("--key: begins with 'scratch'", "scratch", "--data", root, "--key", "x.pub")
    (tmp_path / "empty" / "a").mkdir(parents=True)
    refused("empty: holds no file", "scratch", "--data", str(tmp_path / "empty"), code=3)
    write(tmp_path / "empty" / "a" / "notes.txt", "no scan")
    refused("holds no labelled scan that can be used; the notes", "scratch", "--data", str(tmp_path / "empty"), code=3)
    for number in range(21):
        (tmp_path / "archive" / f"PATIENT-{number}").mkdir(parents=True)
        noise = np.random.default_rng(number).integers(0, 255, (40, 44)).astype(np.uint8)
        write_png(tmp_path / "archive" / f"PATIENT-{number}" / "a.png", noise)
    refused("21 are of one patient each, so they look like patients", "scratch", "--data", str(tmp_path / "archive"))
    write(tmp_path / "x.npz", "no archive")
    refused("is no MedMNIST .npz", "scratch", "--data", str(tmp_path / "x.npz"))
    for option in ("--out", "--set-out"):
        refused(f"{option} {table}: exists; give another name", "scratch", "--data", table, option, table)
    assert main(["probe", "scratch", "--data", table, "--root", root]) == 0
    assert "no figure: a class has only 3 patients, at least 5 are needed" in capsys.readouterr().out


@pytest.mark.parametrize("has_split", [False, True])
def test_a_scan_under_two_patients_does_not_teach_what_it_is_judged_by(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], has_split: bool
) -> None:
    """Whoever judges stays; copies among those who teach may stay, too."""
    pictures(tmp_path, 20)
    lines = ["scan,label,patient" + ",split" * has_split]
    for number in range(20):
        label, part = "ab"[number // 2 % 2], ["train", "test"][number % 4 == 3]
        shutil.copy(tmp_path / "pictures" / f"secret{number}.png", tmp_path / "pictures" / f"again{number}.png")
        lines.append(f"secret{number}.png,{label},p{number}" + ",train" * has_split)
        lines.append(f"again{number}.png,{label},q{number}" + f",{part}" * has_split)
    table = write(tmp_path / "pictures" / "both.csv", "\n".join(lines))
    (told,) = figures_of(tmp_path, "scratch", "--data", table, "--set-out", str(tmp_path / "set.npz"))
    left = 5 if has_split else 20
    assert (told["scans"], told["patients"], told["judged"]) == (40 - left, 40 - left, 5 if has_split else 20)
    assert len(np.load(tmp_path / "set.npz")["scans"]) == 40 - left
    assert f"left out: {left} duplicate: a copy of a file" in capsys.readouterr().err


def test_folders_of_few_patients_are_named_neither_on_the_screen_nor_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path, 6)
    for number in range(6):
        folder = tmp_path / "archive" / f"MILLER-{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "pictures" / f"secret{number}.png", folder)
    data = (str(tmp_path / "archive"), "--patient-pattern", "(?P<patient>MILLER-.)")
    (told,) = figures_of(tmp_path, "scratch", "--data", *data)
    assert (told["scans"], told["patients"], told["classes"]) == (6, 3, {})
    said = capsys.readouterr()
    assert "labels are not named, for most are of one patient each" in said.out
    assert "MILLER" not in said.out + said.err + json.dumps(told)


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ("t.csv", ("--patient-pattern", "(")),
        ("pictures", ("--root", "pictures")),
        ("pictures", ("--label", "label")),
        ("pictures", ("--scan", "s", "--patient", "p")),
        ("x.npz", ("--modality", "CT")),
        ("x.npz", ("--root", "pictures")),
        ("x.yaml", ("--patient-pattern", "(?P<patient>p)")),
        ("x.yaml", ("--modality", "CT")),
        ("x.yaml", ("--label", "kind")),
    ],
)
def test_an_option_that_says_nothing_about_the_data_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: str, options: tuple[str]
) -> None:
    pictures(tmp_path, 6)
    write(tmp_path / "x.npz", "no archive")
    write(tmp_path / "x.yaml", "no: file")
    monkeypatch.chdir(tmp_path)
    assert main(["probe", "scratch", "--data", data, *options]) == 2
    kind = {"t.csv": "a table", "pictures": "a folder", "x.npz": "a MedMNIST file", "x.yaml": "a fine-tuning's file"}
    named = " and ".join(option for option in options if option.startswith("--"))
    told = f"{named}: of no use where --data is {kind[data]}; leave it out"
    assert told in capsys.readouterr().err


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)
