"""What of the global student reaches the sites: the student as they hold it, and the step that takes them there.

The coordinator trains on float32 masters; a site holds R, what the wire makes of them. In bf16 and fp32 R is the master
rounded, and travels whole. A format that carries over would be too coarse for that: there R moves by steps,

    R_r = R_{r-1} + Q(student_r - R_{r-1}),

which a site that holds R_{r-1} adds itself, with the same bits. The difference is taken to the master, so what rounding
lost of one step is in the next one, and R never strays further than one step's rounding.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from unimiss_core.codec import Layout, released
from unimiss_core.formats import FORMATS


@dataclass(frozen=True)
class Release:
    """The student that sites begin a round from.

    student: R, float32, by name.
    step: to be packed for those who hold the release before; None where whole students travel. Not yet rounded, because
        rounding twice may give other values than rounding once.
    before: the release before, from which `of` gives this one again, bit for bit; None likewise.
    """

    student: Mapping[str, Tensor]
    step: Mapping[str, Tensor] | None = None
    before: Mapping[str, Tensor] | None = None

    @classmethod
    def of(
        cls, student: Mapping[str, Tensor], *, before: Mapping[str, Tensor] | None, layout: Layout, dtype: str
    ) -> "Release":
        """Release the masters `student`; before: the student of the last release, None for the first of a run.

        Raises WireError `not_finite` where a format that carries over meets a value that is not.
        """
        if not FORMATS[dtype].carries_over:
            return cls(released(student, layout, dtype))
        before = student if before is None else before
        step = {name: tensor - before[name] for name, tensor in student.items()}
        seen = released(step, layout, dtype)
        return cls({name: tensor + seen[name] for name, tensor in before.items()}, step, before)
