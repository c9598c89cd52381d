"""The probe: figures against scikit-learn and the rank formula, patients kept apart, and sets that cannot be probed."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from unimiss_core.probe import Probe, gain, neighbours, plane, probe


def scored(labels: list[int], scores: list[float], *, folds: list[int] | None = None) -> Probe:
    """A binary probe with these scores of class 1, each scan of a patient of its own."""
    high = np.array(scores, dtype=np.float64)
    return Probe(
        np.array(labels),
        np.array([f"p{k}" for k in range(len(labels))]),
        ("0", "1"),
        np.stack([1 - high, high], axis=1),
        np.array(folds or [0] * len(labels)),
    )


def cohort(
    *, patients: int, classes: int = 2, features: int = 7, shift: float = 0.0, seed: int = 0, scans: int = 1
) -> tuple[NDArray[np.float32], NDArray[np.str_], NDArray[np.str_]]:
    """Patients of equal classes whose features lie `shift` standard deviations apart along one axis of each class."""
    rng = np.random.default_rng(seed)
    label = np.arange(patients) % classes
    centre = rng.normal(size=(patients, features))
    centre[np.arange(patients), label] += shift
    x = np.repeat(centre, scans, axis=0) + 0.1 * rng.normal(size=(patients * scans, features))
    return (
        x.astype(np.float32),
        np.repeat(label, scans).astype(str),
        np.repeat([f"p{k}" for k in range(patients)], scans),
    )


def test_the_auc_is_scikit_learn_s_and_the_rank_formula_s_also_with_ties() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 61)
    scores = np.round(rng.random(61) + 0.3 * labels, 1)
    positives, negatives = int(labels.sum()), int((1 - labels).sum())
    rank_sum = rankdata(scores)[labels == 1].sum() - positives * (positives + 1) / 2
    got = scored(labels.tolist(), scores.tolist()).auc()
    assert got == pytest.approx(roc_auc_score(labels, scores))
    assert got == pytest.approx(rank_sum / (positives * negatives))


def test_what_patients_are_called_changes_no_figure() -> None:
    """A simulation calls them by a secret that is drawn anew for each folder."""
    x, labels, patients = cohort(patients=30, scans=2, shift=0.8)
    again = np.array([f"{(int(name[1:]) * 17) % 101:03}" for name in patients])
    assert list(np.unique(patients, return_index=True)[1]) != list(np.unique(again, return_index=True)[1])
    for judge in (probe, neighbours):
        one, other = judge(x, labels, patients), judge(x, labels, again)
        np.testing.assert_array_equal(one.scores, other.scores)
        assert one.auc() == other.auc()
        assert one.interval() == other.interval()


def test_scores_of_different_folds_are_not_compared() -> None:
    # Within each fold the order is perfect; the second model is merely more pessimistic.
    assert scored([0, 1, 0, 1], [0.6, 0.9, 0.1, 0.2], folds=[0, 0, 1, 1]).auc() == 1.0
    assert scored([0, 1, 0, 1], [0.6, 0.9, 0.1, 0.2]).auc() == 0.75


def test_many_classes_count_alike_each_against_the_rest() -> None:
    found = neighbours(*cohort(patients=45, classes=3, shift=1.5))
    assert found.scores is not None
    each = [roc_auc_score(found.labels == k, found.scores[:, k]) for k in range(3)]
    assert found.auc() == pytest.approx(np.mean(each))


def voted(features: NDArray[np.float32], labels: NDArray[np.str_], bank: list[int], one: int) -> NDArray[np.float64]:
    """Scan `one`'s vote by the definition, neighbour by neighbour."""
    x = features.astype(np.float64)
    cosine = {k: float(x[k] @ x[one] / np.sqrt((x[k] @ x[k]) * (x[one] @ x[one]))) for k in bank}
    nearest = sorted(bank, key=lambda k: (-cosine[k], k))[:10]
    shares = np.array([sum(np.exp(cosine[k] / 0.07) for k in nearest if labels[k] == c) for c in np.unique(labels)])
    return shares / shares.sum()


