"""What a fine-tuned model is worth on scans it never saw: figures, tables by scan, masks as files.

    metrics.json         figures of the validation and test scans, each with its 95% interval over patients
    predictions.csv      of a classification: each scan's probabilities
    cases.csv            of a segmentation: each scan's measures, by class
    predictions/         masks of the test scans, on the grid of each scan's own file

Scans are called by the line of their table; a patient's name or a path stands in none of them unless asked for.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from client import merit
from client.finetune_config import FinetuneConfig
from client.inference import Inference
from client.label_tables import LabelTable, Part
from client.labelled import Labelled
from client.masks import write_at_source
from client.task_training import Score, Standing
from unimiss_core import progress
from unimiss_core.task_config import UNKNOWN, ClassificationConfig, SegmentationConfig
from unimiss_core.tasks import TaskModel

Figures = dict[str, Any]
OF_MASKS = ("dice", "hd95_mm", "surface_dice")
"""What is measured of each mask."""
_NOT_WRITTEN = ("patient", "in_one_alone")
"""What a row of cases.csv is summed up by, and does not tell."""


class Classifying:
    """Evaluates a classification."""

    def __init__(self, config: FinetuneConfig, device: torch.device, size: Sequence[int]) -> None:
        assert isinstance(config.task, ClassificationConfig)
        self._task, self._inference = config.task, _inference(config, device, size)

    def chances(self, model: TaskModel, scans: Sequence[Labelled]) -> NDArray[np.float64]:
        """(N, K): of each scan, seen whole."""
        return self._inference.chances_of_all(model, scans)

    def score(self, scans: Sequence[Labelled]) -> Score:
        """What early stopping goes by: the AUC of these scans, over classes on average; of equal ones the likelihood.

        Few scans are soon in perfect order, long before a model is sure of them.
        """
        truth = self._truth(scans)

        def of(model: TaskModel) -> Standing:
            chances = self.chances(model, scans)
            area = self._inference.areas(chances, truth).mean()
            likelihood = np.log(np.where(truth == 1, chances, 1 - chances).clip(1e-7))[truth != UNKNOWN].mean()
            return float(area), float(likelihood)

        return of

    def evaluate(self, model: TaskModel, scans: Sequence[Labelled], part: Part, out: Path, files: bool) -> Figures:
        """Figures of the scans; their probabilities are added to predictions.csv."""
        chances, truth, classes = self.chances(model, scans), self._truth(scans), self._task.classes
        patients = [one.case.patient for one in scans]
        if self._task.kind == "multi_label":
            figures = merit.of_labels(chances, truth, patients, classes)
        else:
            figures = merit.of_classes(chances, truth.argmax(1), patients, classes)
        rows = [
            {
                **_named(one, part, files),
                **{
                    f"is/{name}": "" if is_it == UNKNOWN else int(is_it)
                    for name, is_it in zip(classes, there, strict=True)
                },
                **{f"p/{name}": f"{chance:.6f}" for name, chance in zip(classes, told, strict=True)},
            }
            for one, there, told in zip(scans, truth, chances, strict=True)
        ]
        _add_rows(out / "predictions.csv", rows)
        return dict(figures)

    def _truth(self, scans: Sequence[Labelled]) -> NDArray[np.int64]:
        """(N, K) of 0 and 1, or UNKNOWN."""
        return self._inference.truth([one.case.target for one in scans])


class Segmenting:
    """Evaluates a segmentation."""

    def __init__(self, config: FinetuneConfig, device: torch.device, size: Sequence[int], table: LabelTable) -> None:
        from client import segmenting  # MONAI takes seconds to import, and a classification needs none

        assert isinstance(config.task, SegmentationConfig)
        self._masks = segmenting
        self._task, self._inference = config.task, _inference(config, device, size)
        self._tolerance_mm = config.inference.surface_tolerance_mm
        self._table = table

    def score(self, scans: Sequence[Labelled]) -> Score:
        """Mean Dice of these scans on the prepared grid, over scans and the classes in them."""

        def of(model: TaskModel) -> Standing:
            found = []
            for one in scans:
                assert one.mask is not None
                classes = self._masks.likeliest(self._inference.voxel_chances(model, one.whole()))
                found += [self._masks.dice(classes, one.mask, number) for number in self._numbers()]
            known = [value for value in found if value is not None]
            return (float(np.mean(known)) if known else 0.0), 0.0

        return of

    def evaluate(self, model: TaskModel, scans: Sequence[Labelled], part: Part, out: Path, files: bool) -> Figures:
        """Figures of the scans, on their sources' grids where their masks are known there; the test's are written.

        What each scan measures is added to cases.csv.
        """
        rows: list[dict[str, Any]] = []
        for done, one in enumerate(scans, start=1):
            at_source = one.reference is not None
            classes = self._inference.mask(model, one.whole(), one.grid if at_source else None)
            rows += self._measured(one, classes, part, files)
            if at_source:
                source = self._table.folder / one.case.file
                write_at_source(out / "predictions", f"line-{one.case.number:05d}", classes, one.grid.affine, source)
            progress.report(progress.StepDone(part, done, len(scans), float("nan")))
        _add_rows(out / "cases.csv", [{k: v for k, v in row.items() if k not in _NOT_WRITTEN} for row in rows])
        alone = sum(row["in_one_alone"] for row in rows)
        return {**figures_of_masks(rows, self._task.classes), "missed_or_made_up": alone}

    def _measured(self, one: Labelled, classes: NDArray[np.uint8], part: Part, files: bool) -> list[dict[str, Any]]:
        truth, spacing = one.reference, one.grid.spacing_mm
        if truth is None:
            truth = one.mask
            spacing = tuple(step * old for step, old in zip(one.grid.steps, one.grid.spacing_mm, strict=True))
        assert truth is not None
        known = spacing if one.grid.spacing_known else None
        return [
            {
                **_named(one, part, files),
                "patient": one.case.patient,
                "class": name,
                **self._masks.measures(classes, truth, number, spacing_mm=known, tolerance_mm=self._tolerance_mm),
                "in_one_alone": bool((classes == number).any() != (truth == number).any()),
            }
            for number, name in enumerate(self._task.classes, start=1)
        ]

    def _numbers(self) -> range:
        return range(1, 1 + len(self._task.classes))


def figures_of_masks(rows: Sequence[dict[str, Any]], classes: Sequence[str]) -> Figures:
    """rows: of each scan and class, with its `patient`; None where a measure is not defined."""
    figures: Figures = {}
    for name in OF_MASKS:
        figures[name] = merit.mean_over_patients([row[name] for row in rows], [row["patient"] for row in rows])
        if len(classes) > 1:
            for each in classes:
                own = [row for row in rows if row["class"] == each]
                values, patients = [row[name] for row in own], [row["patient"] for row in own]
                figures[f"{name}/{each}"] = merit.mean_over_patients(values, patients)
    return figures


def _inference(config: FinetuneConfig, device: torch.device, size: Sequence[int]) -> Inference:
    asked = config.inference
    return Inference(
        task=config.task,
        size=tuple(size),
        device=device,
        precision=config.training.precision,
        batch=asked.batch,
        overlap=asked.overlap,
        keep_largest=asked.keep_largest,
    )


def _named(one: Labelled, part: Part, files: bool) -> dict[str, Any]:
    return {"line": one.case.number, "part": part, **({"file": one.case.file} if files else {})}


def _add_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Below those that stand there already."""
    begun = path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if not begun:
            writer.writeheader()
        writer.writerows(rows)
