"""What travels in a round, and what the wire's formats lose of it.

    python -m benchmarks.wire bytes [--json FILE]
    python -m benchmarks.wire loss --seeds 0 1 [--json FILE]       some minutes of one processor

`bytes` counts from the model's layout, without training: both ways of a round by kind of site, against sending the
whole student in float32 both ways. `loss` trains `nano` on phantoms, an X-ray site and a CT site, in each format. The
first fp32 run is also watched: every update and every student in it goes through the other formats, so that all are
measured on the same values, and some through block quantisers of other shapes than the one that was chosen.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
import yaml
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from numpy.typing import NDArray
from torch import Tensor

from client.app import app as client_app
from client.phantoms import PhantomConfig, write_hospital
from server.coordinator_config import load_coordinator
from server.local_grid import LocalGrid
from server.rounds import Federation
from server.run_folder import RunFolder
from server.simulate import prepare, read_simulation, site_node_config
from unimiss_core.codec import Layout, carried_over, layout_of, num_bytes, released
from unimiss_core.formats import BLOCK, FORMATS
from unimiss_core.groups import groups_of_ranks
from unimiss_core.loss_terms import mean_cross_entropy
from unimiss_core.network import empty_network
from unimiss_core.scan import Rank
from unimiss_core.study import ModelConfig, StudyConfig
from unimiss_core.wire import TrainReply, TrainRequest

ROOT = Path(__file__).parents[1]
SITES: dict[str, frozenset[Rank]] = {"2D only": frozenset({2}), "3D only": frozenset({3}), "both": frozenset({2, 3})}
GOALS = {"bf16": 0.35, "int8": 0.18}
"""Largest share that is asked of a 2D-only site, of `small` with the published number of prototypes."""

LOCAL_STEPS = 3
KINDS: tuple[Literal["cr", "ct"], ...] = ("cr", "ct")
"""The phantom hospitals of `loss`: one of X-rays, one of CT."""

Tensors = Mapping[str, Tensor]


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    content = bytes_section() if options.section == "bytes" else loss_section(options.seeds, options.rounds)
    if options.json:
        options.json.write_text(json.dumps(content, indent=2) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=["bytes", "loss"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


# -- bytes -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Bytes of one round with one site that took part in the round before; `first_down` where it did not.

    In a first round of the study the teacher is the student, and half of `first_down` travels.
    """

    down: int
    up: int
    first_down: int
    share: float
    """Of the whole student in float32 both ways."""


def traffic(model: ModelConfig, ranks: frozenset[Rank], dtype: str) -> Traffic:
    whole = layout_of(empty_network(model))
    held: Layout = {group: whole[group] for group in groups_of_ranks(ranks)}
    step = num_bytes(held, dtype)
    student = num_bytes(held, "fp32") if FORMATS[dtype].carries_over else step
    return Traffic(
        down=step,
        up=step,
        first_down=student + num_bytes(held, "fp32"),
        share=2 * step / (2 * num_bytes(whole, "fp32")),
    )


def bytes_section() -> dict[str, Any]:
    content = {}
    for prototypes in (65_536, 1_024):
        model = ModelConfig(size="small", image_size=(224, 224), volume_size=(16, 96, 96), prototypes=prototypes)
        layout = layout_of(empty_network(model))
        sizes = {group: sum(spec.size for spec in specs) for group, specs in layout.items()}
        total = sum(sizes.values())
        rows = {
            f"{name}, {dtype}": asdict(traffic(model, ranks, dtype))
            for name, ranks in SITES.items()
            for dtype in ("fp32", "bf16", "int8")
        }
        content[str(prototypes)] = {"values": sizes, "rows": rows}
        told = ", ".join(f"{group} {size:,} ({size / total:.3f})" for group, size in sizes.items())
        print(f"small, {prototypes:,} prototypes, {total:,} values: {told}")
        for name, row in rows.items():
            print(f"  {name:14} down {row['down']:>12,}  up {row['up']:>12,}  share {row['share']:.4f}")
        for dtype, most in GOALS.items():
            share = rows[f"2D only, {dtype}"]["share"]
            print(f"  {'PASS' if share <= most else 'FAIL'}: 2D only, {dtype}: {share:.4f}, at most {most} is asked")
    return content


# -- loss of accuracy --------------------------------------------------------------------------------------------------


