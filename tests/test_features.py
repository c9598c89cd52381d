"""`client.features`: from a file to the tensor by which an encoder says what `unimiss embed` has it say."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from client.beginning import begin
from client.features import prepare_file
from client.finetune_config import FromCheckpoint
from client.research_command import main
from tests.series_files import write_series
from tests.test_predict import BALL, LABELS, noise, untrained
from tests.test_research_command import NANO, nano_checkpoint
from unimiss_core import exported
from unimiss_core.backbone import Backbone
from unimiss_core.errors import ConfigError, ScanError
from unimiss_core.tasks import TaskModel
from unimiss_core.views import resize

ROOT = Path(__file__).parents[1]


def a_series(place: Path) -> Path:
    write_series(place, noise((14, 40, 37)), gap_mm=2.5)
    return place


def a_turned_volume(place: Path) -> Path:
    """Stored as anterior, inferior, right."""
    affine = np.array([[0, 0, -1.3, 5], [1.1, 0, 0, 3], [0, -2.0, 0, 9], [0, 0, 0, 1]])
    path = place.with_suffix(".nii.gz")
    nibabel.save(nibabel.Nifti1Image(noise((45, 20, 38)), affine), path)
    return path


def a_picture(place: Path) -> Path:
    path = place.with_suffix(".png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 121), dtype=np.uint8)).save(path)
    return path


def embedded(model: Path, scan: Path, out: Path, *words: str) -> np.ndarray[Any, Any]:
    """(1, width), as the command says it."""
    assert main(["embed", str(model), str(scan), "--out", str(out), *words]) == 0
    features = np.load(out)["features"]
    assert features.shape == (1, 32)
    return np.asarray(features)


def said(encoder: Backbone, x: torch.Tensor) -> np.ndarray[Any, Any]:
    """(1, width), by the calls of timm."""
    with torch.inference_mode():
        return np.asarray(encoder.forward_head(encoder.forward_features(x[None])))


def export(folder: Path, out: Path, form: str = "safetensors", *words: str) -> dict[str, Any]:
    """What config.json holds."""
    assert main(["export", str(folder), "--to", form, "--out", str(out), *words]) == 0
    return dict(json.loads((out / "config.json").read_text()))


@pytest.mark.parametrize("write", [a_series, a_turned_volume, a_picture])
@pytest.mark.parametrize("modality", [None, "CT"])
def test_a_files_tensor_gives_the_features_that_embed_writes(
    tmp_path: Path, write: Callable[[Path], Path], modality: Any
) -> None:
    folder, scan = nano_checkpoint(tmp_path / "round-0001"), write(tmp_path / "scan")
    words = () if modality is None else ("--modality", modality)
    expected = embedded(folder, scan, tmp_path / "features.npz", *words)
    export(folder, tmp_path / "out")
    encoder, config = exported.load(tmp_path / "out")
    assert not isinstance(encoder, TaskModel)
    beginning = begin(FromCheckpoint(folder=folder))
    for one, how in ((encoder, config), (beginning.encoder(), beginning)):
        x = prepare_file(scan, how, modality)
        assert tuple(x.shape[1:]) == NANO.size_of(2 if write is a_picture else 3)
        np.testing.assert_allclose(said(one, x), expected, atol=1e-6, rtol=0)


def test_a_fine_tuned_models_export_remembers_size_and_what_it_took_scans_for(tmp_path: Path) -> None:
    folder, scan = untrained(tmp_path / "model", BALL, modality="CT"), a_turned_volume(tmp_path / "scan")
    told = export(folder, tmp_path / "out")
    assert told["modality"] == "CT"
    model, config = exported.load(tmp_path / "out")
    assert isinstance(model, TaskModel)
    x = prepare_file(scan, config)
    np.testing.assert_allclose(
        said(model.backbone, x), embedded(folder, scan, tmp_path / "features.npz"), atol=1e-6, rtol=0
    )
    with pytest.raises(ScanError, match="other_rank"):
        prepare_file(a_picture(tmp_path / "picture"), config)


def test_what_an_earlier_version_exported_is_prepared_alike(tmp_path: Path) -> None:
    folder, scan = nano_checkpoint(tmp_path / "round-0001"), a_picture(tmp_path / "scan")
    told = export(folder, tmp_path / "out")
    x = prepare_file(scan, exported.read_config(tmp_path / "out"))
    (tmp_path / "out" / "config.json").write_text(
        json.dumps({key: value for key, value in told.items() if key not in {"inputs", "modality"}})
    )
    assert torch.equal(prepare_file(scan, exported.read_config(tmp_path / "out")), x)


def test_what_is_no_scan_is_told_without_its_path(tmp_path: Path) -> None:
    config = begin(FromCheckpoint(folder=nano_checkpoint(tmp_path / "round-0001")))
    (tmp_path / "notes.txt").write_text("no scan")
    a_picture(tmp_path / "a")
    a_picture(tmp_path / "b")
    with pytest.raises(ConfigError, match="does not exist; give a file, or the folder of a series"):
        prepare_file(tmp_path / "nowhere", config)
    for name, reason in (("notes.txt", "not_an_image"), (".", "several_scans")):
        with pytest.raises(ScanError) as told:
            prepare_file(tmp_path / name, config)
        assert told.value.reason == reason
        assert str(tmp_path) not in str(told.value)


VOLUME = {"axes": ["superior", "posterior", "left"], "resize": "linear, antialiased"}
IMAGE = {
    "axes": ["posterior of an axial slice, inferior of others", "left, of a sagittal slice posterior"],
    "resize": "linear, antialiased",
}


def test_every_export_says_how_axes_lie_and_what_a_scan_is_resized_to(tmp_path: Path) -> None:
    encoder = nano_checkpoint(tmp_path / "round-0001")
    classes, masks = untrained(tmp_path / "classes", LABELS), untrained(tmp_path / "masks", BALL)
    both = [
        {**IMAGE, "size": list(NANO.image_size), "fit": "whole"},
        {**VOLUME, "size": list(NANO.volume_size), "fit": "whole"},
    ]
    windows = [{**VOLUME, "size": [16, 33, 33], "fit": "windows"}]
    cases: list[tuple[Path, str, tuple[str, ...], list[dict[str, Any]], str]] = [
        (
            encoder,
            "safetensors",
            (),
            both,
            "All of a scan is then resized to 64 x 64 (H, W) and 16 x 64 x 64 (D, H, W)",
        ),
        (
            encoder,
            "onnx",
            ("--input-size", "40", "44"),
            [{**IMAGE, "size": [40, 44], "fit": "whole"}],
            "resized to 40 x 44 (H, W), whatever",
        ),
        (
            classes,
            "safetensors",
            (),
            [{**IMAGE, "size": [40, 44], "fit": "whole"}],
            "an axial slice with posterior down",
        ),
        (masks, "safetensors", (), windows, "Windows of 16 x 33 x 33 (D, H, W) are cut from it"),
        (masks, "monai", (), windows, "superior, posterior and left"),
    ]
    for number, (folder, form, words, inputs, told) in enumerate(cases):
        out = tmp_path / f"out{number}"
        assert export(folder, out, form, *words)["inputs"] == inputs
        card = (out / "README.md").read_text()
        assert told in card
        assert "`client.features.prepare_file`" in card
        assert exported.read_config(out).size_of(3 if inputs[-1]["axes"] == VOLUME["axes"] else 2) == tuple(
            inputs[-1]["size"]
        )


@pytest.mark.parametrize(("lengths", "size"), [((57, 91), (96, 64)), ((157, 33), (40, 44))])
def test_images_are_resized_as_the_card_says_by_torchs_own_names(
    lengths: tuple[int, ...], size: tuple[int, ...]
) -> None:
    x = torch.rand(1, *lengths, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(x[None], size, mode="bilinear", antialias=True)[0]
    torch.testing.assert_close(resize(x, size), expected, atol=1e-4, rtol=0)


def test_volumes_are_resized_along_the_third_axis_as_along_the_others() -> None:
    x = torch.rand(1, 30, 57, 91, generator=torch.Generator().manual_seed(0))
    planes = F.interpolate(x[0][:, None], (64, 40), mode="bilinear", antialias=True).reshape(1, 1, 30, 64 * 40)
    expected = F.interpolate(planes, (16, 64 * 40), mode="bilinear", antialias=True).reshape(1, 16, 64, 40)
    torch.testing.assert_close(resize(x, (16, 64, 40)), expected, atol=1e-4, rtol=0)


def test_the_example_of_the_documentation_gives_the_features_that_embed_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    of_export, of_checkpoint = examples
    folder = nano_checkpoint(tmp_path / "CHECKPOINT_DIR")
    scan = a_turned_volume(tmp_path / "scan")
    export(folder, tmp_path / "OUT_DIR")
    expected = embedded(folder, scan, tmp_path / "features.npz", "--modality", "CT")
    monkeypatch.chdir(tmp_path)
    for example in (of_export, of_checkpoint + of_export[of_export.index("scan =") :]):
        names: dict[str, Any] = {}
        exec(example, names)
        np.testing.assert_allclose(names["features"], expected, atol=1e-6, rtol=0)
