"""What one optimiser step costs: the naive step against ours, in time and memory.

    python benchmarks/step.py                            every case that this machine is meant for, about 8 minutes
    python benchmarks/step.py --model tiny --rank 3 --batch 2 --variant fast --precision bf16 --repeats 9
    python benchmarks/step.py --rank 3 --precision fp32 --recompute          what a switch costs
    python benchmarks/step.py --rank 3 --objective unimiss_plus              what UniMiSS+ costs beside naive UniMiSS

Ours comes as a whole batch, and again with the switches that options name; without, with volumes' views in turn, and in
the least memory: one scan at a time, recomputed. Other options narrow the cases. The cases of one rank run in processes
of their own and take turns, step by step, so that whatever else the machine does falls on all alike. `naive_unimiss.py`
is the baseline, of MiT alone; of MiTplus there is ours, with the objective that trains all of it. Input sizes and
65,536 prototypes are the published ones; on a CPU the model is tiny with batches of 2 volumes or 4 images, on a GPU
small with 24, unless options say otherwise.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import get_args

import torch
from naive_unimiss import NaiveLearner
from side_by_side import Result, count, run

from unimiss_core.execution import Execution
from unimiss_core.learner import Learner
from unimiss_core.model_config import AnySize, PlusSize
from unimiss_core.network import build_network
from unimiss_core.scan import Rank
from unimiss_core.study import StudyConfig

SIZES: dict[Rank, tuple[int, ...]] = {2: (224, 224), 3: (16, 96, 96)}
SMALL_SIZES: dict[Rank, tuple[int, ...]] = {2: (64, 64), 3: (16, 64, 64)}
"""For nano and plus_nano."""
PLUS_SIZES: dict[Rank, tuple[int, ...]] = {2: (96, 96), 3: (16, 96, 96)}


@dataclass(frozen=True)
class Switches:
    """Of `unimiss_core.execution.Execution`; by default none is on."""

    micro_batch: int | None = None
    views_in_turn: bool = False
    recompute: bool = False
    compile: bool = False


WHOLE = Switches()
IN_TURN = Switches(views_in_turn=True)
LEAST_MEMORY = Switches(micro_batch=1, recompute=True)


@dataclass(frozen=True)
class Case:
    model: str
    rank: Rank
    batch: int
    variant: str
    precision: str
    prototypes: int
    device: str
    threads: int
    switches: Switches = WHOLE
    objective: str = "unimiss"

    @property
    def title(self) -> str:
        return f"{self.row}, {self.rank}D"

    @property
    def row(self) -> str:
        parts = ["of UniMiSS+"] * (self.objective != "unimiss")
        on = self.switches
        parts += [f"in {on.micro_batch}s"] * (on.micro_batch is not None)
        parts += ["views in turn"] * on.views_in_turn
        parts += ["recomputed"] * on.recompute + ["compiled"] * on.compile
        return " ".join([self.variant, self.precision, *parts])

    @property
    def loads_compiler(self) -> bool:
        return self.variant == "naive" or self.switches.recompute or self.switches.compile


def main() -> None:
    run(_parser(), _cases_by_rank, _build, _table)


def _cases_by_rank(options: argparse.Namespace) -> Iterator[list[Case]]:
    gpu = options.device.startswith("cuda")
    model = options.model or ("small" if gpu else "tiny")
    batches: dict[Rank, int] = {2: 24, 3: 24} if gpu else {2: 4, 3: 2}
    is_plus = model in get_args(PlusSize)
    if is_plus and options.variant == "naive":
        _parser().error(f"--model {model}: the naive step is of MiT alone; leave --variant out")
    variants = [options.variant] if options.variant else ["naive", "fast"][is_plus:]
    objective = "unimiss_plus" if is_plus else options.objective  # which alone trains its decoder
    precisions = [options.precision] if options.precision else ["fp32", "bf16"]
    chosen = Switches(options.micro_batch, options.views_in_turn, options.recompute, options.compile)
    for rank in [options.rank] if options.rank else [3, 2]:
        others = [chosen] if chosen != WHOLE else [*[IN_TURN] * (rank == 3), LEAST_MEMORY]
        ways = [chosen] if options.variant else [WHOLE, *others]
        yield [
            Case(
                model=model,
                rank=rank,
                batch=options.batch or batches[rank],
                variant=variant,
                precision=precision,
                prototypes=options.prototypes,
                device=options.device,
                threads=options.threads,
                switches=switches,
                objective=objective if variant == "fast" else "unimiss",
            )
            for variant, precision, switches in product(variants, precisions, ways)
            if options.precision or (variant, precision) != ("naive", "bf16")  # the baseline is float32
            if variant == "fast" or switches == WHOLE
        ]


def _build(case: Case) -> Callable[[], float]:
    """A step that returns its loss; always on the same views (B, V, C, *S)."""
    sizes = PLUS_SIZES if case.model == "plus" else SMALL_SIZES if "nano" in case.model else SIZES
    study = StudyConfig.model_validate(
        {
            "name": "benchmark",
            "model": {
                "size": case.model,
                "image_size": sizes[2],
                "volume_size": sizes[3],
                "prototypes": case.prototypes,
                "reconstruction": case.objective == "unimiss_plus",
            },
            "views": {"image_size": sizes[3][1:], "volume_size": sizes[3]},  # of radiographs
            "objective": {"name": case.objective},
        }
    )
    generator = torch.Generator().manual_seed(0)
    views = torch.rand(case.batch, 2, 1, *sizes[case.rank], generator=generator).to(case.device)
    if case.variant == "naive":
        student, teacher = (build_network(study.model, seed=0).to(case.device) for _ in range(2))
        naive = NaiveLearner(student, teacher, bf16=case.precision == "bf16")
        return lambda: naive.step(views)
    execution = Execution(
        device=torch.device(case.device),
        precision="bf16" if case.precision == "bf16" else "fp32",
        views_in_turn=case.switches.views_in_turn,
        activation_checkpointing=case.switches.recompute,
        compile=case.switches.compile,
        micro_batch={case.rank: case.switches.micro_batch} if case.switches.micro_batch else {},
    )
    learner = Learner(study, ranks=(2, 3), execution=execution)
    return lambda: learner.step(views, step=0).total


def _table(results: Sequence[Result[Case]]) -> str:
    case = results[0].case
    base = next((result for result in results if result.case.variant == "naive"), results[0])
    on_cpu = not case.device.startswith("cuda")  # there processor time, which other work on the machine disturbs less
    wide = max(len(result.case.row) for result in results)
    lines = [
        f"{case.model}, {case.rank}D, batch {case.batch}, {case.prototypes} prototypes, {case.device}, "
        f"{case.threads} threads, median of {results[0].repeats}",
        f"{'':12} {'wall s':>16} {'CPU s':>8} {'speed':>7} {'peak MB':>9} {'memory':>7} {'first loss':>11}",
    ]
    for result in results:
        low, high = result.wall_quartiles_s
        speed = base.cpu_s / result.cpu_s if on_cpu else base.wall_s / result.wall_s
        lines.append(
            f"{result.case.row:{wide}} {result.wall_s:6.3f} ({low:.2f}-{high:.2f}) {result.cpu_s:8.3f} {speed:6.2f}x "
            f"{result.peak_mb:9.0f} {result.peak_mb / base.peak_mb:6.2f}x {result.first_loss:11.5f}"
        )
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="What one optimiser step costs, naive and ours. Without options: every case this machine is for.",
        epilog="In the table: naive and fast are the released step and ours; fp32 and bf16 the precision; 'in 1s' a "
        "batch met one scan at a time (--micro-batch 1), 'views in turn' --views-in-turn, 'recomputed' that and "
        "--recompute, 'compiled' --compile.",
    )
    parser.add_argument("--model", choices=get_args(AnySize), help="default: small on a GPU, else tiny")
    parser.add_argument("--batch", type=count, help="scans in a step (default: 24 on a GPU; else 4 images, 2 volumes)")
    parser.add_argument("--variant", choices=["naive", "fast"], help="default: both")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="default: both for ours, fp32 for the naive step")
    objectives = ["unimiss", "unimiss_plus"]
    parser.add_argument("--objective", choices=objectives, default="unimiss", help="of ours (default: unimiss)")
    parser.add_argument("--micro-batch", type=count, help="scans in one forward pass of ours (default: the batch)")
    parser.add_argument("--views-in-turn", action="store_true", help="ours with some views of volumes at a time")
    parser.add_argument("--recompute", action="store_true", help="ours with activation checkpointing")
    parser.add_argument("--compile", action="store_true", help="ours with torch.compile")
    return parser


if __name__ == "__main__":
    main()
