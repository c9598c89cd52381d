"""Tables of labels that are uncertain or missing (CheXpert, MIMIC-CXR): what they count as, and that what nobody knows
counts in no loss, no weight and no figure, and in no other scan's."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, average_precision_score, roc_auc_score
from torch import Tensor, nn

from client.label_tables import LabelTable, labels_in
from client.labelled import Grid, Labelled
from client.merit import of_labels
from client.research_command import main
from client.splits import split_cases
from client.task_results import Classifying
from client.task_training import classification_loss
from tests.test_finetune import QUICK, pictures, write_config
from tests.test_label_tables import BINARY, MASKS, Case, configured, table
from tests.test_probe_command import figures_of
from unimiss_core.config import parse
from unimiss_core.errors import ConfigError
from unimiss_core.labelled_views import with_shares
from unimiss_core.progress import Note, listen
from unimiss_core.supervised import Supervised, class_cross_entropy
from unimiss_core.task_config import UNKNOWN, SupervisionConfig

SEVERAL = {"name": "classification", "kind": "multi_label", "rank": 2, "classes": ["Edema", "Mass"]}
NUMBERS = {**BINARY, "classes": ["0", "1"]}
CHEXPERT = "scan,patient,Edema,Mass\na.png,1,1.0,0.0\nb.png,2,-1.0,1\nc.png,3,,-1\nd.png,4,0,\n"
RNG = np.random.default_rng(5)


def targets(found: LabelTable) -> dict[str, tuple[int, ...]]:
    return {case.file[0]: case.target for case in found.cases}


@pytest.mark.parametrize(
    ("uncertain", "missing", "expected"),
    [
        ("ones", "zeros", {"a": (1, 0), "b": (1, 1), "c": (0, 1), "d": (0, 0)}),
        ("zeros", "zeros", {"a": (1, 0), "b": (0, 1), "c": (0, 0), "d": (0, 0)}),
        ("ignore", "zeros", {"a": (1, 0), "b": (-1, 1), "c": (0, -1), "d": (0, 0)}),
        ("ones", "ignore", {"a": (1, 0), "b": (1, 1), "c": (-1, 1), "d": (0, -1)}),
        ("ignore", "ignore", {"a": (1, 0), "b": (-1, 1), "d": (0, -1)}),
    ],
)
def test_uncertain_and_blank_cells_count_as_the_table_says(
    tmp_path: Path, uncertain: str, missing: str, expected: dict[str, Any]
) -> None:
    assert targets(table(tmp_path, CHEXPERT, SEVERAL, uncertain=uncertain, missing=missing)) == expected


def test_without_a_setting_such_cells_are_refused_by_their_kind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="4 problem") as told:
        table(tmp_path, CHEXPERT, SEVERAL)
    assert "line 3: 'Edema' is uncertain (-1); data.uncertain says" in str(told.value)
    assert "line 4: 'Edema' is blank; data.missing says" in str(told.value)
    with pytest.raises(ConfigError, match="1 problem") as told:
        table(tmp_path, CHEXPERT + "e.png,5,Miller,1.0\n", SEVERAL, uncertain="ones", missing="zeros")
    assert "line 6: 'Edema' must be 0 or 1" in str(told.value)
    assert "Miller" not in str(told.value)


def test_a_line_of_which_nothing_is_known_is_left_out_and_counted(tmp_path: Path) -> None:
    notes: list[Any] = []
    with listen(notes.append):
        table(tmp_path, CHEXPERT, SEVERAL, uncertain="ignore", missing="ignore")
    assert ["left out: 1 line(s) of the table" in note.text for note in notes if isinstance(note, Note)] == [True]
    config = configured(tmp_path, SEVERAL, {"table": "t.csv", "uncertain": "ignore", "missing": "ignore"})
    found = labels_in(config.data, config.task, one_by_one=True)
    assert found.left_out == ("line 4: of no class it is known whether it is there",)
    with pytest.raises(ConfigError, match="no line has a label that is known"):
        table(tmp_path, "scan,patient,Edema,Mass\na.png,1,,\n", SEVERAL, missing="ignore")


def test_one_class_against_another_may_be_written_in_numbers(tmp_path: Path) -> None:
    text = "scan,patient,label\na.png,1,1.0\nb.png,2,0\nc.png,3,-1.0\nd.png,4,\n"
    found = table(tmp_path, text, NUMBERS, uncertain="ones", missing="ignore")
    assert targets(found) == {"a": (1,), "b": (0,), "c": (1,)}
    turned = {**NUMBERS, "classes": ["1", "0"]}
    assert targets(table(tmp_path, text, turned, uncertain="zeros", missing="zeros")) == {
        "a": (0,),
        "b": (1,),
        "c": (1,),
        "d": (1,),
    }
    named = "scan,patient,label\na.png,1,yes\nb.png,2,\n"
    assert targets(table(tmp_path, named, BINARY, missing="ignore")) == {"a": (1,)}


@pytest.mark.parametrize(
    ("task", "data", "told"),
    [
        (BINARY, {"uncertain": "ones"}, "of labels that are 1 or 0 alone"),
        (BINARY, {"missing": "zeros"}, "of labels that are 1 or 0 alone"),
        (MASKS, {"missing": "ignore"}, "take lines without a mask out"),
    ],
)
def test_what_cannot_be_said_of_a_tasks_labels_is_refused(
    tmp_path: Path, task: dict[str, Any], data: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        configured(tmp_path, task, {"table": "t.csv", **data})


def test_a_class_must_be_known_both_ways_in_each_part(tmp_path: Path) -> None:
    lines = [f"s{n}.png,{n},{n % 2},{1 if n % 3 else ''}" for n in range(12)]
    (tmp_path / "t.csv").write_text("scan,patient,Edema,Mass\n" + "\n".join(lines))
    config = configured(tmp_path, SEVERAL, {"table": "t.csv", "missing": "ignore"}, split={"folds": 2})
    with pytest.raises(ConfigError, match="nothing but 'Mass' among the 6 scans for test"):
        split_cases(labels_in(config.data, config.task).cases, config)


# ------------------------------------------------------------------------------------------------------------ figures


def test_figures_are_scikit_learns_over_the_scans_whose_label_is_known() -> None:
    scores, target = RNG.random((60, 2)), RNG.integers(-1, 2, (60, 2))
    found = of_labels(scores, target, [str(i // 2) for i in range(60)], ["a", "b"])
    for figure, of in {"auc": roc_auc_score, "ap": average_precision_score}.items():
        each = [of(target[target[:, k] >= 0, k], scores[target[:, k] >= 0, k]) for k in range(2)]
        assert found[f"{figure}/b"]["value"] == pytest.approx(each[1])
        assert found[figure]["value"] == pytest.approx(np.mean(each))
    told = [accuracy_score(target[target[:, k] >= 0, k], scores[target[:, k] >= 0, k] >= 0.5) for k in range(2)]
    assert found["accuracy"]["value"] == pytest.approx(np.mean(told))
    assert 0 <= found["ece"]["value"] <= 1


def test_intervals_are_those_of_the_known_scans_alone() -> None:
    """Of one class whose label of some patients' second scan is unknown: as if there were no second scan."""
    scores, target, patients = RNG.random((40, 1)), RNG.integers(0, 2, (40, 1)), [str(i) for i in range(40)]
    more = np.r_[target, np.full((20, 1), UNKNOWN)], np.r_[scores, RNG.random((20, 1))], patients + patients[:20]
    assert of_labels(more[1], more[0], more[2], ["a"]) == of_labels(scores, target, patients, ["a"])


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_line_without_a_label_does_not_cost_the_scan_its_label(tmp_path: Path, one_by_one: bool) -> None:
    (tmp_path / "t.csv").write_text("scan,patient,Edema,Mass\na.png,1,,\na.png,1,1,0\n")
    config = configured(tmp_path, SEVERAL, {"table": "t.csv", "missing": "ignore"})
    found = labels_in(config.data, config.task, one_by_one=one_by_one)
    assert [(one.number, one.target) for one in found.cases] == [(3, (1, 0))]


