import functools
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from client import research_command
from client.nifti import write_nifti
from client.research_command import main
from tests.published import golden, image, needs_reference, recipe_weights, volume
from tests.series_files import write_series
from tests.test_released import released_file
from unimiss_core import checkpoint
from unimiss_core.keys import SigningKey
from unimiss_core.model import ARCHITECTURES
from unimiss_core.network import build_network, tensors_of
from unimiss_core.scan import Scan
from unimiss_core.study import ModelConfig, PlanConfig

ROOT = Path(__file__).parents[1]
NANO = ModelConfig(prototypes=16)
WIDTH = ARCHITECTURES["nano"].width


@functools.cache
def begun(seed: int, architecture: object) -> dict[str, torch.Tensor]:  # noqa: ARG001 - of the key: some tests change it
    return tensors_of(build_network(NANO, seed=seed))


def nano_checkpoint(folder: Path, signing_key: SigningKey | None = None) -> Path:
    """A checkpoint whose student differs from its teacher."""
    student, teacher = (begun(seed, ARCHITECTURES["nano"]) for seed in (0, 1))
    checkpoint.save(
        folder,
        origin="federation",
        round=1,
        study_digest="0" * 64,
        model=NANO,
        plan=PlanConfig(image_longest_side=80),
        student=student,
        teacher=teacher,
        signing_key=signing_key,
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
        source, out = saved(tmp_path / "scans.npy", scans.numpy()), tmp_path / f"features{rank}d.npz"
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
    assert found["features"].shape == (2, WIDTH)
    assert np.isfinite(found["features"]).all()
    assert list(found["files"]) == ["0.png", "1.png"]


def test_a_scan_is_embedded_in_the_range_that_training_saw(tmp_path: Path) -> None:
    """[0, 1] becomes [-2, 2] in training's views; embedding must not feed the encoder anything else."""
    folder, scans, out = nano_checkpoint(tmp_path / "round-0001"), tmp_path / "scans", tmp_path / "features.npz"
    scans.mkdir()
    pixels = np.tile(np.arange(64, dtype=np.uint8), (64, 1))
    Image.fromarray(pixels).save(scans / "ramp.png")
    assert main(["embed", str(folder), str(scans), "--out", str(out)]) == 0
    with torch.no_grad():
        seen = torch.from_numpy(pixels / 63.0).float()[None, None] * 4 - 2
        expected = build_network(NANO, seed=1).backbone(seen)
    np.testing.assert_allclose(np.load(out)["features"], expected, atol=1e-4)


def test_scans_that_do_not_say_what_they_are_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Read as anything else, a CT gives other features than training saw."""
    folder = nano_checkpoint(tmp_path / "round-0001")
    voxels = np.random.default_rng(0).normal(size=(1, 20, 40, 40)).astype(np.float32)
    (tmp_path / "scans").mkdir()
    write_nifti(tmp_path / "scans" / "a.nii.gz", Scan(voxels, (3.0, 2.0, 2.0), "OT"))
    for given, said in (([], True), (["--modality", "CT"], False), (["--modality", "MR"], False)):
        out = tmp_path / f"features{len(given)}{given[-1:]}.npz"
        assert main(["embed", str(folder), str(tmp_path / "scans"), "--out", str(out), *given]) == 0
        heard = capsys.readouterr()
        assert ("1 scan(s) do not say what they are" in heard.out + heard.err) == said


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
        (np.full((1, 1, 64, 64), np.nan), "entry 0 holds NaN, infinity"),
        (np.full((1, 1, 64, 64), 1e300), "entry 0 holds NaN, infinity or a value beyond float32"),
        (np.eye(64, dtype=np.float32)[None, None] * 3e38, "the encoder's answer is not finite for scans 0 to 0"),
        (np.zeros((1, 1, 64, 64), bool), "expected numbers of shape"),
        (np.array(1.0), "expected numbers of shape"),
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


def archive() -> bytes:
    np.savez(payload := io.BytesIO(), a=np.zeros(3))
    return payload.getvalue()


def pickled() -> bytes:
    np.save(payload := io.BytesIO(), np.array([{}], object), allow_pickle=True)
    return payload.getvalue()


def with_header(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        archive(),
        pickled(),
        with_header(b"{" + b"[" * 900),
        with_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999, 1, 64, 64)}"),
        with_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1, 64, 64)}"),
    ],
    ids=["empty", "cut", "archive", "pickled", "nested", "overflowing", "shorter than it says"],
)
def test_a_file_that_is_no_array_is_one_message_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (source := tmp_path / "scans.npy").write_bytes(content)
    folder = nano_checkpoint(tmp_path / "round-0001")
    assert main(["embed", str(folder), str(source), "--out", str(tmp_path / "features.npz")]) == 2
    assert "is not an .npy array of numbers" in capsys.readouterr().err


def test_half_precision_and_integers_are_numbers_too(tmp_path: Path) -> None:
    folder, out = nano_checkpoint(tmp_path / "round-0001"), tmp_path / "features.npz"
    scans = np.random.default_rng(0).integers(-2, 2, (1, 1, 35, 44))
    rows = []
    for dtype in (np.float32, np.float16, np.int64, np.dtype(">f8")):
        source = saved(tmp_path / "scans.npy", scans.astype(dtype))
        assert main(["embed", str(folder), str(source), "--out", str(out)]) == 0
        rows.append(np.load(out)["features"])
        out.unlink()
    assert all(np.array_equal(rows[0], row) for row in rows[1:])


def test_a_folder_of_both_ranks_gives_rows_in_the_order_of_their_paths(tmp_path: Path) -> None:
    folder, scans = nano_checkpoint(tmp_path / "round-0001"), tmp_path / "scans"
    (scans / "a").mkdir(parents=True)
    chance = np.random.default_rng(0)
    for name in ("z.png", "a/b.png", "a/d.png"):
        Image.fromarray(chance.integers(0, 255, (50, 70), dtype=np.uint8)).save(scans / name)
    for name in ("c.nii", "a/c.nii"):
        voxels = chance.random((1, 14, 40, 37), dtype=np.float32)
        write_nifti(scans / name, Scan(voxels, (3.0, 1.0, 1.0), "MR", np.diag([1.0, 1.0, 3.0, 1.0])))
    write_series(scans / "a" / "series", chance.integers(0, 900, (14, 40, 37), dtype=np.int16))
    out = tmp_path / "features.npz"
    assert main(["embed", str(folder), str(scans), "--out", str(out), "--batch", "3", "--show-paths"]) == 0
    found = np.load(out)
    assert [str(file).split("series")[0] for file in found["files"]] == [
        "c.nii", "z.png", "a/b.png", "a/c.nii", "a/d.png", "a/",
    ]  # fmt: skip
    assert list(found["ranks"]) == [3, 2, 2, 3, 2, 3]
    assert found["features"].shape == (6, WIDTH)


def test_an_output_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = nano_checkpoint(tmp_path / "round-0001")
    source = saved(tmp_path / "scans.npy", np.zeros((1, 1, 20, 20), np.float32))  # would be told, if it were looked at
    (tmp_path / "file").write_text("mine")
    (tmp_path / "taken.npz").mkdir()
    for out, told in {
        tmp_path / "file" / "features.npz": "cannot be written (Not a directory)",
        tmp_path / "taken.npz": "is a folder",
        tmp_path / f"{'x' * 300}.npz": "cannot be written (File name too long)",
    }.items():
        assert main(["embed", str(folder), str(source), "--out", str(out)]) == 2
        assert told in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_features_that_were_written_before_are_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = nano_checkpoint(tmp_path / "round-0001")
    source = saved(tmp_path / "scans.npy", np.zeros((1, 1, 64, 64), np.float32))
    (out := tmp_path / "features.npz").write_text("mine")
    assert main(["embed", str(folder), str(source), "--out", str(out)]) == 2
    assert f"--out {out}: exists; give another name, or delete it first" in capsys.readouterr().err
    assert out.read_text() == "mine"


def test_a_checkpoint_that_is_not_what_its_manifest_says_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = nano_checkpoint(tmp_path / "round-0001") / "manifest.json"
    content = json.loads(manifest.read_text())
    source = saved(tmp_path / "scans.npy", np.zeros((1, 1, 64, 64), np.float32))
    for change, told in (
        ({"model": content["model"] | {"prototypes": 2**20}}, "not those of the model in its manifest"),
        ({"sha256": {"a\0": "0"}}, "is missing"),
    ):
        manifest.write_text(json.dumps(content | change))
        assert main(["embed", str(manifest.parent), str(source), "--out", str(tmp_path / "features.npz")]) == 4
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("command", ["client.research_command", "client.site_command"])
def test_ctrl_c_while_libraries_are_imported_is_one_line(tmp_path: Path, command: str) -> None:
    """An import that is interrupted raises KeyboardInterrupt where it stands; here it always stands at NumPy."""
    arguments = ["embed", "x", "y", "--out", "z.npz"] if "research" in command else ["check", str(tmp_path)]
    program = f"""
import sys

class Interrupted:
    def find_spec(name, path=None, target=None):
        if name == "numpy":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupted)
