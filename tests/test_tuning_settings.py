"""Who goes on with a fine-tuning is told what differs, and that there is nothing left to do."""

import json
import os
import re
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from client.beginning import begin
from client.label_tables import label_table
from client.made_of import digests_of
from client.research_command import main
from client.tuning_settings import differences, settings_of
from tests.test_finetune import QUICK, pictures, write_config
from tests.test_label_tables import BINARY, configured, of_medmnist
from tests.test_research_command import nano_checkpoint
from unimiss_core import checkpoint


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a file, its scans, and what its fine-tuning wrote."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_config(folder, **pictures(folder, 18))
    assert main(["finetune", str(path)]) == 0
    return folder


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
    assert "another fine-tuning, which is finished (seed: 0 then, 3 now); put that back" in capsys.readouterr().err
    write_config(tmp_path, **{**settings, "data": {**settings["data"], "modality": "MR"}})
    assert main(["finetune", str(path), "--resume"]) == 2
    assert "which is finished (data: otherwise then)" in capsys.readouterr().err
    assert main(["finetune", str(path)]) == 2
    assert files_in(out) == before
    kept = before["made-of.json"].decode()
    assert json.loads(kept)["training.epochs"] == QUICK["epochs"]
    assert not any(name in kept for name in ("miller", "secret", "pictures", str(tmp_path)))


def test_what_is_handed_round_with_a_model_says_nothing_of_who_was_chosen(tmp_path: Path) -> None:
    """A digest of a patient's number is found by trying all of them."""
    settings = pictures(tmp_path, 18)
    path, out = write_config(tmp_path, **settings), tmp_path / "out"
    assert main(["finetune", str(path)]) == 0
    if os.name == "posix":
        assert stat.S_IMODE((out / "made-of.json").stat().st_mode) == 0o600
    digests = [one for one in json.loads((out / "made-of.json").read_text()).values() if len(str(one)) == 64]
    assert len(digests) == 4  # data, init, weights, cases
    others = b"".join(one for name, one in files_in(out).items() if name != "made-of.json")
    assert not any(digest.encode() in others for digest in digests)
    assert not re.search(rb"[0-9a-f]{64}", (out / "metrics.json").read_bytes())


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [lines[0], *lines[2:]],
        lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
        lambda lines: [line.replace("secret3.png", "./secret3.png") for line in lines],
        lambda lines: [line.replace("miller", "smith") for line in lines],
        lambda lines: [line.replace("secret3.png,coarse", "secret3.png,fine") for line in lines],
    ],
    ids=["fewer", "order", "scan", "patient", "label"],
)
def test_a_finished_one_of_another_table_is_not_called_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Path, change: Any
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    table, before = folder / "t.csv", files_in(folder / "out")
    resumed = ["finetune", str(folder / "x.yaml"), "--resume"]
    assert main(resumed) == 0  # it lies elsewhere by now
    assert "is finished, and nothing is left to do" in capsys.readouterr().out
    table.write_text("\n".join(change(table.read_text().splitlines())))
    assert main(resumed) == 2
    said = capsys.readouterr()
    assert "which is finished (data: other scans, labels, patients or parts then)" in said.err
    assert "is finished, and" not in said.out
    assert files_in(folder / "out") == before


def test_a_finished_one_of_other_weights_is_not_called_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = checkpoint.load(nano_checkpoint(tmp_path / "one"))
    told = {"origin": "federation", "round": 1, "study_digest": "0" * 64}
    sized = {"model": one.manifest.model, "plan": one.manifest.plan}
    checkpoint.save(tmp_path / "other", student=one.student, teacher=one.student, **told, **sized)
    path = write_config(tmp_path, **pictures(tmp_path, 18), init={"folder": "one"})
    assert main(["finetune", str(path)]) == 0
    resumed = ["finetune", str(path), "--resume"]
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    assert main([*resumed, "--init", str(tmp_path / "moved")]) == 0
    capsys.readouterr()
    assert main([*resumed, "--init", str(tmp_path / "other")]) == 2
    assert "which is finished (init: other weights, sizes or plan then)" in capsys.readouterr().err
    assert main([*resumed, "--init", "scratch"]) == 2
    assert "init: otherwise then" in capsys.readouterr().err


@pytest.mark.parametrize("kept", [None, "{}", "[]", '{"seed": 0', '{"weights": "a"}'])
def test_a_finished_one_that_does_not_say_of_what_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: str | None
) -> None:
    path = write_config(tmp_path, **pictures(tmp_path, 18))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.json").write_text("{}")
    if kept is not None:
        (tmp_path / "out" / "made-of.json").write_text(kept)
    assert main(["finetune", str(path), "--resume"]) == 2
    assert "it cannot be compared with what is asked for" in capsys.readouterr().err


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


def test_a_medmnist_file_of_another_size_is_another_though_its_labels_are_the_same(tmp_path: Path) -> None:
    of_medmnist(tmp_path)
    shutil.copy(tmp_path / "m.npz", tmp_path / "m_224.npz")
    (tmp_path / "moved").mkdir()
    shutil.copy(tmp_path / "m.npz", tmp_path / "moved")
    found = []
    for file in ("m.npz", "moved/m.npz", "m_224.npz"):
        config = configured(tmp_path, BINARY, {"name": "medmnist", "file": file})
        found.append(digests_of(config, begin(config.init), label_table(config)))
    assert found[0] == found[1]
    assert differences(found[0], found[2]) == "data: other scans, labels, patients or parts then"


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
