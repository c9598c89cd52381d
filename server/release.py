"""What of the global student reaches the sites: the student as they hold it, and the step that takes them there.

The coordinator trains on float32 masters; a site holds R, what the wire makes of them. In bf16 and fp32 R is the master
rounded, and travels whole. A format that carries over would be too coarse for that: there R moves by steps,

    R_r = R_{r-1} + Q(student_r - R_{r-1}),

which a site that holds R_{r-1} adds itself, with the same bits. The difference is taken to the master, so what rounding
lost of one step is in the next one, and R never strays further than one step's rounding.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from unimiss_core.codec import Layout, Payloads, pack, view
from unimiss_core.formats import FORMATS
from unimiss_core.groups import Group


@dataclass(frozen=True)
class Release:
    """The student that sites begin a round from. It follows from two sets of tensors, bit for bit, and is worked out
    where it is needed, so that between rounds the coordinator holds no more than these.

    student: the masters. before: R of the last release; None where whole students travel.
    """

    student: Mapping[str, Tensor]
    before: Mapping[str, Tensor] | None
    layout: Layout
    dtype: str

    @classmethod
    def first(cls, student: Mapping[str, Tensor], *, layout: Layout, dtype: str) -> "Release":
        """Of a run: where the format carries over, R is the student itself."""
        return cls(student, student if FORMATS[dtype].carries_over else None, layout, dtype)

    def after(self, student: Mapping[str, Tensor]) -> "Release":
        """The next one, of the masters after another round."""
        return replace(self, student=student, before=None if self.before is None else self.held())

    @property
    def is_step(self) -> bool:
        """Whether sites that hold the last release are sent what changed, and not whole students."""
        return self.before is not None

    @cached_property
    def payloads(self) -> Payloads:
        """What tells sites of it, by group: the whole student, or the step from the last release. Packed once for all:
        R itself is read from it too."""
        return {group: pack(self._told(group), specs, self.dtype) for group, specs in self.layout.items()}

    def held(self) -> dict[str, Tensor]:
        """R, float32, by name, in memory of its own. Raises as `seen` does."""
        return {
            name: tensor.to(torch.float32, copy=True)
            for group in self.layout
            for name, tensor in self.seen(group).items()
        }

    def seen(self, group: Group) -> dict[str, Tensor]:
        """R of a group, in the narrowest float type that holds it, to be read only.

        Raises WireError `not_finite` where a format that carries over meets a value that is not.
        """
        told = view(self.payloads[group], self.layout[group], self.dtype)
        if self.before is None:
            return told
        return {name: self.before[name] + step for name, step in told.items()}

    def _told(self, group: Group) -> dict[str, Tensor]:
        """Not yet rounded: rounding twice may give other values than rounding once."""
        names = [spec.name for spec in self.layout[group]]
        if self.before is None:
            return {name: self.student[name] for name in names}
        return {name: self.student[name] - self.before[name] for name in names}
