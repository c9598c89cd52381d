"""A federation's round that fine-tuned: a fine-tuning goes on from it, and it answers as the run's own model does."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from client.beginning import begin
from client.finetune import task_model
from client.finetune_config import FromCheckpoint, init_from, load_finetune
from client.nifti import write_nifti
from client.pictures import read_picture
from client.research_command import main
from server.run_folder import RunFolder
from server.task_release import release_model
from tests.federation import saved_checkpoint
from tests.labelled_hospitals import task_study
from tests.test_finetune import pictures, write_config
from tests.test_research_command import nano_checkpoint
from unimiss_core import checkpoint, exported, task_checkpoint
from unimiss_core.config import dump_yaml
from unimiss_core.groups import group_of
from unimiss_core.keys import SigningKey, new_signing_key, public_line
from unimiss_core.network import below, load_tensors_, tensors_of
from unimiss_core.plan import prepare
from unimiss_core.scan import Scan
from unimiss_core.students import build_student
from unimiss_core.study import StudyConfig
from unimiss_core.tuned_round import load_tuned
from unimiss_core.views import whole

CLASSES = ["fine", "coarse"]


def study_of(head: str = "shared") -> StudyConfig:
    task = {"name": "classification", "kind": "binary", "rank": 2, "classes": CLASSES, "input_size": [40, 44]}
    return task_study(2, finetune={"task": task, "head": head})


def rounds(out: Path, study: StudyConfig, *, last: int = 2, signing_key: SigningKey | None = None) -> Path:
    """What a run of `study` leaves, with tensors of its own: rounds 0 and `last`, the latter's folder."""
    assert study.finetune is not None
    made = tensors_of(build_student(study))
    stay = {name for name in made if group_of(name) == "head" and study.finetune.head == "local"}
    for round in (0, last):
        generator = torch.Generator().manual_seed(round)
        moved = {name: t + 0.02 * torch.randn(t.shape, generator=generator) for name, t in made.items()}
        tensors = {name: tensor for name, tensor in moved.items() if name not in stay}
        folder = out / "checkpoints" / checkpoint.folder_name(round)
        saved_checkpoint(folder, round, study=study, student=tensors, teacher=tensors, signing_key=signing_key)
    (out / "study.yaml").write_text(dump_yaml(study))
    return folder


def begun(folder: Path, init: Path, **changes: Any) -> Mapping[str, Tensor]:
    """The model of a fine-tuning's file as it begins."""
    raw = {"task": {"name": "classification", "rank": 2, "classes": CLASSES}, "data": {"table": "t.csv"}, **changes}
    config = load_finetune(write_config(folder, **raw))
    config = config.model_copy(update={"init": init_from(str(init), config.init)})
    return tensors_of(task_model(config, begin(config.init)))


@pytest.mark.parametrize("of", ["round", "model"])
def test_a_fine_tuning_goes_on_with_encoder_and_head_where_the_classes_are_the_same(tmp_path: Path, of: str) -> None:
    study = study_of()
    folder = rounds(tmp_path / "run", study)
    held = checkpoint.load(folder).student
    release_model(RunFolder(tmp_path / "run"), study, round=2, from_start=False)
    init = folder if of == "round" else tmp_path / "run" / "model"
    same = begun(tmp_path, init)
    assert same.keys() == held.keys()
    assert all(torch.equal(same[name], tensor) for name, tensor in held.items())
    other = begun(tmp_path, init, task={"name": "classification", "rank": 2, "classes": ["clear", "lesion"]})
    drawn = tensors_of(build_student(study))  # the file's seed is the study's
    for name, tensor in other.items():
        assert torch.equal(tensor, drawn[name] if name.startswith("head.") else held[name]), name


