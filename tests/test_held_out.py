"""A federation's validation: who is held out, what is measured of the shared model, and which round was best by it."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from client import held_out
from client.label_config import LabelsConfig
from client.site import Site
from client.site_labels import LabelledScan
from server import validation
from server.beginning import first_student, is_taught
from server.coordinator_config import CoordinatorConfig
from server.report import write_report
from server.run_folder import RunFolder
from tests.federation import metric_rows, saved_checkpoint
from tests.labelled_hospitals import hospital, masks_study, opened, task_study
from tests.test_federated_finetuning import PRIVATE, federate, pictures_of
from unimiss_core import progress, task_checkpoint
from unimiss_core.config import dump_yaml, parse
from unimiss_core.errors import ConfigError, NoUsableScanError
from unimiss_core.students import build_student
from unimiss_core.study import StudyConfig
from unimiss_core.task_config import UNKNOWN, ClassificationConfig
from unimiss_core.tasks import load_task_model

PICTURES = 24
AUC = "validation_auc"


def validated(rounds: int = 1, *, share: float = 0.4, **changes: Any) -> StudyConfig:
    return task_study(rounds, finetune={"validation": share}, **changes)


def test_about_the_share_of_patients_is_held_out_whoever_else_comes() -> None:
    patients = [f"{number:032x}" for number in range(2000)]

    def chosen_by(study: StudyConfig) -> set[str]:
        return {patient for patient in patients if held_out.is_held_out(patient, study)}

    chosen = chosen_by(validated(share=0.3))
    assert len(chosen) / 2000 == pytest.approx(0.3, abs=0.04)  # some four standard deviations
    assert chosen < chosen_by(validated(share=0.5))
    assert chosen != chosen_by(validated(share=0.3, seed=1))
    assert not chosen_by(task_study())


def known_hospital(folder: Path, secret: int, **settings: Any) -> Path:
    """Whose patients have the same keys each time, so that the same ones are held out."""
    path, file = hospital(folder, folder.name, **settings), folder / "state" / "patient_secret"
    file.parent.mkdir(mode=0o700)
    file.write_bytes(bytes([secret]) * 32)
    file.chmod(0o600)
    return path


class Run(NamedTuple):
    out: Path
    sites: list[Path]
    study: StudyConfig
    heard: list[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three rounds of two sites, of which one checkpoint is kept."""
    folder, study, heard = tmp_path_factory.mktemp("validated"), validated(3, lr=0.3), list[str]()
    secrets = {"north": 11, "south": 15}  # 6 and 5 pictures of each class are held out, and 7 and 6
    sites = [
        known_hospital(folder / name, secret, seed=seed, pictures=PICTURES)
        for seed, (name, secret) in enumerate(secrets.items())
    ]
    with progress.listen(lambda event: heard.append(event.text) if isinstance(event, progress.Note) else None):
        federate(folder / "out", sites, study, least=2, keep_checkpoints=1)
    return Run(folder / "out", sites, study, heard)


def test_a_site_trains_on_none_of_whom_it_measures_by(run: Run) -> None:
    site = opened(run.sites[0], run.study)
    trained = {scan.patient for scan in site.library.scans}
    assert len({scan.patient for scan in site.everything.scans}) == PICTURES
    assert 0 < len(trained) < PICTURES
    assert not any(held_out.is_held_out(patient, site.study) for patient in trained)
    told = f"north: measures the shared model on {PICTURES - len(trained)} of {PICTURES} labelled patients"
    assert len([one for one in run.heard if one.startswith(told)]) == 1
    with pytest.raises(NoUsableScanError, match="holds out every labelled patient"):
        held_out.trained_on(site.config, validated(share=0.999), site.everything)


def test_a_site_tells_how_well_the_model_that_it_was_sent_does_on_them(run: Run) -> None:
    """Oracle: scikit-learn's area on pictures that are read without the site's own reading of its table."""
    line, study = metric_rows(run.out)[0]["sites"], run.study
    model = build_student(study).eval()
    for path in run.sites:
        site = opened(path, study)
        with torch.no_grad():
            chances = model(pictures_of(path, study, PICTURES)).softmax(-1)[:, 1].numpy()
        held = [held_out.is_held_out(scan.patient, study) for scan in site.everything.scans]  # in the table's order
        area = roc_auc_score(np.arange(PICTURES)[held] % 2, chances[held])
        assert line[site.config.name]["diagnostics"]["validation_auc"] == round(20 * area) / 20
        assert line[site.config.name]["scans"]["2d"] == PICTURES - sum(held)


