"""The gradients of several patients at once: `torch.func`'s vmap over grad, one row for each patient.

The same as one backward pass after another up to rounding, for as many times the memory. It pays where one patient
alone leaves a device idle. Nothing in the network may couple scans. It may not recompute activations, for torch.func
knows no saved-tensor hooks; nor run in bf16, for the backward pass of torch's norms does not take bf16 activations
beside float32 weights under vmap (torch 2.13); nor be compiled, which has not been tried.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from unimiss_core.objective import Loss, Observed
from unimiss_core.students import Student

Found = tuple[Loss, Mapping[str, Tensor]]
"""One patient's loss, without graph, and its gradients by name."""

Observations = Mapping[str, Mapping[str, Tensor]]
"""Fields of `Observed` by representation: torch.func hands on dictionaries, and no dataclasses."""


def grouped(patients: Iterable[Tensor], most: int) -> Iterator[list[Tensor]]:
    """Patients whose views (N, V, C, *S) have one shape, `most` at a time; what is left over comes at the end."""
    waiting: dict[torch.Size, list[Tensor]] = {}
    for views in patients:
        alike = waiting.setdefault(views.shape, [])
        alike.append(views)
        if len(alike) == most:
            yield waiting.pop(views.shape)
    yield from waiting.values()


def gradients_of_each(
    student: Student, loss_of: Callable[[Tensor], Loss], patients: Tensor, names: Collection[str]
) -> list[Found]:
    """Of each of P patients: its loss, without graph, and the gradients of the student's parameters `names`.

    loss_of: from one patient's views (N, V, C, *S), by `student`. patients: (P, N, V, C, *S).
    """
    called = _Called(student, loss_of)

    def total_of(parameters: dict[str, Tensor], views: Tensor) -> tuple[Tensor, tuple[object, ...]]:
        loss: Loss = functional_call(called, parameters, (views,))
        return loss.total, (loss.total, loss.terms, {name: vars(seen) for name, seen in loss.observed.items()})

    parameters = {f"student.{name}": student.get_parameter(name).detach() for name in names}
    # torch.func keeps its own account of what is differentiated; of attention's fused kernels it would make a loop.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        gradients, losses = vmap(grad(total_of, has_aux=True), in_dims=(None, 0))(parameters, patients)
    return [
        (_loss_at(place, *losses), {name: gradients[f"student.{name}"][place] for name in names})
        for place in range(len(patients))
    ]


class _Called(nn.Module):
    """A loss as a module that holds the student, so that it can be called with other parameters."""

    def __init__(self, student: Student, loss_of: Callable[[Tensor], Loss]) -> None:
        super().__init__()
        self.student = student
        self._loss_of = loss_of

    def forward(self, views: Tensor) -> Loss:
        return self._loss_of(views)


def _loss_at(place: int, totals: Tensor, terms: Mapping[str, Tensor], observed: Observations) -> Loss:
    """One patient's, from rows of all."""
    seen = {
        name: Observed(**{field: rows[place] for field, rows in fields.items()}) for name, fields in observed.items()
    }
    return Loss({name: rows[place] for name, rows in terms.items()}, totals[place], seen)
