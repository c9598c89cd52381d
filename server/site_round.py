"""One site's line in the metrics of a round."""

from dataclasses import dataclass, field

from unimiss_core.wire import TrainReply


@dataclass
class SiteRound:
    """What a site did in a round; docs/artefacts.md names the fields."""

    status: str = "absent"
    reason: str = ""
    scans: dict[str, int] = field(default_factory=lambda: {"2d": 0, "3d": 0})
    left_out: int = 0
    steps: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    diagnostics: dict[str, float] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0

    @property
    def counts(self) -> bool:
        """Whether an update of the site is in the round's sum."""
        return self.status in ("ok", "late")

    def describe(self, answer: TrainReply) -> None:
        """Take over what an update that may count says of itself."""
        self.scans = {f"{rank}d": count for rank, count in answer.scans.items()}
        self.steps = answer.steps
        self.losses = dict(answer.losses)
        self.diagnostics = dict(answer.diagnostics)
        self.seconds = round_s(answer.seconds)


def round_s(seconds: float) -> float:
    """Seconds as they stand in the metrics: to the millisecond."""
    return round(seconds, 3)