def test_neighbours_vote_as_by_brute_force_also_where_a_split_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unimiss_core.probe._AT_ONCE", 7)
    x, labels, patients = cohort(patients=24, classes=3, shift=1.0, scans=2)
    found = neighbours(x, labels, patients)
    for one in range(48):
        bank = [k for k in range(48) if patients[k] != patients[one]]
        np.testing.assert_allclose(found.scores[one], voted(x, labels, bank, one), atol=1e-9)  # type: ignore[index]
    scored = np.arange(48) >= 30
    found = neighbours(x, labels, patients, scored=scored)
    pairs = set(zip(found.patients, patients[30:], strict=True))
    assert len(pairs) == len(set(found.patients)) == len(set(patients[30:]))
    for place, one in enumerate(range(30, 48)):
        expected = voted(x, labels, list(range(30)), one)
        np.testing.assert_allclose(found.scores[place], expected, atol=1e-9)  # type: ignore[index]


def test_where_a_split_is_given_the_others_alone_are_fitted() -> None:
    x, labels, patients = cohort(patients=40, shift=1.0)
    scored = np.arange(40) % 3 == 0
    found = probe(x, labels, patients, scored=scored)
    mean, spread = x[~scored].mean(0), x[~scored].std(0)
    model = LogisticRegression(C=0.1, max_iter=2000).fit((x[~scored] - mean) / spread, labels[~scored])
    expected = model.predict_proba((x[scored] - mean) / spread)
    np.testing.assert_allclose(found.scores, expected, atol=1e-4)  # type: ignore[arg-type]
    assert found.auc() == pytest.approx(roc_auc_score(labels[scored], expected[:, 1].round(6)), abs=1e-6)


@pytest.mark.parametrize("score", [probe, neighbours])
def test_separable_classes_are_separated(score: object) -> None:
    found = score(*cohort(patients=60, shift=8.0))  # type: ignore[operator]
    assert found.auc() > 0.99
    low, high = found.interval()
    assert 0.95 < low <= found.auc() <= high <= 1.0


@pytest.mark.parametrize("score", [probe, neighbours])
def test_features_that_know_nothing_score_one_half_on_average(score: object) -> None:
    aucs = [score(*cohort(patients=40, seed=seed)).auc() for seed in range(24)]  # type: ignore[operator]
    assert abs(np.mean(aucs) - 0.5) < 0.05


@pytest.mark.parametrize("score", [probe, neighbours])
def test_a_patient_s_own_scans_do_not_give_the_label_away(score: object) -> None:
    # Features name the patient and nothing else: whoever sees another scan of that patient knows the label.
    aucs = [score(*cohort(patients=24, seed=seed, scans=5)).auc() for seed in range(12)]  # type: ignore[operator]
    assert abs(np.mean(aucs) - 0.5) < 0.12


def test_the_interval_of_an_auc_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    truth = 0.760  # of two unit normals one standard deviation apart: Phi(1 / sqrt 2)
    covered = 0
    for _ in range(60):
        labels = np.arange(50) % 2
        interval = scored(labels.tolist(), (rng.normal(size=50) + labels).tolist()).interval()
        assert interval is not None
        covered += interval[0] <= truth <= interval[1]
    assert covered >= 51


def test_scans_of_one_patient_are_not_independent_witnesses() -> None:
    labels = [0, 1] * 20
    scores = (np.random.default_rng(3).normal(size=40) + np.array(labels)).tolist()
    single = scored(labels, scores)
    copied = Probe(
        np.repeat(single.labels, 4),
        np.repeat(single.patients, 4),
        single.classes,
        np.repeat(single.scores, 4, axis=0),  # type: ignore[arg-type]
        np.repeat(single.folds, 4),  # type: ignore[arg-type]
    )
    assert copied.auc() == pytest.approx(single.auc())
    assert copied.interval() == pytest.approx(single.interval())


