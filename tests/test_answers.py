"""A model that answers what is no number has no figure and names no class: nothing ranks such answers but their order.

Every weight here is finite, and so is every loss: what overflows does so on its way to the answer.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from client.nifti import write_nifti
from client.pictures import write_png
from client.research_command import main
from tests.test_finetune import pictures, write_config
from tests.test_labelled import write_case
from tests.test_predict import BALL, LABELS, noise, untrained
from unimiss_core import task_checkpoint
from unimiss_core.scan import Scan
from unimiss_core.task_config import TaskConfig

LEAPS = {"epochs": 1, "steps_per_epoch": 1, "batch": 4, "lr": 1e30, "clip_norm": None}
"""One step, whose loss is taken before it, so that the answers alone show where it led."""


def overflowing(folder: Path, task: TaskConfig) -> Path:
    """A model whose weights are all finite, and whose answers are not."""
    untrained(folder / "sane", task)
    model, manifest = task_checkpoint.load(folder / "sane")
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    name = next(name for name, tensor in tensors.items() if tensor.ndim >= 4)
    tensors[name] = torch.full_like(tensors[name], 3e38)
    (folder / "model").mkdir()
    task_checkpoint.save(folder / "model", tensors, manifest)
    return folder / "model"


def test_a_classification_that_leapt_too_far_is_told_and_gets_no_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, **pictures(tmp_path), training=LEAPS)
    assert main(["finetune", str(path)]) == 1
    assert "answers are not all numbers" in capsys.readouterr().err
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_a_segmentation_that_leapt_too_far_is_told_and_draws_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(6):
        write_case(tmp_path, f"c{number}", number)
    path = write_config(
        tmp_path,
        task={"name": "segmentation", "rank": 3, "classes": ["ball"], "input_size": [16, 33, 33]},
        training=LEAPS,
        data={"name": "msd", "folder": ".", "modality": "MR"},
        split={"folds": 3, "validation": 0.5},
    )
    assert main(["finetune", str(path)]) == 1
    assert "answers are not all numbers" in capsys.readouterr().err
    assert not (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.parametrize("task", [LABELS, BALL], ids=["classes", "masks"])
def test_no_class_is_named_by_a_model_that_answers_no_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: TaskConfig
) -> None:
    (tmp_path / "scans").mkdir()
    write_png(tmp_path / "scans" / "a.png", noise((40, 44)).clip(0, 255).astype(np.uint8))
    volume = noise((20, 36, 36))[None].astype(np.float32)
    write_nifti(tmp_path / "scans" / "b.nii.gz", Scan(volume, (2.0, 2.0, 2.0), "MR"))
    model, out = overflowing(tmp_path, task), tmp_path / "out"
    assert main(["predict", str(model), str(tmp_path / "scans"), "--out", str(out)]) == 4
    assert f"{model}: its answers are not all numbers" in capsys.readouterr().err
    assert not (out / "predictions.csv").exists()
    assert not (out / "predicted.json").exists()
