"""Bundles are loaded and run by MONAI itself, and answer as the fine-tuning did that they were made from."""

import csv
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

import client.catalogue
from client import bundle_parts
from client.bundle_parts import MaskAtSource, Prepared
from client.labelled import Grid
from client.monai_bundle import metadata
from client.nifti import write_nifti
from client.research_command import main
from tests import crashing_reader
from tests.test_finetune import QUICK, pictures, write_config
from tests.test_labelled import write_case
from tests.test_research_command import nano_checkpoint
from unimiss_core.errors import NonFiniteLossError, ScanError
from unimiss_core.scan import Scan
from unimiss_core.study import ModelConfig, PlanConfig
from unimiss_core.task_checkpoint import TaskManifest
from unimiss_core.task_config import SegmentationConfig

bundle = pytest.importorskip("monai.bundle")
pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")  # MONAI's, of bundles by strangers


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, a fine-tuning of two epochs in `out`, and its bundle in `bundle`."""
    folder = tmp_path_factory.mktemp("classified")
    return exported(folder, write_config(folder, **pictures(folder, count=18)))


@pytest.fixture(scope="module")
def segmented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of volumes, oblique to the plan's grid, with post-processing and another overlap than the usual."""
    folder = tmp_path_factory.mktemp("segmented")
    for number in range(6):
        write_case(folder, f"c{number}", number, spacing=(1.0, 0.9, 1.1))
    task = {"name": "segmentation", "rank": 3, "classes": ["ball"], "input_size": [16, 33, 33]}
    config = write_config(
        folder,
        task=task,
        plan={"volume_spacing_mm": [1.0, 1.0, 1.0]},
        training={**QUICK, "steps_per_epoch": 8, "lr": 0.003},
        inference={"keep_largest": ["ball"], "overlap": 0.25},
        data={"name": "msd", "folder": "."},
        split={"folds": 3, "validation": 0.5},
    )
    return exported(folder, config)


def exported(folder: Path, config: Path) -> Path:
    assert main(["finetune", str(config), "--show-paths"]) == 0
    assert main(["export", str(folder / "out"), "--to", "monai", "--out", str(folder / "bundle")]) == 0
    return folder


def files(folder: Path) -> dict[str, str]:
    names = {"meta_file": "metadata.json", "config_file": "inference.json"}
    return {key: str(folder / "bundle" / "configs" / name) for key, name in names.items()}


def run(folder: Path, scans: Path) -> Path:
    """`python -m monai.bundle run`, as Python calls it; where the answers are."""
    answers = folder / "answers" / "new"
    places = {"bundle_root": folder / "bundle", "dataset_dir": scans, "output_dir": answers}
    bundle.run(**files(folder), device="cpu", **{name: str(path) for name, path in places.items()})
    return answers


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_classifications_bundle_says_of_pictures_what_the_fine_tuning_said(classified: Path) -> None:
    answers = run(classified, classified / "pictures")
    found = {row.pop("scan"): row for row in rows(answers / "predictions.csv")}
    assert len(found) == 18
    for row in rows(classified / "out" / "predictions.csv"):
        for name in ("p/fine", "p/coarse"):
            assert float(found[row["file"]][name]) == pytest.approx(float(row[name]), abs=1e-5)


def test_a_segmentations_bundle_draws_the_masks_that_the_fine_tuning_drew(segmented: Path) -> None:
    answers = run(segmented, segmented / "imagesTr")
    cases = {row["line"]: Path(row["file"]).name for row in rows(segmented / "out" / "cases.csv")}
    drawn = sorted((segmented / "out" / "predictions").iterdir())
    assert len(drawn) == 2
    for path in drawn:
        name = cases[str(int(path.name[5:10]))].removesuffix(".nii.gz")
        expected, found = nibabel.load(path), nibabel.load(answers / f"{name}_seg.nii.gz")
        np.testing.assert_allclose(found.affine, expected.affine)
        voxels = np.asarray(expected.dataobj)
        assert 0 < voxels.sum() < voxels.size
        assert (np.asarray(found.dataobj) != voxels).mean() < 1e-4


