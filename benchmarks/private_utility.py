"""What is left to learn under patient-level privacy: an encoder that was trained on phantoms, adapted to real X-rays.

    python -m benchmarks.private_utility --steps 40 --batch 96 --threads 1 --json FILE

The start is trained on synthetic radiographs, which are public, and probed; each arm then goes on from it on the NIH
X-rays of the patients that the sites of configs/simulation/shared_real.yaml hold, with the real learner and the real
draws of patients, and is probed on held-out patients (NIH Pneumonia, `benchmarks.recipe_tasks`). Arms: without clip and
noise; clipped, without noise; and epsilon 8, 3 and 1 over all steps, for few parameters (norms and biases of the
backbone) and for all of them. Printed for each: the noise multiplier, how long a step's noise is beside the longest
gradient there can be and beside the sum of clipped gradients that was measured, and the AUC with the gain's 95%
interval over patients.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.recipe import ROOT, TRAINED, Gain, auc_of, gains_of, probed
from benchmarks.recipe_tasks import Task, task
from client.accounting import epsilon, smallest_noise
from client.batches import Batches
from client.patient_draws import PatientDraws
from client.phantoms import PhantomConfig, write_hospital
from client.site import Site
from client.site_config import DataSource, PatientLimits, SiteConfig, TableConfig, anchored
from unimiss_core.config import parse, read_yaml
from unimiss_core.learner import Learner
from unimiss_core.network import tensors_of
from unimiss_core.noise import GaussianNoise
from unimiss_core.privacy import mechanisms
from unimiss_core.private_learner import PrivateLearner
from unimiss_core.study import StudyConfig
from unimiss_core.team import Alone

CPU = torch.device("cpu")
CENTRE_NOISE = 12.0
UNCLIPPED = 1e6
DELTA = 1e-3 / 4
TASK = "nih-pneumonia"


@dataclass(frozen=True)
class Arm:
    """epsilon: None for no noise."""

    name: str
    trained: str
    epsilon: float | None
    clip_norm: float = 0.3
    """A patient's gradient is about as long, at the start."""


ARMS = (
    Arm("no clip, no noise", "norms_and_biases", None, UNCLIPPED),
    Arm("clip, no noise", "norms_and_biases", None),
    Arm("epsilon 8", "norms_and_biases", 8.0),
    Arm("epsilon 3", "norms_and_biases", 3.0),
    Arm("epsilon 1", "norms_and_biases", 1.0),
    Arm("clip, no noise", "all", None),
    Arm("epsilon 8", "all", 8.0),
)


@dataclass(frozen=True)
class Result:
    """noise_to_most, noise_to_sum: length of a step's noise over the clip norm, and over the length of the sum of
    clipped gradients, by the batch that both are divided by; median over the steps."""

    arm: Arm
    values: int
    noise_multiplier: float
    noise_to_most: float
    noise_to_sum: float
    gain: Gain
    seconds: float


