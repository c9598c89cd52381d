import itertools

import numpy as np
import pytest
from sklearn import metrics

from client.merit import auc, average_precision, calibration_error, mean_over_patients, of_classes, of_labels

RNG = np.random.default_rng(0)


def drawn(classes: int, count: int = 60) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Scores with many ties, targets they say something of, and patients of two scans each."""
    target = RNG.integers(0, classes, count)
    scores = np.round(RNG.dirichlet(np.ones(classes), count) + np.eye(classes)[target] * 0.3, 1)
    return scores / scores.sum(1, keepdims=True), target, [f"p{i // 2}" for i in range(count)]


def test_figures_of_weighted_scans_are_scikit_learns() -> None:
    scores, target, _ = drawn(2)
    weights = RNG.integers(0, 4, (5, 60)).astype(float)
    score, positive = scores[:, 1], target == 1
    for row in range(5):
        told = {"y_score": score, "sample_weight": weights[row]}
        assert auc(score, positive, weights)[row] == pytest.approx(metrics.roc_auc_score(positive, **told))
        expected = metrics.average_precision_score(positive, **told)
        assert average_precision(score, positive, weights)[row] == pytest.approx(expected)


@pytest.mark.parametrize("classes", [2, 4])
def test_figures_of_classes_are_scikit_learns(classes: int) -> None:
    scores, target, patients = drawn(classes)
    found = of_classes(scores, target, patients, [f"c{k}" for k in range(classes)])
    chosen = scores.argmax(1)
    area = (
        metrics.roc_auc_score(target, scores[:, 1])
        if classes == 2
        else np.mean([metrics.roc_auc_score(target == k, scores[:, k]) for k in range(classes)])
    )
    assert found["auc"]["value"] == pytest.approx(area)
    assert found["accuracy"]["value"] == pytest.approx(metrics.accuracy_score(target, chosen))
    assert found["balanced_accuracy"]["value"] == pytest.approx(metrics.balanced_accuracy_score(target, chosen))
    assert ("ap/c3" in found) == (classes == 4)
    for figure in found.values():
        assert figure["low"] <= figure["value"] <= figure["high"]


def test_figures_of_labels_are_means_over_labels() -> None:
    scores, target = RNG.random((50, 3)), RNG.integers(0, 2, (50, 3))
    found = of_labels(scores, target, [str(i) for i in range(50)], ["a", "b", "c"])
    assert found["ap"]["value"] == pytest.approx(metrics.average_precision_score(target, scores, average="macro"))
    assert found["auc/b"]["value"] == pytest.approx(metrics.roc_auc_score(target[:, 1], scores[:, 1]))
    assert found["accuracy"]["value"] == pytest.approx(((scores >= 0.5) == target).mean())


def test_calibration_error_is_the_mean_gap_over_bins() -> None:
    confidence, right = RNG.random(200), RNG.random(200) < 0.7
    edges, total = np.linspace(0, 1, 16), 0.0
    for low, high in itertools.pairwise(edges):
        inside = (low <= confidence) & (confidence < high)
        total += inside.sum() / 200 * abs(confidence[inside].mean() - right[inside].mean()) if inside.any() else 0
    assert calibration_error(confidence, right, np.ones((1, 200)))[0] == pytest.approx(total)


def test_an_interval_over_patients_is_wider_than_one_over_scans() -> None:
    """Ten equal scans of each patient are worth no more than one: the interval is that of the patients alone."""
    values = list(RNG.normal(size=20))
    alone = mean_over_patients(values, [f"p{i}" for i in range(20)])
    copied = mean_over_patients(values * 10, [f"p{i}" for i in range(20)] * 10)
    assert copied == pytest.approx(alone)
    naive = mean_over_patients(values * 10, [str(i) for i in range(200)])
    assert (naive["high"] - naive["low"]) * 2 < copied["high"] - copied["low"]


def test_a_figure_that_is_not_defined_is_none() -> None:
    assert mean_over_patients([None, float("nan")], ["a", "b"])["value"] is None
    assert (
        of_classes(np.eye(2)[[0, 0, 0]], np.zeros(3, dtype=np.int64), ["a", "b", "c"], ["n", "y"])["auc"]["value"]
        is None
    )
