"""What is left to learn under patient-level privacy: an encoder that was trained on phantoms, adapted to real X-rays.

    python -m benchmarks.private_utility --threads 1 --at-once 32 --json FILE

The start is trained on synthetic radiographs, which are public, and probed; each arm then goes on from it on the NIH
X-rays of the patients that the sites of configs/simulation/shared_real.yaml hold, with the real learner and the real
draws of patients, and is probed on held-out patients (NIH Pneumonia, `benchmarks.recipe_tasks`). Arms: without clip and
noise; clipped, without noise; epsilon 8, 3 and 1 over all steps, of few parameters (norms and biases of the backbone),
with AdamW and with momentum; epsilon 8 with AdamW that knows its noise; and more parameters, without and with noise.
Printed for each: the noise multiplier, how long a step's noise is beside the longest gradient there can be and beside
the sum of clipped gradients that was measured, the AUC with the gain's 95% interval over patients, and the error with
which these patients' X-rays are drawn again. Noise and draws are new in every call.
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
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.recipe import ROOT, TRAINED, Gain, auc_of, gains_of, probed, with_reconstruction
from benchmarks.recipe_tasks import Task, task
from client.accounting import epsilon, smallest_noise
from client.batches import Batches
from client.patient_draws import PatientDraws
from client.phantoms import PhantomConfig, write_hospital
from client.site import Site
from client.site_config import DataSource, PatientLimits, SiteConfig, TableConfig, anchored
from unimiss_core.config import parse
from unimiss_core.execution import Execution
from unimiss_core.learner import Learner
from unimiss_core.network import build_network, load_tensors_, tensors_of
from unimiss_core.noise import GaussianNoise
from unimiss_core.privacy import mechanisms
from unimiss_core.private_learner import PrivateLearner
from unimiss_core.study import StudyConfig
from unimiss_core.team import Alone
from unimiss_core.unimiss_plus import reconstruction_error
from unimiss_core.yaml_files import read_yaml

CPU = torch.device("cpu")
CENTRE = {"unimiss": (12.0, 0.998), "reconstruction": (100.0, 0.99999)}
"""Its noise and momentum, by objective: for reconstructions it counts little; where it hardly moves it costs little."""
RECONSTRUCTION_WEIGHT = 1e5
"""So much that nothing is left of the cross-entropy's gradient: it would pull towards a centre that hardly moves."""
UNCLIPPED = 1e6
TEACHER_MOMENTUM = (0.9, 0.9)
"""A short study's: the teacher, which is probed, keeps up with the student to the end."""
FLOOR = 0.1
"""Of AdamW that knows its noise."""
DELTA = 1e-3 / 4
TASK = "nih-pneumonia"
Optimiser = Literal["adamw", "noise_aware_adamw", "momentum_sgd"]


@dataclass(frozen=True)
class Arm:
    """epsilon: None for no noise; clipped: to the clip norm that was asked for, if at all."""

    name: str
    trained: str
    epsilon: float | None
    optimiser: Optimiser = "adamw"
    clipped: bool = True


FEW = "norms_and_biases"
ARMS = (
    Arm("no-clip", FEW, None, clipped=False),
    Arm("clip", FEW, None),
    *(Arm(f"epsilon-{epsilon}", FEW, float(epsilon)) for epsilon in (8, 3, 1)),
    Arm("epsilon-8-noise-aware", FEW, 8.0, "noise_aware_adamw"),
    *(Arm(f"epsilon-{epsilon}-momentum", FEW, float(epsilon), "momentum_sgd") for epsilon in (8, 3, 1)),
    *(Arm(f"{trained}-clip", trained, None) for trained in ("last_stages", "all")),
    *(Arm(f"{trained}-epsilon-8", trained, 8.0) for trained in ("last_stages", "all")),
)