@pytest.mark.parametrize(
    ("head", "keeps_study", "told"),
    [
        ("shared", True, "begins with checkpoint (fine-tuned for the same classes: its head, too), trains full"),
        ("local", True, "(fine-tuned; a new head, for its own stayed at its sites, or nothing says its task)"),
        ("shared", False, "(fine-tuned; a new head, for its own stayed at its sites, or nothing says its task)"),
    ],
)
def test_the_screen_says_what_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], head: str, keeps_study: bool, told: str
) -> None:
    folder = rounds(tmp_path / "run", study_of(head))
    if not keeps_study:
        (tmp_path / "run" / "study.yaml").unlink()
    path = write_config(tmp_path, **pictures(tmp_path, 12), training={"epochs": 1, "steps_per_epoch": 1, "batch": 2})
    assert main(["finetune", str(path), "--init", str(folder)]) == 0
    assert told in capsys.readouterr().err


def test_a_round_predicts_and_is_exported_as_the_runs_own_model(tmp_path: Path) -> None:
    study, key = study_of(), new_signing_key()
    folder = rounds(tmp_path / "run", study, signing_key=key)
    release_model(RunFolder(tmp_path / "run", key), study, round=2, from_start=False)
    pictures(tmp_path, 6)
    answers = []
    for name, model in (("round", folder), ("model", tmp_path / "run" / "model")):
        out = tmp_path / name
        assert main(["predict", str(model), str(tmp_path / "pictures"), "--out", str(out)]) == 0
        with (out / "predictions.csv").open() as file:
            answers.append([row["p/coarse"] for row in csv.DictReader(file)])
        bundle = tmp_path / f"{name}-plain"
        assert main(["export", str(model), "--to", "safetensors", "--out", str(bundle)]) == 0
    assert answers[0] == answers[1]
    assert len(set(answers[0])) == 6
    (plain, config), (expected, _) = (exported.load(tmp_path / f"{name}-plain") for name in ("round", "model"))
    assert config.holds == "classification"
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), expected.parameters(), strict=True))
    card = (tmp_path / "round-plain" / "README.md").read_text()
    assert "Fine-tuned by a federation by Federated UniMiSS; what it began with is not known here." in card
    assert "`full`, 2 rounds, seed 0" in card
    assert "| manifest.json | sha256" in card


@pytest.mark.parametrize("asks", ["predict", "export", "finetune"])
def test_a_model_that_nobody_signed_does_not_take_the_place_of_a_signed_round(tmp_path: Path, asks: str) -> None:
    """Somebody lays another fine-tuned model into the folder of the round, under the names of one."""
    study, key = study_of(), new_signing_key()
    folder, public = rounds(tmp_path / "run", study, signing_key=key), tmp_path / "signing.pub"
    public.write_text(public_line(key.public_key()))
    other = task_checkpoint.of_rounds(study, round=9, began_with="scratch", pretrained_digest=None)
    task_checkpoint.save(folder, tensors_of(build_student(study)), other)
    held = checkpoint.load(folder).student
    pictures(tmp_path, 2)
    out = tmp_path / "out"
    if asks == "export":
        assert main(["export", str(folder), "--to", "safetensors", "--key", str(public), "--out", str(out)]) == 0
        model, _ = exported.load(out)
        assert all(torch.equal(parameter, held[name]) for name, parameter in model.named_parameters())
    elif asks == "finetune":
        begun_with = begin(FromCheckpoint(name="checkpoint", folder=folder, key=public)).tensors
        assert begun_with is not None
        assert all(torch.equal(begun_with[name], tensor) for name, tensor in held.items())
    else:
        words = ["predict", str(folder), str(tmp_path / "pictures"), "--key", str(public), "--out"]
        assert main([*words, str(out)]) == 0
        (folder / checkpoint.SIGNATURE).unlink()
        assert main([*words, str(tmp_path / "again")]) == 4
        told = json.loads((out / "predicted.json").read_text())
        assert told["model"] == load_tuned(folder)[1].sha256 != task_checkpoint.load(folder)[1].sha256


