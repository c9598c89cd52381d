"""UniMiSS+: volumes teach their own radiographs and slices, and what is seen must be drawn again.

The teacher looks at the scans alone: images in a 2D step, volumes in a 3D step. The student looks at the same scans;
in a 3D step also at a radiograph of each volume, a pair of X-ray and CT that no archive holds, and at every second
slice. Images, volumes and radiographs are reconstructed from the decoder's map; the same pass gives their class token.

Legend of shapes: B scans, V views, C channels, S spatial axes, N = B x V, E features of the bottleneck.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unimiss_core.loss_terms import is_reconstruction, reconstruction_name
from unimiss_core.network import Network
from unimiss_core.objective import Centre, Loss, cross_entropies, mean_of_slices, observe, targets_of
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
        scans = views.flatten(0, 1)
        shape = views.shape[:2]
        rank: Rank = 2 if scans.ndim == 4 else 3
        (own,) = self.representations(rank)
        with torch.no_grad():
            seen_by_teacher = {own: teacher.bottleneck(scans).unflatten(0, shape)}
            temperature = self.config.teacher_temperature_of(rank)
            targets = targets_of(teacher, seen_by_teacher, centre, temperature)
        pictures = {own: scans} if own == "image" else {own: scans, "radiograph": self.radiographer(scans)}
        seen, errors = {}, {}
        for name, x in pictures.items():
            h, drawn = student.bottleneck_and_reconstruction(x)
            seen[name] = h.unflatten(0, shape)
            errors[reconstruction_name(name)] = reconstruction_error(drawn, x)
        if own == "volume":
            slices = scans[:, :, :: self.config.slice_stride]
            seen["slices"] = mean_of_slices(student, slices).unflatten(0, shape)
        terms = cross_entropies(student, seen, targets, self.config.student_temperature) | errors
        observed = {own: observe(seen_by_teacher[own], targets[own])}
        return Loss(terms, self._weighed(terms), observed)

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
