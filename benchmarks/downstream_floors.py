"""What needs no network, on the test patients of `benchmarks.downstream`: the floor that a result must be above.

    python -m benchmarks.downstream_floors --tasks hippocampus adrenal --threads 1

X-rays: a logistic regression on 32 x 32 pixels, for each finding. Adrenal glands: the number of voxels. Masks: where
the training masks lie, each stretched onto one grid; a voxel is of the class that is likeliest there, classes weighing
as much more than the background as is best on the validation scans. Intervals are over patients.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from benchmarks.downstream import ROOT, TASKS, Run, write_settings
from benchmarks.paired import Floats, Weighed, draws, interval, mean_of_known
from client import merit
from client.finetune_config import FinetuneConfig, load_finetune
from client.label_tables import Part, label_table
from client.labelled import Labelled, prepare_cases
from client.segmenting import dice
from client.splits import split_cases
from unimiss_core.errors import UnimissError
from unimiss_core.study import PlanConfig
from unimiss_core.views import resize

Parts = Mapping[Part, Sequence[Labelled]]
_PIXELS = (32, 32)
_ATLAS = (32, 48, 48)
"""Grid of the mean mask."""
_WEIGHTS = (1, 2, 4, 8, 16, 32, 64)


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        for task in options.tasks:
            try:
                value, (low, high) = floor(task, options.data, Path(scratch) / task)
            except UnimissError as error:
                sys.exit(f"benchmarks.downstream_floors: {error}")
            print(f"{task}: {value:.3f} [{low:.3f}, {high:.3f}]", flush=True)


def floor(task: str, data: Path, scratch: Path) -> tuple[float, tuple[float, float]]:
    """(value, 95% interval): an AUC or a Dice."""
    run = Run(task, "scratch", 0, scratch)
    config = load_finetune(write_settings(run, data), data_root=data)
    table = label_table(config)
    split = split_cases(table.cases, config)
    parts = prepare_cases(split, table, config.plan or PlanConfig(), config, scratch / "prepared")
    figure = FLOORS.get(task, atlas)(parts, config)
    drawn, _ = draws([figure], [one.case.patient for one in parts["test"]], stream=0)
    return float(drawn[0]), interval(drawn)


def voxels(parts: Parts, _: FinetuneConfig) -> Weighed:
    """The larger a gland, the likelier a mass."""
    size = np.array([(one.whole() > 0.5).sum() for one in parts["test"]], dtype=np.float64)
    there = np.array([one.case.target[0] == 1 for one in parts["test"]])
    return lambda weights: merit.auc(size, there, weights)


def pixels(parts: Parts, config: FinetuneConfig) -> Weighed:
    """Mean over findings of a linear model's AUC."""
    known = [*parts["train"], *parts["validation"]]
    seen, truth = _pixels_of(known), np.array([one.case.target for one in known])
    asked, test = _pixels_of(parts["test"]), np.array([one.case.target for one in parts["test"]])
    told = []
    for number in range(len(config.task.classes)):
        model = LogisticRegression(C=0.01, max_iter=2000).fit(seen, truth[:, number])
        told.append((model.decision_function(asked), test[:, number] == 1))
    return lambda weights: np.mean([merit.auc(score, there, weights) for score, there in told], axis=0)


def _pixels_of(scans: Sequence[Labelled]) -> Floats:
    """(N, F)"""
    shrunk = [resize(torch.from_numpy(one.whole()), _PIXELS).flatten().double().numpy() for one in scans]
    return np.stack(shrunk)


def atlas(parts: Parts, config: FinetuneConfig) -> Weighed:
    """Dice of the mean mask, over the classes of a scan."""
    mean = torch.stack([_on_atlas(one, config.task.outputs) for one in parts["train"]]).mean(0)
    best = max(_WEIGHTS, key=lambda weight: float(np.nanmean(_dices(mean, weight, parts["validation"]))))
    return mean_of_known(_dices(mean, best, parts["test"]))


def _on_atlas(one: Labelled, outputs: int) -> Tensor:
    """(K, *_ATLAS): how much of each class lies at each place."""
    classes = F.one_hot(torch.from_numpy(np.array(one.mask)).long(), outputs).movedim(-1, 0).float()
    return F.interpolate(classes[None], _ATLAS, mode="trilinear")[0]


def _dices(mean: Tensor, weight: float, scans: Sequence[Labelled]) -> Floats:
    """(N,): of each scan the mean over its classes."""
    raised = mean * torch.tensor([1.0] + [weight] * (len(mean) - 1))[:, None, None, None]
    found = []
    for one in scans:
        assert one.mask is not None
        classes = F.interpolate(raised[None], one.shape[1:], mode="trilinear")[0].argmax(0).numpy().astype(np.uint8)
        known = [d for k in range(1, len(mean)) if (d := dice(classes, np.array(one.mask), k)) is not None]
        found.append(np.mean(known) if known else np.nan)
    return np.array(found, dtype=np.float64)


FLOORS: Mapping[str, Callable[[Parts, FinetuneConfig], Weighed]] = {"adrenal": voxels, "nih_findings": pixels}
"""Of the others: `atlas`."""


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    return parser.parse_args()


if __name__ == "__main__":
    main()
