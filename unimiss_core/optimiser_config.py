"""What a site makes of a step's gradient, as a study says it; `unimiss_core.local_optimiser` does it."""

from typing import Annotated, Literal, Self

from pydantic import Field, Tag, model_validator

from unimiss_core.config import Config, chosen_by_name

Rate = Annotated[float, Field(ge=0, le=1e6)]


class OptimiserConfig(Config):
    """What every optimiser of a site sets; the peak rate is for the study's batch, no hidden scaling."""

    name: str
    lr: Annotated[float, Field(gt=0, le=1e6)] = 1e-3
    """The peak rate, which the warm-up ends at."""
    final_lr: Rate = 1e-6
    """The rate of the study's last step, reached by half a cosine; at most lr."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """First steps of the study, in which the rate rises linearly; below rounds x local_steps."""
    weight_decay: tuple[Rate, Rate] = (0.04, 0.4)
    """From first to last step (cosine), times the rate; none on biases and other 1-D tensors."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 0.3
    """Each tensor's gradient is clipped to this norm; None turns it off."""
    freeze_prototypes_steps: Annotated[int, Field(ge=0)] = 0
    """The last layer stays as it is for this many first steps of the study; at most rounds x local_steps."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.final_lr > self.lr:
            raise ValueError(f"final_lr={self.final_lr} must not be above lr={self.lr}")
        return self


class AdamWConfig(OptimiserConfig):
    """AdamW, as published. Its name is not written out, so that older studies keep their digests."""

    name: Annotated[Literal["adamw"], Field(exclude_if=lambda name: name == "adamw")] = "adamw"


class NoiseAwareAdamWConfig(OptimiserConfig):
    """AdamW for the privacy mode `patient`, whose noise it knows; see `unimiss_core.local_optimiser`."""

    name: Literal["noise_aware_adamw"] = "noise_aware_adamw"
    clip_norm: None = None
    """Stays null: clipped noise would have another variance than what is subtracted."""
    noise_floor: Annotated[float, Field(gt=0, le=1)] = 0.1
    """The least that a mean of squares counts for, as a share of the noise's variance."""


class MomentumSGDConfig(OptimiserConfig):
    """SGD along the running mean of gradients; lr is in gradients, so it is far above AdamW's."""

    name: Literal["momentum_sgd"] = "momentum_sgd"
    weight_decay: tuple[Rate, Rate] = (0.0, 0.0)
    """From first to last step (cosine), times the rate, which is large here; none on biases and other 1-D tensors."""


LocalOptimiserConfig = Annotated[
    Annotated[AdamWConfig, Tag("adamw")]
    | Annotated[NoiseAwareAdamWConfig, Tag("noise_aware_adamw")]
    | Annotated[MomentumSGDConfig, Tag("momentum_sgd")],
    chosen_by_name(default="adamw"),
]
"""What a site makes of a step's gradient; without a `name` it is AdamW."""
