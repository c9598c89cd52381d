"""Folds: each in its own folder, all in turn, and together what scikit-learn says of their scans."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, average_precision_score, roc_auc_score

from client.merit import of_classes
from client.research_command import main
from tests.test_finetune import QUICK, pictures, write_config
from tests.test_labelled import SHAPE, write_case


def judged_in(out: Path, name: str = "predictions.csv") -> list[list[dict[str, str]]]:
    found = []
    for folder in sorted(out.glob("fold-*")):
        with (folder / name).open() as file:
            found.append([row for row in csv.DictReader(file) if row["part"] == "test"])
    return found


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_all_folds_say_together_what_their_scans_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores of different models are not compared: of an AUC pairs, of a precision positive scans count alike."""
    path = write_config(tmp_path, **pictures(tmp_path, 24))
    assert main(["finetune", str(path), "--fold", "all"]) == 0
    folds = judged_in(tmp_path / "out")
    assert sorted(int(row["line"]) for rows in folds for row in rows) == list(range(2, 26))
    told = json.loads((tmp_path / "out" / "folds.json").read_text())
    test = told["parts"]["test"]
    assert (told["folds"], test["scans"], test["patients"]) == (3, 24, 24)
    truth = [np.array([int(row["is/coarse"]) for row in rows]) for rows in folds]
    scores = [np.array([float(row["p/coarse"]) for row in rows]) for rows in folds]
    for figure, of, share in (
        ("auc", roc_auc_score, lambda t: t.sum() * (1 - t).sum()),
        ("ap", average_precision_score, lambda t: t.sum()),
    ):
        each = [of(t, s) for t, s in zip(truth, scores, strict=True)]
        assert test[figure]["by_fold"] == pytest.approx(each, abs=1e-4)
        assert test[figure]["value"] == pytest.approx(np.average(each, weights=list(map(share, truth))), abs=1e-4)
    whole = accuracy_score(np.concatenate(truth), np.concatenate(scores) >= 0.5)
    assert test["accuracy"]["value"] == pytest.approx(whole)
    assert test["auc"]["low"] <= test["auc"]["value"] <= test["auc"]["high"]
    said = capsys.readouterr().out
    by_fold = ", ".join(f"{one:.3f}" for one in test["auc"]["by_fold"])
    assert f"all folds, test: auc {test['auc']['value']:.3f} (" in said
    assert f"; by fold {by_fold}" in said
    assert not any(name in json.dumps(told) + said for name in ("miller", "secret"))


def test_folds_that_were_stopped_go_on_and_end_as_if_they_had_not_been(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(tmp_path, **pictures(tmp_path, 18), training={**QUICK, "epochs": 1})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["finetune", str(path), "--fold", "all", "--out", str(whole)]) == 0
    assert main(["finetune", str(path), "--fold", "0", "--out", str(parts)]) == 0
    assert {one.name for one in parts.iterdir()} == {"fold-0"}
    assert main(["finetune", str(path), "--fold", "all", "--out", str(parts)]) == 2
    assert "which --resume leaves as it is" in capsys.readouterr().err

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("client.finetune._write_model", killed)
        assert main(["finetune", str(path), "--fold", "all", "--out", str(parts), "--resume"]) == 130
    assert {one.name for one in parts.iterdir()} == {"fold-0", "fold-1"}
    capsys.readouterr()
    assert main(["finetune", str(path), "--fold", "all", "--out", str(parts), "--resume"]) == 0
    said = capsys.readouterr()
    assert f"{parts / 'fold-0'}: is finished" in said.out
    assert "goes on after epoch 1" in said.err
    assert contents(parts) == contents(whole)
    assert main(["finetune", str(path), "--fold", "all", "--out", str(parts), "--resume"]) == 0
    assert capsys.readouterr().out.count("is finished") == 3
    assert contents(parts) == contents(whole)
    (parts / "fold-1" / "predictions.csv").unlink()
    assert main(["finetune", str(path), "--fold", "all", "--out", str(parts), "--resume"]) == 2
    assert "cannot be put together" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [lines[0], "secret0.png,fine,jones", *lines[2:], lines[1].replace("secret0", "secret18")],
        lambda lines: [line.translate(str.maketrans({"0": "1", "1": "0"})) for line in lines],
        lambda lines: [line.replace(",miller", ",smith") for line in lines],
        lambda lines: lines[:-3],
    ],
    ids=["inserted", "swapped", "renamed", "lost"],
)
def test_folds_of_a_table_that_changed_are_not_put_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any
) -> None:
    path = write_config(tmp_path, **pictures(tmp_path, 18), training={**QUICK, "epochs": 1})
    out, table = tmp_path / "out", tmp_path / "t.csv"
    assert main(["finetune", str(path), "--fold", "0"]) == 0
    before = contents(out)
    shutil.copy(tmp_path / "pictures" / "secret0.png", tmp_path / "pictures" / "secret18.png")
    table.write_text("\n".join(change(table.read_text().splitlines())))
    capsys.readouterr()
    assert main(["finetune", str(path), "--fold", "all", "--resume"]) == 2
    told = f"{out / 'fold-0'} holds another fine-tuning, which is finished (data: other scans, labels, patients or"
    assert told in capsys.readouterr().err
    assert contents(out) == before