def case(number: int, target: tuple[int, ...]) -> Labelled:
    stored = np.zeros((1, 36, 44), np.uint16)
    return Labelled(Case(number, "", str(number), target), stored, Grid((36, 44), (1, 1), (1, 1), None))


def test_early_stopping_goes_by_the_known_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = [(1, -1), (0, 1), (-1, 0), (1, 0), (0, -1), (0, 1)]
    chances = np.array([[0.9, 0.2], [0.4, 0.3], [0.7, 0.6], [0.2, 0.1], [0.6, 0.9], [0.1, 0.8]])
    settings = configured(Path(), SEVERAL, {"table": "t.csv"})
    judge = Classifying(settings, torch.device("cpu"), (33, 40))
    monkeypatch.setattr(judge, "chances", lambda *_: chances)
    area, likelihood = judge.score([case(n, one) for n, one in enumerate(truth)])(nn.Identity())  # type: ignore[arg-type]
    pairs = [(t, p) for one, told in zip(truth, chances, strict=True) for t, p in zip(one, told, strict=True) if t >= 0]
    assert likelihood == pytest.approx(np.mean([np.log(p if t else 1 - p) for t, p in pairs]))
    known = [[(one[k], told[k]) for one, told in zip(truth, chances, strict=True) if one[k] >= 0] for k in range(2)]
    expected = np.mean([roc_auc_score(*zip(*each, strict=True)) for each in known])
    assert area == pytest.approx(expected)
    as_negative = np.array(truth).clip(0)
    assert expected != pytest.approx(np.mean([roc_auc_score(as_negative[:, k], chances[:, k]) for k in range(2)]))


