"""UniMiSS self-distillation: what a batch of views costs the student, and what the teacher's centre learns from it.

Legend of shapes: B scans, V views, C channels, S spatial axes, D slices of a volume, E features of the bottleneck,
K prototypes.

A *representation* is one way to look at a scan: an image has one, `image`; a volume has two, `volume` and `slices`.
The loss terms are the product of the student's and the teacher's representations: one for images, four for volumes.
Logits are linear in the bottleneck, so the mean of D slices' logits is the prototypes applied to the mean of D
bottlenecks: D times fewer of the widest products, for the same number.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from unimiss_core.head import at_least_float32
from unimiss_core.loss_terms import cross_entropy_name
from unimiss_core.network import Network
from unimiss_core.scan import Rank
from unimiss_core.study import UniMiSSConfig

Centre = Mapping[str, Tensor]
"""Per representation, the running mean of the teacher's bottlenecks (E,), float32."""


@dataclass(frozen=True)
class Observed:
    """What the teacher did with one representation of a batch; means over its B x V views, without gradient.

    Every field is a mean, so that a batch met in parts is the weighted mean of its parts.
    """

    bottleneck: Tensor
    """(E,): moves the centre."""
    second_moment: Tensor
    """(E, E): mean of h h^T; with `bottleneck` it gives the covariance of the bottlenecks."""
    target: Tensor
    """(K,): mean of the target distributions; its entropy falls when all views land on one prototype."""
    target_entropy: Tensor
    """Scalar, nats; near log K the targets say nothing."""


@dataclass(frozen=True)
class Loss:
    """terms: scalars by name (`unimiss_core.loss_terms`), each as it is before its weight, so that it reads the same in
    every study; total: what is minimised, their sum by the study's weights; observed: by representation."""

    terms: dict[str, Tensor]
    total: Tensor
    observed: dict[str, Observed] = field(default_factory=dict)

    def detached(self) -> "Loss":
        """The same numbers without graph."""
        return Loss({name: term.detach() for name, term in self.terms.items()}, self.total.detach(), self.observed)

    def tensors(self) -> list[Tensor]:
        """All of it, in an order that is the same for losses of one objective and rank."""
        observed = [getattr(one, part.name) for one in self.observed.values() for part in fields(one)]
        return [*self.terms.values(), self.total, *observed]


class Objective(Protocol):
    """What a learner minimises; the learner knows neither terms nor representations."""

    def representations(self, rank: Rank) -> tuple[str, ...]:
        """The teacher's representations of scans of this rank, each with a centre of its own. None of any rank: there
        is no teacher."""
        ...

    def __call__(self, student: Any, teacher: Any, views: Tensor, centre: Centre) -> Loss:
        """views (B, V, C, *S); student, teacher: the networks that the objective is of (`unimiss_core.students`),
        teacher None where there is none; centre: from before this step, and not moved here."""
        ...


@runtime_checkable
class PiecewiseObjective(Objective, Protocol):
    """An objective that can be met in less memory."""

    def pieces(self, student: Any, teacher: Any, views: Tensor, centre: Centre) -> Iterator[Loss]:
        """The same loss as a sum, in terms and total, of losses that share no graph. Whoever is done with one before
        asking for the next holds the activations of one.

        Volumes give one for each thing that the student looks at in turn (`in_turn`); the first tells what was
        observed. Images give one: a loss for each view took 12% more time for 3% less memory.
        """
        ...


@dataclass(frozen=True)
class UniMiSS:
    """The loss of UniMiSS (ECCV 2022); the published one number for number, with two corrections.

    The centre moves once per step (the released code moves it with each of the four 3D terms), and each
    representation has its own, so that volume and slice statistics do not mix.
    """

    config: UniMiSSConfig

    def representations(self, rank: Rank) -> tuple[str, ...]:
        return ("image",) if rank == 2 else ("volume", "slices")

    def __call__(self, student: Network, teacher: Network, views: Tensor, centre: Centre) -> Loss:
        targets, observed = self._taught(teacher, views, centre)
        seen_by_student = representations(student, views, slices=self.config.slices_per_volume)
        terms = cross_entropies(student, seen_by_student, targets, self.config.student_temperature)
        return Loss(terms, torch.stack(list(terms.values())).sum(), observed)

    def pieces(self, student: Network, teacher: Network, views: Tensor, centre: Centre) -> Iterator[Loss]:
        if views.ndim == 5:
            yield self(student, teacher, views, centre)
            return
        targets, observed = self._taught(teacher, views, centre, one_by_one=True)
        for name, view in in_turn(targets, views.shape[1]):
            h = look(student, views[:, view : view + 1], name, slices=self.config.slices_per_volume)
            terms = cross_entropies_of_view(student, name, h, view, targets, self.config.student_temperature)
            yield Loss(terms, torch.stack(list(terms.values())).sum(), observed)
            del h, terms
            observed = {}

    def _taught(
        self, teacher: Network, views: Tensor, centre: Centre, *, one_by_one: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Observed]]:
        """The teacher's targets (B, V, K) by representation, and what it did."""
        rank: Rank = 2 if views.ndim == 5 else 3
        with torch.no_grad():
            slices = self.config.slices_per_volume
            seen = {
                name: (look_in_turn if one_by_one else look)(teacher, views, name, slices=slices)
                for name in self.representations(rank)
            }
            targets = targets_of(teacher, seen, centre, self.config.teacher_temperature_of(rank))
        return targets, {name: observe(h, targets[name]) for name, h in seen.items()}