from {command} import main
sys.exit(main({arguments!r}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 130
    assert "interrupted" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_does_not_exist_is_told_as_that(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = nano_checkpoint(tmp_path / "round-0001"), ["--out", str(tmp_path / "features.npz")]
    nowhere = str(tmp_path / "nowhere")
    assert main(["embed", nowhere, str(tmp_path), *out]) == 4
    assert f"{nowhere}: does not exist" in capsys.readouterr().err
    assert main(["embed", str(folder), nowhere, *out]) == 2
    assert f"{nowhere}: does not exist; give a folder of scans" in capsys.readouterr().err
    assert main(["verify", nowhere]) == 4
    assert f"{nowhere}: does not exist" in capsys.readouterr().err


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
    assert main(["embed", str(folder), str(empty), *out, "--device", "meta"]) == 2
    assert main(["embed", str(folder), "x" * 300, *out]) == 2
    assert main(["import", str(tmp_path / "absent.pth"), str(tmp_path / "new")]) == 4


@needs_reference
def test_import_tells_where_it_cannot_write_and_takes_the_folder_it_stands_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    released, here = released_file(tmp_path, "tiny"), tmp_path / "here"
    (tmp_path / "file").write_text("mine")
    assert main(["import", str(released), str(tmp_path / "file" / "new")]) == 2
    assert "cannot be written (Not a directory)" in capsys.readouterr().err
    here.mkdir()
    monkeypatch.chdir(here)
    assert main(["import", str(released), "."]) == 0
    assert checkpoint.read_manifest(here).model.size == "tiny"


def test_import_never_replaces_a_folder_that_holds_something(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    assert main(["import", str(tmp_path / "released.pth"), str(tmp_path)]) == 2
    assert "exists and is not empty; give a new folder" in capsys.readouterr().err
    assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("command", "way_out"),
    [
        ("finetune", "go on with --resume; or begin anew in another --out with a smaller training.batch"),
        ("embed", "give a smaller --batch"),
        ("predict", "give a smaller --batch"),
        ("probe", "give a smaller --batch"),
        ("audit-privacy", "give fewer --patients-at-once"),
    ],
)
def test_memory_that_ends_is_one_message_that_says_what_to_change(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, way_out: str
) -> None:
    def act(_options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has a capacity of 8 GiB")

    monkeypatch.setattr(research_command, "_ACTS", {command: act})
    given = {
        "finetune": ["x.yaml"],
        "embed": ["x", "y", "--out", "z.npz"],
        "predict": ["x", "y", "--out", "z"],
        "probe": ["x", "--data", "y"],
        "audit-privacy": ["--study", "x.yaml"],
    }
    assert main([command, *given[command]]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"unimiss {command}: the memory of the GPU ran out; ")
    assert way_out in said
    assert said.count("\n") == 1