# ------------------------------------------------------------------------------------------------------------- losses


def test_a_loss_and_its_weights_count_known_labels_alone() -> None:
    found = [case(n, one) for n, one in enumerate([(1, -1), (0, 1), (-1, 0), (0, 0), (0, -1), (0, 0)])]
    truth = torch.tensor([one.case.target for one in found]).float()
    logits = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = classification_loss(found, configured(Path(), SEVERAL, {"table": "t.csv"}), torch.device("cpu"))
    weights = [4 / 1, 3 / 1]  # absent over there, of the known
    naive = []
    for row, told in zip(logits.tolist(), truth.tolist(), strict=True):
        for k, (z, t) in enumerate(zip(row, told, strict=True)):
            if t >= 0:
                p = 1 / (1 + np.exp(-z))
                naive.append(-weights[k] * np.log(p) if t else -np.log(1 - p))
    found_loss = loss(logits, truth)
    assert found_loss.item() == pytest.approx(np.mean(naive), rel=1e-5)
    found_loss.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad == 0, truth < 0)
    assert loss(logits, torch.full((6, 2), -1.0)) == 0


def test_of_a_federation_each_scan_costs_the_mean_over_its_own_known_classes() -> None:
    logits, weights = torch.randn(3, 3, generator=torch.Generator().manual_seed(2)), torch.tensor([1.0, 2.0, 5.0])
    shares = torch.tensor([[1.0, -1.0, 0.0], [-1.0, -1.0, 1.0], [-1.0, -1.0, -1.0]])
    each = []
    for z, t in zip(logits, shares, strict=True):
        known = [k for k in range(3) if t[k] >= 0]
        costs = [F.binary_cross_entropy_with_logits(z[k], t[k], pos_weight=weights[k]) for k in known]
        each.append(sum(costs) / len(costs) if costs else torch.tensor(0.0))
    assert torch.allclose(class_cross_entropy(logits, shares, weights, several=True), torch.stack(each).mean())


