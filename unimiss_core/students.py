"""Which network a study trains, and what of it travels between coordinator and sites.

In pretraining it is a whole `Network`, of which a site holds the ranks that it needs. In fine-tuning it is the model of
the study's task, which is of one rank; its head stays at each site where the study says so.
"""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache

from torch import Tensor

from unimiss_core.backbone import architecture_of
from unimiss_core.codec import Layout, layout_of
from unimiss_core.gathering import GatheredGradient, Gathers, gathered_by
from unimiss_core.groups import group_of
from unimiss_core.network import Network, build_network, empty_network
from unimiss_core.scan import RANKS, Rank
from unimiss_core.study import StudyConfig
from unimiss_core.tasks import TaskModel, build_task_model, empty_task_model, freeze_

Student = Network | TaskModel


def empty_student(study: StudyConfig, *, ranks: Collection[Rank] = RANKS) -> Student:
    """`build_student` on torch's meta device: names and shapes without values, memory or time."""
    if study.finetune is None:
        return empty_network(study.model, ranks=ranks)
    made = empty_task_model(study.model, study.finetune.task)
    freeze_(made, study.finetune.trains)
    return made


def build_student(study: StudyConfig, *, ranks: Collection[Rank] = RANKS) -> Student:
    """As the study begins, on the CPU, in float32: every tensor follows from the study's seed and its own name. What
    the study leaves alone has no gradient.

    ranks: of which tensors are needed; a task's are of its own rank, whatever stands here.
    """
    if study.finetune is None:
        return build_network(study.model, seed=study.seed, ranks=ranks)
    made = build_task_model(study.model, study.finetune.task, seed=study.seed, pretrained=None)
    freeze_(made, study.finetune.trains)
    return made


def travelling_layout(study: StudyConfig) -> Layout:
    """What travels of the whole network, by parameter group: groups without a tensor, and what stays at the sites, are
    not in it."""
    layout, _ = _shapes(study, architecture_of(study.model))
    staying = staying_names(study, (spec.name for specs in layout.values() for spec in specs))
    kept = {group: tuple(spec for spec in specs if spec.name not in staying) for group, specs in layout.items()}
    return {group: specs for group, specs in kept.items() if specs}


def update_layout(study: StudyConfig) -> Layout:
    """What of that comes back in updates, by parameter group: what a fine-tuning leaves alone would be zeros, and under
    site-level privacy be moved by noise for nothing."""
    _, moves = _shapes(study, architecture_of(study.model))
    moving = {group: tuple(s for s in specs if s.name in moves) for group, specs in travelling_layout(study).items()}
    return {group: specs for group, specs in moving.items() if specs}


@lru_cache(maxsize=16)
def _shapes(study: StudyConfig, architecture: object) -> tuple[Layout, frozenset[str]]:  # noqa: ARG001 - of the key
    """The whole student's layout, and the names of what is trained of it. Each message asks for them, and a network
    built for its shapes alone takes milliseconds.

    architecture: what the study's model stands for.
    """
    student = empty_student(study)
    return layout_of(student), frozenset(name for name, p in student.named_parameters() if p.requires_grad)


def staying_names(study: StudyConfig, names: Iterable[str]) -> frozenset[str]:
    """Of these parameters, those that never leave a site: of a local head."""
    if study.finetune is None or study.finetune.head == "shared":
        return frozenset()
    return frozenset(name for name in names if group_of(name) == "head")


@contextmanager
def gathering(student: Student) -> Iterator[list[GatheredGradient]]:
    """Within, backward passes give what meets few rows no gradient: of a whole network the prototypes, which have most
    of all, come first, then the head's other layers and convolutions whose windows are few. Once all passes are
    through, each is to be written or used in pieces; what no row was gathered of has none, as what no pass reached."""
    if not isinstance(student, Network):
        yield []
        return
    found: list[GatheredGradient] = []
    layers = [layer for layer in student.modules() if isinstance(layer, Gathers) and layer.weight.requires_grad]
    with student.head.gathering() as prototypes, gathered_by(layers) as gradients:
        yield found
        found += [prototypes, *(gradient for gradient in gradients if not gradient.products.is_empty)]


def shape_of_views(study: StudyConfig, rank: Rank) -> tuple[int, ...]:
    """(V, C, *S) of one scan in a step; a label is a channel more (`unimiss_core.labelled_views`)."""
    if study.finetune is None:
        return study.views.views, 1, *study.size_of(rank)
    return 1, (study.finetune.task.channel_count or 1) + 1, *study.size_of(rank)


def rank_of_views(views: Tensor) -> Rank:
    """Of a batch of views. Raises ValueError: it is none."""
    if views.ndim == 5:
        return 2
    if views.ndim == 6:
        return 3
    raise ValueError(f"expected views (B, V, C, H, W) or (B, V, C, D, H, W); got shape {tuple(views.shape)}")