@dataclass(frozen=True)
class Result:
    """noise_to_most, noise_to_sum: length of a step's noise over the clip norm, and over the length of the sum of
    clipped gradients, by the batch that both are divided by; median over the steps. errors: of reconstruction on
    held-out patients, before and after; NaN under an objective without."""

    arm: Arm
    values: int
    noise_multiplier: float
    noise_to_most: float
    noise_to_sum: float
    gain: Gain
    errors: tuple[float, float]
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
        for arm in options.arms:
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
    noise = 1.0 if arm.epsilon is None else _noise_for(options, arm, rate)
    study = _study(options, arm=arm, rate=rate, noise=noise)
    site = Site(real.config, study, real.run)
    site.__dict__["library"] = real.library  # read once for all arms
    kept = Measured(silent=arm.epsilon is None)
    learner = PrivateLearner(study, ranks={2, 3}, noise=kept, execution=Execution(patients_at_once=options.at_once))
    learner.start_round(start, start)
    draws, began = PatientDraws(site, Alone(), CPU), time.monotonic()
    for step in range(options.steps):
        draws.draw(step).train(learner, step)
    values = sum(learner.student.get_parameter(name).numel() for name in learner.trained_names(2, 0))
    length = 0.0 if arm.epsilon is None else noise * options.clip_norm * math.sqrt(values)
    after = probed(study.model, tensors_of(learner.teacher), tasks)
    error_before, error_after = (
        _reconstruction_error(study, tensors, tasks[TASK]) for tensors in (start, tensors_of(learner.teacher))
    )
    return Result(
        arm=arm,
        values=values,
        noise_multiplier=0.0 if arm.epsilon is None else noise,
        noise_to_most=length / options.clip_norm / options.batch,
        noise_to_sum=length / statistics.median(kept.lengths),
        gain=gains_of(before, after)[TASK],
        errors=(error_before, error_after),
        seconds=time.monotonic() - began,
    )


@torch.inference_mode()
def _reconstruction_error(study: StudyConfig, tensors: Mapping[str, Tensor], held_out: Task) -> float:
    """Mean squared error of intensities in [0, 1] over scans that nobody trained on; NaN without reconstruction."""
    if not study.model.reconstruction:
        return math.nan
    network = build_network(study.model, seed=0)
    load_tensors_(network, tensors)
    errors = [reconstruction_error(network.bottleneck_and_reconstruction(x)[1], x) for x in held_out.scans.split(1)]
    return torch.stack(errors).mean().item()


def _noise_for(options: argparse.Namespace, arm: Arm, rate: float) -> float:
    """The least noise with which all steps cost the arm's epsilon, centre included."""
    assert arm.epsilon is not None

    def reached(noise: float) -> float:
        return epsilon(mechanisms(_study(options, arm=arm, rate=rate, noise=noise), {2}, [1]), DELTA)

    return smallest_noise(reached, arm.epsilon)


def _start(options: argparse.Namespace, scratch: Path) -> dict[str, Tensor]:
    """A teacher that saw synthetic radiographs alone; kept in a file where one was named."""
    if options.start is not None and options.start.exists():
        return dict(load_file(options.start))
    write_hospital(PhantomConfig(kind="cr", patients=options.phantoms, seed=7), scratch / "phantoms")
    source = DataSource(
        folder=scratch / "phantoms", table=TableConfig(path=scratch / "phantoms" / "labels.csv", patient="patient")
    )
    site = _site(options, scratch / "public", source, steps=options.start_steps)
    learner = Learner(site.study, ranks={2, 3})  # a probe takes a whole network
    batches = Batches(site, Alone(), CPU)
    for step in range(options.start_steps):
        batches.draw(step).train(learner, step)
    start = {name: tensor.clone() for name, tensor in tensors_of(learner.teacher).items()}
    if options.start is not None:
        save_file(start, options.start)
    return start


def _real(data: Path) -> DataSource:
    nih = TableConfig(path=data / "nih_cxr14" / "labels.csv", file="image", patient="patient_id")
    return DataSource(folder=data / "nih_cxr14" / "images_224", table=nih, patient_range=TRAINED)


RADIOGRAPHS = PatientLimits(holds=("images",))
"""A site that says it holds volumes, too, would spend steps on them, of noise alone."""


def _site(options: argparse.Namespace, state: Path, source: DataSource, *, steps: int | None = None) -> Site:
    state.mkdir()
    config = SiteConfig(name="site", data=(source,), state=state, devices=("cpu",), privacy=RADIOGRAPHS)
    return Site(anchored(config, state), _study(options, steps=steps), "0" * 16)