class Mean(nn.Module):
    """Stands in for a model: the mean of the pixels times each of two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([0.5, -2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).mean(1)[:, None] * self.weights


def test_what_is_unknown_of_one_scan_changes_no_other_scans_gradient() -> None:
    """What patient-level privacy rests on: a batch's gradient is the mean of the scans' own."""
    objective, model = Supervised(parse(SupervisionConfig, {"task": SEVERAL}, where="test")), Mean()
    known = [(1, 0), (-1, 1), (0, -1), (-1, -1)]
    generator = torch.Generator().manual_seed(3)
    views = torch.stack([with_shares(torch.randn(1, 8, 8, generator=generator), one) for one in known])[:, None]

    def gradient(batch: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(objective(model, None, batch, {}).total, model.parameters())  # type: ignore[arg-type]
        return found

    alone = torch.stack([gradient(one[None]) for one in views])
    assert torch.allclose(gradient(views), alone.mean(0))
    assert torch.equal(alone == 0, torch.tensor(known) < 0)


# ----------------------------------------------------------------------------------------------------------- commands


def findings(folder: Path, count: int = 36) -> dict[str, Any]:
    """Pictures whose two labels are known of most: coarse grain, and a number that is a multiple of three."""
    settings = pictures(folder, count)
    lines = ["scan,patient,Edema,Mass"]
    for n in range(count):
        edema, mass = ("-1.0", "") if n in (7, 8) else (f"{n % 2}.0", f"{int(n % 3 == 0)}")
        lines.append(f"secret{n}.png,miller{n},{'' if n % 5 == 0 else edema},{'-1' if n % 7 == 1 else mass}")
    (folder / "t.csv").write_text("\n".join(lines))
    data = {**settings["data"], "missing": "ignore", "uncertain": "ignore"}
    return {"task": {**SEVERAL, "input_size": [40, 44]}, "data": data, "split": {"folds": 3}}


def test_a_fine_tuning_measures_each_class_by_the_scans_of_which_it_is_known(tmp_path: Path) -> None:
    path = write_config(tmp_path, **findings(tmp_path), training=QUICK)
    assert main(["finetune", str(path)]) == 0
    told = json.loads((tmp_path / "out" / "metrics.json").read_text())["parts"]["test"]
    with (tmp_path / "out" / "predictions.csv").open() as file:
        test = [row for row in csv.DictReader(file) if row["part"] == "test"]
    assert any(row["is/Edema"] == "" for row in test)
    for name in ("Edema", "Mass"):
        known = [(int(row[f"is/{name}"]), float(row[f"p/{name}"])) for row in test if row[f"is/{name}"]]
        assert told[f"auc/{name}"]["value"] == pytest.approx(roc_auc_score(*zip(*known, strict=True)))


def test_a_probe_asks_of_each_label_the_scans_of_which_it_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, **findings(tmp_path))
    rows = [line.split(",") for line in (tmp_path / "t.csv").read_text().splitlines()[1:]]
    found = figures_of(tmp_path, "scratch", "--data", str(path))
    for column, one in enumerate(found, start=2):
        known = [float(row[column]) for row in rows if row[column] not in ("", "-1", "-1.0")]
        assert one["classes"] == {"no": known.count(0), "yes": known.count(1)}
    neither = sum(row[2] in ("", "-1.0") and row[3] in ("", "-1") for row in rows)
    assert capsys.readouterr().err.count(f"left out: {neither} line(s) of the table") == 1


def test_a_probe_of_a_column_of_numbers_says_what_the_rest_counts_as(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the table with those lines taken out by hand."""
    findings(tmp_path)
    rows = [line.split(",") for line in (tmp_path / "t.csv").read_text().splitlines()[1:]]
    (tmp_path / "pictures" / "all.csv").write_text((tmp_path / "t.csv").read_text())
    clean = [f"{scan},{patient},{edema[0]}" for scan, patient, edema, _ in rows if edema and edema != "-1.0"]
    (tmp_path / "pictures" / "clean.csv").write_text("\n".join(["scan,patient,Edema", *clean]))
    asked = ["scratch", "--label", "Edema", "--data"]
    expected = figures_of(tmp_path, *asked, str(tmp_path / "pictures" / "clean.csv"))
    capsys.readouterr()
    both = ["--missing", "ignore", "--uncertain", "ignore"]
    assert figures_of(tmp_path, *asked, str(tmp_path / "pictures" / "all.csv"), *both) == expected
    assert f"left out: {len(rows) - len(clean)} line(s)" in capsys.readouterr().err
    assert main(["probe", *asked, str(tmp_path / "pictures" / "all.csv")]) == 2
    assert "with --missing ignore it is left out" in capsys.readouterr().err
    assert main(["probe", "scratch", "--data", str(tmp_path / "pictures"), "--missing", "ignore"]) == 2
    assert "--missing: of no use where --data is a folder" in capsys.readouterr().err
