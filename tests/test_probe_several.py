"""`unimiss probe A B`: each checkpoint's figures are those that it has alone, and differences are paired."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from client import probing
from client.research_command import main
from tests.test_finetune import pictures
from tests.test_predict import LABELS, untrained
from tests.test_probe_command import embedded, figures_of, table_with_split
from tests.test_research_command import NANO, begun, nano_checkpoint
from unimiss_core import checkpoint
from unimiss_core.model import ARCHITECTURES
from unimiss_core.probe import gain, probe
from unimiss_core.study import PlanConfig


def another(folder: Path, plan: PlanConfig) -> Path:
    weights = begun(5, ARCHITECTURES["nano"])
    about: dict[str, Any] = {"origin": "federation", "round": 2, "study_digest": "0" * 64, "model": NANO}
    checkpoint.save(folder, **about, plan=plan, student=weights, teacher=weights)
    return folder


@pytest.mark.parametrize("longest_side", [80, 40])
def test_each_is_judged_as_it_is_alone_whatever_its_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], longest_side: int
) -> None:
    first, table = nano_checkpoint(tmp_path / "round-0001"), str(table_with_split(tmp_path))
    second = another(tmp_path / "round-0002", PlanConfig(image_longest_side=longest_side))
    (both,) = figures_of(tmp_path, str(first), str(second), "--data", table)
    said = capsys.readouterr()
    alone = [figures_of(tmp_path, str(one), "--data", table)[0]["figures"] for one in (first, second)]
    for judge, figures in both["figures"].items():
        assert list(figures) == ["A", "B", "random encoder", "bare pixels", "B minus A"]
        for name, one in zip("AB", alone, strict=True):
            assert figures[name] == one[judge]["this encoder"]
        for name in ("random encoder", "bare pixels"):
            assert figures[name] == alone[0][judge][name]
        for figure, told in figures["B minus A"].items():
            assert told["value"] == pytest.approx(figures["B"][figure]["value"] - figures["A"][figure]["value"])
    assert f"A: {first}\nB: {second}\n" in said.out
    assert "    B minus A         " in said.out
    assert str(tmp_path) not in json.dumps(both)
    assert {len(one["tensors"]) for one in both["encoders"].values()} == {64}


def test_the_interval_of_a_difference_is_paired(tmp_path: Path) -> None:
    """Oracle: the core's own pairing, on the features of `unimiss embed`."""
    pictures(tmp_path)
    first = nano_checkpoint(tmp_path / "round-0001")
    second = another(tmp_path / "round-0002", PlanConfig(image_longest_side=80))
    asked = ("--data", str(tmp_path / "t.csv"), "--root", str(tmp_path / "pictures"))
    (both,) = figures_of(tmp_path, str(first), str(second), *asked)
    told = both["figures"]["linear"]["B minus A"]["auc"]
    labels, patients = np.array(["fine", "coarse"] * 15), np.array([f"miller{k}" for k in range(30)])
    probed = []
    for folder in (first, second):
        probed.append(probe(embedded(tmp_path, folder), labels, patients))
        (tmp_path / "features.npz").unlink()
    found = gain(*probed)
    assert found is not None
    assert told["value"] == pytest.approx(found[0], abs=0.02)
    assert (told["low"], told["high"]) == pytest.approx(found[1], abs=0.05)


def test_the_random_encoder_and_pixels_are_worked_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures(tmp_path)
    one, asked = str(nano_checkpoint(tmp_path / "round-0001")), list[object]()
    embed, pixels = probing.embed, probing.bare_pixels
    monkeypatch.setattr(probing, "embed", lambda encoder, x: (asked.append(id(encoder)), embed(encoder, x))[1])
    monkeypatch.setattr(probing, "bare_pixels", lambda x: (asked.append("pixels"), pixels(x))[1])
    data = ("--data", str(tmp_path / "t.csv"), "--root", str(tmp_path / "pictures"), "--batch", "30")
    assert main(["probe", one, one, one, *data]) == 0
    assert len(asked) == len(set(asked)) == 5


def test_scores_by_number_give_the_figures_again(tmp_path: Path) -> None:
    folder, table = nano_checkpoint(tmp_path / "round-0001"), table_with_split(tmp_path)
    (told,) = figures_of(tmp_path, str(folder), "--data", str(table), "--scores")
    rows = told["scores"]
    assert [row["scan"] for row in rows] == list(range(26, 38))  # lines of the table, of which the first names columns
    assert [row["patient"] for row in rows] == list(range(12))
    for judge, figures in told["figures"].items():
        for name in ("this encoder", "random encoder", "bare pixels"):
            chances = [row[judge][name][1] for row in rows]
            assert roc_auc_score([row["label"] for row in rows], chances) == pytest.approx(
                figures[name]["auc"]["value"]
            )
    assert not any(name in json.dumps(told) for name in ("miller", "secret", str(tmp_path)))
    (without,) = figures_of(tmp_path, str(folder), "--data", str(table))
    assert without == {key: value for key, value in told.items() if key != "scores"}


def test_scores_without_a_split_say_whose_and_of_which_fold_they_are(tmp_path: Path) -> None:
    folder, _ = nano_checkpoint(tmp_path / "round-0001"), pictures(tmp_path)
    data = ("--data", str(tmp_path / "t.csv"), "--root", str(tmp_path / "pictures"))
    (told,) = figures_of(tmp_path, str(folder), str(folder), *data, "--scores")
    assert len(told["scores"]) == 30
    assert {row["fold"] for row in told["scores"]} == set(range(5))
    assert all(row["linear"]["A"] == row["linear"]["B"] for row in told["scores"])
    assert all(
        figure == {"value": 0, "low": 0, "high": 0} for figure in told["figures"]["linear"]["B minus A"].values()
    )


def test_what_several_cannot_be_asked_together_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures(tmp_path)
    first = str(nano_checkpoint(tmp_path / "round-0001"))
    gaps = str(another(tmp_path / "round-0002", PlanConfig(missing_slices="interpolate")))
    of_ct = str(untrained(tmp_path / "tuned", LABELS, modality="CT"))
    asked = ("--data", str(tmp_path / "t.csv"), "--root", str(tmp_path / "pictures"))
    for told, words in (
        ("--scores: are written into the file of --out", (first, *asked, "--scores")),
        ("--set-out: scans are prepared as one checkpoint takes them", (first, first, *asked, "--set-out", "x.npz")),
        ("their plans differ in missing_slices", (first, gaps, *asked)),
        ("for different kinds; say what these are, as by --modality CT", (first, of_ct, *asked)),
        ("at most 26 are held against another", (*[first] * 27, *asked)),
        ("--study: says what 'scratch' is", (first, first, *asked, "--study", "configs/study/nano.yaml")),
    ):
        assert main(["probe", *words]) == 2
        assert told in capsys.readouterr().err


def test_a_fine_tuned_encoder_beside_others_is_told_by_its_letter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path)
    first, tuned = nano_checkpoint(tmp_path / "round-0001"), untrained(tmp_path / "tuned", LABELS)
    data = ("--data", str(tmp_path / "t.csv"), "--root", str(tmp_path / "pictures"))
    (told,) = figures_of(tmp_path, str(first), str(tuned), "scratch", *data)
    assert "B: this encoder was taught by labels" in capsys.readouterr().err
    assert [one["taught_by_labels"] for one in told["encoders"].values()] == [False, True, False]
    assert told["encoders"]["C"]["tensors"] is None
    assert {"B minus A", "C minus A"} < set(told["figures"]["linear"])
