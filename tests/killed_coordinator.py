"""A program: coordinators are killed (SIGKILL) at random instants until a run is finished, again and again.

    python -m tests.killed_coordinator FOLDER KILLS SEED

Each process forks from one that has run a federation, so that the instants fall into the run, not into imports.
Prints one JSON line: kills in all, where they fell (how many rounds were finished), how many left a checkpoint
half written, and whether each run ended with the bits of an unbroken one.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch

import server.exchange
import server.roster
from server.coordinator_config import CoordinatorConfig
from server.local_grid import LocalGrid
from server.rounds import Federation
from tests.federation import NARROW, StubSite, small_study, stub_app
from unimiss_core import checkpoint, durable
from unimiss_core.model import ARCHITECTURES

ROUNDS = 3
STUDY = small_study(
    ROUNDS, aggregation={"server_optimiser": {"name": "fedadam"}, "rule": {"name": "median"}}, wire={"dtype": "int8"}
)


def main() -> None:
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    server.exchange.FIRST_PAUSE_S = server.roster.POLL_S = server.roster.LONGEST_POLL_S = 0.002
    ARCHITECTURES["nano"] = NARROW
    _federate(folder / "warm")  # torch and Numba import and compile more when they are used, for seconds
    chance = random.Random(seed)
    began = time.monotonic()
    assert _run(folder / "unbroken", kill_after_s=None)
    took = time.monotonic() - began
    rounds: Counter[int] = Counter()
    half_written = runs = 0
    same = True
    while sum(rounds.values()) < kills or (len(rounds) < 3 and sum(rounds.values()) < 3 * kills):
        out = folder / f"run-{runs}"
        while not _run(out, kill_after_s=chance.uniform(0.0, took)):
            found = checkpoint.latest(out / "checkpoints")
            rounds[-1 if found is None else checkpoint.read_manifest(found).round] += 1
            half_written += any((out / "checkpoints").glob(f"*{durable.PARTIAL}"))
        runs += 1
        same = same and _equal(out, folder / "unbroken")
    told = {"kills": sum(rounds.values()), "after_rounds": rounds, "half_written": half_written, "runs": runs}
    print(json.dumps({**told, "same": same, "unbroken_s": round(took, 2)}))


def _run(out: Path, *, kill_after_s: float | None) -> bool:
    """Start, or go on with, the run of `out` in a process of its own; whether it ended by itself, and well."""
    if (child := os.fork()) == 0:
        try:
            _federate(out)
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    if os.WEXITSTATUS(status) != 0:
        raise SystemExit("a coordinator failed instead of being killed")
    return True


def _federate(out: Path) -> None:
    sites = {"xray": StubSite("xray", {2: 10}), "ct": StubSite("ct", {3: 6}), "both": StubSite("both", {2: 3, 3: 3})}
    config = CoordinatorConfig(study=Path("unused"), out=out, wait_s=5.0, min_sites=3, min_replies=3)
    with LocalGrid(stub_app(sites), {name: {"name": name} for name in sites}, run_config={}) as grid:
        Federation(grid, STUDY, config).run(resume=True)


def _equal(ours: Path, theirs: Path) -> bool:
    """Whether both ended with the same weights, teacher and bookkeeping, and have one line for each round."""
    a, b = (checkpoint.load(out / "checkpoints" / checkpoint.folder_name(ROUNDS)) for out in (ours, theirs))
    if a.manifest.sha256 != b.manifest.sha256:
        return False
    lines = [json.loads(line)["round"] for line in (ours / "metrics.jsonl").read_text().splitlines()]
    return lines == list(range(1, ROUNDS + 1)) and all(torch.equal(a.student[n], b.student[n]) for n in b.student)


if __name__ == "__main__":
    main()