def _study(
    options: argparse.Namespace, *, steps: int | None = None, arm: Arm | None = None, rate: float = 0, noise: float = 0
) -> StudyConfig:
    """`nano` for as many steps at the size asked for; with an arm, private."""
    raw = dict(read_yaml(ROOT / "configs" / "study" / "nano.yaml"))
    size = {"image_size": [options.pixels] * 2}
    raw["model"], raw["views"] = dict(raw["model"]) | size, dict(raw["views"]) | size
    raw["seed"] = options.seed
    raw["schedule"] = {"rounds": 1, "local_steps": steps or options.steps}
    raw["optimiser"] = {"lr": 5e-4, "warmup_steps": 5}
    if options.objective == "reconstruction":
        raw = with_reconstruction(raw, reconstruction_weight=options.start_weight)
    if arm:
        raw |= _private(options, arm, rate, noise)
        raw["objective"] = dict(raw["objective"]) | _private_objective(options)
    return parse(StudyConfig, raw, where="nano")


def _private(options: argparse.Namespace, arm: Arm, rate: float, noise: float) -> dict[str, Any]:
    clip_norm = options.clip_norm if arm.clipped else UNCLIPPED
    deviation = noise * clip_norm / options.batch
    # Where noise drowns the gradient, all optimisers then step as far as AdamW does.
    lr = {"adamw": 1.0, "noise_aware_adamw": FLOOR**0.5, "momentum_sgd": 1 / deviation}[arm.optimiser]
    lr *= options.lr if arm.trained == FEW else options.lr / 10
    optimiser = {"name": arm.optimiser, "lr": lr, "warmup_steps": 5, "clip_norm": None}
    return {
        "optimiser": optimiser | ({"noise_floor": FLOOR} if arm.optimiser == "noise_aware_adamw" else {}),
        "batch": {"images": options.batch, "volumes": 100_000},  # of volumes none are here; their centre is not judged
        "privacy": {
            "mode": "patient",
            "max_epsilon": 1e6,
            "delta": DELTA,
            "clip_norm": clip_norm,
            "noise_multiplier": noise,
            "centre_noise": CENTRE[options.objective][0],
            "trained": arm.trained,
            "sampling_rate": {"images": rate, "volumes": rate},
            "scans_per_patient": 1,
        },
    }


def _private_objective(options: argparse.Namespace) -> dict[str, Any]:
    settings = {"centre_momentum": CENTRE[options.objective][1], "teacher_momentum": list(TEACHER_MOMENTUM)}
    is_plus = options.objective == "reconstruction"
    return settings | ({"reconstruction_weight": RECONSTRUCTION_WEIGHT} if is_plus else {})


def _line(result: Result) -> str:
    arm, gain = result.arm, result.gain
    low, high = gain.interval
    drawn = "; error {:.4f} to {:.4f}".format(*result.errors)
    return (
        f"{arm.name:22} {result.values:9,} values, multiplier {result.noise_multiplier:6.3g}, noise "
        f"{result.noise_to_most:6.3g}x the clip, {result.noise_to_sum:6.3g}x the sum; AUC {gain.before:.3f} to "
        f"{gain.after:.3f}, {gain.value:+.3f} [{low:+.3f}, {high:+.3f}]{drawn}; {result.seconds:.0f} s"
    )


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    named = {arm.name: arm for arm in ARMS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=named, default=list(named), metavar="ARM", help=", ".join(named))
    parser.add_argument("--objective", choices=tuple(CENTRE), default="reconstruction", help="(default: the latter)")
    parser.add_argument("--steps", type=int, default=40, help="of an arm (default: 40)")
    parser.add_argument("--batch", type=int, default=90, help="patients that a step expects (default: 90)")
    parser.add_argument(
        "--lr",
        type=float,
        default=3e-2,
        help="of AdamW, of norms and biases; a tenth of it where matrices are trained (default: 3e-2)",
    )
    parser.add_argument("--clip-norm", type=float, default=1000.0, help="(default: 1000)")
    parser.add_argument("--pixels", type=int, default=40, help="sides of a view (default: 40)")
    parser.add_argument("--phantoms", type=int, default=300, help="synthetic patients of the start (default: 300)")
    parser.add_argument("--start-steps", type=int, default=200, help="(default: 200)")
    parser.add_argument("--start-weight", type=float, default=5.0, help="of reconstruction (default: 5, as published)")
    parser.add_argument("--seed", type=int, default=0, help="of the start (default: 0)")
    parser.add_argument("--start", type=Path, metavar="FILE", help="where the start is kept for another call")
    parser.add_argument("--at-once", type=int, default=1, help="patients worked out side by side (default: 1)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    options.arms = [named[name] for name in options.arms]
    return options


if __name__ == "__main__":
    main()
