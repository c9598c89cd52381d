"""Whose a fine-tuning's folder is: its own files' alone, and one fine-tuning's at a time."""

from pathlib import Path
from typing import Any

import pytest

from client import tuning_folder
from client.research_command import main
from client.tuning_folder import alone_in
from tests.test_finetune import QUICK, pictures, write_config


def quick(tmp_path: Path) -> tuple[str, ...]:
    return "finetune", str(write_config(tmp_path, **pictures(tmp_path, 18), training={**QUICK, "epochs": 1}))


@pytest.mark.parametrize("resume", [[], ["--resume"]])
@pytest.mark.parametrize("name", ["prepared/mine.txt", "predictions/mine.txt", "predictions.csv", "model.safetensors"])
def test_what_a_fine_tuning_did_not_write_it_does_not_take_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, resume: list[str]
) -> None:
    folder, path = tmp_path / "work", write_config(tmp_path, **pictures(tmp_path, 18))
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("years of work")
    assert main(["finetune", str(path), "--out", str(folder), *resume]) == 2
    assert "give a new or empty one" in capsys.readouterr().err
    assert (folder / name).read_text() == "years of work"
    assert [one.name for one in folder.rglob("*") if one.is_file()] == [Path(name).name]


def test_two_fine_tunings_do_not_work_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, out = quick(tmp_path), tmp_path / "out"
    for more in ([], ["--resume"]):
        with alone_in(out, resume=False):
            assert main([*command, *more]) == 2
        assert "another fine-tuning is at work in this folder" in capsys.readouterr().err
        assert [one.name for one in out.iterdir()] == ["finetune.lock"]
    assert main(list(command)) == 0  # nobody is at work any more, and nothing else is there
    assert not (out / "finetune.lock").exists()


def test_what_was_finished_while_this_one_read_its_table_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command, out = quick(tmp_path), tmp_path / "out"
    alone = tuning_folder.alone_in

    def after_the_other(*arguments: Any, **more: Any) -> Any:
        out.mkdir()
        (out / "metrics.json").write_text("{}")
        return alone(*arguments, **more)

    monkeypatch.setattr("client.finetune.alone_in", after_the_other)
    assert main(list(command)) == 2
    assert "finished" in capsys.readouterr().err
    assert (out / "metrics.json").read_text() == "{}"


def test_a_disk_without_locks_is_worked_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> Any:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(tuning_folder, "locked", unknown)
    out = tmp_path / "out"
    with alone_in(out, resume=False), alone_in(out, resume=False):
        assert (out / "finetune.lock").exists()
