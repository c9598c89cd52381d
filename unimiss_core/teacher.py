"""The teacher: an exponential moving average of the student, in a step and over rounds."""

from collections.abc import Mapping

from torch import Tensor


def advance_teacher(
    teacher: Mapping[str, Tensor], student: Mapping[str, Tensor], retention: Mapping[str, float]
) -> dict[str, Tensor]:
    """teacher <- m teacher + (1 - m) student for each tensor, m = `retention[name]`; m = 1 leaves it bit for bit.

    Between rounds coordinator and sites call this on the same released values, so that a site can rebuild the
    global teacher instead of receiving it. It is the cheap form of averaging the sites' teachers: EMA is linear, so
    the mean of teachers is the EMA of the mean student path, here with that path replaced by its end.

    In operations that IEEE 754 rounds alike everywhere: `torch.lerp`, and `alpha` of `add_`, fuse them on some
    processors and not on others.
    """
    return {
        name: before if (kept := retention[name]) == 1.0 else (before * kept).add_(student[name] * (1.0 - kept))
        for name, before in teacher.items()
    }