def representations(network: Network, views: Tensor, *, slices: int | None = None) -> dict[str, Tensor]:
    """views (B, V, C, *S) -> bottlenecks (B, V, E) by representation: `image`, or `volume` and `slices`.

    `slices` is the mean over a volume's D slices of bottlenecks of length 1, each slice taking the 2D path as a grey
    image. That mean is shorter than 1 and stays so, for the released code averages the slices' logits.
    slices: take only this many of the D, evenly spaced. Their mean estimates the mean of all: a view is cut at a
    random depth, so each of the scan's slices is as likely as its neighbours to be among them. The logits, linear in
    it, are then right on average, with a variance that falls as 1 / slices; the loss, which is not linear, sees
    slightly noisier targets and predictions.
    """
    names = ("image",) if views.ndim == 5 else ("volume", "slices")
    return {name: look(network, views, name, slices=slices) for name in names}


def look(network: Network, views: Tensor, name: str, *, slices: int | None = None) -> Tensor:
    """One of `representations`: views (B, V, C, *S) -> (B, V, E)."""
    scans = views.flatten(0, 1)
    seen = mean_of_slices(network, _evenly_spaced(scans, slices)) if name == "slices" else network.bottleneck(scans)
    by_view: Tensor = seen.unflatten(0, views.shape[:2])
    return by_view


def look_in_turn(network: Network, views: Tensor, name: str, *, slices: int | None = None) -> Tensor:
    """`look`, at one view after the other as `in_turn` gives them to a student: a CPU's library keeps half a megabyte
    for each shape of product in bfloat16, and so has the same shapes for both."""
    return torch.cat([look(network, view, name, slices=slices) for view in views.split(1, dim=1)], dim=1)


def in_turn(names: Collection[str], views: int) -> Iterator[tuple[str, int]]:
    """What a student looks at, one after the other: a representation of volumes, and the number of a view.

    Slices come first: they keep two to three times what the volume itself does, and most is held then, for gradients of
    3D tensors, which they do not reach, are still to come.
    """
    for name in sorted(names, key=lambda name: name != "slices"):
        yield from ((name, view) for view in range(views))


def mean_of_slices(network: Network, volumes: Tensor) -> Tensor:
    """volumes (N, C, D, H, W) -> (N, E): the mean bottleneck of the D slices, each a grey image on the 2D path."""
    images = volumes.transpose(1, 2).flatten(0, 1)
    mean: Tensor = network.bottleneck(images).unflatten(0, (len(volumes), -1)).mean(1)
    return mean