def test_the_best_round_is_named_and_its_checkpoint_kept(run: Run) -> None:
    rows = metric_rows(run.out)
    means = [np.mean([one["diagnostics"]["validation_auc"] for one in row["sites"].values()]) for row in rows]
    best = validation.best_in(rows, AUC)
    assert best is not None
    assert (best.round, best.sites) == (1 + int(np.argmax(means[1:])), 2)
    assert best.mean == pytest.approx(max(means[1:]))
    kept = {path.name for path in RunFolder(run.out).checkpoints.iterdir()}
    assert kept == {"round-0000", f"round-{best.round:04d}", "round-0003"}
    said = f"round {best.round}, {best.mean:.3f} as the mean of 2 sites"
    assert any(said in one and f"checkpoints/round-{best.round:04d}" in one for one in run.heard)
    page = write_report(run.out).read_text(encoding="utf-8")
    assert "Validation" in page
    assert said in page


def test_rounds_that_fewer_sites_measured_and_figures_that_are_none_do_not_win() -> None:
    told = [
        (2, {"a": {"validation_auc": 0.5}, "b": {"validation_auc": 0.7}}),
        (3, {"a": {"validation_auc": 0.9}}),
        (4, {"a": {"validation_auc": 0.6}, "b": {"validation_auc": 1e30}, "c": {"validation_auc": float("nan")}}),
        (5, {"a": {"validation_auc": 0.8, "validation_dice": 1.0}, "b": {"validation_auc": 0.5}}),
    ]
    measured = validation.by_round(told, AUC)
    assert measured == {1: {"a": 0.5, "b": 0.7}, 2: {"a": 0.9}, 3: {"a": 0.6}, 4: {"a": 0.8, "b": 0.5}}
    assert validation.best_of(measured) == validation.Best(4, pytest.approx(0.65), 2)
    assert validation.best_of({}) is None


def test_the_model_whose_head_nothing_has_taught_is_not_the_best() -> None:
    """Its figure may be the highest all the same, by chance."""
    untaught = {0: {"a": 0.9, "b": 0.9, "c": 0.9}}
    assert validation.best_of(untaught) is None
    assert validation.best_of({**untaught, 1: {"a": 0.5}}) == validation.Best(1, 0.5, 1)


def test_it_is_said_how_many_of_those_who_measured_the_best_are_gone() -> None:
    sites = dict.fromkeys("abc", 0.75)
    stays = validation.best_of({3: sites, 4: dict.fromkeys("abcd", 0.5)})
    assert stays is not None
    assert stays.in_words().endswith("round 3, 0.750 as the mean of 3 sites")
    gone = validation.best_of({3: sites, 4: {"a": 0.7}, 5: {"a": 0.9, "d": 0.9}})
    assert gone is not None
    assert gone.in_words().endswith(
        "round 3, 0.750 as the mean of 3 sites, 2 of which told no figure of the newest round"
    )


def test_sites_that_told_a_figure_once_do_not_choose_the_round() -> None:
    """Rounds are compared by the sites that measured both."""
    alone = {1: {"guest": 1.0}, 2: {"a": 0.5, "b": 0.6, "c": 0.7}, 3: {"a": 0.6, "b": 0.7, "c": 0.7}}
    assert validation.best_of(alone) == validation.Best(3, pytest.approx(2 / 3), 3)
    early = {1: {"a": 0.5, "b": 0.5, "guest": 0.9}, **{round: {"a": 0.4 + round / 10, "b": 0.6} for round in (2, 3)}}
    assert validation.best_of(early) == validation.Best(3, pytest.approx(0.65), 2)
    easy = {1: {"a": 0.6, "b": 0.6, "c": 0.6}, 2: {"a": 0.5, "b": 0.5, "c": 0.5, "guest": 1.0}}
    assert validation.best_of(easy) == validation.Best(1, pytest.approx(0.6), 3)


