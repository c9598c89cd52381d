"""`unimiss finetune --fold`: one fold of several, or all in turn, and what they say together.

OUT/fold-0, OUT/fold-1, ...   a fine-tuning of each fold, as `client.finetune` writes it
OUT/folds.json                of all folds: each figure by fold, and over the patients of all, with its interval
"""

import csv
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from client import merit
from client.finetune_config import FinetuneConfig, FoldSplit
from client.label_tables import LabelTable, Part
from client.task_results import OF_MASKS, Figures, figures_of_masks
from client.tuning_folder import METRICS
from unimiss_core import durable
from unimiss_core.errors import ConfigError
from unimiss_core.json_text import read_object
from unimiss_core.task_config import UNKNOWN, ClassificationConfig, SegmentationConfig

SUMMARY = "folds.json"
_PARTS: tuple[Part, ...] = ("validation", "test")
Row = Mapping[str, str]


def runs_of(config: FinetuneConfig, fold: int | Literal["all"] | None) -> list[FinetuneConfig]:
    """The file itself, or each fold that is asked for, in a folder of its own. Raises ConfigError: it is not there."""
    if fold is None:
        return [config]
    split = config.split
    if not isinstance(split, FoldSplit):
        raise ConfigError("--fold: the file's split is `given`, which has no folds; leave the option out")
    if fold != "all" and fold >= split.folds:
        raise ConfigError(f"--fold {fold}: is not there; {split.folds} folds count from 0 to {split.folds - 1}")
    return [
        config.model_copy(update={"split": split.model_copy(update={"fold": one}), "out": config.out / f"fold-{one}"})
        for one in (range(split.folds) if fold == "all" else [fold])
    ]


def summarise(config: FinetuneConfig, runs: Sequence[FinetuneConfig], table: LabelTable) -> None:
    """Write and print what finished folds say together. table: whose scans they are, of each fold the same
    (`client.made_of`). Raises ConfigError: a fold's files are gone, or others by now."""
    patients = {case.number: case.patient for case in table.cases}
    try:
        parts = {part: _of_part(config, runs, part, patients) for part in _PARTS}
    except (OSError, ValueError, LookupError):
        raise ConfigError(
            "--fold all: what the folds wrote cannot be put together: a file of theirs has changed or is gone since; "
            "begin anew in another --out"
        ) from None
    told = {"name": config.name, "task": config.task.name, "folds": len(runs), "parts": parts}
    durable.write_text(config.out / SUMMARY, json.dumps(told, indent=2) + "\n")
    for part, figures in parts.items():
        for line in _lines(figures):
            print(f"all folds, {part}: {line}")
    print(f"{config.out / SUMMARY}: {len(runs)} folds")


def _of_part(
    config: FinetuneConfig, runs: Sequence[FinetuneConfig], part: Part, patients: Mapping[int, str]
) -> Figures:
    """Each figure over the scans of all folds, with its values by fold."""
    by_fold = [read_object(run.out / METRICS)["parts"][part] for run in runs]
    rows = [(fold, row) for fold, run in enumerate(runs) for row in _rows(run, part)]
    whose = [patients[int(row["line"])] for _, row in rows]
    task = config.task
    pooled = (
        _of_classes(task, rows, whose)
        if isinstance(task, ClassificationConfig)
        else _of_masks(task, [row for _, row in rows], whose)
    )
    counts: Figures = {"scans": sum(one["scans"] for one in by_fold), "patients": len(set(whose))}
    if isinstance(task, SegmentationConfig):
        counts["missed_or_made_up"] = sum(one["missed_or_made_up"] for one in by_fold)
    return counts | {
        name: {**figure, "by_fold": [one[name]["value"] for one in by_fold]} for name, figure in pooled.items()
    }


def _rows(run: FinetuneConfig, part: Part) -> list[Row]:
    name = "predictions.csv" if isinstance(run.task, ClassificationConfig) else "cases.csv"
    with (run.out / name).open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row["part"] == part]


def _of_classes(task: ClassificationConfig, rows: Sequence[tuple[int, Row]], patients: Sequence[str]) -> Figures:
    chances = np.array([[float(row[f"p/{name}"]) for name in task.classes] for _, row in rows])
    truth = np.array([[int(row[f"is/{name}"] or UNKNOWN) for name in task.classes] for _, row in rows])
    folds = np.array([fold for fold, _ in rows])
    if task.kind == "multi_label":
        return dict(merit.of_labels(chances, truth, patients, task.classes, folds=folds))
    return dict(merit.of_classes(chances, truth.argmax(1), patients, task.classes, folds=folds))


def _of_masks(task: SegmentationConfig, rows: Sequence[Row], patients: Sequence[str]) -> Figures:
    def number(text: str) -> float | None:
        return float(text) if text else None

    known: list[dict[str, Any]] = [
        {"patient": patient, "class": row["class"]} | {name: number(row[name]) for name in OF_MASKS}
        for row, patient in zip(rows, patients, strict=True)
    ]
    return figures_of_masks(known, task.classes)


def _lines(figures: Figures) -> list[str]:
    """Figures in words; those of one class alone stand in the file."""
    lines = []
    for name, figure in figures.items():
        if isinstance(figure, Mapping) and "/" not in name:
            each = ", ".join("undefined" if one is None else f"{one:.3f}" for one in figure["by_fold"])
            value, low, high = (figure[key] for key in ("value", "low", "high"))
            told = "undefined" if value is None else f"{value:.3f} ({low:.3f} to {high:.3f})"
            lines.append(f"{name} {told}; by fold {each}")
    return lines
