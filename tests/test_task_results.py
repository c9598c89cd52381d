"""What figures of a segmentation are made of, case by case."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.finetune_config import FinetuneConfig
from client.inference import Inference
from client.label_tables import Case, LabelTable
from client.labelled import Grid, Labelled
from client.task_results import Segmenting
from unimiss_core.config import parse

pytest.importorskip("monai")


def drawn(*places: int) -> np.ndarray[Any, Any]:
    """Two squares of class 1 at most, left (0) and right (1)."""
    mask = np.zeros((12, 24), np.uint8)
    for place in places:
        mask[4:8, 4 + 12 * place : 8 + 12 * place] = 1
    return mask


@pytest.mark.parametrize("known", [True, False])
def test_what_is_in_one_mask_alone_is_counted_and_pixels_are_no_millimetres(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """Found at its place; at another; missed; made up; rightly nothing."""
    pairs = [((0,), (0,)), ((0,), (1,)), ((), (0,)), ((0,), ()), ((), ())]
    task = {"name": "segmentation", "rank": 2, "classes": ["square"]}
    raw = {"name": "x", "task": task, "init": {"name": "scratch"}, "data": {"name": "csv", "table": "t.csv"}}
    config = parse(FinetuneConfig, raw, where="test")
    grid, values = Grid((12, 24), (0.5, 0.5), (1.0, 1.0), None, known), np.zeros((1, 12, 24), np.uint16)
    scans = [
        Labelled(Case(number, "", str(number)), values, grid, mask=drawn(*truth))
        for number, (_, truth) in enumerate(pairs)
    ]
    answers = iter([drawn(*found) for found, _ in pairs])
    monkeypatch.setattr(Inference, "mask", lambda *_: next(answers))
    judge = Segmenting(config, torch.device("cpu"), (12, 24), LabelTable((), tmp_path))
    figures = judge.evaluate(None, scans, "validation", tmp_path, files=False)  # type: ignore[arg-type]
    assert figures["missed_or_made_up"] == 2
    assert figures["dice"]["value"] == pytest.approx(1 / 4)
    with (tmp_path / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0].keys() == {"line", "part", "class", "dice", "hd95_mm", "surface_dice"}
    assert [row["hd95_mm"] for row in rows] == (["0.0", "6.0", "", "", ""] if known else [""] * 5)
    assert (figures["surface_dice"]["value"] is None) == (not known), json.dumps(figures)
