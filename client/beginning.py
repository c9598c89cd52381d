"""What a task begins with: a checkpoint of ours, a released file, or nothing at all."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from client.finetune_config import FromCheckpoint, FromReleased, InitConfig
from unimiss_core import checkpoint, task_checkpoint
from unimiss_core.embedding import encoder_of
from unimiss_core.errors import CheckpointError
from unimiss_core.keys import read_signing_public_key
from unimiss_core.model import MiT
from unimiss_core.network import build_network, empty_network
from unimiss_core.released import read_released
from unimiss_core.study import ModelConfig, PlanConfig


@dataclass(frozen=True)
class Beginning:
    """The weights that a fine-tuning begins with, or that are probed."""

    name: Literal["checkpoint", "released", "scratch"]
    model: ModelConfig
    plan: PlanConfig
    tensors: Mapping[str, Tensor] | None
    """The pretrained teacher's; None from scratch."""

    @property
    def digest(self) -> str | None:
        return None if self.tensors is None else task_checkpoint.digest_of(self.tensors)

    def encoder(self) -> MiT:
        """On the CPU; from scratch the random one."""
        return self.random_encoder() if self.tensors is None else encoder_of(self.model, self.tensors)

    def random_encoder(self, seed: int = 0) -> MiT:
        """What an encoder of these sizes is before it has seen a scan."""
        return build_network(self.model, seed=seed).backbone.eval().requires_grad_(False)


def begin(init: InitConfig, plan: PlanConfig | None = None) -> Beginning:
    """Read what `init` names. plan: instead of the checkpoint's own. Raises CheckpointError, ConfigError."""
    if isinstance(init, FromCheckpoint):
        found = checkpoint.load(init.folder, key=read_signing_public_key(init.key) if init.key else None)
        manifest = found.manifest
        shapes = {name: tuple(p.shape) for name, p in empty_network(manifest.model).named_parameters()}
        if shapes != manifest.tensors:
            raise CheckpointError(f"{init.folder}: its tensors are not those of the model in its manifest")
        return Beginning("checkpoint", manifest.model, plan or manifest.plan, found.teacher)
    if isinstance(init, FromReleased):
        released = read_released(init.file)
        return Beginning("released", released.model, plan or PlanConfig(), released.teacher)
    return Beginning("scratch", init.model, plan or PlanConfig(), None)