def _evenly_spaced(volumes: Tensor, slices: int | None) -> Tensor:
    """volumes (B, C, D, H, W) -> (B, C, min(slices, D), H, W), each slice from the middle of an equal part of D."""
    depth = volumes.shape[2]
    if slices is None or slices >= depth:
        return volumes
    chosen = ((2 * i + 1) * depth // (2 * slices) for i in range(slices))
    return torch.stack([volumes[:, :, place] for place in chosen], dim=2)


def logits_of(network: Network, bottlenecks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bottlenecks (B, V, E) by representation -> logits (B, V, K), in one product with the prototypes."""
    logits = network.prototypes(torch.stack(list(bottlenecks.values())))
    return dict(zip(bottlenecks, logits, strict=True))


def targets_of(
    teacher: Network, bottlenecks: Mapping[str, Tensor], centre: Centre, temperature: float
) -> dict[str, Tensor]:
    """The teacher's bottlenecks (B, V, E) by representation -> its targets (B, V, K)."""
    centred = {name: h - centre[name] for name, h in bottlenecks.items()}
    return {name: target_distribution(logits, temperature) for name, logits in logits_of(teacher, centred).items()}


def cross_entropies(
    student: Network, bottlenecks: Mapping[str, Tensor], targets: Mapping[str, Tensor], temperature: float
) -> dict[str, Tensor]:
    """From each of the student's bottlenecks (B, V, E) to each of the teacher's targets (B, V, K): scalars by name."""
    predictions = {name: log_prediction(z, temperature) for name, z in logits_of(student, bottlenecks).items()}
    return {
        cross_entropy_name(mine, theirs): view_cross_entropy(prediction, target)
        for mine, prediction in predictions.items()
        for theirs, target in targets.items()
    }


def cross_entropies_of_view(
    student: Network, name: str, h: Tensor, view: int, targets: Mapping[str, Tensor], temperature: float
) -> dict[str, Tensor]:
    """What one view adds to `cross_entropies`: from the student's bottleneck `name` of it, h (B, 1, E), to each of the
    teacher's targets (B, V, K) of the other views."""
    predictions = log_prediction(student.prototypes(h), temperature)
    return {
        cross_entropy_name(name, theirs): cross_entropy_of_view(predictions, view, target)
        for theirs, target in targets.items()
    }


def log_prediction(logits: Tensor, temperature: float) -> Tensor:
    """The student's logits (..., K) -> log-probabilities (..., K), float32 or better."""
    return torch.log_softmax(at_least_float32(logits) / temperature, dim=-1)


def target_distribution(centred_logits: Tensor, temperature: float) -> Tensor:
    """The teacher's logits less the centre's (..., K) -> probabilities (..., K), float32 or better.

    The logits of `h - centre` are the logits of h less those of the centre, by linearity.
    """
    return torch.softmax(at_least_float32(centred_logits) / temperature, dim=-1)


def view_cross_entropy(log_predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean over ordered pairs of different views s != t and over scans of -sum_k targets[:, t, k] * log p[:, s, k].

    log_predictions: the student's (B, V, K); targets: the teacher's (B, V, K). DINO (arXiv:2104.14294) eq. 3.
    Raises ValueError: fewer than two views.
    """
    b, v, _ = targets.shape
    if v < 2:
        raise ValueError(f"self-distillation compares views of one scan; got {v} view, needs at least 2")
    with torch.autocast(targets.device.type, enabled=False):
        pairs = -torch.einsum("bsk,btk->st", log_predictions, targets)
    return (pairs.sum() - pairs.diagonal().sum()) / (b * v * (v - 1))


def cross_entropy_of_view(log_predictions: Tensor, view: int, targets: Tensor) -> Tensor:
    """What one view of the student adds to `view_cross_entropy`: log_predictions (B, 1, K) of the view of this number,
    targets (B, V, K) of all.

    Raises ValueError: fewer than two views.
    """
    b, v = targets.shape[:2]
    if v < 2:
        raise ValueError(f"self-distillation compares views of one scan; got {v} view, needs at least 2")
    of_others = torch.cat([targets[:, :view], targets[:, view + 1 :]], dim=1).sum(1)
    return -(log_predictions[:, 0] * of_others).sum() / (b * v * (v - 1))


def new_centre(names: Iterable[str], bottleneck: int, device: torch.device) -> dict[str, Tensor]:
    """The centre before the first step: zero, which centres nothing."""
    return {name: torch.zeros(bottleneck, device=device) for name in names}


def move_centre(centre: Tensor, mean: Tensor, momentum: float) -> Tensor:
    """momentum * centre + (1 - momentum) * mean: once per step, after its loss.

    Kept on bottlenecks (E,) and turned into logits by the teacher's prototypes of the day. By linearity that is the
    published running mean of logits (K,), but for the drift of the teacher's prototypes within that mean.
    """
    return centre.lerp(mean, 1.0 - momentum)


def observe(h: Tensor, targets: Tensor) -> Observed:
    """The teacher's bottlenecks (B, V, E) and targets (B, V, K) -> their means over B and V."""
    rows = h.flatten(0, 1)
    with torch.autocast(h.device.type, enabled=False):
        second_moment = rows.mT @ rows / len(rows)
    entropies = torch.special.entr(targets).sum(-1)
    return Observed(rows.mean(0), second_moment, targets.mean((0, 1)), entropies.mean())


def weighted_mean(parts: Sequence[tuple[float, Observed]]) -> Observed:
    """(share, what was seen) of each part of a whole, shares adding up to 1 -> what was seen of the whole."""

    def mean(values: Iterable[Tensor]) -> Tensor:
        return torch.stack([share * value for (share, _), value in zip(parts, values, strict=True)]).sum(0)

    return Observed(
        bottleneck=mean(part.bottleneck for _, part in parts),
        second_moment=mean(part.second_moment for _, part in parts),
        target=mean(part.target for _, part in parts),
        target_entropy=mean(part.target_entropy for _, part in parts),
    )


def weighted_sum(losses: Sequence[tuple[float, Loss]]) -> Loss:
    """The loss of a batch from those of its parts, or of their pieces; means of equal-sized views weigh by their part's
    size."""

    def total(values: Iterable[tuple[float, Tensor]]) -> Tensor:
        return torch.stack([share * value for share, value in values]).sum(0)

    def of_each(attribute: str) -> dict[str, list[tuple[float, Any]]]:
        found: dict[str, list[tuple[float, Any]]] = {}
        for share, loss in losses:
            for name, value in getattr(loss, attribute).items():
                found.setdefault(name, []).append((share, value))
        return found

    return Loss(
        terms={name: total(values) for name, values in of_each("terms").items()},
        total=total((share, loss.total) for share, loss in losses),
        observed={name: weighted_mean(values) for name, values in of_each("observed").items()},
    )