@pytest.mark.parametrize(
    ("later", "best"),
    [
        ({"c": 0.1}, 4),
        ({"c": 1.0, "d": 1.0}, 4),
        ({"c": 1.0, "d": 1.0, "e": 1.0, "f": 1.0}, 4),
        ({"a": 1.0, "c": 1.0, "d": 1.0}, 4),
        ({"c": 0.5, "d": 0.5, "e": 0.5, "f": 0.5, "g": 0.5}, 5),
        ({"a": 0.95, "b": 0.95, "c": 0.1}, 5),
    ],
    ids=["another", "others", "twice as many", "half, and others", "more than twice as many", "both"],
)
def test_the_best_round_is_not_given_up_for_the_word_of_other_sites(later: dict[str, float], best: int) -> None:
    """Unless they are so many that it was the word of a few: patients differ from site to site."""
    found = validation.best_of({4: {"a": 0.9, "b": 0.91}, 5: later})
    assert found is not None
    assert found.round == best


def test_a_start_that_labels_taught_is_told_on_screen_in_the_report_and_by_the_model(run: Run, tmp_path: Path) -> None:
    heard, study, start = list[str](), validated(2, name="second"), RunFolder(run.out).checkpoint_of(3)
    with progress.listen(lambda event: heard.append(event.text) if isinstance(event, progress.Note) else None):
        federate(tmp_path / "out", run.sites[:1], study, start=start)
    assert any(one.startswith("WARNING: the start was fine-tuned: its head stays behind") for one in heard)
    _, manifest = task_checkpoint.load(tmp_path / "out" / "model")
    assert (manifest.began_with, manifest.taught_by_labels) == ("checkpoint", True)
    assert "show what is remembered" in write_report(tmp_path / "out").read_text(encoding="utf-8")
    site = opened(run.sites[0], run.study)
    trained = {scan.patient for scan in site.library.scans}  # by the start; the way out that the note names
    assert not any(held_out.is_held_out(one, validated(share=share)) for one in trained for share in (0.1, 0.4))
    _, scratch = task_checkpoint.load(run.out / "model")
    assert (scratch.began_with, scratch.taught_by_labels) == ("scratch", False)
    assert "show what is remembered" not in write_report(run.out).read_text(encoding="utf-8")


def test_a_start_of_pretraining_is_not_told_of(tmp_path: Path) -> None:
    heard, folder = list[str](), RunFolder(tmp_path)
    saved_checkpoint(tmp_path / "round-0007")
    config = CoordinatorConfig(study=Path("unused"), out=tmp_path, start=tmp_path / "round-0007")
    with progress.listen(lambda event: heard.append(event.text) if isinstance(event, progress.Note) else None):
        first_student(validated(), config)
    assert heard == []
    assert folder.was_taught() is None
    for told in (is_taught(config), True, None):
        folder.note_start(taught_by_labels=told)
        assert folder.was_taught() is told
    assert not is_taught(config)


def test_figures_that_the_study_did_not_ask_for_are_in_no_report(run: Run, tmp_path: Path) -> None:
    """A site tells them all the same."""
    for study in (task_study(3), masks_study(), None):
        out = tmp_path / (study.digest() if study else "none")
        shutil.copytree(run.out, out)
        (out / "study.yaml").unlink()
        if study is not None:
            (out / "study.yaml").write_text(dump_yaml(study))
        assert "Validation" not in write_report(out).read_text(encoding="utf-8")


def test_where_the_best_rounds_checkpoint_is_gone_that_is_told(tmp_path: Path) -> None:
    heard, study = list[str](), validated(2)
    site = known_hospital(tmp_path / "north", 11, pictures=PICTURES)
    federate(tmp_path / "out", [site], study)
    folder = RunFolder(tmp_path / "out")
    rows = metric_rows(tmp_path / "out")
    rows[1]["sites"]["north"]["diagnostics"]["validation_auc"] = 1.0  # of round 1
    rows[0]["sites"]["north"]["diagnostics"]["validation_auc"] = 0.5
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.rmtree(folder.checkpoint_of(1))
    with progress.listen(lambda event: heard.append(event.text) if isinstance(event, progress.Note) else None):
        federate(tmp_path / "out", [site], study, resume=True)
    assert any("round 1, 1.000 as the mean of 1 site: its checkpoint is gone" in one for one in heard)


