"""Models of tasks whose scans have several channels, elsewhere: in other forms, and asked of what takes one channel."""

import csv
import json
import logging
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import onnxruntime
import pytest
import torch
from markdown_it import MarkdownIt
from PIL import Image

import client.channel_reading
from client import segmenting
from client.beginning import begin
from client.bundle_parts import Prepared, cases_in
from client.catalogue import read_one
from client.channel_reading import read_channels_apart
from client.channels import cases_of, of_numbers
from client.features import prepare_file
from client.finetune_config import FromCheckpoint
from client.label_tables import label_table
from client.labelled import as_stored, as_values, grid_of, mask_at
from client.monai_bundle import inference, metadata
from client.research_command import main
from tests import crashing_reader
from tests.labelled_hospitals import task_study
from tests.series_files import write_series
from tests.test_finetune import write_config
from tests.test_label_tables import MASKS, configured, msd
from tests.test_predict import noise, untrained
from tests.test_tuned_round import rounds
from unimiss_core import checkpoint, exported, task_checkpoint
from unimiss_core.card_wording import inputs_in_words
from unimiss_core.errors import ConfigError, ScanError
from unimiss_core.inputs import inputs_of
from unimiss_core.plan import prepare
from unimiss_core.scan import Modality, Scan
from unimiss_core.study import StudyConfig
from unimiss_core.task_config import ClassificationConfig, SegmentationConfig, TaskConfig
from unimiss_core.tuned_round import load_tuned, rank_of_task
from unimiss_core.views import whole

CHANNELS = ("CT", "PET-fdg", "T2")
NUMBERS = (2, 0, 1)
"""Which number each has in the files' names."""
KINDS: tuple[Modality | None, ...] = ("CT", "PT", None)
BALL = SegmentationConfig(classes=("ball",), input_size=(16, 33, 33), channels=CHANNELS)
PICTURES = ClassificationConfig(kind="multi_class", rank=2, classes=("a", "b", "c"), input_size=(40, 44))
SEVERAL = PICTURES.model_copy(update={"channels": ("T1", "T2", "FLAIR", "T1gd")})


def write_case(folder: Path, case: str, seed: int = 0, shape: tuple[int, ...] = (38, 22, 36)) -> Path:
    """A case of three files, of other ranges each, on one grid, of which one is stored in another order; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    affine = np.array([[0, 0, -1.5, 5], [1.1, 0, 0, 3], [0, -2.5, 0, 9], [0, 0, 0, 1]])
    ranges: list[tuple[float, float]] = [(900, 60), (3, 1), (40, 500)]
    for number, (centre, width) in enumerate(ranges):
        values = np.random.default_rng([seed, number]).normal(centre, width, shape).astype(np.float32)
        image = nibabel.Nifti1Image(values, affine)
        stored = image.as_reoriented(np.array([[1, 1], [0, -1], [2, 1]])) if number == 2 else image
        nibabel.save(stored, folder / f"{case}_{number:04d}.nii.gz")
    return folder


def in_one_file(folder: Path, case: str) -> None:
    images = [nibabel.as_closest_canonical(nibabel.load(folder / f"{case}_{n:04d}.nii.gz")) for n in range(3)]
    volumes = np.stack([np.asarray(image.dataobj) for image in images], -1)
    for number in range(3):
        (folder / f"{case}_{number:04d}.nii.gz").unlink()
    nibabel.save(nibabel.Nifti1Image(volumes, images[0].affine), folder / f"{case}.nii.gz")


def export(folder: Path, out: Path, form: str, *words: str) -> int:
    return main(["export", str(folder), "--to", form, "--out", str(out), *words])


def prepared_alone(folder: Path, case: str, plan: Any) -> np.ndarray[Any, Any]:
    """(C, *S) in the model's order: each channel as if it were all there is."""
    files = [folder / f"{case}_{number:04d}.nii.gz" for number in NUMBERS]
    scans = [read_one(path, kind) for path, kind in zip(files, KINDS, strict=True)]
    return np.concatenate([prepare(scan, plan)[0] for scan in scans])


# -------------------------------------------------------------------------------------------------------- plain tensors


