"""How far sums in floating point are from exact, at most."""

import torch


def relative_error(roundings: int, dtype: torch.dtype) -> float:
    """n u / (1 - n u) of n roundings, u being half of what lies between 1 and the next number: what they are off by at
    most, of the sum of what is summed without its signs, in whatever order it is summed.

    Higham 2002, Accuracy and Stability of Numerical Algorithms, lemma 3.1 and section 3.1. What is too small for the
    type's full precision (1e-38 in float32) is not in it.
    """
    off = roundings * torch.finfo(dtype).eps / 2
    return off / (1 - off)
