"""What of the global student reaches the sites: the student as they hold it, and the step that takes them there.

The coordinator trains on float32 masters; a site holds R, what the wire makes of them. In bf16 and fp32 R is the master
rounded, and travels whole. A format that carries over would be too coarse for that: there R moves by steps,

    R_r = R_{r-1} + Q(student_r - R_{r-1}),

which a site that holds R_{r-1} adds itself, with the same bits. The difference is taken to the master, so what rounding
lost of one step is in the next one, and R never strays further than one step's rounding.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from unimiss_core.codec import Layout, released
from unimiss_core.formats import FORMATS


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

    def step(self) -> dict[str, Tensor] | None:
        """To be packed for sites that hold the last release; None where whole students travel.

        Not yet rounded: rounding twice may give other values than rounding once.
        """
        if self.before is None:
            return None
        return {name: tensor - self.before[name] for name, tensor in self.student.items()}

    def whole(self) -> Mapping[str, Tensor]:
        """To be packed for sites that hold nothing: what packs to R. Where whole students travel, packing the masters
        rounds them to it."""
        return self.student if self.before is None else self.held()

    def held(self) -> dict[str, Tensor]:
        """R, float32, by name. Raises WireError `not_finite` where a format that carries over meets a value that is
        not."""
        step = self.step()
        seen = released(self.student if step is None else step, self.layout, self.dtype)
        return seen if self.before is None else {name: tensor + seen[name] for name, tensor in self.before.items()}