def test_a_bundle_of_a_round_holds_a_model_that_loads(tmp_path: Path) -> None:
    folder, out = rounds(tmp_path / "run", study_of()), tmp_path / "bundle"
    assert main(["export", str(folder), "--to", "monai", "--out", str(out)]) == 0
    model, manifest = task_checkpoint.load(out / "models")
    held = checkpoint.load(folder).student
    assert all(torch.equal(parameter, held[name]) for name, parameter in model.named_parameters())
    assert (manifest.epoch, manifest.trained_in, manifest.began_with) == (2, "rounds", "unknown")


@pytest.mark.parametrize("head", ["shared", "local"])
def test_the_encoder_of_a_round_embeds_scans_of_its_tasks_rank_and_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], head: str
) -> None:
    folder, out = rounds(tmp_path / "run", study_of(head)), tmp_path / "features.npz"
    (scans := tmp_path / "scans").mkdir()
    pictures(scans)
    voxels = np.random.default_rng(0).random((1, 24, 40, 40), dtype=np.float32)
    write_nifti(scans / "volume.nii", Scan(voxels, (3.0, 1.0, 1.0), "MR", np.diag([1.0, 1.0, 3.0, 1.0])))
    assert main(["embed", str(folder), str(scans / "pictures" / "secret0.png"), "--out", str(out)]) == 0
    study, pixels = study_of(head), read_picture(scans / "pictures" / "secret0.png", "XR")
    backbone = build_student(study).backbone
    load_tensors_(backbone, below("backbone.", checkpoint.load(folder).student))
    expected = backbone(whole(prepare(pixels, study.plan)[0], (40, 44))[None]).detach()
    np.testing.assert_allclose(np.load(out)["features"], expected, atol=1e-5)
    assert main(["embed", str(folder), str(scans), "--out", str(tmp_path / "all.npz")]) == 0
    assert list(np.load(tmp_path / "all.npz")["ranks"]) == [2] * 30
    assert "a volume where images are" in capsys.readouterr().err


def test_the_encoder_of_a_round_is_probed_beside_the_random_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = rounds(tmp_path / "run", study_of())
    pictures(tmp_path)
    table = ["--data", str(tmp_path / "t.csv"), "--root", str(tmp_path / "pictures")]
    assert main(["probe", str(folder), *table, "--out", str(tmp_path / "told.json")]) == 0
    said, noted = capsys.readouterr()
    assert "was taught by labels" in noted
    assert [one["taught_by_labels"] for one in json.loads((tmp_path / "told.json").read_text())] == [True]
    assert "30 images of 30 patients" in said
    assert "this minus random" in said


def test_what_a_round_cannot_be_used_for_is_told_in_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local, shared = rounds(tmp_path / "local", study_of("local")), rounds(tmp_path / "shared", study_of())
    (tmp_path / "scans").mkdir()

    def refused(words: list[str], told: str, code: int) -> None:
        assert main(words) == code
        said = capsys.readouterr().err
        assert told in said, said
        assert said.count("\n") == 1

    asked = [str(tmp_path / "scans"), "--out", str(tmp_path / "out")]
    refused(["predict", str(local), *asked], "its federation leaves heads at their sites", 4)
    refused(["export", str(local), "--to", "onnx", *asked[1:]], "its federation leaves heads at their sites", 4)
    refused(["export", str(shared), "--to", "safetensors", "--student", *asked[1:]], "leave --student out", 2)
    volumes = {"name": "segmentation", "rank": 3, "classes": ["ball"]}
    path = write_config(tmp_path, task=volumes, data={"name": "msd", "folder": "."})
    refused(["finetune", str(path), "--init", str(shared)], "init: was fine-tuned for scans of rank 2", 2)
    unknown = rounds(tmp_path / "unknown", study_of())
    (tmp_path / "unknown" / "study.yaml").unlink()
    refused(["predict", str(unknown), *asked], "what it answers stands in its study.yaml", 4)
    refused(["predict", str(nano_checkpoint(tmp_path / "plain")), *asked], "is a checkpoint of pretraining", 4)
