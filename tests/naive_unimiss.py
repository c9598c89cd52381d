"""UniMiSS written as it reads on paper: loops over scans, views, slices and pairs, nothing shared, nothing clever.

The oracle for `unimiss_core.objective`. It uses a network's backbone and weights, one image or volume at a time, and
does everything after the features by itself.
"""

from collections.abc import Mapping
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from unimiss_core.network import Network


def naive_loss_terms(
    student: Network,
    teacher: Network,
    views: Tensor,
    centre_logits: Mapping[str, Tensor],
    *,
    student_temperature: float,
    teacher_temperature: float,
) -> dict[str, Tensor]:
    """views (B, V, C, *S) -> every loss term by name; centre_logits (K,) by representation."""
    b, v = views.shape[:2]
    names = ["image"] if views.ndim == 5 else ["volume", "slices"]
    terms = {}
    for mine, theirs in product(names, names):
        costs = []
        for scan, s, t in product(range(b), range(v), range(v)):
            if s != t:
                with torch.no_grad():
                    logits = naive_logits(teacher, views[scan, t], theirs)
                    target = torch.exp((logits - centre_logits[theirs]) / teacher_temperature)
                    target = target / target.sum()
                prediction = torch.exp(naive_logits(student, views[scan, s], mine) / student_temperature)
                costs.append(-(target * torch.log(prediction / prediction.sum())).sum())
        name = mine if mine == theirs else f"{mine}_to_{theirs}"
        terms[name] = torch.stack(costs).mean()
    return terms


def naive_logits(network: Network, view: Tensor, representation: str) -> Tensor:
    """One view (C, *S) -> logits (K,); slices one by one, as RGB, their logits averaged."""
    if representation != "slices":
        return _logits(network, view if view.ndim == 4 or view.shape[0] == 3 else view.expand(3, -1, -1))
    return torch.stack([_logits(network, view[:, d].expand(3, -1, -1)) for d in range(view.shape[1])]).mean(0)


def _logits(network: Network, view: Tensor) -> Tensor:
    h = view[None]
    h = network.backbone.features(h).class_token[0]
    mlp = network.head.mlp
    for i in (0, 2, 4):
        h = mlp[i].weight @ h + mlp[i].bias
        h = F.gelu(h) if i < 4 else h
    h = h / torch.sqrt((h * h).sum())
    rows = network.head.prototypes.weight
    return (rows / torch.sqrt((rows * rows).sum(1, keepdim=True))) @ h