@pytest.mark.parametrize("task", [BALL, SEVERAL])
def test_a_model_comes_back_as_it_was_and_says_what_its_channels_are(tmp_path: Path, task: TaskConfig) -> None:
    folder, out = untrained(tmp_path / "model", task, channels=NUMBERS if task is BALL else ()), tmp_path / "out"
    assert export(folder, out, "safetensors") == 0
    assert task.channels is not None
    (model, config), x = exported.load(out), torch.rand(2, len(task.channels), *(task.input_size or ()))
    with torch.no_grad():
        assert torch.equal(model(x), task_checkpoint.load(folder)[0](x))
    told = json.loads((out / "config.json").read_text())
    kinds = KINDS if task is BALL else (None,) * 4
    assert told["inputs"][0]["channels"] == [
        {"name": name, "modality": kind} for name, kind in zip(task.channels, kinds, strict=True)
    ]
    assert tuple(told["task"]["channels"]) == config.channels == task.channels


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_what_is_said_of_all_channels_goes_before_their_names(tmp_path: Path, modality: str) -> None:
    folder, out = untrained(tmp_path / "model", BALL, modality=modality), tmp_path / "out"
    assert export(folder, out, "safetensors") == 0
    assert {one.modality for one in exported.read_config(out).inputs[0].channels} == {modality}


@pytest.mark.parametrize("rule", ["refuse", "resample"])
def test_what_becomes_of_channels_of_other_grids_goes_with_the_model(tmp_path: Path, rule: str) -> None:
    task = BALL.model_copy(update={"other_grids": rule})
    assert export(untrained(tmp_path / "model", task, channels=NUMBERS), tmp_path / "out", "safetensors") == 0
    said = "laid on the grid of the first" in (tmp_path / "out" / "README.md").read_text()
    told = json.loads((tmp_path / "out" / "config.json").read_text())["inputs"][0]
    assert (said, told.get("other_grids")) == ((True, "resample") if rule == "resample" else (False, None))


def test_a_model_of_one_channel_is_described_as_it_always_was(tmp_path: Path) -> None:
    assert export(untrained(tmp_path / "model", PICTURES), tmp_path / "out", "safetensors") == 0
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "channels" not in told["inputs"][0]
    assert "channels" not in (tmp_path / "out" / "README.md").read_text()


def test_the_card_says_what_each_channel_is_and_that_it_is_prepared_by_itself(tmp_path: Path) -> None:
    odd = ("CT", "PET-fdg", "<b>a|b</b>")
    folder = untrained(tmp_path / "model", BALL.model_copy(update={"channels": odd}))
    assert export(folder, tmp_path / "out", "safetensors") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    shown = MarkdownIt("commonmark", {"html": True}).enable("table").render(card)
    assert "3 channels, of one patient and on one grid, in this order: CT (as CT), PET-fdg (as PT), &lt;b&gt;a" in shown
    assert "Each is prepared by itself: CT by the window, all else by percentiles of its own. What a file says" in shown
    assert "<td>CT, PET-fdg, &lt;b&gt;a|b&lt;/b&gt;</td>" in shown
    assert "prepare_file" not in card
    assert "`unimiss predict` does all of this" in card


def test_a_federations_card_tells_them_too_and_not_what_sites_took_them_for() -> None:
    told = inputs_in_words(inputs_of(task_study().model, BALL))
    assert "in this order: CT, PET-fdg, T2. Each is prepared by itself" in told
    assert "brackets" not in told


# ----------------------------------------------------------------------------------------------------------------- ONNX


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model's folder, and what was exported of it."""
    folder = tmp_path_factory.mktemp("graph")
    model = untrained(folder / "model", SEVERAL)
    assert export(model, folder / "out", "onnx", "--channels", "4") == 0
    return model, folder / "out"


def test_a_graph_takes_all_channels_and_answers_as_torch(graph: tuple[Path, Path]) -> None:
    folder, out = graph
    x = torch.randn(3, 4, 40, 44, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"scan": x.numpy()})
    with torch.no_grad():
        expected = task_checkpoint.load(folder)[0](x)
        mixed = task_checkpoint.load(folder)[0](x[:, [1, 0, 2, 3]])
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)
    assert (expected - mixed).abs().max() > 1e-3  # their order counts
    config = exported.read_config(out)
    assert config.graphs["model.onnx"].input == ("batch", 4, 40, 44)
    assert [one.name for one in config.inputs[0].channels] == ["T1", "T2", "FLAIR", "T1gd"]
    told = session.get_modelmeta().custom_metadata_map["unimiss.channels"]
    assert [one["name"] for one in json.loads(told)] == ["T1", "T2", "FLAIR", "T1gd"]