def test_masks_are_measured_by_dice_on_the_prepared_grid(tmp_path: Path) -> None:
    pytest.importorskip("monai", reason="the extra finetune is not there")
    study = masks_study()
    study = study.model_copy(update={"finetune": study.finetune.model_copy(update={"validation": 0.5})})  # type: ignore[union-attr]
    site = opened(known_hospital(tmp_path / "north", 11, masks=True, pictures=10), study)
    student = {name: parameter.detach() for name, parameter in build_student(study).named_parameters()}
    found = held_out.measured(site.config, study, site.everything, student, torch.device("cpu"))
    model, expected = load_task_model(study.model, study.finetune.task, tensors=student), []
    for number, scan in enumerate(site.everything.scans):
        if held_out.is_held_out(scan.patient, study):
            x = pictures_of(tmp_path / "north" / "site.yaml", study, 10)[number][None]
            with torch.no_grad():
                drawn = model(x).argmax(1)[0].numpy() == 1  # 64 x 64 is a single window
            truth = np.add.outer(np.arange(64), np.arange(64)) < 40 + 8 * number
            expected.append(2 * (drawn & truth).sum() / (drawn.sum() + truth.sum()))
    assert len(expected) == 7
    assert found == {"validation_dice": round(float(np.mean(expected)), 2)}


def test_a_scan_that_stands_under_two_patients_is_not_trained_on_where_one_is_held_out(run: Run) -> None:
    site = opened(run.sites[0], run.study)
    out = next(scan for scan in site.everything.scans if held_out.is_held_out(scan.patient, site.study))
    trained = site.library.scans[0]
    twice = replace(site.everything, scans=(*site.everything.scans, replace(out, patient=trained.patient)))
    assert set(held_out.trained_on(site.config, site.study, twice).scans) == set(site.library.scans)


def measured_by(site: Site) -> dict[str, float]:
    """What the site says of a model as the study begins it."""
    student = {name: parameter.detach() for name, parameter in build_student(site.study).named_parameters()}
    return held_out.measured(site.config, site.study, site.everything, student, torch.device("cpu"))


