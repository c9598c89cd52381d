"""Updates of one round on disk, for the rules that need them all side by side.

One flat float32 file for each site and parameter group:

    OUT/updates.partial/shared-0003.f32      the fourth update that trained the group

They are read by stripes with plain reads. Mapped into memory, every page once touched would count as the coordinator's
until the system takes it back, and memory would grow with the number of sites after all. Nothing here outlives its
round: the folder is emptied at its end, and after a crash when the run goes on (`RunFolder.begin`).
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unimiss_core.codec import Layout, split
from unimiss_core.groups import Group

_VALUE_BYTES = 4


class Spill:
    """Updates in `folder`, which must be there and is the owner's to delete."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._folder = folder
        self._layout = layout
        self._counts: dict[Group, int] = {}

    @property
    def groups(self) -> Collection[Group]:
        """The groups that were written."""
        return self._counts.keys()

    def count(self, group: Group) -> int:
        """Updates written of a group."""
        return self._counts.get(group, 0)

    def write(self, group: Group, update: Mapping[str, Tensor]) -> None:
        """Keep the update's tensors of one group."""
        index = self.count(group)
        with self._path(group, index).open("wb") as file:
            for spec in self._layout[group]:
                file.write(update[spec.name].detach().float().contiguous().numpy().data)
        self._counts[group] = index + 1

    def read(self, group: Group, index: int) -> dict[str, Tensor]:
        """The tensors of the group's update number `index`."""
        return split(torch.from_numpy(np.fromfile(self._path(group, index), np.float32)), self._layout[group])

    def stripe(self, group: Group, start: int, stop: int) -> NDArray[np.float32]:
        """The values from `start` to `stop` of the group's tensors laid end to end: (coordinates, updates)."""
        values = np.empty((stop - start, self.count(group)), np.float32)
        for index in range(self.count(group)):
            offset, count = start * _VALUE_BYTES, stop - start
            values[:, index] = np.fromfile(self._path(group, index), np.float32, offset=offset, count=count)
        return values

    def _path(self, group: Group, index: int) -> Path:
        return self._folder / f"{group}-{index:04d}.f32"
