"""What a round costs the coordinator: peak memory and seconds with 2 to 128 sites, beside keeping all replies.

    python -m benchmarks.federation --json federation.json
    python -m benchmarks.federation --rule median --sites 2 8 32 --no-naive

The coordinator is the real one over the in-process grid, and writes its checkpoints. The sites are stubs that hold
scans of both ranks, so that every tensor travels, and answer with a copy of one prepared update: memory and time are
the coordinator's, and as if every site had finished at the same moment, which is the worst for it. `naive` keeps every
update until all have come and then averages them, as most servers do; it is left out where it would not fit into the
memory that is free.

Each case has a process of its own. Memory is the process's peak above what it held before the coordinator was built.
Times are medians over the rounds after the first, without the time in which values are delivered.
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import resource
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import cast

import torch
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from rich.console import Console
from rich.table import Table
from torch import Tensor

from server import rounds
from server.coordinator_config import CoordinatorConfig
from server.local_grid import LocalGrid
from server.rounds import Federation
from unimiss_core import progress
from unimiss_core.codec import Layout, layout_of
from unimiss_core.config import parse
from unimiss_core.groups import Group
from unimiss_core.network import empty_network
from unimiss_core.study import StudyConfig
from unimiss_core.wire import Hello, Introduction, TrainReply, study_of

SCANS = {2: 100, 3: 50}
_M_ARENA_MAX = -8
"""Of malloc.h."""
GOAL_GROWTH = 1.10
"""Peak memory with the most sites, over that with the fewest."""
GOAL_S = 2.0
"""Of a round with 8 sites."""
RULES: dict[str, object] = {
    "mean": "mean",
    "median": "median",
    "trimmed_mean": "trimmed_mean",
    "norm_bounded_mean": "norm_bounded_mean",
    "norm_bounded_mean_fixed": {"name": "norm_bounded_mean", "max_norm": 1.0},
}


@dataclass(frozen=True)
class Case:
    sites: int
    variant: str
    rule: str
    model: str
    prototypes: int
    rounds: int
    threads: int
    out: str

    def study(self) -> StudyConfig:
        raw = {
            "name": "benchmark",
            "model": {
                "size": self.model,
                "prototypes": self.prototypes,
                "image_size": [224, 224] if self.model != "nano" else [64, 64],
                "volume_size": [16, 96, 96] if self.model != "nano" else [16, 64, 64],
            },
            "schedule": {"rounds": self.rounds, "local_steps": 2},
            "optimiser": {"warmup_steps": 1},
            "aggregation": {"rule": RULES[self.rule]},
        }
        return parse(StudyConfig, raw, where="benchmark")


@dataclass(frozen=True)
class Result:
    """peak_mb, disk_mb: above the bare process, and of what a rule spilled (MB of 10^6 bytes). seconds: of a round."""

    case: Case
    peak_mb: float
    disk_mb: float
    wall_s: float
    cpu_s: float


# ------------------------------------------------------------------------------------------------------------- sites


class Stubs:
    """All sites at once: each answers with the same prepared update."""

    def __init__(self, study: StudyConfig) -> None:
        layout = layout_of(empty_network(study.model))
        self._digest = study.digest()
        self._update = {group: _values(size, seed) for seed, (group, size) in enumerate(_sizes(layout).items())}

    def app(self) -> ClientApp:
        """Its replies hold the update's groups, still without values."""
        app = ClientApp()

        @app.query()
        def introduce(message: Message, context: Context) -> Message:
            Hello.unpack(message.content)
            return Message(Introduction(str(context.node_config["name"]), SCANS).pack(), reply_to=message)  # type: ignore[arg-type]

        @app.train()
        def train(message: Message, context: Context) -> Message:
            return Message(self._reply(message.content, str(context.node_config["name"])), reply_to=message)

        return app

    def fill(self, reply: Message) -> None:
        """Lay a copy of the values into a reply."""
        for group, array in cast(ArrayRecord, reply.content["update"]).items():
            array.data = bytes(memoryview(self._update[cast(Group, group)]))

    def _reply(self, request: RecordDict, name: str) -> RecordDict:
        study, asked = study_of(request), request["facts"]
        facts = TrainReply(
            site=name,
            run=str(asked["run"]),
            round=int(asked["round"]),  # type: ignore[arg-type]
            study_digest=self._digest,
            update={},
            scans=SCANS,  # type: ignore[arg-type]
            steps=study.schedule.local_steps,
            seconds=1.0,
            losses={"image": 1.0},
            diagnostics={},
        ).pack({}, study.wire.dtype)
        arrays = ArrayRecord()
        for group, payload in self._update.items():
            arrays[group] = Array(dtype=study.wire.dtype, shape=(len(payload) // 2,), stype="unimiss", data=b"")
        return RecordDict({"facts": facts["facts"], "update": arrays})


class Delivery(LocalGrid):
    """Delivers each reply's values when it is pulled, as a network would: one at a time, in memory of their own."""

    def __init__(self, stubs: Stubs, names: Sequence[str]) -> None:
        super().__init__(stubs.app(), {name: {"name": name} for name in names}, run_config={})
        self._stubs = stubs
        self.wall_s = self.cpu_s = 0.0
        """Spent on delivering, which is not the coordinator's."""

    def pull_messages(self, message_ids: Iterable[str]) -> Sequence[Message]:
        pulled = super().pull_messages(message_ids)
        wall_s, cpu_s = time.perf_counter(), time.thread_time()
        for message in pulled:
            if "update" in message.content:
                self._stubs.fill(message)
        self.wall_s += time.perf_counter() - wall_s
        self.cpu_s += time.thread_time() - cpu_s
        return pulled


def _sizes(layout: Layout) -> dict[Group, int]:
    return {group: sum(spec.size for spec in specs) for group, specs in layout.items()}


def _values(size: int, seed: int) -> bytearray:
    """An update's group as it travels: bf16 values of about 1e-4, drawn once for 2^20 of them."""
    some = torch.randn(2**20, generator=torch.Generator().manual_seed(seed)).mul_(1e-4).to(torch.bfloat16)
    drawn = some.view(torch.uint8).numpy().tobytes()
    return bytearray((drawn * (2 * size // len(drawn) + 1))[: 2 * size])


# ------------------------------------------------------------------------------------------------------------- naive


class KeepAll:
    """Keeps every update until all have come, then averages."""

    def __init__(self) -> None:
        self._kept: list[tuple[Mapping[str, Tensor], Mapping[Group, float]]] = []

    def fold(self, update: Mapping[str, Tensor], weights: Mapping[Group, float]) -> None:
        self._kept.append((update, weights))

    def result(self) -> dict[str, Tensor]:
        total = sum(weights["shared"] for _, weights in self._kept)
        joined = {name: torch.zeros_like(tensor) for name, tensor in self._kept[0][0].items()}
        for update, weights in self._kept:
            for name, tensor in update.items():
                joined[name] += tensor * (weights["shared"] / total)
        return joined


@contextmanager
def _keep_all(*_: object) -> Iterator[KeepAll]:
    yield KeepAll()


# ------------------------------------------------------------------------------------------------------- measurement


class Clock:
    """Wall and processor time of each round, and the most that lay spilled whenever a site had replied."""

    def __init__(self, delivery: Delivery, spilled: Path) -> None:
        self._delivery = delivery
        self._spilled = spilled
        self._began = (0.0, 0.0)
        self.rounds: list[tuple[float, float]] = []
        self.disk_bytes = 0

    def __call__(self, event: progress.Event) -> None:
        if isinstance(event, progress.RoundStarted):
            self._began = self._now()
        elif isinstance(event, progress.RoundDone):
            wall, cpu = self._now()
            self.rounds.append((wall - self._began[0], cpu - self._began[1]))
        elif isinstance(event, progress.SiteReplied) and self._spilled.is_dir():
            assert event.status == "ok", event
            self.disk_bytes = max(self.disk_bytes, sum(file.stat().st_size for file in self._spilled.iterdir()))

    def _now(self) -> tuple[float, float]:
        return time.perf_counter() - self._delivery.wall_s, time.process_time() - self._delivery.cpu_s


def measure(case: Case) -> Result:
    """In this process, which should be new."""
    torch.set_num_threads(case.threads)
    _keep_one_heap()
    study = case.study()
    stubs = Stubs(study)
    if case.variant == "naive":
        rounds.opened_aggregate = _keep_all  # type: ignore[assignment]
    torch.ones(8).sum().item()
    gc.collect()
    bare = _resident_bytes()
    names = [f"site-{index}" for index in range(case.sites)]
    config = CoordinatorConfig(
        study=Path("unused"), out=Path(case.out), min_sites=case.sites, min_replies=case.sites, keep_checkpoints=1
    )
    with Delivery(stubs, names) as grid, progress.listen(clock := Clock(grid, Path(case.out) / "updates.partial")):
        Federation(grid, study, config).run()
    measured = clock.rounds[1:]
    return Result(
        case=case,
        peak_mb=(_peak_bytes() - bare) / 1e6,
        disk_mb=clock.disk_bytes / 1e6,
        wall_s=median(wall for wall, _ in measured),
        cpu_s=median(cpu for _, cpu in measured),
    )


def _in_a_new_process(case: Case) -> Result:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (case,))


def _keep_one_heap() -> None:
    """glibc gives each thread a heap, up to 8 for a core, and keeps freed blocks of up to 32 MB in each. The stubs have
    a thread each, a coordinator over a network does not: without this, memory would grow with the number of stubs."""
    ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def _resident_bytes() -> int:
    """Of this process now (Linux), after the allocator gave back what it can."""
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _free_bytes() -> int:
    """That the machine could still give (Linux)."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


# ------------------------------------------------------------------------------------------------------------ report


def main() -> None:
    options = _options()
    results: list[Result] = []
    for sites in options.sites:
        for variant in ["ours"] if options.no_naive else ["ours", "naive"]:
            with tempfile.TemporaryDirectory(dir=options.scratch) as out:
                case = Case(
                    sites=sites,
                    variant=variant,
                    rule=options.rule,
                    model=options.model,
                    prototypes=options.prototypes,
                    rounds=options.rounds,
                    threads=options.threads,
                    out=f"{out}/run",
                )
                if variant == "naive" and (needed := _needed_bytes(case, results)) > 0.8 * _free_bytes():
                    print(f"naive with {sites} sites would need {needed / 1e9:.0f} GB: left out", flush=True)
                    continue
                results.append(_in_a_new_process(case))
                print(_line(results[-1]), flush=True)
    _print_table(results)
    _print_verdicts(results)
    if options.json is not None:
        machine = {"torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count()}
        content = {"machine": machine, "results": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _needed_bytes(case: Case, results: list[Result]) -> float:
    """As much as ours took, and each update in float32."""
    ours = next((result.peak_mb * 1e6 for result in reversed(results) if result.case.variant == "ours"), 0.0)
    return ours + 4.0 * case.sites * sum(_sizes(layout_of(empty_network(case.study().model))).values())


def _line(result: Result) -> str:
    case = result.case
    return f"{case.sites:4} {case.variant:6} {result.peak_mb:8.0f} MB {result.wall_s:7.2f} s {result.cpu_s:7.2f} CPU s"


def _print_table(results: list[Result]) -> None:
    naive = {result.case.sites: result for result in results if result.case.variant == "naive"}
    case = results[0].case
    table = Table(title=f"{case.model}, {case.prototypes} prototypes, {case.rule}, {case.threads} threads")
    for column in ("sites", "peak MB", "s", "CPU s", "spilled MB", "naive MB", "naive CPU s", "memory, naive : ours"):
        table.add_column(column, justify="right")
    for ours in results:
        if ours.case.variant != "ours":
            continue
        cells = [f"{ours.case.sites}", f"{ours.peak_mb:.0f}", f"{ours.wall_s:.2f}", f"{ours.cpu_s:.2f}"]
        cells.append(f"{ours.disk_mb:.0f}")
        if (other := naive.get(ours.case.sites)) is not None:
            cells += [f"{other.peak_mb:.0f}", f"{other.cpu_s:.2f}", f"{other.peak_mb / ours.peak_mb:.2f}"]
        table.add_row(*cells)
    Console(width=110).print(table)


def _print_verdicts(results: list[Result]) -> None:
    ours = sorted((result for result in results if result.case.variant == "ours"), key=lambda result: result.case.sites)
    few, many = ours[0], ours[-1]
    if few is not many:
        growth = many.peak_mb / few.peak_mb
        print(
            f"memory from {few.case.sites} to {many.case.sites} sites: x {growth:.3f}, {_verdict(growth, GOAL_GROWTH)}"
        )
        slopes = [(b.cpu_s - a.cpu_s) / (b.case.sites - a.case.sites) for a, b in pairwise(ours)]
        print("CPU s for each further site: " + ", ".join(f"{slope:.3f}" for slope in slopes))
    for result in ours:
        if result.case.sites == 8:
            print(f"a round with 8 sites: {result.wall_s:.2f} s, {_verdict(result.wall_s, GOAL_S)}")


def _verdict(found: float, goal: float) -> str:
    return f"{'PASS' if found <= goal else 'FAIL'} (at most {goal:g})"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What a round costs the coordinator.")
    parser.add_argument("--sites", type=int, nargs="+", default=[2, 8, 32, 128])
    parser.add_argument("--rule", choices=list(RULES), default="mean")
    parser.add_argument("--model", choices=["nano", "tiny", "small"], default="small")
    parser.add_argument("--prototypes", type=int, default=65_536)
    parser.add_argument("--rounds", type=int, default=4, help="of a case; the first is not counted (default: 4)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-naive", action="store_true")
    parser.add_argument("--scratch", type=Path, help="where runs are written (default: the system's temporary folder)")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
