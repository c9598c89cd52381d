"""What one optimiser step costs: the naive step against ours, in time and memory.

    python benchmarks/step.py                            every case that this machine is meant for, about 8 minutes
    python benchmarks/step.py --model tiny --rank 3 --batch 2 --variant fast --precision bf16 --repeats 9
    python benchmarks/step.py --rank 3 --precision fp32 --recompute          what a switch costs
    python benchmarks/step.py --rank 3 --objective unimiss_plus              what UniMiSS+ costs beside naive UniMiSS
    python benchmarks/step.py --largest --variant fast --precision bf16      on a GPU: the largest batch that fits
    python benchmarks/step.py --profile                                      and where a bf16 step's time goes

Ours comes as a whole batch, and again with the switches that options name; without, with volumes' views in turn, and in
the least memory: one scan at a time, recomputed (on a GPU launched one operation after the other, recomputed as a whole
batch, and compiled). Other options narrow the cases; how they are measured, `side_by_side.py` tells. `naive_unimiss.py`
is the baseline, of MiT alone; of MiTplus there is ours, with the objective that trains all of it. Input sizes and
65,536 prototypes are the published ones; on a CPU the model is tiny with batches of 2 volumes or 4 images, on a GPU
small with 24, unless options say otherwise.

TFLOP/s, of ours, are of the matrix products and convolutions that it needs, forward and backward; recomputing is not
counted. Their share is of what this GPU reaches in a product of 8192 x 8192 matrices in bf16.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from statistics import median
from typing import Any, get_args

import torch
from naive_unimiss import NaiveLearner
from side_by_side import WARM_UP, Result, count, is_gpu, run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from client.execution import most_that_fit
from unimiss_core.execution import Execution
from unimiss_core.learner import Learner
from unimiss_core.model_config import AnySize, PlusSize
from unimiss_core.network import build_network
from unimiss_core.objective import new_centre
from unimiss_core.objectives import build_objective
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
    one_by_one: bool = False


WHOLE = Switches()
IN_TURN = Switches(views_in_turn=True)
LEAST_MEMORY = Switches(micro_batch=1, recompute=True)
RECOMPUTED = Switches(recompute=True)
COMPILED = Switches(compile=True)
ONE_BY_ONE = Switches(one_by_one=True)

CPU = torch.device("cpu")
MOST = 1024
"""Scans of the batch beside which the largest micro-batch is looked for."""
PROFILED = 3
"""Steps that a profile is of."""


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
    is_largest: bool = False

    @property
    def title(self) -> str:
        return f"{self.row}, {self.rank}D"

    @property
    def row(self) -> str:
        parts = [f"{self.batch} scans"] * self.is_largest + ["of UniMiSS+"] * (self.objective != "unimiss")
        on = self.switches
        parts += [f"in {on.micro_batch}s"] * (on.micro_batch is not None)
        parts += ["views in turn"] * on.views_in_turn
        parts += ["recomputed"] * on.recompute + ["compiled"] * on.compile + ["one by one"] * on.one_by_one
        return " ".join([self.variant, self.precision, *parts])

    @property
    def loads_compiler(self) -> bool:
        return self.variant == "naive" or self.switches.recompute or self.switches.compile


def main() -> None:
    run(_parser(), _cases_by_rank, _build, _table)


def _cases_by_rank(options: argparse.Namespace) -> Iterator[list[Case]]:
    gpu = is_gpu(options.device)
    model = options.model or ("small" if gpu else "tiny")
    batches: dict[Rank, int] = {2: 24, 3: 24} if gpu else {2: 4, 3: 2}
    if options.largest and not gpu:
        _parser().error("--largest: on a CPU a batch that is too large ends the process; name a GPU with --device")
    if (options.variant != "fast" and options.largest) or (options.variant == "naive" and options.profile):
        _parser().error("--largest and --profile are of ours; give --variant fast")
    is_plus = model in get_args(PlusSize)
    if is_plus and options.variant == "naive":
        _parser().error(f"--model {model}: the naive step is of MiT alone; leave --variant out")
    variants = [options.variant] if options.variant else ["naive", "fast"][is_plus:]
    objective = "unimiss_plus" if is_plus else options.objective  # which alone trains its decoder
    precisions = [options.precision] if options.precision else ["fp32", "bf16"]
    chosen = Switches(
        options.micro_batch, options.views_in_turn, options.recompute, options.compile, options.one_by_one
    )
    for rank in [options.rank] if options.rank else [3, 2]:
        usual = [*[IN_TURN] * (rank == 3), *([ONE_BY_ONE, RECOMPUTED, COMPILED] if gpu else [LEAST_MEMORY])]
        ways = [chosen] if options.variant else [WHOLE, *([chosen] if chosen != WHOLE else usual)]
        cases = [
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
            if not gpu or precision == precisions[-1] or switches == WHOLE  # there it takes minutes to compile
        ]
        yield [_with_largest_batch(case) for case in cases] if options.largest else cases
        if options.profile:
            ours = [case for case in cases if case.variant == "fast" and case.switches == chosen]
            _print_profile(ours[-1])


def _with_largest_batch(case: Case) -> Case:
    """With the most scans that fit at a time, as a site finds them."""
    learner = Learner(_study(replace(case, batch=MOST)), ranks=(2, 3), execution=_execution(case))
    return replace(case, is_largest=True, batch=max(1, most_that_fit(partial(learner.fits, case.rank), MOST)))


def _build(case: Case) -> Callable[[], float]:
    """A step that returns its loss; always on the same views (B, V, C, *S)."""
    study = _study(case)
    generator = torch.Generator().manual_seed(0)
    views = torch.rand(_shape_of_views(case), generator=generator).to(case.device)
    if case.variant == "naive":
        student, teacher = (build_network(study.model, seed=0).to(case.device) for _ in range(2))
        naive = NaiveLearner(student, teacher, bf16=case.precision == "bf16")
        return lambda: naive.step(views)
    learner = Learner(study, ranks=(2, 3), execution=_execution(case))
    return lambda: learner.step(views, step=0).total


def _shape_of_views(case: Case) -> tuple[int, ...]:
    return case.batch, 2, 1, *sizes_of(case.model)[case.rank]


def sizes_of(model: str) -> dict[Rank, tuple[int, ...]]:
    """S of what a model of this size is measured on."""
    return PLUS_SIZES if model == "plus" else SMALL_SIZES if "nano" in model else SIZES


def model_settings(model: str, prototypes: int) -> dict[str, Any]:
    """Of a study, for a model of this size."""
    sizes = sizes_of(model)
    return {"size": model, "image_size": sizes[2], "volume_size": sizes[3], "prototypes": prototypes}


def _study(case: Case) -> StudyConfig:
    sizes, reconstruction = sizes_of(case.model), case.objective == "unimiss_plus"
    raw: dict[str, Any] = {
        "name": "benchmark",
        "model": {**model_settings(case.model, case.prototypes), "reconstruction": reconstruction},
        "views": {"image_size": sizes[3][1:], "volume_size": sizes[3]},  # of radiographs
        "objective": {"name": case.objective},
        "batch": {"images": case.batch, "volumes": case.batch},
    }
    return StudyConfig.model_validate(raw)


def _execution(case: Case) -> Execution:
    return Execution(
        device=torch.device(case.device),
        precision="bf16" if case.precision == "bf16" else "fp32",
        views_in_turn=case.switches.views_in_turn,
        activation_checkpointing=case.switches.recompute,
        compile=case.switches.compile,
        cuda_graphs=not case.switches.one_by_one,
        micro_batch={case.rank: case.switches.micro_batch} if case.switches.micro_batch else {},
    )


def tflop(case: Case) -> float:
    """10^12 operations of products and convolutions in a step of ours, forward and backward; they grow with the
    batch."""
    one = replace(case, batch=1, precision="fp32", switches=WHOLE, device="cpu")
    return case.batch * _operations(one) / 1e12


@cache
def _operations(case: Case) -> float:
    """Counted on tensors without values, for seconds."""
    study = _study(case)
    student, teacher = build_network(study.model, seed=0), build_network(study.model, seed=0).requires_grad_(False)
    shapes = FakeTensorMode(allow_non_fake_inputs=True)
    counter = FlopCounterMode(display=False)
    with shapes, sdpa_kernel(SDPBackend.MATH), counter:  # of fused attention some backends are not counted
        objective = build_objective(study)
        centre = new_centre(objective.representations(case.rank), student.head.prototypes.weight.shape[1], CPU)
        loss = objective(student, teacher, torch.rand(_shape_of_views(case)), centre).total
        torch.autograd.backward(loss)
    return counter.get_total_flops()


@cache
def peak_tflop_per_s(device: str) -> float:
    """What a product of 8192 x 8192 random matrices in bfloat16 reaches there, the median of 20."""
    left, right = (torch.rand(8192, 8192, device=device, dtype=torch.bfloat16) - 0.5 for _ in range(2))
    times = []
    for _ in range(20 + WARM_UP):
        torch.cuda.synchronize()
        began = time.perf_counter()
        left @ right
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * 8192**3 / median(times[WARM_UP:]) / 1e12


def _print_profile(case: Case) -> None:
    """Where a step's time goes, by operation. Of a GPU's one launched one by one: a recorded step does the same work,
    and no longer knows for whom."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = is_gpu(case.device)
    step = _build(replace(case, switches=replace(case.switches, one_by_one=True)))
    for _ in range(WARM_UP):
        step()
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as taken:
        for _ in range(PROFILED):
            step()

    def own_ms(event: Any) -> float:
        own: float = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        return own / 1e3 / PROFILED

    # On a GPU what ran there is listed under its own name and under the operation that asked for it: the latter counts.
    events = [
        event for event in taken.key_averages() if not on_gpu or event.device_type == torch.autograd.DeviceType.CPU
    ]
    whole = sum(map(own_ms, events))
    print(f"{case.title}: {whole:.1f} ms a step in operations, mean of {PROFILED}")
    for event in sorted(events, key=own_ms, reverse=True)[:15]:
        print(f"{own_ms(event):9.2f} ms {own_ms(event) / whole:6.1%} {event.count // PROFILED:6d} times  {event.key}")
    print(flush=True)


