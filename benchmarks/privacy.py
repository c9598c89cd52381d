"""What privacy costs in an optimiser step: the private step against the plain one over the same patients.

    python benchmarks/privacy.py                         tiny, 3D and 2D, some minutes
    python benchmarks/privacy.py --model nano --rank 2 --patients 36 --threads 1
    python benchmarks/privacy.py --precision bf16 --json privacy.json

Plain is `Learner.step` over a batch with one scan of each patient, met as a whole; private is
`PrivateLearner.private_step` over the views of the same patients, each worked out alone, or `--at-once` several. The
two run in processes of their own and take turns, step by step. Input sizes and 65,536 prototypes are the published
ones, as in `step.py`; views are random numbers that wait in memory, so reading scans and drawing views is no part of
this.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from side_by_side import Result, count, run
from step import model_settings, sizes_of

from unimiss_core.config import parse
from unimiss_core.execution import Execution
from unimiss_core.learner import Learner
from unimiss_core.private_learner import PrivateLearner
from unimiss_core.scan import Rank
from unimiss_core.study import StudyConfig

GOAL_TIME = 2.0
GOAL_MEMORY = 1.2
"""What is asked of the private step at most, in plain ones; of time, on a CPU."""

PRIVACY = {"mode": "patient", "max_epsilon": 1e6, "clip_norm": 1.0, "noise_multiplier": 1.0, "centre_noise": 0.01}
"""Numbers that cost as much time as any others; so little noise on the centre that no batch is refused as too small."""


@dataclass(frozen=True)
class Case:
    private: bool
    model: str
    rank: Rank
    patients: int
    views: int
    precision: str
    prototypes: int
    device: str
    threads: int
    at_once: int

    @property
    def title(self) -> str:
        return f"{'private' if self.private else 'plain'}, {self.rank}D"

    @property
    def loads_compiler(self) -> bool:
        return self.private and self.at_once > 1


def main() -> None:
    run(_parser(), _pairs, _build, _table)


def _pairs(options: argparse.Namespace) -> Iterator[tuple[Case, Case]]:
    """(plain, private) of each rank."""
    for rank in [options.rank] if options.rank else [3, 2]:
        settings = {
            "model": options.model,
            "rank": rank,
            "patients": options.patients,
            "views": options.views,
            "precision": options.precision,
            "prototypes": options.prototypes,
            "device": options.device,
            "threads": options.threads,
            "at_once": options.at_once,
        }
        yield Case(private=False, **settings), Case(private=True, **settings)


def _build(case: Case) -> Callable[[], float]:
    """A step that returns its mean loss; always on the same views (B, V, C, *S) of as many patients."""
    study = _study(case)
    execution = Execution(
        device=torch.device(case.device),
        precision="bf16" if case.precision == "bf16" else "fp32",
        patients_at_once=case.at_once,
    )
    generator = torch.Generator().manual_seed(0)
    views = torch.rand(case.patients, case.views, 1, *sizes_of(case.model)[case.rank], generator=generator).to(
        execution.device
    )
    if not case.private:
        plain = Learner(study, ranks=(2, 3), execution=execution)
        return lambda: plain.step(views, step=0).total
    private = PrivateLearner(study, ranks=(2, 3), execution=execution)
    return lambda: private.private_step(views.split(1), rank=case.rank, step=0).total


def _study(case: Case) -> StudyConfig:
    raw: dict[str, Any] = {
        "name": "benchmark",
        "model": model_settings(case.model, case.prototypes),
        "views": {"views": case.views},
        "batch": {"images": case.patients, "volumes": case.patients},
    }
    return parse(StudyConfig, raw | ({"privacy": PRIVACY} if case.private else {}), where="benchmark")


def _table(pair: Sequence[Result[Case]]) -> str:
    plain, private = pair
    case = plain.case
    lines = [
        f"{case.model}, {case.rank}D, {case.patients} patients of {case.views} views, {case.prototypes} prototypes, "
        f"{case.precision}, {case.device}, {case.threads} threads, median of {plain.repeats}",
        f"{'':8} {'wall s':>19} {'':>6} {'CPU s':>8} {'':>6} {'peak MB':>9}",
    ]
    for name, result in (("plain", plain), ("private", private)):
        low, high = result.wall_quartiles_s
        lines.append(
            f"{name:8} {result.wall_s:7.3f} ({low:.2f}-{high:.2f}) {result.wall_s / plain.wall_s:5.2f}x "
            f"{result.cpu_s:8.3f} {result.cpu_s / plain.cpu_s:5.2f}x {result.peak_mb:9.0f} "
            f"{result.peak_mb / plain.peak_mb:5.2f}x"
        )
    lines.append(_verdict(f"{case.rank}D, time", private.wall_s / plain.wall_s, GOAL_TIME))
    lines.append(_verdict(f"{case.rank}D, memory", private.peak_mb / plain.peak_mb, GOAL_MEMORY))
    return "\n".join(lines) + "\n"


def _verdict(what: str, ratio: float, most: float) -> str:
    return f"{'PASS' if ratio <= most else 'FAIL'}: {what}: {ratio:.2f}x the plain step's, at most {most:g}x is asked"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="What privacy costs in an optimiser step: the private step against the plain one, same patients."
    )
    parser.add_argument("--model", choices=["nano", "tiny", "small"], default="tiny", help="default: tiny")
    parser.add_argument("--patients", type=count, default=8, help="in a step, with one scan each (default: 8)")
    parser.add_argument("--views", type=count, default=2, help="of each scan (default: 2)")
    parser.add_argument("--at-once", type=count, default=1, help="patients worked out together (default: 1)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="default: fp32")
    return parser


if __name__ == "__main__":
    main()
