import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from client.research_command import main
from tests.published import golden, image, needs_reference, recipe_weights, volume
from unimiss_core import checkpoint
from unimiss_core.network import build_network, tensors_of
from unimiss_core.study import ModelConfig, PlanConfig

NANO = ModelConfig(prototypes=16)


def nano_checkpoint(folder: Path) -> Path:
    """A checkpoint whose student differs from its teacher."""
    student, teacher = (tensors_of(build_network(NANO, seed=seed)) for seed in (0, 1))
    checkpoint.save(
        folder,
        origin="federation",
        round=1,
        study_digest="0" * 64,
        model=NANO,
        plan=PlanConfig(image_longest_side=80),
        student=student,
        teacher=teacher,
    )
    return folder


def saved(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


@needs_reference
def test_an_imported_release_embeds_as_the_published_code_does(tmp_path: Path) -> None:
    weights = recipe_weights("tiny", "")
    torch.save(
        {"student": {f"module.{n}": t for n, t in weights.items()}, "teacher": weights}, tmp_path / "released.pth"
    )
    assert main(["import", str(tmp_path / "released.pth"), str(tmp_path / "imported")]) == 0
    assert checkpoint.read_manifest(tmp_path / "imported").model.size == "tiny"
    for rank, scans in {2: image("x2d"), 3: volume("x3d")}.items():
        source, out = saved(tmp_path / "scans.npy", scans.numpy()), tmp_path / "features.npz"
        assert main(["embed", str(tmp_path / "imported"), str(source), "--out", str(out)]) == 0
        np.testing.assert_allclose(np.load(out)["features"], golden("tiny")[f"features{rank}d"], atol=1e-5, rtol=0)


def test_the_teacher_embeds_an_array_whatever_the_batch(tmp_path: Path) -> None:
    folder = nano_checkpoint(tmp_path / "round-0001")
    scans = np.random.default_rng(0).random((5, 1, 14, 40, 37), dtype=np.float32)
    source, out = saved(tmp_path / "scans.npy", scans), tmp_path / "new" / "features.npz"
    assert main(["embed", str(folder), str(source), "--out", str(out), "--batch", "2"]) == 0
    with torch.no_grad():
        expected = build_network(NANO, seed=1).backbone(torch.from_numpy(scans))
    np.testing.assert_allclose(np.load(out)["features"], expected, atol=1e-5)
    np.testing.assert_array_equal(np.load(out)["ranks"], [3] * 5)


def test_a_folder_of_scans_is_prepared_by_the_checkpoints_plan_and_seen_whole(tmp_path: Path) -> None:
    folder, scans = nano_checkpoint(tmp_path / "round-0001"), tmp_path / "scans"
    scans.mkdir()
    for index, size in enumerate([(70, 50), (90, 120)]):
        pixels = np.random.default_rng(index).integers(0, 255, size, dtype=np.uint8)
        Image.fromarray(pixels).save(scans / f"{index}.png")
    (scans / "notes.txt").write_text("no scan")
    out = tmp_path / "features.npz"
    assert main(["embed", str(folder), str(scans), "--out", str(out), "--show-paths"]) == 0
    found = np.load(out)
    assert found["features"].shape == (2, 16)
    assert np.isfinite(found["features"]).all()
    assert list(found["files"]) == ["0.png", "1.png"]


def test_a_scan_is_embedded_in_the_range_that_training_saw(tmp_path: Path) -> None:
    """[0, 1] becomes [-2, 2] in training's views; embedding must not feed the encoder anything else."""
    folder, scans, out = nano_checkpoint(tmp_path / "round-0001"), tmp_path / "scans", tmp_path / "features.npz"
    scans.mkdir()
    pixels = np.zeros((64, 64), np.uint8)
    pixels[:, 32:] = 255
    Image.fromarray(pixels).save(scans / "halves.png")
    assert main(["embed", str(folder), str(scans), "--out", str(out)]) == 0
    with torch.no_grad():
        seen = torch.from_numpy(pixels / 255.0).float()[None, None] * 4 - 2
        expected = build_network(NANO, seed=1).backbone(seen)
    np.testing.assert_allclose(np.load(out)["features"], expected, atol=1e-4)


def test_paths_stay_out_of_the_result_unless_asked_for(tmp_path: Path) -> None:
    folder = nano_checkpoint(tmp_path / "round-0001")
    source = saved(tmp_path / "scans.npy", np.zeros((1, 1, 64, 64), np.float32))
    assert main(["embed", str(folder), str(source), "--out", str(tmp_path / "features.npz")]) == 0
    assert set(np.load(tmp_path / "features.npz").files) == {"features", "ranks"}


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 64, 64)), r"expected numbers of shape \(N, C, H, W\)"),
        (np.array([["a"]]), "expected numbers of shape"),
        (np.zeros((1, 1, 20, 20)), "too small"),
        (np.zeros((1, 2, 64, 64)), "1 or 3 channels; got 2"),
        (np.full((1, 1, 64, 64), np.nan), "entry 0 holds NaN or infinity"),
    ],
)
def test_an_array_that_does_not_fit_is_one_message_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], array: np.ndarray, message: str
) -> None:
    folder, source = nano_checkpoint(tmp_path / "round-0001"), saved(tmp_path / "scans.npy", array)
    assert main(["embed", str(folder), str(source), "--out", str(tmp_path / "features.npz")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("unimiss embed: ")
    assert re.search(message, said)
    assert not (tmp_path / "features.npz").exists()


def test_every_mistake_has_its_exit_code(tmp_path: Path) -> None:
    folder, empty = nano_checkpoint(tmp_path / "round-0001"), tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "garbage.npy").write_bytes(b"garbage")
    out = ["--out", str(tmp_path / "features.npz")]
    assert main(["embed", str(tmp_path / "absent"), str(empty), *out]) == 4
    assert main(["embed", str(folder), str(empty), *out]) == 3
    assert main(["embed", str(folder), str(tmp_path / "absent"), *out]) == 2
    assert main(["embed", str(folder), str(tmp_path / "absent.npy"), *out]) == 2
    assert main(["embed", str(folder), str(tmp_path / "garbage.npy"), *out]) == 2
    assert main(["embed", str(folder), str(empty), "--out", str(tmp_path / "features.txt")]) == 2
    assert main(["embed", str(folder), str(empty), *out, "--device", "cuda:99"]) == 2
    assert main(["import", str(tmp_path / "absent.pth"), str(tmp_path / "new")]) == 4


def test_import_never_replaces_a_folder_that_holds_something(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    assert main(["import", str(tmp_path / "released.pth"), str(tmp_path)]) == 2
    assert "exists and is not empty; give a new folder" in capsys.readouterr().err
    assert (tmp_path / "precious.txt").read_text() == "mine"