def loss_section(seeds: list[int], rounds: int) -> dict[str, Any]:
    began = time.process_time()
    watch = Watch()
    losses: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for kind in KINDS:
            write_hospital(PhantomConfig(kind=kind, patients=12), folder / kind)
        for seed, dtype in product(seeds, ("fp32", "bf16", "int8")):
            watched = watch if (seed, dtype) == (seeds[0], "fp32") else None
            loss = _train(folder / f"{seed}-{dtype}", dtype, seed, rounds, watched)
            losses.setdefault(str(seed), {})[dtype] = loss
            print(f"seed {seed}, {dtype}: {loss:.4f} nats", flush=True)
    figures = {"losses": losses, "rounds": rounds, **watch.figures()}
    print("\n".join(_lines(figures)))
    print(f"{time.process_time() - began:.0f} s of processor time")
    return figures


def _train(out: Path, dtype: str, seed: int, rounds: int, watch: "Watch | None") -> float:
    """Train a federation; the mean cross-entropy over its sites and its last quarter of rounds, in nats."""
    out.mkdir()
    simulation = {
        "study": str(ROOT / "configs" / "study" / "nano.yaml"),
        "overrides": {
            "seed": seed,
            "wire": {"dtype": dtype},
            "optimiser": {"warmup_steps": rounds},
            "schedule": {"rounds": rounds, "local_steps": LOCAL_STEPS},
            "batch": {"images": 6, "volumes": 1},
            "views": {"image_size": [33, 40], "volume_size": [13, 33, 36]},
        },
        "sites": [{"name": kind, "data": [{"folder": str(out.parent / kind / "scans")}]} for kind in KINDS],
    }
    (out / "simulation.yaml").write_text(yaml.safe_dump(simulation))
    read = read_simulation(out / "simulation.yaml")
    coordinator, study = load_coordinator(prepare(read, out, resume=False)), read.study
    nodes = {site.name: site_node_config(out, site.name) for site in read.config.sites}
    with LocalGrid(watch.app(study) if watch else client_app, nodes, run_config={}) as grid:
        state = Federation(grid, study, coordinator).run()
    if watch:
        watch.student(state.student)
    rows = RunFolder(out).metric_rows()[-max(1, rounds // 4) :]
    return fmean(mean_cross_entropy(line["losses"]) for row in rows for line in row["sites"].values())


class Watch:
    """Sees what an exact run sends and receives, and makes of it what other formats would."""

    def __init__(self) -> None:
        self._updates: dict[tuple[str, str], Updates] = {}
        self._students: list[dict[str, Tensor]] = []
        self._release: dict[str, Tensor] = {}
        self._strayed: dict[str, list[float]] = {"bf16": [], "int8 steps": [], "int8 whole": []}
        self._blocks: dict[str, list[float]] = {}

    def app(self, study: StudyConfig) -> ClientApp:
        """The site's app, and this one looks over its shoulder."""
        self._layout = layout_of(empty_network(study.model))
        app = ClientApp()
        app.query()(client_app)

        @app.train()
        def train(message: Message, context: Context) -> Message:
            reply = client_app(message, context)
            site = Path(str(context.node_config["site"])).parent.name
            held = {group: self._layout[group] for group in groups_of_ranks({2} if site == "cr" else {3})}
            if site == "ct":  # it is sent every group
                request = TrainRequest.unpack(message.content, held)
                assert request.student is not None
                self.student(request.student)
            self._update(site, held, TrainReply.unpack(reply.content, held, "fp32"))
            return reply

        return app

    def student(self, student: Tensors) -> None:
        """The master after one more round."""
        if not self._students:
            self._students = [dict(student)]
            self._release = dict(student)
            return
        way = _distance(student, self._students[0])
        step = {name: tensor - self._release[name] for name, tensor in student.items()}
        seen = released(step, self._layout, "int8")
        self._release = {name: tensor + seen[name] for name, tensor in self._release.items()}
        made = {
            "bf16": released(student, self._layout, "bf16"),
            "int8 steps": self._release,
            "int8 whole": released(student, self._layout, "int8"),
        }
        for name, tensors in made.items():
            self._strayed[name].append(_distance(tensors, student) / way)

    def _update(self, site: str, layout: Layout, reply: TrainReply) -> None:
        for dtype in ("bf16", "int8"):
            self._updates.setdefault((site, dtype), Updates(layout, dtype)).add(reply.update)
        if site == "ct" and reply.round % 5 == 0:
            for name, error in block_errors(reply.update, layout):
                self._blocks.setdefault(name, []).append(error)

    def figures(self) -> dict[str, Any]:
        return {
            "up": {f"{dtype}, {site}": updates.figures() for (site, dtype), updates in self._updates.items()},
            "down": {name: [strayed[0], strayed[-1]] for name, strayed in self._strayed.items()},
            "blocks": {name: fmean(errors) for name, errors in self._blocks.items()},
        }


@dataclass
class Updates:
    """One site's updates in one format: relative errors of what arrives, with feedback and without."""

    layout: Layout
    dtype: str
    errors: list[float] = field(default_factory=list)
    true: dict[str, Tensor] = field(default_factory=dict)
    alone: dict[str, Tensor] = field(default_factory=dict)
    fed_back: dict[str, Tensor] = field(default_factory=dict)
    lost: dict[str, Tensor] = field(default_factory=dict)

    def add(self, update: Tensors) -> None:
        alone = released(update, self.layout, self.dtype)
        sent, self.lost = carried_over(update, self.lost, self.layout, self.dtype)
        self.errors.append(_distance(alone, update) / _norm(update))
        for total, part in (
            (self.true, update),
            (self.alone, alone),
            (self.fed_back, released(sent, self.layout, self.dtype)),
        ):
            for name, tensor in part.items():
                total[name] = total.get(name, 0.0) + tensor.double()

    def figures(self) -> dict[str, float]:
        whole = _norm(self.true)
        return {
            "per_round": fmean(self.errors),
            "sum_without_feedback": _distance(self.alone, self.true) / whole,
            "sum_with_feedback": _distance(self.fed_back, self.true) / whole,
        }


def block_errors(update: Tensors, layout: Layout) -> Iterator[tuple[str, float]]:
    """(block and scale, relative error of the update) for quantisers of 8 bits of several shapes."""
    flat = [torch.cat([update[s.name].reshape(-1) for s in specs]).double().numpy() for specs in layout.values()]
    whole = float(np.sqrt(sum(np.square(values).sum() for values in flat)))
    for block in (64, 128, 256, 1024):
        for scale, size in (("fp32", 4), ("fp16", 2), ("bf16 up", 2), ("power of 2 up", 1)):
            lost = float(np.sqrt(sum(_squared_error(values, block, scale) for values in flat)))
            yield f"{block} values, {scale}, {1 + size / block:.4f} bytes a value", lost / whole


def _squared_error(values: NDArray[np.float64], block: int, scale: str) -> float:
    blocks = np.pad(values, (0, -len(values) % block)).reshape(-1, block)
    least = np.abs(blocks).max(axis=1) / 127
    fraction, exponent = np.frexp(least)
    scales = {
        "fp32": least.astype(np.float32).astype(float),
        "fp16": least.astype(np.float16).astype(float),
        "bf16 up": np.ldexp(np.ceil(fraction * 256), exponent - 8),
        "power of 2 up": np.ldexp(1.0, exponent),
    }[scale][:, None]
    codes = np.clip(np.rint(np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales > 0)), -127, 127)
    return float(np.square(codes * scales - blocks).sum())


def _norm(tensors: Tensors) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors.values()) ** 0.5


def _distance(a: Tensors, b: Tensors) -> float:
    return _norm({name: tensor.double() - b[name].double() for name, tensor in a.items()})


def _lines(figures: Mapping[str, Any]) -> Iterator[str]:
    yield f"updates, relative error: each round alone; the sum of {figures['rounds']} without feedback; with feedback"
    for name, row in figures["up"].items():
        yield f"  {name:10} {row['per_round']:.5f}  {row['sum_without_feedback']:.5f}  {row['sum_with_feedback']:.5f}"
    yield "student, distance from the master over the way trained: after the first round, after the last"
    for name, (first, last) in figures["down"].items():
        yield f"  {name:10} {first:.5f}  {last:.5f}"
    yield f"8 bits, relative error of the CT site's updates (chosen: {BLOCK} values, bf16 up)"
    yield from (f"  {name}: {error:.5f}" for name, error in figures["blocks"].items())
    yield "mean cross-entropy of the last quarter of rounds, nats; difference from fp32"
    for seed, by_dtype in figures["losses"].items():
        told = "  ".join(f"{d} {loss:.4f} ({loss - by_dtype['fp32']:+.4f})" for d, loss in by_dtype.items())
        yield f"  seed {seed}: {told}"


if __name__ == "__main__":
    main()
