"""UniMiSS and UniMiSS+ as they read on paper: loops over scans, views, slices and pairs, nothing shared or clever.

The oracle for `unimiss_core.objective` and `unimiss_core.unimiss_plus`. It uses a network's backbone and weights, one
image or volume at a time, and does everything after the features by itself.
"""

import math
from collections.abc import Callable, Mapping
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
    names = ["image"] if views.ndim == 5 else ["volume", "slices"]
    terms = {}
    for mine, theirs in product(names, names):
        name = mine if mine == theirs else f"{mine}_to_{theirs}"
        terms[name] = _cross_entropy(
            lambda s, name=mine: naive_logits(student, s, name),
            lambda t, name=theirs: (naive_logits(teacher, t, name) - centre_logits[name]) / teacher_temperature,
            views,
            student_temperature,
        )
    return terms


def naive_plus_terms(
    student: Network,
    teacher: Network,
    views: Tensor,
    centre_logits: Mapping[str, Tensor],
    *,
    student_temperature: float,
    teacher_temperature: float,
    radiograph_size: tuple[int, int],
    ct_window_hu: tuple[float, float],
    slice_stride: int,
) -> dict[str, Tensor]:
    """UniMiSS+: every loss term before its weight; radiographs from front to back."""
    own = "image" if views.ndim == 5 else "volume"

    def taught(view: Tensor) -> Tensor:
        return (naive_logits(teacher, view, own) - centre_logits[own]) / teacher_temperature

    def radiograph(view: Tensor) -> Tensor:
        return naive_radiograph(view, radiograph_size, ct_window_hu)

    looks: dict[str, Callable[[Tensor], Tensor]] = {own: lambda view: naive_logits(student, view, own)}
    drawn: dict[str, Callable[[Tensor], Tensor]] = {own: lambda view: view}
    if own == "volume":
        looks["radiograph_to_volume"] = lambda view: naive_logits(student, radiograph(view), "image")
        looks["slices_to_volume"] = lambda view: naive_logits(student, view[:, ::slice_stride], "slices")
        drawn["radiograph"] = radiograph
    terms = {name: _cross_entropy(look, taught, views, student_temperature) for name, look in looks.items()}
    for name, picture in drawn.items():
        errors = [naive_reconstruction_error(student, picture(view)) for scan in views for view in scan]
        terms[f"{name}_reconstruction"] = torch.stack(errors).mean()
    return terms


def naive_radiograph(view: Tensor, size: tuple[int, int], ct_window_hu: tuple[float, float]) -> Tensor:
    """One volume (1, D, H, W) as the model takes it -> (1, *size): photons counted ray by ray, head above."""
    _, depth, height, width = view.shape
    passed = torch.zeros(depth, width, dtype=view.dtype)
    low, high = ct_window_hu
    for d, w in product(range(depth), range(width)):
        hu = [low + (high - low) * (0.5 + 0.25 * value) for value in view[0, d, :, w].tolist()]
        passed[depth - 1 - d, w] = math.exp(-sum(max(0.0, 1 + one / 1000) for one in hu) / height)
    seen = F.interpolate(-torch.log(passed)[None, None], size, mode="bilinear", antialias=True)[0]
    return 4 * (seen - seen.min()) / (seen.max() - seen.min()) - 2


def naive_reconstruction_error(network: Network, view: Tensor) -> Tensor:
    """One picture or volume (C, *S): each vector of the decoder's map becomes its patch, a patch at a time."""
    x = view if view.ndim == 4 or view.shape[0] == 3 else view.expand(3, -1, -1)
    found = network.backbone.features(x[None]).decoder_map[0]
    assert network.reconstruction is not None
    layer = network.reconstruction.patch[f"{x.ndim - 1}d"]
    patch = layer.weight.shape[2:]
    expected = (x - x.min()) / (x.max() - x.min())
    error, count = torch.zeros((), dtype=x.dtype), 0
    for cell in product(*(range(n) for n in found.shape[1:])):
        place = tuple(slice(i * n, min((i + 1) * n, end)) for i, n, end in zip(cell, patch, x.shape[1:], strict=True))
        target = expected[(slice(None), *place)]
        values = torch.einsum("i,io...->o...", found[(slice(None), *cell)], layer.weight)
        values = values + layer.bias.view(-1, *(1 for _ in patch))
        values = 1 / (1 + torch.exp(-values[(slice(None), *(slice(n) for n in target.shape[1:]))]))
        error, count = error + (values - target).square().sum(), count + target.numel()
    assert count == x.numel()
    return error / count


def _cross_entropy(
    look: Callable[[Tensor], Tensor], taught: Callable[[Tensor], Tensor], views: Tensor, temperature: float
) -> Tensor:
    """Of one scan and pair of its views after the other; `look` gives the student's logits of a view (C, *S), `taught`
    the teacher's, centred and divided by its temperature."""
    b, v = views.shape[:2]
    costs = []
    for scan, s, t in product(range(b), range(v), range(v)):
        if s != t:
            with torch.no_grad():
                target = torch.exp(taught(views[scan, t]))
                target = target / target.sum()
            prediction = torch.exp(look(views[scan, s]) / temperature)
            costs.append(-(target * torch.log(prediction / prediction.sum())).sum())
    return torch.stack(costs).mean()


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
