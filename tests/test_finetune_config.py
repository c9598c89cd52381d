from pathlib import Path
from typing import Any

import pytest
import yaml

from client.finetune_config import CsvData, FinetuneConfig, FromCheckpoint, FromScratch, init_from, load_finetune
from unimiss_core.config import parse
from unimiss_core.errors import ConfigError

PLAIN: dict[str, Any] = {
    "name": "x",
    "task": {"name": "classification", "rank": 2, "classes": ["no", "yes"]},
    "init": {"name": "scratch"},
    "data": {"name": "csv", "table": "labels.csv"},
}


def parsed(**changed: Any) -> FinetuneConfig:
    return parse(FinetuneConfig, PLAIN | changed, where="x.yaml")


def test_every_mistake_is_told_in_one_message() -> None:
    with pytest.raises(ConfigError) as told:
        parsed(training={"epoch": 3, "lr": -1.0}, data={"name": "csv", "tabel": "a"}, seed="0")
    message = str(told.value)
    for piece in ("epoch", "training.lr", "did you mean 'table'", "'seed'"):
        assert piece in message


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"data": {"name": "msd", "folder": "."}}, "the task must be segmentation"),
        ({"split": {"name": "folds", "folds": 3, "fold": 3}}, "count from 0 to 2"),
        ({"task": {"classes": ["a", "b", "c"]}}, "binary needs two"),
        ({"task": {"classes": ["a", "a"]}}, "each name may stand once"),
        ({"task": {"rank": 3, "classes": ["a", "b"], "input_size": [64, 64]}}, r"at least \[13, 33, 33\]"),
        ({"inference": {"keep_largest": ["liver"]}}, "none of the task's classes"),
        ({"device": "gpu"}, "no device's name"),
        ({"training": {"augmentation": {"area": [0.9, 0.5]}}}, "must rise"),
    ],
)
def test_a_contradiction_is_told(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parsed(**changed)


def test_paths_are_below_the_file_or_below_the_data_root_of_the_command(tmp_path: Path) -> None:
    file = tmp_path / "a" / "x.yaml"
    file.parent.mkdir()
    raw = PLAIN | {"init": {"folder": "round-0001"}, "data_root": "../held", "data": {"table": "t.csv"}}
    file.write_text(yaml.safe_dump(raw))
    plain, moved = load_finetune(file), load_finetune(file, data_root=tmp_path / "b", out=tmp_path / "c")
    assert isinstance(plain.init, FromCheckpoint)
    assert isinstance(plain.data, CsvData)
    assert plain.init.folder == file.parent / "round-0001"
    assert plain.data.table.resolve() == tmp_path / "held" / "t.csv"
    assert plain.out == file.parent / "out"
    assert (moved.data.table, moved.out) == (tmp_path / "b" / "t.csv", tmp_path / "c")  # type: ignore[union-attr]


def test_a_command_line_may_say_what_to_begin_with(tmp_path: Path) -> None:
    assert init_from(str(tmp_path), FromScratch()) == FromCheckpoint(folder=tmp_path)
    assert init_from("scratch", FromCheckpoint(folder=tmp_path)) == FromScratch()
    with pytest.raises(ConfigError, match="does not exist; give 'scratch'"):
        init_from(str(tmp_path / "gone"), FromScratch())