@pytest.mark.parametrize("kind", ["classified", "segmented"])
def test_monai_finds_the_network_to_take_and_give_what_the_metadata_says(
    kind: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(kind)
    bundle.verify_net_in_out("network_def", **files(folder), bundle_root=str(folder / "bundle"), device="cpu")


def test_a_bundle_whose_tensors_were_changed_does_not_load(classified: Path, tmp_path: Path) -> None:
    parser = bundle.ConfigParser()
    parser.read_config(files(classified)["config_file"])
    parser["bundle_root"] = str(tmp_path)
    models = tmp_path / "models"
    models.mkdir()
    for path in (classified / "bundle" / "models").iterdir():
        payload = bytearray(path.read_bytes())
        payload[-1] ^= path.suffix == ".safetensors"
        (models / path.name).write_bytes(payload)
    with pytest.raises(RuntimeError) as raised:
        parser.get_parsed_content("network_def")
    assert "was changed after it was written" in str(raised.value.__cause__ or raised.value)


def test_what_cannot_be_read_is_left_out_and_the_rest_goes_on(
    classified: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(classified / "pictures" / "secret3.png", tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    (tmp_path / "notes.txt").write_text("no scan")
    write_nifti(
        tmp_path / "volume.nii", Scan(np.random.default_rng(0).random((1, 20, 40, 44), np.float32), (1, 1, 1), "MR")
    )
    assert [row["scan"] for row in rows(run(classified, tmp_path) / "predictions.csv")] == ["good.png"]
    told = [record.getMessage() for record in caplog.records if record.name == "client.bundle_parts"]
    assert len(told) == 3
    assert "left out: scan 4 of 4: other_rank" in told
    assert not any(str(tmp_path) in one for one in told)


def test_a_scan_that_crashes_its_decoder_does_not_crash_the_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.catalogue, "read", crashing_reader.crash)
    manifest: Any = SimpleNamespace(modality=None, plan=PlanConfig(), task=SimpleNamespace(rank=2))
    with pytest.raises(ScanError, match="reader_crashed"):
        Prepared(manifest)({"image": str(crashing_reader.write_compressed(tmp_path / "bad.dcm"))})


def test_a_bundle_whose_answers_are_no_numbers_writes_none_of_them() -> None:
    written: list[object] = []
    items = [{"image": torch.full((1, 4, 4), value)} for value in (1.0, math.nan, 1.0)]
    with pytest.raises(NonFiniteLossError, match="not all numbers"):
        bundle_parts.run(items, torch.nn.Identity(), lambda image, network: network(image), written.append)
    assert len(written) == 1


def test_a_bundle_names_no_patient_and_no_place(classified: Path) -> None:
    written = "".join(
        path.read_text() for path in (classified / "bundle").rglob("*.*") if path.suffix != ".safetensors"
    )
    assert not any(word in written for word in (str(classified), "miller", "secret"))


def test_scans_that_differ_by_their_ending_alone_get_a_mask_each(tmp_path: Path) -> None:
    task = SimpleNamespace(classes=("ball",))
    write = MaskAtSource(SimpleNamespace(task=task, keep_largest=()), str(tmp_path / "answers"))  # type: ignore[arg-type]
    grid = Grid((8, 8), (1.0, 1.0), (1.0, 1.0), None)
    for ending in (".png", ".tif"):
        write({"pred": torch.rand(2, 8, 8), "source": tmp_path / f"a{ending}", "grid": grid})
    assert len(list((tmp_path / "answers").iterdir())) == 2


@pytest.mark.parametrize("name", ["$os.environ.setdefault('RUN', 'by a name')", "%high", "@network", "50 %::x"])
def test_no_name_of_a_class_is_a_program_to_monai(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUN", raising=False)
    task = SegmentationConfig(classes=(name,))
    manifest = TaskManifest(
        task=task,
        model=ModelConfig(),
        plan=PlanConfig(),
        began_with="scratch",
        pretrained_digest=None,
        trained="full",
        seed=0,
        epoch=1,
    )
    parser = bundle.ConfigParser({"imports": ["$import os"], "_meta_": metadata(manifest)})
    told = parser.get_parsed_content("_meta_")["network_data_format"]["outputs"]["pred"]["channel_def"]["1"]
    assert told.replace(" ", "") == f"class {name}".replace(" ", "")
    assert "RUN" not in os.environ


def test_a_checkpoint_of_pretraining_answers_no_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = nano_checkpoint(tmp_path / "round-0001")
    assert main(["export", str(folder), "--to", "monai", "--out", str(tmp_path / "out")]) == 2
    assert "a bundle answers a task; give a fine-tuned model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
