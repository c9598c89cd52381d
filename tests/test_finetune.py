import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.metrics import roc_auc_score

from client.finetune_config import load_finetune
from client.label_tables import label_table
from client.pictures import write_png
from client.research_command import main
from client.splits import split_cases
from tests.shared_files import DATA, needs
from tests.test_labelled import SHAPE, ball, write_case
from tests.test_research_command import nano_checkpoint
from unimiss_core import checkpoint, keys, task_checkpoint
from unimiss_core.errors import CheckpointError
from unimiss_core.network import build_network, tensors_of
from unimiss_core.study import PlanConfig

ROOT = Path(__file__).parents[1]
PLAIN = {"area": [1.0, 1.0], "intensity": 0.0}
QUICK = {"epochs": 2, "steps_per_epoch": 2, "batch": 2}


def write_config(folder: Path, **settings: Any) -> Path:
    raw = {"name": "x", "init": {"name": "scratch"}, "training": QUICK, "device": "cpu", **settings}
    path = folder / "x.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def pictures(folder: Path, count: int = 30) -> dict[str, Any]:
    """Fine and coarse noise of as many patients, listed in a table."""
    (folder / "pictures").mkdir()
    lines = ["scan,label,patient"]
    for number in range(count):
        grain = [1, 8][number % 2]
        cells = np.random.default_rng(number).integers(0, 255, (48 // grain, 48 // grain)).astype(np.uint8)
        pixels = np.kron(cells, np.ones((grain, grain), np.uint8))[:40, :44]
        write_png(folder / "pictures" / f"secret{number}.png", pixels)
        lines.append(f"secret{number}.png,{['fine', 'coarse'][number % 2]},miller{number}")
    (folder / "t.csv").write_text("\n".join(lines))
    task = {"name": "classification", "rank": 2, "classes": ["fine", "coarse"], "input_size": [40, 44]}
    return {"task": task, "data": {"table": "t.csv", "folder": "pictures"}, "split": {"folds": 3}}


def test_a_classification_learns_from_a_checkpoint_and_says_how_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nano_checkpoint(tmp_path / "round-0001")
    training = {"epochs": 5, "batch": 6, "lr": 0.003, "layer_decay": 1.0, "augmentation": PLAIN}
    path = write_config(tmp_path, **pictures(tmp_path), init={"folder": "round-0001"}, training=training)
    assert main(["finetune", str(path)]) == 0
    out = tmp_path / "out"
    told = json.loads((out / "metrics.json").read_text())
    with (out / "predictions.csv").open() as file:
        test = [row for row in csv.DictReader(file) if row["part"] == "test"]
    area = roc_auc_score([int(row["is/coarse"]) for row in test], [float(row["p/coarse"]) for row in test])
    assert told["parts"]["test"]["auc"]["value"] == pytest.approx(area)
    with (out / "curves.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert losses[-1] < losses[0] / 2
    assert told["parts"]["test"]["patients"] == 10
    assert {p.name for p in out.iterdir()} == {
        "metrics.json",
        "made-of.json",
        "model.json",
        "model.safetensors",
        "curves.csv",
        "predictions.csv",
    }
    written = "".join(p.read_text() for p in out.iterdir() if p.suffix != ".safetensors")
    said = capsys.readouterr()
    assert not any(name in written + said.out + said.err for name in ("miller", "secret"))


def test_a_linear_probe_keeps_the_teachers_backbone_and_says_whose_it_is(tmp_path: Path) -> None:
    folder = nano_checkpoint(tmp_path / "round-0001")
    path = write_config(tmp_path, **pictures(tmp_path), training={**QUICK, "trains": "linear_probe"})
    assert main(["finetune", str(path), "--init", str(folder)]) == 0
    model, manifest = task_checkpoint.load(tmp_path / "out")
    teacher = checkpoint.load(folder).teacher
    assert (manifest.began_with, manifest.pretrained_digest) == ("checkpoint", task_checkpoint.digest_of(teacher))
    for name, parameter in model.backbone.named_parameters():
        assert torch.equal(parameter, teacher[f"backbone.{name}"]), name


def test_an_interrupted_fine_tuning_goes_on_and_a_finished_one_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(tmp_path, **pictures(tmp_path))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["finetune", str(path), "--out", str(path / "below a file")]) == 2
    assert "out: the folder" in capsys.readouterr().err
    assert main(["finetune", str(path), "--out", str(whole)]) == 0
    assert f"{whole}: model of epoch" in capsys.readouterr().out

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("client.finetune._write_model", killed)
        assert main(["finetune", str(path), "--out", str(parts)]) == 130
    assert not (parts / "prepared").exists()
    capsys.readouterr()
    other = str(nano_checkpoint(tmp_path / "other"))
    assert main(["finetune", str(path), "--out", str(parts), "--resume", "--init", other]) == 4
    said = capsys.readouterr().err
    assert "is of another fine-tuning" in said
    state = (parts / "state.safetensors").read_bytes()
    (parts / "state.safetensors").write_bytes(state.replace(b'"version":"2"', b'"version":"1"'))
    assert main(["finetune", str(path), "--out", str(parts), "--resume"]) == 4
    assert "was written by another version of this program" in capsys.readouterr().err
    (parts / "state.safetensors").write_bytes(state)
    assert main(["finetune", str(path), "--out", str(parts)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["finetune", str(path), "--out", str(parts), "--resume"]) == 0
    for name in ("metrics.json", "made-of.json", "model.json", "model.safetensors", "curves.csv", "predictions.csv"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    assert main(["finetune", str(path), "--out", str(parts)]) == 2
    assert "finished" in capsys.readouterr().err


def test_a_fine_tuning_does_not_go_on_with_scans_that_are_others_by_now(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = pictures(tmp_path)
    path, out = write_config(tmp_path, **settings), ("--out", str(tmp_path / "out"))

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("client.finetune._write_model", killed)
        assert main(["finetune", str(path), *out]) == 130
    write_config(tmp_path, **{**settings, "data": {**settings["data"], "modality": "CT"}})
    assert main(["finetune", str(path), *out, "--resume"]) == 4
    assert "is of another fine-tuning" in capsys.readouterr().err
    write_config(tmp_path, **settings)
    picture = tmp_path / "pictures" / "secret3.png"
    before = picture.read_bytes()
    write_png(picture, 255 - np.asarray(Image.open(picture)))
    assert main(["finetune", str(path), *out, "--resume"]) == 4
    assert "its scans" in capsys.readouterr().err
    picture.write_bytes(b"gone")
    assert main(["finetune", str(path), *out, "--resume"]) == 4
    assert "is of another fine-tuning" in capsys.readouterr().err
    picture.write_bytes(before)
    assert main(["finetune", str(path), *out, "--resume"]) == 0


def test_a_fine_tuning_does_not_go_on_with_masks_that_are_others_by_now(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        write_case(tmp_path, f"c{number}", number)
    path = write_config(
        tmp_path,
        task={"name": "segmentation", "rank": 3, "classes": ["ball"], "input_size": [16, 33, 33]},
        data={"name": "msd", "folder": ".", "modality": "MR"},
        split={"folds": 2, "validation": 0.5},
        training={"epochs": 1, "steps_per_epoch": 1, "batch": 1},
    )

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("client.finetune._write_model", killed)
        assert main(["finetune", str(path)]) == 130
    file = tmp_path / "labelsTr" / "c2.nii.gz"
    mask = nibabel.load(file)
    turned = np.flip(np.asarray(mask.dataobj), 0).copy()  # as many voxels, elsewhere
    nibabel.save(nibabel.Nifti1Image(turned, mask.affine), file)
    assert main(["finetune", str(path), "--resume"]) == 4
    assert "is of another fine-tuning" in capsys.readouterr().err


def test_what_begins_with_a_fine_tuned_model_is_not_called_unseen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its patients may have trained that model: another fold tests whom the first trained on."""
    path = write_config(tmp_path, **pictures(tmp_path, 18), training={**QUICK, "epochs": 1})
    for out, more, taught in (("first", [], False), ("second", ["--init", str(tmp_path / "first")], True)):
        assert main(["finetune", str(path), "--out", str(tmp_path / out), *more]) == 0
        assert ("was taught by labels" in capsys.readouterr().err) == taught
        for name in ("metrics.json", "model.json"):
            assert json.loads((tmp_path / out / name).read_text())["taught_by_labels"] == taught
        assert main(["export", str(tmp_path / out), "--to", "safetensors", "--out", str(tmp_path / f"{out}-x")]) == 0
        card = (tmp_path / f"{out}-x" / "README.md").read_text()
        assert ("that it never saw" in card) == (not taught)
        assert ("an earlier fine-tuning may have trained on them" in card) == taught


def test_nobody_is_trained_on_and_judged_by_under_two_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each picture stands there a second time, under another name and patient: of those in two parts the one that
    judges stays. Oracle: the split by patients, and the files' own bytes."""
    settings = pictures(tmp_path, 18)
    lines = (tmp_path / "t.csv").read_text().splitlines()
    for number in range(18):
        shutil.copy(tmp_path / "pictures" / f"secret{number}.png", tmp_path / "pictures" / f"again{number}.png")
        lines.append(lines[number + 1].replace("secret", "again").replace("miller", "smith"))
    (tmp_path / "t.csv").write_text("\n".join(lines))
    path = write_config(tmp_path, **settings, training={**QUICK, "epochs": 1})
    config = load_finetune(path)
    table = label_table(config)
    split = split_cases(table.cases, config)
    held = {part: [(table.folder / case.file).read_bytes() for case in cases] for part, cases in split.items()}
    kept = {
        "test": len(held["test"]),
        "validation": sum(one not in held["test"] for one in held["validation"]),
        "train": sum(one not in held["test"] + held["validation"] for one in held["train"]),
    }
    assert kept["train"] < len(held["train"])
    assert main(["finetune", str(path)]) == 0
    said = capsys.readouterr().err
    assert {part: int(count) for part, count in re.findall(r"(train|validation|test) (\d+) of \d+ p", said)} == kept
    assert f"left out: {36 - sum(kept.values())} scan(s) that equal one of another part to the last bit" in said
    first, other = map(int, re.findall(r"\(line (\d+) is line (\d+)", said)[0])
    assert abs(first - other) == 18
    assert not any(name in said for name in ("miller", "smith", "secret", "again"))


@pytest.mark.parametrize(("modality", "told"), [(None, True), ("CT", False), ("OT", False)])
def test_volumes_that_do_not_say_what_they_are_are_told_before_training(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    modality: str | None,
    told: bool,
) -> None:
    for number in range(4):
        write_case(tmp_path, f"c{number}", number)
    path = write_config(
        tmp_path,
        task={"name": "segmentation", "rank": 3, "classes": ["ball"]},
        data={"name": "msd", "folder": ".", "modality": modality},
        split={"folds": 2, "validation": 0.5},
    )

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("client.finetune._training", stopped)
    assert main(["finetune", str(path)]) == 130
    said = capsys.readouterr().err
    assert ("4 scan(s) do not say what they are; where they are CT, say so: with data.modality: CT" in said) == told


def test_a_segmentation_writes_its_masks_in_the_geometry_of_the_scans(tmp_path: Path) -> None:
    for number in range(6):
        write_case(tmp_path, f"c{number}", number, spacing=(1.0, 0.9, 1.1))
    task = {"name": "segmentation", "rank": 3, "classes": ["ball"], "input_size": [16, 33, 33]}
    plan = {"volume_spacing_mm": [1.0, 1.0, 1.0]}
    training = {**QUICK, "precision": "bf16"}
    asked = {"keep_largest": ["ball"]}
    path = write_config(
        tmp_path,
        task=task,
        plan=plan,
        training=training,
        inference=asked,
        data={"name": "msd", "folder": "."},
        split={"folds": 3, "validation": 0.5},
    )
    assert main(["finetune", str(path), "--show-paths"]) == 0
    out = tmp_path / "out"
    test = json.loads((out / "metrics.json").read_text())["parts"]["test"]
    assert 0 <= test["dice"]["value"] <= 1
    masks = sorted((out / "predictions").iterdir())
    assert len(masks) == test["scans"] == 2
    for mask in masks:
        number = int(mask.name[5:10]) - 1
        source = nibabel.load(tmp_path / "imagesTr" / f"c{number}.nii.gz")
        found = nibabel.load(mask)
        assert found.shape == source.shape
        np.testing.assert_allclose(found.affine, source.affine)
    assert "imagesTr/c" in (out / "cases.csv").read_text()
    assert ball(SHAPE, (10, 11, 8), 5).sum() > 0


def test_a_model_whose_tensors_were_changed_is_refused(tmp_path: Path) -> None:
    path = write_config(tmp_path, **pictures(tmp_path))
    assert main(["finetune", str(path)]) == 0
    file = tmp_path / "out" / "model.safetensors"
    payload = bytearray(file.read_bytes())
    payload[-1] ^= 1
    file.write_bytes(payload)
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        task_checkpoint.load(tmp_path / "out")
    told = json.loads((tmp_path / "out" / "model.json").read_text())
    (tmp_path / "out" / "model.json").write_text(json.dumps({**told, "format_version": 9, "of_a_later_version": 1}))
    with pytest.raises(CheckpointError, match="format version 9, this program reads 1"):
        task_checkpoint.load(tmp_path / "out")


def test_a_checkpoint_with_a_changed_tensor_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = nano_checkpoint(tmp_path / "round-0001")
    path = write_config(tmp_path, **pictures(tmp_path), init={"folder": "round-0001"})
    file = folder / "teacher.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert main(["finetune", str(path)]) == 4
    assert "was changed after it was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert tensors_of(build_network(checkpoint.read_manifest(folder).model, seed=0))


def test_a_checkpoint_of_whom_it_should_be_and_no_other_is_begun_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, other = keys.new_signing_key(), keys.new_signing_key()
    for name, key in {"theirs": theirs, "other": other}.items():
        (tmp_path / f"{name}.pub").write_text(keys.public_line(key.public_key()))
    nano_checkpoint(tmp_path / "round-0001", theirs)
    nano_checkpoint(tmp_path / "round-0002")
    begins = {"folder": "round-0001", "key": "theirs.pub"}
    path = write_config(tmp_path, **pictures(tmp_path, 12), init=begins, training={**QUICK, "epochs": 1})
    assert main(["finetune", str(path), "--key", str(tmp_path / "other.pub")]) == 4
    assert "is not of the key" in capsys.readouterr().err
    assert main(["finetune", str(path), "--init", str(tmp_path / "round-0002")]) == 4
    assert "should be signed by" in capsys.readouterr().err
    assert main(["finetune", str(path), "--init", "scratch", "--key", str(tmp_path / "other.pub")]) == 2
    assert "--key: begins with 'scratch', which nobody signs" in capsys.readouterr().err
    assert main(["finetune", str(path)]) == 0


def test_what_masks_need_is_asked_for_before_scans_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = {"name": "segmentation", "rank": 3, "classes": ["ball"]}
    path = write_config(tmp_path, task=task, data={"name": "msd", "folder": "nowhere"})
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert main(["finetune", str(path)]) == 2
    assert "pip install -e '.[finetune]' in this program's folder" in capsys.readouterr().err


EXAMPLES = sorted((ROOT / "configs" / "finetune").glob("*.yaml"))


def as_the_decathlon_has_it(folder: Path) -> None:
    """Its brain tumours by name, which are too large to lie at the workplace."""
    for part in ("imagesTr", "labelsTr"):
        (folder / "Task01_BrainTumour" / part).mkdir(parents=True)
        for case in range(1, 31):
            (folder / "Task01_BrainTumour" / part / f"BRATS_{case:03d}.nii.gz").touch()
    told = {
        "modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
        "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"},
    }
    (folder / "Task01_BrainTumour" / "dataset.json").write_text(json.dumps(told))


@needs(DATA)
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_each_example_finds_its_scans_and_splits_them(tmp_path: Path, path: Path) -> None:
    from client.beginning import begin
    from client.finetune_config import FromScratch

    if path.stem == "brain_tumours":
        as_the_decathlon_has_it(tmp_path)
    config = load_finetune(path, data_root=tmp_path if path.stem == "brain_tumours" else DATA)
    if not isinstance(config.init, FromScratch):
        config = config.model_copy(update={"init": FromScratch()})
    parts = split_cases(label_table(config).cases, config)
    assert min(len(parts[part]) for part in ("train", "validation", "test")) >= 5
    assert begin(config.init, config.plan).plan == (config.plan or PlanConfig())
