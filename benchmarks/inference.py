"""What a mask of a large volume costs: ours beside the plain reading, each in a process of its own.

    python benchmarks/inference.py --threads 1                          512 x 512 x 400 voxels, nano, two classes
    python benchmarks/inference.py --classes 3 --window 32 96 96 --variant ours

The volume is synthetic and lies prepared in memory, on the grid of its source: the most voxels that there can be. What
is measured ends with a class for each voxel, small parts removed. *Plain* joins windows of logits in float32 by MONAI's
own defaults, softmax and argmax of the whole after that; *ours* is what fine-tuning and prediction do. Memory is the
most that the process held (resident), libraries and volume included; both say how many voxels they found.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from side_by_side import count, machine

from client.labelled import Grid
from client.segmenting import keep_largest, likeliest_at_source, probabilities
from unimiss_core.model_config import AnySize
from unimiss_core.study import ModelConfig
from unimiss_core.task_config import SegmentationConfig
from unimiss_core.tasks import TaskModel, build_task_model
from unimiss_core.views import standardise

MOST_GB = 4.0
"""What is asked of ours."""
VARIANTS = ("ours", "plain")
_BLOCK = 16
"""Voxels along each side of a block of one value, of which the volume is made: a mask of some size, not dust."""


@dataclass(frozen=True)
class Case:
    variant: str
    model: str
    shape: tuple[int, ...]
    window: tuple[int, ...]
    overlap: float
    classes: int
    """Besides the background."""
    batch: int
    threads: int


@dataclass(frozen=True)
class Result:
    """Times of inference alone; peak_gb: of the whole process, in 2^30 bytes."""

    case: Case
    wall_s: float
    cpu_s: float
    peak_gb: float
    voxels: tuple[int, ...]
    """Of each class, to tell that both found the same."""


def main() -> None:
    options = _options()
    results = []
    for variant in options.variant or VARIANTS:
        case = Case(
            variant,
            options.model,
            tuple(options.shape),
            tuple(options.window),
            options.overlap,
            options.classes,
            options.batch,
            options.threads,
        )
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as own:
            results.append(own.submit(measure, case).result())
        print(line(results[-1]), flush=True)
    for result in results:
        if result.case.variant == "ours":
            met = result.peak_gb < MOST_GB
            print(f"{'PASS' if met else 'FAIL'}  below {MOST_GB:g} GB: {result.peak_gb:.2f} GB")
    if options.json:
        content = {"machine": machine(), "results": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(content, indent=2) + "\n")


def measure(case: Case) -> Result:
    """One mask, in this process."""
    torch.set_num_threads(case.threads)
    model = build_task_model(
        ModelConfig(size=case.model),  # type: ignore[arg-type]
        SegmentationConfig(classes=tuple(f"class {number}" for number in range(case.classes))),
        seed=0,
        pretrained=None,
    ).eval()
    values = volume(case.shape)
    wall, cpu = time.perf_counter(), time.process_time()
    found = (ours if case.variant == "ours" else plain)(model, values, case)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    voxels = tuple(int((found == number).sum()) for number in range(1 + case.classes))
    return Result(case, wall, cpu, _peak_gb(), voxels)


def ours(model: TaskModel, values: NDArray[np.float32], case: Case) -> NDArray[np.uint8]:
    """values (1, D, H, W) in [0, 1] -> classes (D, H, W)."""
    chances = probabilities(
        model,
        values,
        case.window,
        overlap=case.overlap,
        windows=case.batch,
        device=torch.device("cpu"),
        autocast=nullcontext(),
    )
    grid = Grid(case.shape, (1.0,) * 3, (1.0,) * 3, None)
    return keep_largest(likeliest_at_source(chances, grid), range(1, 1 + case.classes))


@torch.inference_mode()
def plain(model: TaskModel, values: NDArray[np.float32], case: Case) -> NDArray[np.uint8]:
    """The same by the text of a tutorial."""
    from monai.inferers.utils import sliding_window_inference

    logits = sliding_window_inference(
        standardise(torch.from_numpy(values))[None],
        case.window,
        case.batch,
        model,
        overlap=case.overlap,
        mode="gaussian",
        cval=-2.0,
    )
    assert isinstance(logits, torch.Tensor)
    classes = torch.softmax(logits, 1)[0].argmax(0).to(torch.uint8).numpy()
    return keep_largest(np.asarray(classes), range(1, 1 + case.classes))


def volume(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """(1, *shape) in [0, 1]: blocks of random brightness."""
    coarse = [-(-length // _BLOCK) for length in shape]
    blocks = np.random.default_rng(0).random((1, *coarse), dtype=np.float32)
    for axis, length in enumerate(shape, start=1):
        blocks = blocks.repeat(_BLOCK, axis).take(range(length), axis)
    return blocks


def line(result: Result) -> str:
    case = result.case
    sides = " x ".join(str(n) for n in case.shape)
    return (
        f"{case.variant}: {case.model}, {sides}, windows {' x '.join(str(n) for n in case.window)}: "
        f"{result.wall_s:.0f} s ({result.cpu_s:.0f} of CPU), most memory {result.peak_gb:.2f} GB, "
        f"voxels {', '.join(str(n) for n in result.voxels)}"
    )


def _peak_gb() -> float:
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=VARIANTS, action="append", help="default: both")
    parser.add_argument("--model", choices=get_args(AnySize), default="nano", help="default: nano")
    parser.add_argument("--shape", type=count, nargs=3, default=[400, 512, 512], metavar=("D", "H", "W"))
    parser.add_argument("--window", type=count, nargs=3, default=[32, 96, 96], metavar=("D", "H", "W"))
    parser.add_argument("--overlap", type=float, default=0.25, help="share of a window's sides (default: 0.25)")
    parser.add_argument("--classes", type=count, default=2, help="besides the background (default: 2)")
    parser.add_argument("--batch", type=count, default=4, help="windows at a time (default: 4)")
    parser.add_argument("--threads", type=count, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
