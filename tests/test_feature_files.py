"""Features of scans as files: what stands in them, and that memory does not grow with them."""

import hashlib
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from client.feature_files import feature_file
from client.research_command import main
from tests.series_files import write_series
from tests.test_research_command import WIDTH, nano_checkpoint


def some_scans(folder: Path) -> Path:
    """Three pictures and a series."""
    folder.mkdir()
    chance = np.random.default_rng(0)
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(chance.integers(0, 255, (50, 70), dtype=np.uint8)).save(folder / name)
    write_series(folder / "series", chance.integers(0, 900, (14, 40, 37), dtype=np.int16))
    return folder


def batches(count: int, size: int = 64, width: int = 256) -> Any:
    for number in range(count):
        yield np.random.default_rng(number).random((size, width), dtype=np.float32), {"rank": [3] * size}


def test_a_scan_has_the_key_that_its_file_has_by_other_programs(tmp_path: Path) -> None:
    scans, out = some_scans(tmp_path / "scans"), tmp_path / "features.npz"
    assert main(["embed", str(nano_checkpoint(tmp_path / "r")), str(scans), "--out", str(out)]) == 0
    found = np.load(out)
    assert set(found.files) == {"features", "ranks", "keys"}
    digests = [hashlib.sha256((scans / f"{name}.png").read_bytes()).hexdigest()[:32] for name in "abc"]
    assert found["keys"][:3].tolist() == digests
    assert len(set(found["keys"].tolist())) == 4
    moved = tmp_path / "moved"
    (scans / "series").rename(moved)
    assert main(["embed", str(tmp_path / "r"), str(moved), "--out", str(tmp_path / "again.npz")]) == 0
    again = np.load(tmp_path / "again.npz")
    assert again["keys"].tolist() == [found["keys"][3]]
    np.testing.assert_allclose(again["features"][0], found["features"][3], atol=1e-4)


def test_one_file_is_embedded_as_in_its_folder(tmp_path: Path) -> None:
    scans, folder = some_scans(tmp_path / "scans"), nano_checkpoint(tmp_path / "r")
    for source, name in ((scans, "all"), (scans / "b.png", "one")):
        assert main(["embed", str(folder), str(source), "--out", str(tmp_path / f"{name}.npz")]) == 0
    every, one = (np.load(tmp_path / f"{name}.npz") for name in ("all", "one"))
    np.testing.assert_allclose(one["features"][0], every["features"][1], atol=1e-4)


def test_memory_does_not_grow_with_the_number_of_scans(tmp_path: Path) -> None:
    count = 300  # 19,200 scans, 19.7 MB
    tracemalloc.start()
    with feature_file(tmp_path / "x.npz") as file:
        for features, labels in batches(count):
            file.add(features, labels)
        file.finish()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6
    found = np.load(tmp_path / "x.npz")
    np.testing.assert_array_equal(found["features"], np.concatenate([features for features, _ in batches(count)]))
    assert found["ranks"].shape == (64 * count,)


def test_nothing_half_written_stays(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_text("the one before")
    with feature_file(tmp_path / "x.npz") as file:
        file.add(*next(batches(1)))  # and no more: as when it is interrupted here
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]
    assert (tmp_path / "x.npz").read_text() == "the one before"


def test_parquet_holds_the_same(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    scans, folder = some_scans(tmp_path / "scans"), nano_checkpoint(tmp_path / "r")
    for name in ("x.npz", "x.parquet"):
        assert main(["embed", str(folder), str(scans), "--out", str(tmp_path / name), "--show-paths"]) == 0
    arrays, table = np.load(tmp_path / "x.npz"), parquet.read_table(tmp_path / "x.parquet")
    assert table.schema.names == ["feature", "rank", "key", "file"]
    np.testing.assert_array_equal(np.array(table["feature"].to_pylist(), np.float32), arrays["features"])
    for column, name in {"rank": "ranks", "key": "keys", "file": "files"}.items():
        assert table[column].to_pylist() == arrays[name].tolist()
    assert table.schema.field("feature").type.list_size == WIDTH


def test_parquet_without_pyarrow_is_told_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = nano_checkpoint(tmp_path / "r")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert main(["embed", str(folder), str(tmp_path / "nowhere"), "--out", str(tmp_path / "x.parquet")]) == 2
    assert (
        "pip install -e '.[parquet]' in this program's folder; or give a name that ends in .npz"
        in capsys.readouterr().err
    )