@pytest.mark.parametrize(
    ("fails", "error", "told"),
    [
        ("Inference.chances", RuntimeError("CUDA out of memory. Tried to allocate 9 bytes"), "does not fit into"),
        ("load_task_model", RuntimeError("CUDA out of memory. Tried to allocate 9 bytes"), "does not fit into"),
        ("LabelledScan.crop", FileNotFoundError(2, "gone"), "a held-out scan cannot be read"),
        ("LabelledScan.crop", ConfigError("a scan of the cache was changed"), "a scan of the cache was changed"),
    ],
)
def test_a_scan_that_cannot_be_asked_about_costs_the_figure_and_not_the_round(
    run: Run, monkeypatch: pytest.MonkeyPatch, fails: str, error: Exception, told: str
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    site, heard = opened(run.sites[0], run.study), list[str]()
    assert measured_by(site).keys() == {"validation_auc"}
    monkeypatch.setattr(f"client.held_out.{fails}", fail)
    with progress.listen(lambda event: heard.append(event.text) if isinstance(event, progress.Note) else None):
        assert measured_by(site) == {}
    assert len(heard) == 1
    assert heard[0].startswith("north: does not measure the shared model: ")
    assert told in heard[0]


def test_a_model_that_answers_no_numbers_is_not_ranked_by_the_order_of_the_table(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, answers = list[str](), lambda _, x: torch.full((len(x), 2), torch.nan)
    monkeypatch.setattr("unimiss_core.tasks.TaskModel.forward", answers)
    with progress.listen(lambda event: heard.append(event.text) if isinstance(event, progress.Note) else None):
        assert measured_by(opened(run.sites[0], run.study)) == {}
    assert len(heard) == 1
    assert heard[0].startswith("north: does not measure the shared model: its answers are not all numbers")


def test_a_figure_of_a_few_patients_is_told_to_nobody(tmp_path: Path) -> None:
    """The site's secret holds out four, two of each class."""
    heard, site = list[str](), opened(known_hospital(tmp_path / "few", 1, pictures=14), validated())
    with progress.listen(lambda event: heard.append(event.text) if isinstance(event, progress.Note) else None):
        left = {scan.patient for scan in site.library.scans}
    held = {scan.patient for scan in site.everything.scans} - left
    assert len(held) == held_out.LEAST_PATIENTS - 1
    assert measured_by(site) == {}
    assert f"few: holds out {len(held)} of 14 labelled patients, and tells no figure of fewer than 5" in heard


def told_of(
    run: Run, monkeypatch: pytest.MonkeyPatch, chances: Sequence[Any], truth: Sequence[Any], kind: str
) -> dict[str, float]:
    """What a site says of a model that gives these chances to as many held-out patients. truth: class of each, or 0 and
    1 for every class."""
    study = validated(share=0.999)
    classes = ["clear", "lesion", "other"][: len(chances[0])]
    task = parse(ClassificationConfig, {"kind": kind, "rank": 2, "classes": classes}, where="task")
    assert study.finetune is not None
    study = study.model_copy(update={"finetune": study.finetune.model_copy(update={"task": task})})
    site = opened(run.sites[0], run.study)
    targets = [tuple(one) if np.ndim(one) else (int(one),) for one in truth]
    scans = tuple(
        replace(site.everything.scans[0], patient=f"{number:032x}", target=target)
        for number, target in enumerate(targets)
    )
    assert all(held_out.is_held_out(scan.patient, study) for scan in scans)
    monkeypatch.setattr("client.held_out.Inference.chances_of_all", lambda *_: np.array(chances))
    student = {name: parameter.detach() for name, parameter in build_student(study).named_parameters()}
    library = replace(site.everything, scans=scans)
    return held_out.measured(site.config, study, library, student, torch.device("cpu"))


@pytest.mark.parametrize(("positives", "is_told"), [(1, False), (4, False), (5, True), (15, True), (16, False)])
def test_an_area_is_told_only_of_five_patients_on_either_side(
    run: Run, monkeypatch: pytest.MonkeyPatch, positives: int, is_told: bool
) -> None:
    """Of one patient among twenty it would be that patient's rank."""
    truth = [number < positives for number in range(20)]
    chances = np.linspace(0, 1, 20)[:, None] * [-1, 1] + [1, 0]
    assert told_of(run, monkeypatch, chances, truth, "binary") == ({"validation_auc": 0.0} if is_told else {})


@pytest.mark.parametrize("kind", ["multi_class", "multi_label"])
def test_a_class_of_too_few_patients_is_in_no_mean(run: Run, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Of three classes the last has four patients; the first is told from the rest without a mistake, as the second."""
    classes = np.repeat([0, 1, 2], [8, 8, 4])
    one_of = np.eye(3)[classes]
    chances = one_of.copy()
    chances[:, 2] = 1 - chances[:, 2]  # all wrong: with this class the mean would be 2/3
    truth = classes if kind == "multi_class" else one_of.astype(int)
    assert told_of(run, monkeypatch, chances, truth, kind) == {"validation_auc": 1.0}
    few = np.repeat([0, 1, 2], [4, 3, 4])
    truth = few if kind == "multi_class" else np.eye(3, dtype=int)[few]
    assert told_of(run, monkeypatch, np.eye(3)[few], truth, kind) == {}


@pytest.mark.parametrize(("positives", "negatives"), [(5, 5), (5, 6), (12, 12), (5, 20), (12, 13)])
def test_an_area_does_not_tell_of_how_many_pairs_it_is(
    run: Run, monkeypatch: pytest.MonkeyPatch, positives: int, negatives: int
) -> None:
    """Every step may be told: which do come, round after round, would else give the number of pairs away."""
    steps = 20 if positives + negatives < 25 else 100
    truth = [True] * positives + [False] * negatives
    for below in {0, 1, positives * negatives // 3, positives * negatives}:  # pairs in order, of all
        whole, rest = divmod(below, positives)
        scores = [whole + (number < rest) for number in range(positives)]  # negatives that each positive is above
        chances = np.array([*(np.array(scores) - 0.5), *range(negatives)])[:, None] * [-1, 1]
        told = told_of(run, monkeypatch, chances, truth, "binary")["validation_auc"]
        assert told == round(below / (positives * negatives) * steps) / steps
    reached = {round(pairs / (positives * negatives) * steps) for pairs in range(positives * negatives + 1)}
    assert reached == set(range(steps + 1))


def test_patients_whose_label_nobody_knows_do_not_make_an_area_finer(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a hundred held out, five are known to be ill and five not: the area is of 25 pairs, 0.04 each."""
    truth = [(1,)] * 5 + [(0,)] * 5 + [(UNKNOWN,)] * 90
    for below in range(26):
        whole, rest = divmod(below, 5)
        scores = [*(whole + (number < rest) - 0.5 for number in range(5)), *range(5), *[0.0] * 90]
        told = told_of(run, monkeypatch, np.array(scores)[:, None], truth, "multi_label")["validation_auc"]
        assert told == round(below / 25 * 20) / 20


@pytest.mark.parametrize(
    ("with_mask", "draws", "told"), [(1, True, {}), (4, True, {}), (4, False, {}), (5, True, None)]
)
def test_dice_is_told_only_of_five_patients_whose_mask_holds_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_mask: int, draws: bool, told: dict[str, float] | None
) -> None:
    """Where a mask is empty and the model draws, Dice is 0 whosever it is: the mean would be the others'."""
    pytest.importorskip("monai", reason="the extra finetune is not there")
    study = masks_study()
    study = study.model_copy(update={"finetune": study.finetune.model_copy(update={"validation": 0.5})})  # type: ignore[union-attr]
    site = opened(known_hospital(tmp_path / "north", 11, masks=True, pictures=10), study)
    held = [scan.patient for scan in site.everything.scans if held_out.is_held_out(scan.patient, study)]
    assert len(held) == 7
    full = set(held[:with_mask])
    monkeypatch.setattr(LabelledScan, "classes", lambda scan: np.full((64, 64), int(scan.patient in full)))
    monkeypatch.setattr("client.held_out.Inference.mask", lambda *_: np.full((64, 64), int(draws), np.uint8))
    assert measured_by(site) == ({"validation_dice": round(with_mask / 7, 2)} if told is None else told)


def test_where_a_figure_would_be_of_too_few_the_site_reads_why(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    heard, chances = list[str](), np.eye(2)[[0] * 9 + [1]]
    monkeypatch.setattr("client.telling._told", set())
    with progress.listen(lambda event: heard.append(event.text) if isinstance(event, progress.Note) else None):
        for _ in range(2):  # each round asks again
            assert told_of(run, monkeypatch, chances, [0] * 9 + [1], "binary") == {}
    assert heard == ["north: tells no figure: of no class are 5 held-out patients, and 5 not"]


@pytest.mark.parametrize(("settings", "guessed"), [({}, True), ({"file_is_patient": True}, False)])
def test_it_is_told_where_nothing_says_whose_held_out_masks_are(
    run: Run, tmp_path: Path, settings: dict[str, Any], guessed: bool
) -> None:
    site, heard = opened(run.sites[0], run.study), list[str]()
    raw = {"data": {"name": "msd", "folder": "masks"}, "classes": ["disc"], **settings}
    changes = {"labels": parse(LabelsConfig, raw, where="labels"), "state": tmp_path}
    with progress.listen(lambda event: heard.append(event.text) if isinstance(event, progress.Note) else None):
        held_out.trained_on(site.config.model_copy(update=changes), site.study, site.everything)
    assert len(heard) == 1
    assert ("each file counts as a patient" in heard[0]) == guessed


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (PRIVATE, "finetune.validation: its figures would not leave a site under privacy.mode: patient"),
        ({"wire": {"losses": False}}, "under wire.losses: false"),
    ],
)
def test_a_study_whose_figures_may_not_leave_holds_out_nobody(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        validated(**changes)


def test_a_study_of_local_heads_has_no_model_to_measure_and_others_keep_their_digests() -> None:
    with pytest.raises(ConfigError, match="with head: local there is none"):
        task_study(finetune={"validation": 0.2, "head": "local"})
    assert "validation" not in task_study().canonical()