@pytest.mark.parametrize(
    ("task", "asked", "told"),
    [
        (SEVERAL, "3", r"--channels 3: the model's scans have 4 \(T1, T2, FLAIR, T1gd\); leave it out"),
        (BALL, "1", r"--channels 1: the model's scans have 3 \(CT, PET-fdg, T2\); leave it out"),
        (PICTURES, "4", "--channels 4: give 1, of grey images, or 3, of coloured ones"),
        (PICTURES.model_copy(update={"rank": 3, "input_size": None}), "3", "--channels 3: volumes have one channel"),
    ],
)
def test_other_channels_are_refused_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: TaskConfig, asked: str, told: str
) -> None:
    folder = untrained(tmp_path / "model", task)
    assert export(folder, tmp_path / "out", "onnx", "--channels", asked) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert told.replace("\\", "") in said
    assert not (tmp_path / "out").exists()


def test_a_volume_of_three_channels_may_be_asked_for_by_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    class Enough(Exception):  # noqa: N818
        pass

    def graph_of(_: object, size: Any, *, channels: int, **__: object) -> None:
        asked.append((channels, *size))
        raise Enough

    monkeypatch.setattr("client.export.graph_of", graph_of)
    folder = untrained(tmp_path / "model", BALL)
    for words in ([], ["--channels", "3"], ["--channels", "3", "--input-size", "16", "64", "64"]):
        with pytest.raises(Enough):
            export(folder, tmp_path / "out", "onnx", *words)
    assert asked == [(3, 16, 33, 33), (3, 16, 33, 33), (3, 16, 64, 64)]


# ----------------------------------------------------------------------------------------------------------- the bundle


def bundled(folder: Path, task: TaskConfig, **more: Any) -> Path:
    assert export(untrained(folder / "model", task, **more), folder / "bundle", "monai") == 0
    return folder / "bundle"


def answered(bundle_root: Path, scans: Path, out: Path) -> Path:
    bundle = pytest.importorskip("monai.bundle")
    configs = bundle_root / "configs"
    files = {"meta_file": str(configs / "metadata.json"), "config_file": str(configs / "inference.json")}
    places = {"bundle_root": bundle_root, "dataset_dir": scans, "output_dir": out}
    bundle.run(**files, device="cpu", **{name: str(path) for name, path in places.items()})
    return out


@pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")
def test_a_bundle_draws_masks_of_cases_as_each_channel_by_itself_has_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: channels prepared one by one, put together by hand, and windows joined by our own inference."""
    bundle = bundled(tmp_path, BALL, channels=NUMBERS, overlap=0.25)
    scans = write_case(write_case(tmp_path / "scans", "a", 1), "b", 2)
    expected = {}
    model, manifest = task_checkpoint.load(tmp_path / "model")
    for case in "ab":
        values = as_values(as_stored(prepared_alone(scans, case, manifest.plan)))
        how = {"overlap": 0.25, "windows": 4, "device": torch.device("cpu"), "autocast": nullcontext()}
        chances = segmenting.probabilities(model, values, (16, 33, 33), **how)
        first = read_one(scans / f"{case}_0002.nii.gz")
        grid = grid_of(first, prepare(first, manifest.plan)[1])
        expected[case] = segmenting.likeliest_at_source(chances, grid)
        assert 0.01 < expected[case].mean() < 0.99
    in_one_file(scans, "b")
    shutil.copy(scans / "a_0000.nii.gz", scans / "c_0000.nii.gz")
    (scans / "notes.txt").write_text("none")
    with caplog.at_level(logging.WARNING):
        out = answered(bundle, scans, tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == ["a_seg.nii.gz", "b_seg.nii.gz"]
    for case, classes in expected.items():
        mask, source = (
            nibabel.load(out / f"{case}_seg.nii.gz"),
            scans / ("a_0002.nii.gz" if case == "a" else "b.nii.gz"),
        )
        np.testing.assert_allclose(mask.affine, nibabel.load(source).affine)
        assert mask.shape == nibabel.load(source).shape[:3]
        assert (read_back(out / f"{case}_seg.nii.gz") != classes).mean() < 1e-4
    told = [record.getMessage() for record in caplog.records if record.name == "client.bundle_parts"]
    assert told == ["left out: scan 3 of 4: lacks_channel", "left out: scan 4 of 4: not_an_image"]


def read_back(path: Path) -> np.ndarray[Any, Any]:
    """(D, H, W), by the reader of masks."""
    mask = mask_at(path)
    assert isinstance(mask, Scan)
    return mask.voxels[0]


@pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")
def test_a_bundle_classifies_cases_of_several_pictures(tmp_path: Path) -> None:
    """Oracle: the pictures prepared one by one, and the model by hand."""
    bundle, scans = bundled(tmp_path, SEVERAL), tmp_path / "scans"
    scans.mkdir()
    for number in range(4):
        values = np.random.default_rng(number).integers(0, 50 * (number + 1), (60, 71), dtype=np.uint8)
        Image.fromarray(values).save(scans / f"a_{number:04d}.png")
    model, manifest = task_checkpoint.load(tmp_path / "model")
    alone = [prepare(read_one(path), manifest.plan)[0] for path in sorted(scans.iterdir())]
    with torch.no_grad():
        expected = model(whole(np.concatenate(alone), (40, 44))[None]).softmax(1)[0]
    out = answered(bundle, scans, tmp_path / "out")
    with (out / "predictions.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row.pop("scan") == "a.png"
    assert [float(chance) for chance in row.values()] == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")
@pytest.mark.parametrize("task", [BALL, SEVERAL])
def test_monai_finds_the_network_to_take_and_give_what_the_metadata_says(tmp_path: Path, task: TaskConfig) -> None:
    bundle = pytest.importorskip("monai.bundle")
    folder = bundled(tmp_path, task)
    configs = {key: str(folder / "configs" / f"{key}.json") for key in ("metadata", "inference")}
    files = {"meta_file": configs["metadata"], "config_file": configs["inference"]}
    bundle.verify_net_in_out("network_def", **files, bundle_root=str(folder), device="cpu")
    told = json.loads(Path(configs["metadata"]).read_text())
    names = task.channels or ()
    image = told["network_data_format"]["inputs"]["image"]
    assert image["num_channels"] == told["unimiss"]["channels_at_most"] == len(names)
    assert image["channel_def"] == {str(number): f"channel {name}" for number, name in enumerate(names)}


def test_a_bundle_of_one_channel_is_configured_as_it_always_was(tmp_path: Path) -> None:
    manifest = task_checkpoint.load(untrained(tmp_path / "model", PICTURES))[1]
    assert inference(manifest)["datalist"] == {"_target_": "client.bundle_parts.scans_in", "folder": "@dataset_dir"}
    image = metadata(manifest)["network_data_format"]["inputs"]["image"]
    assert (image["num_channels"], image["channel_def"]) == (1, {"0": "image"})
    assert metadata(manifest)["unimiss"]["channels_at_most"] == 3


@pytest.mark.parametrize("name", ["$__import__('os').abort()", "@network", "50 %::x"])
def test_no_name_of_a_channel_is_a_program_to_monai(tmp_path: Path, name: str) -> None:
    bundle = pytest.importorskip("monai.bundle")
    task = BALL.model_copy(update={"channels": (name, "T2")})
    manifest = task_checkpoint.load(untrained(tmp_path / "model", task))[1]
    told = bundle.ConfigParser({"_meta_": metadata(manifest)}).get_parsed_content("_meta_")
    found = told["network_data_format"]["inputs"]["image"]["channel_def"]["0"]
    assert found.replace(" ", "") == f"channel {name}".replace(" ", "")


def test_the_bundles_card_says_which_number_each_channel_has(tmp_path: Path) -> None:
    card = (bundled(tmp_path, BALL, channels=NUMBERS) / "README.md").read_text()
    assert "0002 is CT, 0000 is PET-fdg, 0001 is T2" in card
    assert "Both name a scan by its case." in card


def test_series_of_a_case_are_its_channels_where_their_folders_are_called_so(tmp_path: Path) -> None:
    task = BALL.model_copy(update={"channels": ("CT", "PET")})
    manifest = task_checkpoint.load(untrained(tmp_path / "model", task))[1]
    volumes = [noise((16, 36, 34), seed) for seed in range(2)]
    for number, kind in enumerate(("CT", "PT")):
        write_series(tmp_path / "scans" / f"p_{number:04d}", volumes[number], attributes={"Modality": kind})
    (item,) = cases_in(str(tmp_path / "scans"), manifest)
    assert item["name"] == "p"
    found = Prepared(manifest)(item)
    alone = [prepare(read_one(tmp_path / "scans" / f"p_{number:04d}"), manifest.plan)[0] for number in range(2)]
    np.testing.assert_allclose((found["image"].numpy() + 2) / 4, np.concatenate(alone), atol=1e-4)
    shutil.rmtree(tmp_path / "scans" / "p_0001")
    (tmp_path / "scans" / "p_0000").rename(tmp_path / "scans" / "p")
    (item,) = cases_in(str(tmp_path / "scans"), manifest)
    with pytest.raises(ScanError, match="lacks_channel"):
        Prepared(manifest)(item)


def test_channels_on_other_grids_are_told_apart(tmp_path: Path) -> None:
    scans = write_case(tmp_path / "scans", "a")
    write_case(tmp_path / "other", "a", shape=(38, 22, 35))
    shutil.copy(tmp_path / "other" / "a_0001.nii.gz", scans)
    manifest = task_checkpoint.load(untrained(tmp_path / "model", BALL))[1]
    (item,) = cases_in(str(scans), manifest)
    assert [Path(one).name for one in item["image"]] == [f"a_{number:04d}.nii.gz" for number in range(3)]
    with pytest.raises(ScanError, match="channels_apart"):
        Prepared(manifest)(item)


def test_a_channel_that_crashes_its_decoder_does_not_crash_who_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = crashing_reader.write_compressed(tmp_path / "bad.dcm")
    monkeypatch.setattr(client.channel_reading, "read_channels", crashing_reader.crash)
    with pytest.raises(ScanError, match="reader_crashed"):
        read_channels_apart([path, tmp_path / "good.dcm"], (0, 1), (None, None), interpolate=False)


# -------------------------------------------------------------------------------------------------- names of a folder


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["b_0001.nii", "a_0000.nii", "a_0001.nii", "b_0000.nii"],
            {"a.nii": {0: "a_0000.nii", 1: "a_0001.nii"}, "b.nii": {0: "b_0000.nii", 1: "b_0001.nii"}},
        ),
        (["a_0001.nii", "a_0002.nii"], {"a_0001.nii": {None: "a_0001.nii"}, "a_0002.nii": {None: "a_0002.nii"}}),
        (["a_0000.png", "b.nii", "c_0000"], {"a.png": {0: "a_0000.png"}, "b.nii": {None: "b.nii"}, "c": {0: "c_0000"}}),
        (["a_0000.nii", "a_0001.png"], {"a.nii": {0: "a_0000.nii"}, "a.png": {1: "a_0001.png"}}),
        (
            ["1.2.840.5_0000.nii.gz", "x_00001.nii"],
            {"1.2.840.5.nii.gz": {0: "1.2.840.5_0000.nii.gz"}, "x_00001.nii": {None: "x_00001.nii"}},
        ),
        ([], {}),
    ],
)
def test_cases_of_names(names: list[str], expected: dict[str, dict[int | None, str]]) -> None:
    assert cases_of(names) == expected
    assert list(cases_of(names)) == sorted(expected)


def test_files_of_a_cases_channels() -> None:
    held: dict[int | None, str] = {0: "a_0000.nii", 2: "a_0002.nii", 3: "a_0003.nii"}
    assert list(of_numbers((3, 0), held).values()) == ["a_0003.nii", "a_0000.nii"]
    assert of_numbers((0, 1), held) == {0: "a_0000.nii"}
    assert of_numbers((1, 4), {None: "a.nii"}) == {1: "a.nii", 4: "a.nii"}


def test_a_file_of_all_volumes_may_end_in_four_digits_of_its_own(tmp_path: Path) -> None:
    task = {**MASKS, "channels": ["T1", "T2"]}
    msd(tmp_path, ["brain_0001.nii.gz", "brain_0002.nii.gz"], ["brain_0001.nii.gz", "brain_0002.nii.gz"])
    found = label_table(configured(tmp_path, task, {"name": "msd", "folder": ".", "channels": [1, 0]}))
    assert [case.files for case in found.cases] == [(f"imagesTr/brain_000{n}.nii.gz",) * 2 for n in (1, 2)]


# ------------------------------------------------------------------------------------------ what takes one channel


def refused(words: list[str], capsys: pytest.CaptureFixture[str], told: str) -> None:
    capsys.readouterr()
    assert main(words) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, said
    assert told in said[0]


WAY_OUT = "and here each file is a scan of one; ask it by `unimiss predict`, or give an encoder of pretraining"


@pytest.mark.parametrize("of", ["model", "round"])
def test_embed_and_probe_refuse_before_any_scan_is_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a scan was looked at")

    monkeypatch.setattr("client.reading.catalogue", never)
    monkeypatch.setattr("client.reading.catalogue_one", never)
    monkeypatch.setattr("client.probe_sources.read_cases", never)
    model = untrained(tmp_path / "model", SEVERAL) if of == "model" else rounds(tmp_path / "run", study_of())
    told = f"4 channels (T1, T2, FLAIR, T1gd), {WAY_OUT}"
    (tmp_path / "scans" / "a").mkdir(parents=True)
    (tmp_path / "t.csv").write_text("scan,label,patient\n" + "".join(f"{n}.png,{n % 2},{n}\n" for n in range(8)))
    for scans in (tmp_path / "scans", tmp_path / "scans.npy"):
        refused(["embed", str(model), str(scans), "--out", str(tmp_path / "out.npz")], capsys, told)
    for data in (tmp_path / "scans", tmp_path / "t.csv"):
        refused(["probe", str(model), "--data", str(data), "--out", str(tmp_path / "out.json")], capsys, told)
        refused(["probe", "scratch", str(model), "--data", str(data)], capsys, told)
    assert not list(tmp_path.glob("out*"))


def test_prepare_file_refuses(tmp_path: Path) -> None:
    folder = untrained(tmp_path / "model", BALL)
    assert export(folder, tmp_path / "out", "safetensors") == 0
    for config in (exported.read_config(tmp_path / "out"), begin(FromCheckpoint(folder=folder))):
        with pytest.raises(ConfigError, match=r"3 channels \(CT, PET-fdg, T2\), and here each file is a scan of one"):
            prepare_file(write_case(tmp_path / "scans", "a") / "a_0000.nii.gz", config)


def test_a_probe_refuses_scans_of_several_channels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = {"name": "classification", "rank": 2, "classes": ["0", "1"], "channels": ["T1", "T2"]}
    (tmp_path / "t.csv").write_text("a,b,label,patient\n" + "".join(f"a{n},b{n},{n % 2},{n}\n" for n in range(8)))
    path = write_config(tmp_path, task=task, data={"table": "t.csv", "scan": ["a", "b"]})
    refused(["probe", "scratch", "--data", str(path)], capsys, "--data: its scans have 2 channels, and a probe takes")


# ---------------------------------------------------------------------------------------------------- federated rounds


def study_of(head: str = "shared", task: TaskConfig = SEVERAL) -> StudyConfig:
    return task_study(2, finetune={"task": json.loads(task.model_dump_json()), "head": head})


@pytest.mark.parametrize("task", [SEVERAL, BALL, PICTURES, PICTURES.model_copy(update={"channels": ("R", "G", "B")})])
@pytest.mark.parametrize("head", ["shared", "local"])
def test_a_round_is_known_whatever_channels_its_task_has(tmp_path: Path, task: TaskConfig, head: str) -> None:
    study = study_of(head, task)
    folder = rounds(tmp_path / "run", study)
    manifest = checkpoint.read_manifest(folder)
    assert rank_of_task(manifest) == task.rank
    begun = begin(FromCheckpoint(folder=folder))
    assert (begun.is_taught, begun.channels) == (True, task.channels)
    kernel = next(name for name in manifest.tensors if name.endswith(f"stem.{task.rank}d.conv.weight"))
    for shape in ((8, 4, 7), (9, *manifest.tensors[kernel][1:]), ()):
        other = manifest.model_copy(update={"tensors": {**manifest.tensors, kernel: shape}})
        assert rank_of_task(other) is None


def test_a_round_is_exported_with_its_channels(tmp_path: Path) -> None:
    study = study_of()
    folder = rounds(tmp_path / "run", study)
    assert export(folder, tmp_path / "out", "safetensors") == 0
    (model, config), (expected, manifest) = exported.load(tmp_path / "out"), load_tuned(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert config.channels == ("T1", "T2", "FLAIR", "T1gd")
    assert manifest.channel_numbers == (0, 1, 2, 3)


def test_a_round_that_nothing_describes_says_how_many_channels_its_scans_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = rounds(tmp_path / "run", study_of())
    (tmp_path / "run" / "study.yaml").unlink()
    words = ["embed", str(folder), str(tmp_path), "--out", str(tmp_path / "out.npz")]
    refused(words, capsys, f"4 channels (0, 1, 2, 3), {WAY_OUT}")
    begun = begin(FromCheckpoint(folder=folder))
    kernel = "backbone.encoder.stem.2d.conv.weight"
    of_two = begun.tensors_for(SEVERAL.model_copy(update={"channels": ("T1", "T2")}))
    assert of_two is not None
    torch.testing.assert_close(of_two[kernel].sum(1), checkpoint.load(folder).student[kernel].sum(1))
