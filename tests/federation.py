"""What federation tests share: a study small enough for milliseconds, and stub sites that answer at once."""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from unimiss_core import checkpoint
from unimiss_core.backbone import architecture_of
from unimiss_core.codec import Layout, layout_of
from unimiss_core.config import parse
from unimiss_core.errors import WireError
from unimiss_core.groups import GROUPS, groups_of_ranks
from unimiss_core.model import ARCHITECTURES
from unimiss_core.network import empty_network
from unimiss_core.scan import RANKS, Rank
from unimiss_core.study import ModelConfig, StudyConfig
from unimiss_core.team import Alone
from unimiss_core.wire import Hello, Introduction, Refusal, TrainReply, TrainRequest, study_of

NARROW = replace(
    ARCHITECTURES["nano"],
    stem=8,
    widths=(8, 8, 8, 8),
    encoder_depths=(1, 0, 0, 1),
    decoder_depths=(0, 0, 1),
    head_hidden=16,
    bottleneck=8,
)
"""Of few numbers, some in every group: what a test moves between a coordinator and stubs goes by numbers."""


def small_study(rounds: int = 2, **changes: object) -> StudyConfig:
    short = {"schedule": {"rounds": rounds, "local_steps": 2}, "optimiser": {"warmup_steps": 1}}
    views = {} if "task" in changes else {"views": {"image_size": [33, 40], "volume_size": [13, 33, 36]}}
    raw = {"name": "toy", "model": {"prototypes": 16}, **views, **short, **changes}
    return parse(StudyConfig, raw, where="test")


def metric_rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def whole_layout(model: ModelConfig | None = None) -> Layout:
    model = model or small_study().model
    return _known_layout(model, architecture_of(model))


@functools.cache
def _known_layout(model: ModelConfig, architecture: object) -> Layout:  # noqa: ARG001 - of the key: some tests change it
    return layout_of(empty_network(model))


def layout_for(ranks: frozenset[Rank]) -> Layout:
    layout = whole_layout()
    return {group: layout[group] for group in GROUPS if group in groups_of_ranks(ranks)}


def random_tensors(layout: Layout, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {spec.name: torch.randn(spec.shape, generator=generator) for specs in layout.values() for spec in specs}


def saved_checkpoint(
    folder: Path, round: int = 7, seed: int = 0, *, study: StudyConfig | None = None, **more: Any
) -> Path:
    """A checkpoint in `folder` of a study, by default `small_study` with tensors drawn from `seed`. more: of
    `checkpoint.save`, student and teacher among it where the study is another."""
    if study is None:
        study, layout = small_study(), whole_layout()
        more = {"student": random_tensors(layout, seed), "teacher": random_tensors(layout, seed + 1), **more}
    checkpoint.save(
        folder,
        origin="federation",
        round=round,
        study_digest=study.digest(),
        model=study.model,
        plan=study.plan,
        **more,
    )
    return folder


class Placed(Alone):
    """One of a team of `size`, whose sums are its own values."""

    def __init__(self, place: int, size: int) -> None:
        self.place, self.size = place, size


RUN = "0123456789abcdef"

Answer = Callable[[TrainRequest, "StubSite"], TrainReply]


class StubSite:
    """Stands in for a hospital: introduces itself with `scans`, answers a round by `answer`."""

    def __init__(self, name: str, scans: Mapping[Rank, int], answer: Answer | None = None) -> None:
        self.name = name
        self.scans = {rank: scans.get(rank, 0) for rank in RANKS}
        self.ranks: frozenset[Rank] = frozenset(rank for rank in RANKS if self.scans[rank])
        self.layout = layout_for(self.ranks)
        self.answer = answer or good_answer
        self.requests: list[TrainRequest] = []
        self.tamper: Callable[[RecordDict, int], RecordDict] = lambda content, _: content
        """Changes the packed reply to the request of a round, as a faulty or hostile site might."""


def good_answer(request: TrainRequest, site: StubSite) -> TrainReply:
    """An honest update: a fixed random direction of the site, other in each round."""
    seed = sum(site.name.encode()) * 1000 + request.round
    update = {name: 0.01 * tensor for name, tensor in random_tensors(site.layout, seed).items()}
    return reply_with(update, request, site)


def reply_with(update: Mapping[str, Tensor], request: TrainRequest, site: StubSite) -> TrainReply:
    return TrainReply(
        site=site.name,
        run=request.run,
        round=request.round,
        study_digest=request.study.digest(),
        update=update,
        scans=site.scans,
        steps=request.study.schedule.local_steps,
        seconds=0.5,
        losses={"image": 2.0},
        diagnostics={},
    )


def stub_app(sites: Mapping[str, StubSite]) -> ClientApp:
    """A ClientApp whose node configuration `name` picks one of `sites`."""
    app = ClientApp()

    @app.query()
    def introduce(message: Message, context: Context) -> Message:
        site = sites[str(context.node_config["name"])]
        Hello.unpack(message.content)
        return Message(Introduction(site.name, site.scans).pack(), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        site = sites[str(context.node_config["name"])]
        request = TrainRequest.unpack(message.content, site.layout)
        site.requests.append(request)
        try:
            reply = site.answer(request, site)
        except WireError as error:
            return Message(Refusal(error.reason).pack(), reply_to=message)
        content = reply.pack(site.layout, study_of(message.content).wire.dtype)
        return Message(site.tamper(content, request.round), reply_to=message)

    return app