def _table(results: Sequence[Result[Case]]) -> str:
    case = results[0].case
    base = next((result for result in results if result.case.variant == "naive"), results[0])
    on_cpu = not is_gpu(case.device)  # there processor time, which other work on the machine disturbs less
    wide = max(len(result.case.row) for result in results)
    rates = "" if on_cpu else f" {'TFLOP/s':>8} {'of peak':>7}"
    lines = [
        f"{case.model}, {case.rank}D, batch {case.batch}, {case.prototypes} prototypes, {case.device}, "
        f"{case.threads} threads, median of {results[0].repeats}",
        f"{'':{wide}} {'wall s':>20} {'CPU s':>8} {'speed':>7} {'peak MB':>9} {'memory':>7} {'first loss':>11}{rates}",
    ]
    for result in results:
        low, high = result.wall_quartiles_s
        speed = base.cpu_s / result.cpu_s if on_cpu else base.wall_s / result.wall_s
        lines.append(
            f"{result.case.row:{wide}} {result.wall_s:6.3f} ({low:.3f}-{high:.3f}) {result.cpu_s:8.3f} {speed:6.2f}x "
            f"{result.peak_mb:9.0f} {result.peak_mb / base.peak_mb:6.2f}x {result.first_loss:11.5f}"
        )
        if not on_cpu and result.case.variant == "fast":
            rate, peak = tflop(result.case) / result.wall_s, peak_tflop_per_s(case.device)
            lines[-1] += f" {rate:8.1f} {rate / peak:7.1%}"
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="What one optimiser step costs, naive and ours. Without options: every case this machine is for.",
        epilog="In the table: naive and fast are the released step and ours; fp32 and bf16 the precision; 'in 1s' a "
        "batch met one scan at a time (--micro-batch 1), 'views in turn' --views-in-turn, 'recomputed' that and "
        "--recompute, 'compiled' --compile, 'one by one' --one-by-one.",
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
    parser.add_argument("--one-by-one", action="store_true", help="on a GPU, ours: steps not recorded as CUDA graphs")
    parser.add_argument("--largest", action="store_true", help="on a GPU, ours: with the largest batch that fits")
    parser.add_argument(
        "--profile", action="store_true", help="also where the time of ours goes, in bf16 unless --precision"
    )
    return parser


if __name__ == "__main__":
    main()