class Measured:
    """The noise of an arm; keeps how long the sums were that it was added to."""

    def __init__(self, *, silent: bool) -> None:
        self._noise = None if silent else GaussianNoise(CPU)
        self.lengths: list[float] = []
        self._is_gradient = True

    def add_(self, sums: Sequence[Tensor], deviation: float) -> None:
        if self._is_gradient:  # a step adds to the gradients first, then to the centres
            self.lengths.append(math.sqrt(sum(total.double().square().sum().item() for total in sums)))
        self._is_gradient = not self._is_gradient
        if self._noise is not None:
            self._noise.add_(sums, deviation)


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        real = _site(options, Path(scratch) / "real", _real(options.data))
        tasks = {TASK: task(TASK, options.data, real.study)}
        start = _start(options, Path(scratch))
        before = probed(real.study.model, start, tasks)
        patients = len({scan.patient for scan in real.library.of_rank(2)})
        print(
            f"{patients} patients; start {auc_of(before[TASK]):.3f}, floor {auc_of(tasks[TASK].floor()):.3f}",
            flush=True,
        )
        results = []
        for arm in ARMS:
            results.append(_measured(options, arm, real, patients, start, before, tasks))
            print(_line(results[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


def _measured(
    options: argparse.Namespace,
    arm: Arm,
    real: Site,
    patients: int,
    start: Mapping[str, Tensor],
    before: Mapping[str, Any],
    tasks: Mapping[str, Task],
) -> Result:
    rate = options.batch / patients
    noise = 1.0 if arm.epsilon is None else _noise_for(options, rate, arm.epsilon)
    study = _study(options, privacy=_privacy(arm, rate, noise))
    site = Site(real.config, study, real.run)
    site.__dict__["library"] = real.library  # read once for all arms
    kept = Measured(silent=arm.epsilon is None)
    learner = PrivateLearner(study, ranks={2, 3}, noise=kept)
    learner.start_round(start, start)
    draws, began = PatientDraws(site, Alone(), CPU), time.monotonic()
    for step in range(options.steps):
        draws.draw(step).train(learner, step)
    values = sum(learner.student.get_parameter(name).numel() for name in learner.trained_names(2, 0))
    length = 0.0 if arm.epsilon is None else noise * math.sqrt(values)
    after = probed(study.model, tensors_of(learner.teacher), tasks)
    return Result(
        arm=arm,
        values=values,
        noise_multiplier=0.0 if arm.epsilon is None else noise,
        noise_to_most=length / options.batch,
        noise_to_sum=length / statistics.median(kept.lengths),
        gain=gains_of(before, after)[TASK],
        seconds=time.monotonic() - began,
    )


def _noise_for(options: argparse.Namespace, rate: float, target: float) -> float:
    """The least noise with which all steps cost `target`, centre included."""

    def reached(noise: float) -> float:
        study = _study(options, privacy=_privacy(Arm("", "all", target), rate, noise))
        return epsilon(mechanisms(study, {2}, [1]), DELTA)

    return smallest_noise(reached, target)


def _privacy(arm: Arm, rate: float, noise: float) -> dict[str, Any]:
    return {
        "mode": "patient",
        "max_epsilon": 1e6,
        "delta": DELTA,
        "clip_norm": arm.clip_norm,
        "noise_multiplier": noise,
        "centre_noise": CENTRE_NOISE,
        "trained": arm.trained,
        "sampling_rate": {"images": rate, "volumes": rate},
    }


def _start(options: argparse.Namespace, scratch: Path) -> dict[str, Tensor]:
    """A teacher that saw synthetic radiographs alone."""
    write_hospital(PhantomConfig(kind="cr", patients=options.phantoms, seed=7), scratch / "phantoms")
    source = DataSource(
        folder=scratch / "phantoms", table=TableConfig(path=scratch / "phantoms" / "labels.csv", patient="patient")
    )
    site = _site(options, scratch / "public", source, steps=options.start_steps)
    learner = Learner(site.study, ranks={2, 3})  # a probe takes a whole network
    batches = Batches(site, Alone(), CPU)
    for step in range(options.start_steps):
        batches.draw(step).train(learner, step)
    return {name: tensor.clone() for name, tensor in tensors_of(learner.teacher).items()}


def _real(data: Path) -> DataSource:
    nih = TableConfig(path=data / "nih_cxr14" / "labels.csv", file="image", patient="patient_id")
    return DataSource(folder=data / "nih_cxr14" / "images_224", table=nih, patient_range=TRAINED)


BOTH = PatientLimits(holds=("images", "volumes"))


def _site(options: argparse.Namespace, state: Path, source: DataSource, *, steps: int | None = None) -> Site:
    state.mkdir()
    config = SiteConfig(name="site", data=(source,), state=state, devices=("cpu",), privacy=BOTH)
    return Site(anchored(config, state), _study(options, steps=steps), "0" * 16)


def _study(
    options: argparse.Namespace, *, steps: int | None = None, privacy: Mapping[str, Any] | None = None
) -> StudyConfig:
    """`nano` for as many steps; a private one with batches and a centre that its noise does not drown."""
    raw = dict(read_yaml(ROOT / "configs" / "study" / "nano.yaml"))
    raw["schedule"] = {"rounds": 1, "local_steps": steps or options.steps}
    raw["optimiser"] = {"lr": options.lr if privacy else 5e-4, "warmup_steps": 5}
    if privacy:
        raw["privacy"] = privacy
        raw["batch"] = {
            "images": options.batch,
            "volumes": 10_000,
        }  # volumes: none here, and their centre is not judged
        raw["objective"] = dict(raw["objective"]) | {"centre_momentum": options.centre_momentum}
    return parse(StudyConfig, raw, where="nano")


def _line(result: Result) -> str:
    arm, gain = result.arm, result.gain
    low, high = gain.interval
    return (
        f"{arm.trained:17} {arm.name:18} {result.values:9,} values, multiplier {result.noise_multiplier:6.3g}, noise "
        f"{result.noise_to_most:6.3g}x the clip, {result.noise_to_sum:6.3g}x the sum; AUC {gain.before:.3f} to "
        f"{gain.after:.3f}, {gain.value:+.3f} [{low:+.3f}, {high:+.3f}]; {result.seconds:.0f} s"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of an arm (default: 200)")
    parser.add_argument("--batch", type=int, default=128, help="patients that a step expects (default: 128)")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--centre-momentum", type=float, default=0.998)
    parser.add_argument("--phantoms", type=int, default=300, help="synthetic patients of the start (default: 300)")
    parser.add_argument("--start-steps", type=int, default=400, help="(default: 400)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
