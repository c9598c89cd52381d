"""One UniMiSS step as the published description reads, with nothing shared: the baseline that `step.py` measures.

Views one after another, slices as RGB images, the whole decoder, logits of every slice, weight normalisation in each
call, softmax and log-softmax in each term, attention as three products, optimiser and averages tensor by tensor.
It takes its tensors from a `Network` and computes everything by itself; a test holds it against the fast step.

Legend of shapes: B scans, V views, C channels, S spatial axes, D slices, N tokens, K prototypes.
"""

import contextlib
import math
from collections.abc import Mapping
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from unimiss_core.network import Network

CONV = {2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSED = {2: F.conv_transpose2d, 3: F.conv_transpose3d}
HEADS, REDUCTIONS = (1, 2, 4, 8), (6, 4, 2, 1)


class NaiveLearner:
    """Student, teacher, AdamW and a centre of logits for each representation."""

    def __init__(self, student: Network, teacher: Network, *, bf16: bool = False) -> None:
        self.student, self.teacher, self.bf16 = student, teacher, bf16
        self.centre: dict[str, Tensor] = {}
        others = [p for p in student.parameters() if p.ndim <= 1]
        decaying = [p for p in student.parameters() if p.ndim > 1]
        self.optimiser = torch.optim.AdamW(
            [{"params": decaying, "weight_decay": 0.04}, {"params": others, "weight_decay": 0.0}],
            lr=1e-4,
            foreach=False,
        )

    def step(self, views: Tensor) -> float:
        """views (B, V, C, *S) -> the loss before the update."""
        self.optimiser.zero_grad(set_to_none=True)
        with torch.autocast(views.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext():
            terms, centre = naive_loss(self.student, self.teacher, views, self.centre)
        loss = torch.stack(list(terms.values())).sum()
        loss.backward()
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                norm = parameter.grad.norm()
                scale = 0.3 / (norm + 1e-6)
                if scale < 1:
                    parameter.grad.mul_(scale)
        self.optimiser.step()
        with torch.no_grad():
            for mine, theirs in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                theirs.mul_(0.996).add_(mine, alpha=0.004)
        self.centre = centre
        return loss.item()


def naive_loss(
    student: Network, teacher: Network, views: Tensor, centre: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(loss terms by name, the centre after this step); temperatures 0.1 and 0.04, centre momentum 0.9."""
    names = ["image"] if views.ndim == 5 else ["volume", "slices"]
    count = views.shape[1]
    seen = {(name, v): naive_logits(student, views[:, v], name) for name, v in product(names, range(count))}
    with torch.no_grad():
        taught = {(name, v): naive_logits(teacher, views[:, v], name) for name, v in product(names, range(count))}
    terms, moved = {}, {}
    for theirs in names:
        mean = torch.stack([taught[theirs, v].float() for v in range(count)]).mean((0, 1))
        old = centre.get(theirs, torch.zeros_like(mean))
        for mine in names:
            costs = []
            for s, t in product(range(count), range(count)):
                if s != t:
                    target = F.softmax((taught[theirs, t].float() - old) / 0.04, dim=-1)
                    prediction = F.log_softmax(seen[mine, s].float() / 0.1, dim=-1)
                    costs.append(-(target * prediction).sum(-1).mean())
            terms[mine if mine == theirs else f"{mine}_to_{theirs}"] = torch.stack(costs).mean()
        moved[theirs] = 0.9 * old + 0.1 * mean
    return terms, moved


def naive_logits(network: Network, x: Tensor, representation: str) -> Tensor:
    """x (B, C, *S), one view of each scan -> (B, K); of slices, the mean over D."""
    if representation != "slices":
        return _head(network, naive_features(network, _as_rgb(x) if x.ndim == 4 else x))
    b, _, d = x.shape[:3]
    slices = x.transpose(1, 2).reshape(b * d, 1, *x.shape[3:])
    return _head(network, naive_features(network, _as_rgb(slices))).reshape(b, d, -1).mean(1)


def naive_features(network: Network, x: Tensor) -> Tensor:
    """x (B, C, *S), images with three channels -> class token (B, width)."""
    p = {name.removeprefix("backbone."): tensor for name, tensor in network.named_parameters()}
    rank = x.ndim - 2
    r = f"{rank}d"
    x = _conv_block(p, f"encoder.stem.{r}", x, stride=2 if rank == 2 else (1, 2, 2), padding=3)
    token = p["encoder.class_token"].expand(len(x), -1)
    maps = []
    for i in range(4):
        stage = f"encoder.stages.{i}"
        x = _conv_block(p, f"{stage}.embed.{r}", x, stride=2, padding=1)
        token = token if i == 0 else F.linear(token, p[f"{stage}.class_token.weight"], p[f"{stage}.class_token.bias"])
        table = network.backbone.encoder.stages[i].position[r](x)
        token, x = _blocks(p, stage, token, x, table, HEADS[i], REDUCTIONS[i], eps=1e-6)
        maps.append(x)
    for i in range(3):
        stage = f"decoder.stages.{i}"
        x = CONV_TRANSPOSED[rank](x, p[f"{stage}.embed.{r}.weight"], p[f"{stage}.embed.{r}.bias"], stride=2)
        skip = maps[2 - i]
        x = x[(..., *(slice(n) for n in skip.shape[2:]))] + skip
        token = F.linear(token, p[f"{stage}.class_token.weight"], p[f"{stage}.class_token.bias"])
        table = network.backbone.decoder.stages[i].position[r](x)
        token, x = _blocks(p, stage, token, x, table, HEADS[3 - i], REDUCTIONS[2 - i], eps=1e-5)
    tokens = torch.cat([token[:, None], x.flatten(2).transpose(1, 2)], dim=1)
    return F.layer_norm(tokens, tokens.shape[-1:], p["decoder.norm.weight"], p["decoder.norm.bias"], 1e-5)[:, 0]


def _conv_block(p: Mapping[str, Tensor], at: str, x: Tensor, *, stride: int | tuple[int, ...], padding: int) -> Tensor:
    x = CONV[x.ndim - 2](x, p[f"{at}.conv.weight"], None, stride, padding)
    return F.leaky_relu(F.instance_norm(x, weight=p[f"{at}.norm.weight"], bias=p[f"{at}.norm.bias"]), 0.01)


def _blocks(
    p: Mapping[str, Tensor], stage: str, token: Tensor, x: Tensor, table: Tensor, heads: int, ratio: int, *, eps: float
) -> tuple[Tensor, Tensor]:
    grid = x.shape[2:]
    tokens = torch.cat([token[:, None], x.flatten(2).transpose(1, 2)], dim=1) + table
    depth = len({name.split(".")[4] for name in p if name.startswith(f"{stage}.blocks.")})
    for j in range(depth):
        at = f"{stage}.blocks.{j}"
        tokens = tokens + _attention(p, f"{at}.attention", _norm(p, f"{at}.norm1", tokens, eps), grid, heads, ratio)
        hidden = F.gelu(_linear(p, f"{at}.mlp.0", _norm(p, f"{at}.norm2", tokens, eps)))
        tokens = tokens + _linear(p, f"{at}.mlp.2", hidden)
    return tokens[:, 0], tokens[:, 1:].transpose(1, 2).reshape(len(x), -1, *grid)


def _attention(p: Mapping[str, Tensor], at: str, tokens: Tensor, grid: torch.Size, heads: int, ratio: int) -> Tensor:
    b, n, c = tokens.shape
    context = tokens
    if ratio > 1:
        cells = tokens[:, 1:].transpose(1, 2).reshape(b, c, *grid)
        reduce = f"{at}.reduce.{len(grid)}d"
        cells = CONV[len(grid)](cells, p[f"{reduce}.weight"], p[f"{reduce}.bias"], ratio)
        context = torch.cat([tokens[:, :1], cells.flatten(2).transpose(1, 2)], dim=1)
        context = _norm(p, f"{at}.reduce_norm", context, 1e-5)
    query = _linear(p, f"{at}.query", tokens).reshape(b, n, heads, -1).transpose(1, 2)
    key, value = _linear(p, f"{at}.key_value", context).reshape(b, -1, 2, heads, c // heads).permute(2, 0, 3, 1, 4)
    weights = ((query @ key.transpose(-2, -1)) / math.sqrt(c // heads)).softmax(-1)
    return _linear(p, f"{at}.project", (weights @ value).transpose(1, 2).reshape(b, n, c))


def _head(network: Network, features: Tensor) -> Tensor:
    """features (B, width) -> logits (B, K), the prototypes normalised in every call."""
    h = F.normalize(network.head.mlp(features), dim=-1)
    weight = network.head.prototypes.weight
    return F.linear(h, torch._weight_norm(weight, torch.ones_like(weight[:, :1]), 0))


def _linear(p: Mapping[str, Tensor], at: str, x: Tensor) -> Tensor:
    return F.linear(x, p[f"{at}.weight"], p.get(f"{at}.bias"))


def _norm(p: Mapping[str, Tensor], at: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f"{at}.weight"], p[f"{at}.bias"], eps)


def _as_rgb(x: Tensor) -> Tensor:
    return x if x.shape[1] == 3 else x.repeat(1, 3, 1, 1)
