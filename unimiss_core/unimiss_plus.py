"""UniMiSS+: volumes teach their own radiographs and slices, and what is seen must be drawn again.

The teacher looks at the scans alone: images in a 2D step, volumes in a 3D step. The student looks at the same scans;
in a 3D step also at a radiograph of each volume, a pair of X-ray and CT that no archive holds, and at every second
slice. Images, volumes and radiographs are reconstructed from the decoder's map; the same pass gives their class token.

Legend of shapes: B scans, V views, C channels, S spatial axes, N = B x V, E features of the bottleneck.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unimiss_core.loss_terms import is_reconstruction, reconstruction_name
from unimiss_core.network import Network
from unimiss_core.objective import (
    Centre,
    Loss,
    Observed,
    cross_entropies,
    cross_entropies_of_view,
    in_turn,
    look,
    look_in_turn,
    mean_of_slices,
    observe,
    targets_of,
)
from unimiss_core.radiograph import Radiographer
from unimiss_core.scan import Rank
from unimiss_core.study import UniMiSSPlusConfig
from unimiss_core.views import min_max


@dataclass(frozen=True)
class UniMiSSPlus:
    """The loss of UniMiSS+ (TPAMI 2024); docs/objectives.md has its mathematics and where ours differs.

    Radiographs are projected from each view here, where the published ones are rendered once from each file: no second
    picture has to be kept, and what the student sees is what the volume's view shows.
    """

    config: UniMiSSPlusConfig
    radiographer: Radiographer

    def representations(self, rank: Rank) -> tuple[str, ...]:
        return ("image",) if rank == 2 else ("volume",)

    def __call__(self, student: Network, teacher: Network, views: Tensor, centre: Centre) -> Loss:
        targets, observed = self._taught(teacher, views, centre)
        seen: dict[str, Tensor] = {}
        errors: dict[str, Tensor] = {}
        for name in self._looks(views):
            seen[name], error = self._look(student, views, name)
            errors |= error
        terms = cross_entropies(student, seen, targets, self.config.student_temperature) | errors
        return Loss(terms, self._weighed(terms), observed)

    def pieces(self, student: Network, teacher: Network, views: Tensor, centre: Centre) -> Iterator[Loss]:
        if views.ndim == 5:
            yield self(student, teacher, views, centre)
            return
        targets, observed = self._taught(teacher, views, centre, one_by_one=True)
        count = views.shape[1]
        for name, view in in_turn(self._looks(views), count):
            h, errors = self._look(student, views[:, view : view + 1], name)
            terms = cross_entropies_of_view(student, name, h, view, targets, self.config.student_temperature)
            terms |= {error: value / count for error, value in errors.items()}
            yield Loss(terms, self._weighed(terms), observed)
            del h, errors, terms
            observed = {}

    def _taught(
        self, teacher: Network, views: Tensor, centre: Centre, *, one_by_one: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Observed]]:
        """The teacher's targets (B, V, K) of the scans as they are, by representation, and what it did."""
        rank: Rank = 2 if views.ndim == 5 else 3
        (own,) = self.representations(rank)
        with torch.no_grad():
            seen = {own: (look_in_turn if one_by_one else look)(teacher, views, own)}
            targets = targets_of(teacher, seen, centre, self.config.teacher_temperature_of(rank))
        return targets, {own: observe(seen[own], targets[own])}

    def _looks(self, views: Tensor) -> tuple[str, ...]:
        """What the student looks at."""
        return ("image",) if views.ndim == 5 else ("volume", "radiograph", "slices")

    def _look(self, student: Network, views: Tensor, name: str) -> tuple[Tensor, dict[str, Tensor]]:
        """views (B, V, C, *S) -> the student's bottlenecks (B, V, E), and the error of what it draws again by name."""
        scans, shape = views.flatten(0, 1), views.shape[:2]
        if name == "slices":
            slices = scans[:, :, :: self.config.slice_stride]
            return mean_of_slices(student, slices).unflatten(0, shape), {}
        seen = self.radiographer(scans) if name == "radiograph" else scans
        h, drawn = student.bottleneck_and_reconstruction(seen)
        return h.unflatten(0, shape), {reconstruction_name(name): reconstruction_error(drawn, seen)}

    def _weighed(self, terms: Mapping[str, Tensor]) -> Tensor:
        of_cross_entropy = {
            "radiograph_to_volume": self.config.radiograph_weight,
            "slices_to_volume": self.config.slices_weight,
        }
        weighed = [
            term * (self.config.reconstruction_weight if is_reconstruction(name) else of_cross_entropy.get(name, 1.0))
            for name, term in terms.items()
        ]
        return torch.stack(weighed).sum()


def reconstruction_error(drawn: Tensor, x: Tensor) -> Tensor:
    """Mean squared error of `drawn` (N, C', *S) against each x (N, C, *S) of its views, from its own 0 to its own 1.

    A grey image counts as three equal channels, as in the stem.
    """
    return (drawn - min_max(x).to(drawn.dtype)).square().mean()
