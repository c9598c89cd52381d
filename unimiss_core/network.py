"""Backbone and heads as one network, built reproducibly from a study's model configuration."""

import hashlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from unimiss_core.backbone import Backbone, architecture_of, backbone_of
from unimiss_core.errors import CheckpointError
from unimiss_core.head import Head, Prototypes
from unimiss_core.layers import PositionTable
from unimiss_core.reconstruction import Reconstruction
from unimiss_core.scan import RANKS, Rank
from unimiss_core.study import ModelConfig
from unimiss_core.unvalued import unvalued


class Network(nn.Module):
    """What self-distillation trains, as student and as teacher; tensors are named `backbone.*` and `head.*`.

    reconstruction: draws the input again (`reconstruction.*`); only where the study's objective asks for it.
    """

    def __init__(self, backbone: Backbone, head: Head, reconstruction: Reconstruction | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.reconstruction = reconstruction

    @property
    def ranks(self) -> tuple[Rank, ...]:
        """The ranks this network has tensors for."""
        return self.backbone.ranks

    def bottleneck(self, x: Tensor) -> Tensor:
        """x (B, C, *S) -> (B, E) of length 1. Raises ValueError where x does not fit the backbone."""
        return self.head.bottleneck(self.backbone(x))

    def bottleneck_and_reconstruction(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, *S) -> (B, E) as `bottleneck` gives it, and (B, C', *S) in (0, 1), in one pass; C' is 3 for images.

        Raises ValueError where x does not fit the backbone.
        """
        assert self.reconstruction is not None, "the study's model has no reconstruction"
        found = self.backbone.features(x)
        return self.head.bottleneck(found.class_token), self.reconstruction(found.decoder_map, x.shape[2:])

    def prototypes(self, h: Tensor) -> Tensor:
        """h (..., E) -> logits (..., K), linear in h."""
        logits: Tensor = self.head.prototypes(h)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, *S) -> logits (B, K)."""
        return self.prototypes(self.bottleneck(x))


def build_network(config: ModelConfig, *, seed: int, ranks: Collection[Rank] = RANKS) -> Network:
    """A freshly initialised network on the CPU, in float32.

    seed: every tensor's values follow from it and the tensor's name alone, so a network without a rank's tensors
    begins with the same values as the whole one. The global random state is neither read nor moved.
    """
    network = empty_network(config, ranks=ranks).to_empty(device="cpu")
    initialise_(network, seed)
    return network


def empty_network(config: ModelConfig, *, ranks: Collection[Rank] = RANKS) -> Network:
    """The network on torch's meta device: names and shapes without values, memory or time."""
    architecture = architecture_of(config)
    with unvalued():
        backbone = backbone_of(config, ranks)
        head = Head(architecture.width, architecture.head_hidden, architecture.bottleneck, config.prototypes)
        reconstruction = Reconstruction(backbone.map_width, backbone.cells) if config.reconstruction else None
        return Network(backbone, head, reconstruction)


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """Every parameter by name, detached, sharing memory with the network."""
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by what follows it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def load_tensors_(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into the network's parameters, after every name and shape was seen to agree.

    Raises CheckpointError: a name too many or too few, or another shape; the network is then unchanged.
    """
    check_tensors(network, tensors)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(tensors[name])


def check_tensors(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError: a name too many or too few, or another shape than the network's."""
    own = dict(network.named_parameters())
    problems = [f"missing {name}" for name in sorted(own.keys() - tensors.keys())]
    problems += [f"unexpected {name}" for name in sorted(tensors.keys() - own.keys())]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(parameter.shape)}"
        for name, parameter in own.items()
        if name in tensors and tensors[name].shape != parameter.shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"tensors do not fit the model: {'; '.join(problems[:5])}{more}")


def initialise_(network: nn.Module, seed: int, *, but: Collection[str] = ()) -> None:
    """All initialisation: Xavier for linear layers, Kaiming for convolutions, a normal of 0.02 for tokens and tables,
    1 and 0 for norms, random directions for prototypes; biases are 0.

    Linear layers of the published model begin with a normal of 0.02 whatever their width. At small widths the class
    token then hardly sees the patches: two scans' features begin with a cosine of 0.98, the centre takes the rest,
    and training falls into the uniform answer (docs/LOG.md).

    but: parameters that stay as they are, because others' values are put there.
    """
    for path, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if f"{path}.{name}" in but:
                continue
            generator = _generator(seed, f"{path}.{name}")
            with torch.no_grad():
                if name == "bias":
                    parameter.zero_()
                elif isinstance(module, nn.LayerNorm | nn.InstanceNorm2d | nn.InstanceNorm3d):
                    parameter.fill_(1.0)
                elif isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
                    nn.init.kaiming_normal_(parameter, a=0.01, generator=generator)
                elif isinstance(module, Prototypes):
                    parameter.normal_(generator=generator)
                    parameter.div_(torch.linalg.vector_norm(parameter, dim=1, keepdim=True))
                elif isinstance(module, nn.Linear):
                    nn.init.xavier_normal_(parameter, generator=generator)
                elif isinstance(module, PositionTable) or name == "class_token":
                    parameter.normal_(std=0.02, generator=generator)
                else:
                    raise AssertionError(f"no initialisation for {path}.{name}")


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
