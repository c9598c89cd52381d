"""FedProx: a site's steps are pulled towards the student that the round began with.

Li et al. 2020 (arXiv:1812.06127), eq. 2: a site lowers F(w) + mu/2 ||w - w_received||^2, so mu (w - w_received) joins
the gradient of F, once a step and when that is final: summed over parts and team, before the clipping per tensor and
AdamW, which hold for the sum. A tensor's pull can thus crowd out F's gradient but never exceed the clip; and as AdamW
takes steps of about the rate's size, mu weighs the pull against F, not the length of a step.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class ProximalTerm:
    """mu: the study's `local.proximal`; with 0 nothing is kept and nothing computed."""

    def __init__(self, mu: float) -> None:
        self._mu = mu
        self._received: Mapping[str, Tensor] = {}

    @property
    def is_on(self) -> bool:
        """Whether there is something to be pulled to: outside a federation nothing is."""
        return bool(self._received)

    def stay_near(self, received: Mapping[str, Tensor], device: torch.device) -> None:
        """From here on towards `received`, the global student by name, wherever the round starts from. It is kept, not
        copied, where it is on the device already."""
        if self._mu > 0:
            self._received = {name: tensor.to(device) for name, tensor in received.items()}

    def pull_(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Add to gradients; `global_distance`, the norm of w - w_received over what this step trains.

        What it does not train (3D tensors in a 2D step, frozen prototypes) has no gradient, hence no pull, and keeps
        its moments; what stays at the site was received from nobody.
        """
        if not self.is_on:
            return {}
        moved = [(self._received[name], p, p.grad) for name, p in parameters.items() if name in self._received]
        trained = [(near, p.detach(), grad) for near, p, grad in moved if grad is not None]
        apart = torch._foreach_sub([p for _, p, _ in trained], [near for near, _, _ in trained])
        torch._foreach_add_([grad for _, _, grad in trained], apart, alpha=self._mu)
        return {"global_distance": torch.linalg.vector_norm(torch.stack(torch._foreach_norm(apart)))}