def test_masks_of_all_folds_are_averaged_over_their_scans(tmp_path: Path) -> None:
    """Those in which the model alone found something count in every fold."""
    for number in range(6):
        write_case(tmp_path, f"c{number}", number, **({"values": np.zeros(SHAPE)} if number in (0, 3) else {}))
    path = write_config(
        tmp_path,
        task={"name": "segmentation", "rank": 3, "classes": ["ball"], "input_size": [16, 33, 33]},
        plan={"volume_spacing_mm": [2.0, 2.0, 2.0]},
        data={"name": "msd", "folder": ".", "modality": "MR"},
        split={"folds": 3, "validation": 0.5},
        allow_empty_masks=True,
        training={"epochs": 1, "steps_per_epoch": 1, "batch": 1},
    )
    assert main(["finetune", str(path), "--fold", "all"]) == 0
    test = json.loads((tmp_path / "out" / "folds.json").read_text())["parts"]["test"]
    folds = judged_in(tmp_path / "out", "cases.csv")
    dice = [[float(row["dice"]) for row in rows] for rows in folds]
    assert test["dice"]["value"] == pytest.approx(np.mean(np.concatenate(dice)))
    assert test["dice"]["by_fold"] == pytest.approx([np.mean(one) for one in dice])
    assert (test["scans"], test["patients"]) == (6, 6)
    alone = [sum(not row["hd95_mm"] for row in rows) for rows in folds]
    assert (test["missed_or_made_up"], sum(alone), max(alone)) == (2, 2, 1)


@pytest.mark.parametrize(
    ("split", "fold", "told"),
    [
        ({"name": "given"}, "all", "--fold: the file's split is `given`"),
        ({"folds": 3}, "3", "--fold 3: is not there; 3 folds count from 0 to 2"),
    ],
)
def test_a_fold_that_is_not_there_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], split: dict[str, Any], fold: str, told: str
) -> None:
    path = write_config(tmp_path, **{**pictures(tmp_path, 6), "split": split})
    assert main(["finetune", str(path), "--fold", fold]) == 2
    assert told in capsys.readouterr().err


def test_the_first_fold_does_not_begin_where_another_cannot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = pictures(tmp_path, 18)
    lines = (tmp_path / "t.csv").read_text().splitlines()
    (tmp_path / "t.csv").write_text("\n".join([lines[0], *lines[1::2], lines[2], lines[4]]))  # two of the coarse
    path = write_config(tmp_path, **settings)
    assert main(["finetune", str(path), "--fold", "all"]) == 2
    assert "split (fold" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_figures_of_folds_compare_no_scores_of_different_ones() -> None:
    """A fold whose scores are all higher changes no ranking."""
    rng = np.random.default_rng(0)
    scores, target = rng.random(40) / 2, rng.integers(0, 2, 40)
    folds = np.arange(40) % 2
    raised = scores + folds / 2
    patients = [str(number) for number in range(40)]
    both = [of_classes(np.stack([1 - s, s], 1), target, patients, ["a", "b"], folds=folds) for s in (scores, raised)]
    for figure in ("auc", "ap"):
        assert both[0][figure] == pytest.approx(both[1][figure])
