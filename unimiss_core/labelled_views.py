"""Views that bring what is true of them: one tensor, so that a batch is split, moved and stacked with its labels.

Legend of shapes: B scans, V views, C channels, S spatial axes - (H, W) or (D, H, W) -, K answers of a model.

The truth is one more channel, the last: a mask's classes, each at its voxel; or, of whole scans, K shares of classes in
its first K places (`UNKNOWN` where nobody knows) and 0 in all others. float32 holds both exactly.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def with_mask(view: Tensor, mask: Tensor) -> Tensor:
    """view (C, *S), classes (*S) -> (C + 1, *S)."""
    return torch.cat([view, mask[None].to(view.dtype)])


def with_shares(view: Tensor, shares: Sequence[float]) -> Tensor:
    """view (C, *S), K numbers -> (C + 1, *S). S has K places at least: 4,096 in the smallest input there is."""
    truth = torch.zeros_like(view[:1])
    truth.view(-1)[: len(shares)] = torch.tensor(shares, dtype=view.dtype)
    return torch.cat([view, truth])


def parted(views: Tensor) -> tuple[Tensor, Tensor]:
    """views (B, V, C + 1, *S) -> what a model sees (B V, C, *S), and the truth's channel (B V, *S)."""
    seen = views.flatten(0, 1)
    return seen[:, :-1], seen[:, -1]


def shares_in(truth: Tensor, outputs: int) -> Tensor:
    """The truth's channel (N, *S) of whole scans -> (N, K)."""
    return truth.flatten(1)[:, :outputs]
