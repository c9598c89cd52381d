"""What a study promises of privacy. docs/privacy.md says what each number is worth.

Two guarantees that are never mixed up. Patient-level: whoever sees everything that a site ever sent can hardly tell
whether any one patient's scans were used (`unimiss_core.private_step`). Site-level: the same for a whole site's
archive, from the coordinator's releases on; the coordinator itself sees what a site sent.
"""

from typing import Annotated, Literal

from pydantic import Field, Tag

from unimiss_core.config import Config, chosen_by_name
from unimiss_core.scan import Rank

Delta = Annotated[float, Field(gt=0, lt=1e-3)]
Rate = Annotated[float, Field(gt=0, le=1)]
Multiplier = Annotated[float, Field(gt=0)]


class NoPrivacyConfig(Config):
    """Nothing is promised beyond what docs/federation.md says of what travels."""

    mode: Literal["none"] = "none"


class SamplingRateConfig(Config):
    """Chance with which each patient takes part in a step, by the rank of the step's scans."""

    images: Rate = 0.05
    volumes: Rate = 0.05

    def of(self, rank: Rank) -> float:
        return self.images if rank == 2 else self.volumes


class PatientPrivacyConfig(Config):
    """Local DP-SGD at each site, whose unit is the patient. `batch` is what its sums are divided by: patients that a
    step of each rank is expected to hold, the same constant at every site."""

    mode: Literal["patient"] = "patient"
    delta: Delta = 1e-5
    """Below one over ten times the patients of the largest site."""
    max_epsilon: Annotated[float, Field(gt=0)]
    """What a patient may cost over the whole study, at most, at any site."""
    sampling_rate: SamplingRateConfig = SamplingRateConfig()
    scans_per_patient: Annotated[int, Field(gt=0)] = 4
    """Scans of one patient that one step looks at, drawn at random; together they are one gradient."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """L2 norm to which a patient's gradient, over all parameters together, is shortened where it is longer (C)."""
    noise_multiplier: Multiplier
    """Standard deviation of the noise on the sum of gradients, in clip norms (s)."""
    centre_noise: Multiplier = 10.0
    """Standard deviation of the noise on the sum of the patients' mean bottlenecks, each of norm 1 at most."""


class SitePrivacyConfig(Config):
    """DP-FedAvg: a site's whole update is clipped, and the coordinator adds noise to the sum of all."""

    mode: Literal["site"] = "site"
    delta: Delta = 1e-5
    max_epsilon: Annotated[float, Field(gt=0)]
    """What a site may cost over the whole study."""
    clip_norm: Annotated[float, Field(gt=0)]
    """L2 norm to which a site's update, over all groups together, is shortened where it is longer (C)."""
    noise_multiplier: Multiplier
    """Standard deviation of the noise on the sum of the updates, in clip norms (z)."""
    sites: Annotated[int, Field(gt=0)]
    """Sites that each round asks and divides by, a public number; a round with fewer replies is refused."""


PrivacyConfig = Annotated[
    Annotated[NoPrivacyConfig, Tag("none")]
    | Annotated[PatientPrivacyConfig, Tag("patient")]
    | Annotated[SitePrivacyConfig, Tag("site")],
    chosen_by_name(default="none", key="mode"),
]
