"""FedEMA: a site that comes back starts between the student it receives and the one it trained itself.

Zhuang, Wen and Zhang, "Divergence-aware Federated Self-supervised Learning" (ICLR 2022, arXiv:2204.04385). Taken from
the paper:

    start = mu W_k + (1 - mu) W_g        W_g: received; W_k: what this site trained to in the round before
    mu = min(lambda ||W_g - W_k||, 1)    one for the whole network, measured on the encoder alone
    lambda = tau / ||W_g - W_k||         of the first time that the site comes back, then kept: mu begins at tau

and, as in the authors' program where sites are drawn at random, a site that missed a round starts from W_g.

What differs. Theirs has an online encoder, a predictor and a target network; mu, measured on the encoder, mixes encoder
and predictor. Ours has no predictor: mu, measured on all but the head, mixes all of the student. Their target network
stays at the site; our teacher is the federation's, as without this option. Their sites send the weights they trained
to; ours send these minus the *received* ones, not minus the start, so that the coordinator's old + mean of updates is
the mean of what the sites trained to, as it is there, and nothing at the coordinator knows of mu. An update hence
holds what the site kept of its own besides what it learned, and is the larger for it. (The authors' program also
differs from their paper: it takes for the distance the mean over convolutions of how far local training went.)
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unimiss_core.groups import group_of


@dataclass(frozen=True)
class Start:
    """What a site's round starts from.

    own_share: mu, the site's own share of it. scale: lambda; None until the site has come back once.
    """

    student: Mapping[str, Tensor]
    own_share: float
    scale: float | None


def divergence_aware_start(
    received: Mapping[str, Tensor], own: Mapping[str, Tensor], *, tau: float, scale: float | None
) -> Start:
    """The start of a site that trained to `own` in the round before; both of the same names and shapes.

    scale: lambda of earlier rounds; None makes it. Students that do not differ leave it unmade, for a later round.
    """
    distance = _encoder_distance(received, own)
    if distance == 0:
        return Start(received, 0.0, scale)
    scale = tau / distance if scale is None else scale
    share = min(scale * distance, 1.0)
    return Start({name: torch.lerp(received[name], own[name], share) for name in received}, share, scale)


def _encoder_distance(received: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> float:
    """L2 norm of the difference of all tensors but the head's, summed in float64."""
    encoder = [name for name in received if group_of(name) != "head"]
    norms = [torch.linalg.vector_norm(received[name] - own[name], dtype=torch.float64) for name in encoder]
    return float(torch.linalg.vector_norm(torch.stack(norms)))
