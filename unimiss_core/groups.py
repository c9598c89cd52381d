"""Which parameters a rank trains: the groups by which updates are aggregated.

The model names the children of a rank switch `2d` and `3d` (`unimiss_core.layers.Switched`) and its head `head`, so
a tensor's name tells its group; a test holds this against what autograd reaches.
"""

from collections.abc import Collection
from typing import Literal, get_args

from unimiss_core.scan import Rank

Group = Literal["shared", "2d", "3d", "head"]

GROUPS: tuple[Group, ...] = get_args(Group)


def group_of(name: str) -> Group:
    """The group of the parameter with this name in a `Network`."""
    parts = name.split(".")
    if parts[0] == "head":
        return "head"
    if "2d" in parts:
        return "2d"
    return "3d" if "3d" in parts else "shared"


def groups_of_ranks(ranks: Collection[Rank]) -> frozenset[Group]:
    """What a step on scans of these ranks trains: volumes train all, since their slices take the 2D path."""
    groups: set[Group] = {"shared", "head", "2d"} if ranks else set()
    return frozenset(groups | {"3d"} if 3 in ranks else groups)


def ranks_needed(ranks: Collection[Rank]) -> tuple[Rank, ...]:
    """The ranks whose tensors a site must hold to train on these: volumes need the 2D path too."""
    return (2, 3) if 3 in ranks else (2,)
