"""The gradient of the prototypes (`unimiss_core.head.Prototypes`), kept as the rows that make it.

Legend of shapes: E features of the bottleneck, K prototypes, R rows, which may be samples of several parts.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from unimiss_core.gathering import OuterProducts, add_gradient_, blocks_of
from unimiss_core.rounding import relative_error


class PrototypesGradient:
    """The gradient (K, E) of a weight of `Prototypes`, gathered over backward passes and never held as a whole unless
    asked for: s^T h - c W of `_UnitRowProduct` is as many products of rows as the batch has, and multiples of W."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self._lengths = torch.linalg.vector_norm(weight.detach(), dim=1)
        self._products = OuterProducts(weight)
        self._along = torch.zeros_like(self._lengths)

    def logits(self, h: Tensor) -> Tensor:
        """h (R, E) -> (R, K); a backward pass from them adds to this gradient."""
        logits: Tensor = (h @ self.weight.detach().mT) / self._lengths
        inputs, outputs = h.detach(), logits.detach()
        if logits.requires_grad:
            logits.register_hook(lambda grad: self._add(inputs, outputs, grad))
        return logits

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(which rows of the weight, their gradient), until all have been met; for the weight as it now is there."""
        return ((rows, self._rows(rows)) for rows in blocks_of(self.weight))

    def norm(self) -> Tensor:
        """L2 norm, a scalar; the gradient is not made for it. Each row of s^T h has c l along its row of W, and the
        gradient is what is left of it, so the squares of the one are those of the other less (c l)^2."""
        along = (self._along.double() / self._lengths).square().sum()
        norm: Tensor = (self._products.square_norm() - along).clamp(min=0.0).sqrt()
        return norm.to(self._lengths.dtype)

    @property
    def is_rows(self) -> bool:
        """Whether it is kept as rows and nothing else: there are few."""
        return self._products.are_rows

    def norm_at_most(self) -> float:
        """No less than the L2 norm of what `add_to_` adds at a scale of 1, whatever rounding does, so that what is
        shortened by it keeps a clip norm. NaN or infinite where a row is, and infinite where a prototype is so short
        that its own length has lost bits (3e-16 in float32). Of rows alone (`is_rows`).

        `norm` may be too small: where rows cancel, their product in float32 is longer than the exact one. With |.| for
        Frobenius norms, g(n) for the `relative_error` of n roundings, t = |s| |h|, a = |c l|, and all of them as they
        are kept, exactly

            |s^T h - c W|^2 = |s^T h|^2 - 2 <s^T h, c W> + |c W|^2.

        The first term is a sum of R x R products of rows. What was gathered along w_k, from logits, stands for w_k
        times row k of s^T h, with E + 2R + 8 roundings of |s_k| |h| |w_k|, l's among them. By Cauchy and Schwarz the
        other two terms are then off by 2 g(E + 2R + 8) a (t + a) at most, and float64 adds its own g to (t + a)^2. To
        the root of all this comes what `add_to_` rounds: R products and their sum, and the six steps that scale and
        join them, g(R + 6) (t + a).
        """
        assert self.is_rows
        single = self._lengths.dtype
        if self._lengths.min().square() < torch.finfo(single).tiny / torch.finfo(single).eps:
            return math.inf
        s, h = (rows.double() for rows in self._products.kept_rows())
        c, lengths = self._multiples(slice(None)).double(), self._lengths.double()
        rows, (prototypes, features) = len(s), self.weight.shape
        t = torch.linalg.vector_norm(s) * torch.linalg.vector_norm(h)
        a = torch.linalg.vector_norm(c * lengths)
        square = ((s @ s.mT) * (h @ h.mT)).sum() - 2 * (c @ self._along.double()) + a.square()
        off = 2 * relative_error(features + 2 * rows + 8, single) * a * (t + a)
        off += relative_error(2 * (prototypes + features + rows**2), torch.float64) * (t + a).square()
        return float((square + off).clamp(min=0.0).sqrt() + relative_error(rows + 6, single) * (t + a))

    def add_to_(self, total: Tensor, scale: float) -> None:
        """Add `scale` times the gradient to `total` (K, E). Not for use after that.

        Each block is made apart from `total`, of nothing else but these rows, and then added: rounding of the sum
        aside, what is added hangs on nothing else either. Made by one product with others' rows, where those cancel
        and these are lost beside them, it would.
        """
        self._products.scale_(scale)
        self._along *= scale
        for rows, block in self.blocks():
            total[rows] += block

    def write(self) -> None:
        """Add the whole to the weight's `grad`."""
        add_gradient_(self.weight, self._rows(slice(None)))

    def _add(self, h: Tensor, logits: Tensor, grad: Tensor) -> None:
        self._products.add(grad / self._lengths, h)
        self._along += (grad * logits).sum(0)

    def _rows(self, rows: slice) -> Tensor:
        along = self._multiples(rows)[:, None]
        return self._products.rows(rows).addcmul_(self.weight.detach()[rows], along, value=-1)

    def _multiples(self, rows: slice) -> Tensor:
        """c: of each row of the weight, how much of it is taken off."""
        multiples: Tensor = self._along[rows] / self._lengths[rows].square()
        return multiples
