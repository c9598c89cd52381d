"""Who goes on with a fine-tuning is told what differs, and that there is nothing left to do."""

import json
from pathlib import Path
from typing import Any

import pytest

from client.research_command import main
from client.tuning_settings import differences, settings_of
from tests.test_finetune import QUICK, pictures, write_config
from tests.test_label_tables import BINARY, configured


def killed(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def files_in(folder: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in folder.iterdir()}


def test_a_finished_fine_tuning_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = pictures(tmp_path, 18)
    path, out = write_config(tmp_path, **settings), tmp_path / "out"
    assert main(["finetune", str(path), "--resume"]) == 0
    before = files_in(out)
    capsys.readouterr()
    assert main(["finetune", str(path), "--resume", "--device", "cpu"]) == 0
    assert f"{out}: is finished, and nothing is left to do" in capsys.readouterr().out
    write_config(tmp_path, **settings, seed=3)
    assert main(["finetune", str(path), "--resume"]) == 2
    assert "a finished fine-tuning of another file (seed: 0 then, 3 now)" in capsys.readouterr().err
    write_config(tmp_path, **{**settings, "data": {**settings["data"], "modality": "MR"}})
    assert main(["finetune", str(path), "--resume"]) == 2
    assert "another file (data: otherwise then)" in capsys.readouterr().err
    assert main(["finetune", str(path)]) == 2
    assert files_in(out) == before
    told = json.loads(before["metrics.json"])["settings"]
    assert not any(name in json.dumps(told) for name in ("miller", "secret", "pictures", str(tmp_path)))


def test_a_finished_one_that_kept_no_settings_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, **pictures(tmp_path, 18))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.json").write_text("{}")
    assert main(["finetune", str(path), "--resume"]) == 2
    assert "holds a finished fine-tuning" in capsys.readouterr().err


def test_what_an_interrupted_one_was_asked_otherwise_is_told_by_its_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = pictures(tmp_path, 18)
    path = write_config(tmp_path, **settings)
    with monkeypatch.context() as patched:
        patched.setattr("client.finetune._write_model", killed)
        assert main(["finetune", str(path)]) == 130
    write_config(tmp_path, **settings, training={**QUICK, "epochs": 10, "patience": 4})
    assert main(["finetune", str(path), "--resume"]) == 4
    told = "is of another fine-tuning: training.epochs: 2 then, 10 now; training.patience: 15 then, 4 now; put that"
    assert told in capsys.readouterr().err
    write_config(tmp_path, **settings)
    assert main(["finetune", str(path), "--resume"]) == 0


def test_settings_are_told_without_what_data_says_and_where_anything_lies() -> None:
    data = {"table": "miller.csv", "patient": "miller", "where": {"who": ["miller"]}}
    config = configured(Path("/miller"), BINARY, data, out="miller", plan={"volume_spacing_mm": [1, 1, 2]})
    now = settings_of(config)
    assert "miller" not in json.dumps(now)
    assert (now["task.classes"], now["training.lr"]) == (["no", "yes"], 1e-3)
    moved = configured(Path("/other"), BINARY, {**data, "table": "t.csv"}, out="there", plan=config.plan.model_dump())
    assert differences(now, settings_of(moved)) == ""
    other = configured(Path("/miller"), BINARY, {**data, "where": {}})
    told = differences(now, settings_of(other))
    assert told.startswith("data: otherwise then; plan.")
    assert " then, not set now; and " in told
