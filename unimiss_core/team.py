"""The processes that take a site's optimiser steps together, one for each of its devices.

Each holds the whole network and finds the gradient of its part of a batch. The parts are summed over the team; then
all take the same step, so that weights, moments, teacher and centre stay alike without being sent.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

_BUCKET = 2**24
"""Values summed at a time: large enough for the wire's full speed, small beside the gradient itself."""


class Team(Protocol):
    """place: of this process, from 0. size: how many processes there are."""

    @property
    def place(self) -> int: ...

    @property
    def size(self) -> int: ...

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the team; every process gives tensors of the same shapes, in order."""
        ...


class Alone:
    """A team of one."""

    place = 0
    size = 1

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        pass


class Processes:
    """The processes of torch's default process group, which must have been joined."""

    def __init__(self) -> None:
        self.place = dist.get_rank()
        self.size = dist.get_world_size()

    @torch.no_grad()
    def sum_(self, tensors: Sequence[Tensor]) -> None:
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat)
            for tensor, summed in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(summed.view_as(tensor))


class Part(NamedTuple):
    """One process's part of a batch. scans: which; share: its weight in the batch's means, 1 for all of it."""

    scans: slice
    share: float


def part_of(team: Team, scans: int) -> Part:
    """The part of a batch of `scans` that this process takes; parts differ by one scan at most.

    A process that is left without one goes along with the first scan and a share of 0: it then takes part in every
    sum and adds nothing.
    """
    start, stop = (scans * place // team.size for place in (team.place, team.place + 1))
    if start == stop:
        return Part(slice(0, 1), 0.0)
    return Part(slice(start, stop), (stop - start) / scans)


def largest_part(team: Team, scans: int) -> int:
    """The scans of the largest part that any process takes of a batch of `scans`."""
    return math.ceil(scans / team.size)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(held.numel() for held in bucket) >= _BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
