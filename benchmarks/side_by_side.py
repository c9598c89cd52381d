"""Cases measured side by side: each in a process of its own, taking turns step by step.

So whatever else the machine does falls on all alike, and each case has a peak of memory of its own. On a GPU, which
does one program's work at a time and counts the memory of each by itself, they come one after the other in one process.
"""

import argparse
import gc
import json
import multiprocessing
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch

from unimiss_core.device import device_of
from unimiss_core.errors import ConfigError

WARM_UP = 2
COMPILER = "torch._dynamo"


class Case(Protocol):
    """What is measured; it is sent to its process."""

    @property
    def title(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def loads_compiler(self) -> bool:
        """Whether it uses what loads torch's compiler though nothing is compiled, as torch's optimisers, vmap and
        recomputing do: 80 MB of libraries, which are not to count."""


Build = Callable[[Any], Callable[[], float]]
"""From a case to its step, which returns its loss; a function of a module, for it is sent by its name."""


class Taken(NamedTuple):
    """One step."""

    wall_s: float
    cpu_s: float
    loss: float


@dataclass(frozen=True)
class Figures:
    """Times in seconds: medians, with the quartiles of wall time; memory above that of the bare libraries."""

    wall_s: float
    wall_quartiles_s: tuple[float, float]
    cpu_s: float
    peak_mb: float
    first_loss: float
    repeats: int


CaseT = TypeVar("CaseT", bound=Case)


@dataclass(frozen=True)
class Result(Figures, Generic[CaseT]):
    case: CaseT


class CaseLostError(Exception):
    """The process of a case ended before its figures were there."""


def measure(cases: Sequence[Case], build: Build, repeats: int) -> list[Figures]:
    """Figures of `repeats` steps of each case, after WARM_UP.

    Raises CaseLostError; the other processes, being daemons, end with this one.
    """
    if any(is_gpu(case.device) for case in cases):
        return [_alone(case, build, repeats) for case in cases]
    return _in_turn(cases, build, repeats)


def _alone(case: Case, build: Build, repeats: int) -> Figures:
    """Of a case on a GPU; what it was is told at once, for such a machine may be lent by the minute."""
    torch.set_num_threads(case.threads)
    torch.cuda.set_device(torch.device(case.device).index or 0)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = _peak_mb(case)
    try:
        step = build(case)
        steps = [_taken(step, case) for _ in range(WARM_UP + repeats)]
    except torch.OutOfMemoryError:
        raise CaseLostError(f"{case.title}, does not fit into the memory of {case.device}") from None
    figures = _figures(steps, peak_mb=_peak_mb(case) - before)
    _say(f"{case.title}: {figures.wall_s:.4f} s, {figures.peak_mb:.0f} MB; the first step took {steps[0].wall_s:.1f} s")
    return figures


def _in_turn(cases: Sequence[Case], build: Build, repeats: int) -> list[Figures]:
    """Of cases whose processes live together, one step of one case at a time."""
    context = multiprocessing.get_context("spawn")
    pipes, workers = [], []
    for case in cases:
        _say(f"building {case.title}")
        here, there = context.Pipe()
        worker = context.Process(target=_work, args=(case, build, there), daemon=True)
        worker.start()
        there.close()  # or this process would wait for itself where the other one has ended
        pipes.append(here)
        workers.append(worker)
        _heard(case, here)  # built: no two cases are built at once
    steps: list[list[Taken]] = [[] for _ in cases]
    for number in range(WARM_UP + repeats):
        _say(f"step {number + 1} of {WARM_UP + repeats}, of {len(cases)} cases each")
        for case, pipe, taken in zip(cases, pipes, steps, strict=True):
            pipe.send("step")
            taken.append(_heard(case, pipe))
    figures = []
    for case, pipe, worker, taken in zip(cases, pipes, workers, steps, strict=True):
        pipe.send("stop")
        figures.append(_figures(taken, peak_mb=_heard(case, pipe)))
        worker.join()
    return figures


def run(
    parser: argparse.ArgumentParser,
    cases: Callable[[argparse.Namespace], Iterable[Sequence[CaseT]]],
    build: Build,
    table: Callable[[Sequence[Result[CaseT]]], str],
) -> None:
    """A benchmark's life: measure each of the sets of `cases` that were asked for, print its table, write the file.

    parser: of the options that are its own; to them come those of every benchmark of a step.
    """
    _add_common(parser)
    options = parser.parse_args()
    try:
        device_of(options.device)
    except ConfigError as error:
        parser.error(str(error))
    results: list[Result[CaseT]] = []
    for alike in cases(options):
        try:
            figures = measure(alike, build, options.repeats)
        except CaseLostError as error:  # its own process has printed why
            parser.exit(1, f"{parser.prog}: {error}\n")
        measured = [Result(**vars(found), case=case) for case, found in zip(alike, figures, strict=True)]
        results += measured
        if options.json:
            content = {"machine": machine(), "results": [asdict(result) for result in results]}
            options.json.write_text(json.dumps(content, indent=2) + "\n")
        print(table(measured), flush=True)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rank", type=int, choices=[2, 3], help="2 images, 3 volumes (default: both)")
    parser.add_argument("--repeats", type=count, default=7, help=f"measured steps, after {WARM_UP} (default: 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument("--prototypes", type=count, default=65_536, help="default: 65536")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help=f"cpu, cuda or cuda:N (default: {device})")
    parser.add_argument("--threads", type=count, default=torch.get_num_threads(), help="default: %(default)s")


def processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def machine() -> dict[str, str]:
    """What the figures were taken with."""
    return {"torch": torch.__version__, "python": platform.python_version(), "processor": processor()}


def count(text: str) -> int:
    """For argparse: a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text}")
    return int(text)


def _heard(case: Case, pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError):
        raise CaseLostError(f"{case.title}, ended before it was measured; see above") from None


def _say(what: str) -> None:
    """A sign of life, beside the figures."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def _figures(taken: Sequence[Taken], *, peak_mb: float) -> Figures:
    walls, cpus = [step.wall_s for step in taken[WARM_UP:]], [step.cpu_s for step in taken[WARM_UP:]]
    low, high = (torch.tensor(walls).quantile(q).item() for q in (0.25, 0.75))
    return Figures(median(walls), (low, high), median(cpus), peak_mb, taken[0].loss, len(walls))


def _work(case: Case, build: Build, pipe: Connection) -> None:
    """A process's life: build, then a step for each 'step', then its peak memory."""
    torch.set_num_threads(case.threads)
    torch.ones(8).sum().item()
    if case.loads_compiler:
        import_module(COMPILER)
    before = _peak_mb(case)
    step = build(case)
    pipe.send("ready")
    while pipe.recv() == "step":
        pipe.send(_taken(step, case))
    pipe.send(_peak_mb(case) - before)
    if case.loads_compiler != (COMPILER in sys.modules):
        _say(f"{case.title}: the compiler's libraries count in its memory, or do where they should not")


def _taken(step: Callable[[], float], case: Case) -> Taken:
    wall, cpu = time.perf_counter(), time.process_time()
    loss = step()
    if is_gpu(case.device):
        torch.cuda.synchronize()
    return Taken(time.perf_counter() - wall, time.process_time() - cpu, loss)


def is_gpu(device: str) -> bool:
    """Whether a device of this name is one (`unimiss_core.device`)."""
    return device.startswith("cuda")


def _peak_mb(case: Case) -> float:
    if is_gpu(case.device):
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