def test_the_gain_is_paired() -> None:
    labels = [0, 1] * 30
    noise = np.random.default_rng(5).normal(size=60)
    before, after = noise + 0.8 * np.array(labels), noise + 1.2 * np.array(labels)
    found = gain(scored(labels, before.tolist()), scored(labels, after.tolist()))
    assert found is not None
    difference, (low, high) = found
    assert difference == pytest.approx(roc_auc_score(labels, after) - roc_auc_score(labels, before))
    assert 0 < low < difference < high  # each alone has an interval that covers the other
    own = scored(labels, before.tolist()).interval()
    assert own is not None
    assert high - low < 0.7 * (own[1] - own[0])


def test_nothing_gained_is_a_gain_of_zero() -> None:
    same = scored([0, 1] * 10, np.random.default_rng(0).random(20).tolist())
    assert gain(same, same) == (0.0, (0.0, 0.0))


def test_a_gain_needs_the_same_scans() -> None:
    with pytest.raises(ValueError, match="not probed on the same scans"):
        gain(scored([0, 1], [0.1, 0.2]), scored([1, 0], [0.1, 0.2]))


def test_the_same_set_gives_the_same_figures() -> None:
    first, again = (probe(*cohort(patients=30, shift=1.0)) for _ in range(2))
    assert first.auc() == again.auc()
    assert first.interval() == again.interval()


@pytest.mark.parametrize("score", [probe, neighbours])
@pytest.mark.parametrize(
    ("features", "labels", "patients", "reason"),
    [
        (np.zeros((6, 3)), ["a"] * 6, list("pqrstu"), "all scans have the same label"),
        (np.zeros((0, 3)), [], [], "there are no scans"),
        (np.zeros((9, 3)), ["a"] * 6 + ["b"] * 3, list("pqrstuvwx"), "only 3 patients"),
        (np.zeros((12, 3)), ["a"] * 6 + ["b"] * 6, [*"pqrstu", *"zzzzzz"], "only 1 patient,"),
        (np.full((12, 3), np.nan), ["a", "b"] * 6, list("pqrstuvwxyzA"), "not finite"),
    ],
)
def test_what_cannot_be_probed_says_why(
    score: object, features: NDArray[np.float64], labels: list[str], patients: list[str], reason: str
) -> None:
    found = score(features.astype(np.float32), np.array(labels, dtype=str), np.array(patients, dtype=str))  # type: ignore[operator]
    assert reason in found.reason
    assert found.auc() is None
    assert found.interval() is None
    assert gain(found, found) is None


def test_a_constant_feature_is_no_obstacle() -> None:
    x, labels, patients = cohort(patients=20, shift=4.0)
    x[:, 3] = 1.0
    found = probe(x, labels, patients)
    assert found.auc() is not None
    assert np.isfinite(plane(x)).all()


def test_the_plane_keeps_the_two_largest_variances_and_its_signs() -> None:
    x = np.random.default_rng(2).normal(size=(40, 6)).astype(np.float32)
    x[:, 1] = x[:, 0] + 0.1 * x[:, 1]
    standard = (x - x.mean(0)) / x.std(0)
    variances = np.sort(np.linalg.eigvalsh(standard.T @ standard / len(x)))[::-1]
    got = plane(x)
    np.testing.assert_allclose(got.var(0), variances[:2], rtol=1e-4)
    assert abs(float((got[:, 0] * got[:, 1]).mean())) < 1e-6
    np.testing.assert_allclose(plane(3 * x + 5), got, atol=1e-4)
    np.testing.assert_allclose(plane(x[::-1])[::-1], got, atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 1), (1, 4), (2, 9)])
def test_the_plane_of_very_little_is_padded_with_zeros(shape: tuple[int, int]) -> None:
    got = plane(np.random.default_rng(0).normal(size=shape).astype(np.float32))
    assert got.shape == (shape[0], 2)
    assert np.isfinite(got).all()
