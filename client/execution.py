"""How this site computes its steps: from the site file to a learner, with the largest parts of a batch that fit."""

import json
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from client.site_config import SiteConfig
from client.telling import tell
from unimiss_core import durable
from unimiss_core.device import devices_of, left_unused, memory_of
from unimiss_core.errors import ConfigError
from unimiss_core.execution import Execution
from unimiss_core.json_text import read_object
from unimiss_core.learner import Learner
from unimiss_core.private_learner import PrivateLearner
from unimiss_core.scan import Rank
from unimiss_core.students import shape_of_views
from unimiss_core.study import StudyConfig
from unimiss_core.team import Team

log = logging.getLogger(__name__)

MEMORY = "micro_batches.json"
"""In the site's state folder: what was found to fit, by circumstances. May be deleted; it is found again."""

CLEARLY_MORE = 0.1
"""Of a card's memory: where so much more is free than when it was tried out, it is tried out again."""

_SLOW_IN_WORDS = {
    "cpu": "this processor, which has no such products; fp32 is faster here",
    "cuda": "{}, which emulates its products (GPUs have them from compute capability 8.0 on); fp32 is faster there, if "
    "it fits",
}


class _Fit(NamedTuple):
    """scans: most at a time. free: bytes that the card had free when that was found: other work may have held the rest,
    and may be gone by now."""

    scans: int
    free: int


def devices_for(config: SiteConfig) -> list[torch.device]:
    """What the site file names. Raises ConfigError: it is not on this machine."""
    try:
        return devices_of(config.devices)
    except ConfigError as error:
        raise ConfigError(f"site '{config.name}': key 'devices': {error}") from None


def look_over(config: SiteConfig) -> None:
    """Before there is work: tell of devices that the site file asks for what they do badly.

    Raises ConfigError: a device is not on this machine.
    """
    devices = devices_for(config)
    for gpu, why in left_unused(config.devices).items():
        tell(config.name, f"devices: auto leaves {gpu} unused: {why}")
    slow = [device for device in dict.fromkeys(devices) if config.precision == "bf16" and is_slow_in_bf16(device)]
    for device in slow:
        tell(config.name, f"precision: bf16 is slow on {_SLOW_IN_WORDS[device.type].format(device)}")


def learner_for(
    config: SiteConfig, study: StudyConfig, ranks: Collection[Rank], *, device: torch.device, team: Team
) -> Learner:
    """A learner of `study` on `device`, one of `team`, as the site file wants steps computed.

    Where a micro-batch is `auto`, a GPU is tried out, once, and again where clearly more of it is free: a message
    starts a new process, so what was found is kept in the state folder. A CPU takes the whole batch; there is no asking
    it what fits.
    """
    asked = {rank: config.micro_batch.of(rank) for rank in sorted(set(ranks))}
    execution = Execution(
        device=device,
        precision=config.precision,
        views_in_turn=config.views_in_turn,
        activation_checkpointing=config.activation_checkpointing,
        compile=config.compile,
        cuda_graphs=config.cuda_graphs,
        patients_at_once=config.patients_at_once,
        micro_batch={rank: size for rank, size in asked.items() if isinstance(size, int)},
    )
    if config.compile and study.privacy.mode != "patient":
        tell(config.name, "compile: the first steps take minutes each, while the network is compiled")
    kind = PrivateLearner if study.privacy.mode == "patient" else Learner
    learner = kind(study, ranks=ranks, execution=execution, team=team, tell=partial(tell, config.name))
    if device.type == "cuda":
        open_ones = [rank for rank, size in asked.items() if size == "auto"]
        learner.micro_batch |= _found(learner, open_ones, config.state / MEMORY, tell=partial(tell, config.name))
    return learner


def largest_that_fits(fits: Callable[[int], bool], whole: int) -> int:
    """The size of the fewest equal parts of `whole` that fit; 0 where not even 1 fits.

    Parts are evened out, for 12 and 12 need no more passes than 17 and 7, and less memory.
    """
    size = most_that_fit(fits, whole)
    return _ceil_div(whole, _ceil_div(whole, size)) if size else 0


def most_that_fit(fits: Callable[[int], bool], whole: int) -> int:
    """The largest size up to `whole` that fits; 0 where not even 1 does.

    fits: true up to some size and false above it. Tried first is the whole, then halves until one fits, then middles
    between that and what did not.
    """
    size, too_large = whole, whole + 1
    while size > 0 and not fits(size):
        size, too_large = size // 2, size
    while too_large - size > 1:
        middle = (size + too_large) // 2
        if fits(middle):
            size = middle
        else:
            too_large = middle
    return size


def is_slow_in_bf16(device: torch.device) -> bool:
    """Whether products in bfloat16 take longer than in float32, as where they must be emulated: of a CPU by measure, of
    a GPU by its generation."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) < (8, 0)

    def seconds(dtype: torch.dtype) -> float:
        square = torch.ones(256, 256, dtype=dtype)
        times = []
        for _ in range(3):
            began = time.perf_counter()
            square @ square
            times.append(time.perf_counter() - began)
        return min(times)

    return seconds(torch.bfloat16) > 2 * seconds(torch.float32)


def _found(
    learner: Learner, ranks: Collection[Rank], memory: Path, *, tell: Callable[[str], None]
) -> Iterator[tuple[Rank, int]]:
    """(rank, micro-batch that fits), remembered or found now; of a team on cards that are alike the first remembers.

    tell: hears what was found now. Raises ConfigError: the card gives no answer.
    """
    if not ranks:
        return
    remembered = _read(memory)
    free, total = memory_of(learner.device)  # before any trial, whose kernels stay on the card
    for rank in ranks:
        key = _circumstances(learner, rank)
        fit = remembered.get(key)
        if fit is None or free - fit.free > CLEARLY_MORE * total:
            fit = _Fit(largest_that_fits(partial(learner.fits, rank), learner.most_scans(rank)), free)
            tell(_in_words(learner, rank, fit, total))
            if fit.scans and learner.team.place == 0:
                remembered[key] = fit
                _write(memory, remembered)
        yield rank, max(1, fit.scans)  # where not even 1 fits, the step says so in words


def _in_words(learner: Learner, rank: Rank, fit: _Fit, total: int) -> str:
    key, most = "images" if rank == 2 else "volumes", learner.most_scans(rank)
    found = f"{fit.scans} of {most}" if fit.scans else f"not even 1 of {most}"
    room = f"{fit.free / 1e9:.1f} of {total / 1e9:.1f} GB are free"
    return f"micro_batch.{key}: auto found {found} {rank}D scans at a time to fit on {learner.device}, where {room}"


def _circumstances(learner: Learner, rank: Rank) -> str:
    """All that a step's need of memory, and what there is of it, follow from."""
    study, execution = learner.study, learner.execution
    card = torch.cuda.get_device_properties(learner.device)
    facts = {
        "card": card.name,
        "bytes": card.total_memory,
        "torch": torch.__version__,
        "precision": execution.precision,
        "cuda_graphs": execution.cuda_graphs,
        "views_in_turn": execution.views_in_turn,
        "activation_checkpointing": execution.activation_checkpointing,
        "ranks": list(learner.ranks),
        "model": study.model.model_dump(mode="json"),
        "views": shape_of_views(study, rank),
        "objective": (study.finetune or study.objective).model_dump(mode="json"),
        "batch": learner.most_scans(rank),
        "proximal": study.local.proximal > 0,
        "optimiser": study.optimiser.name,
        "privacy": study.privacy.mode,
    }
    return json.dumps(facts, sort_keys=True)


def _read(memory: Path) -> dict[str, _Fit]:
    """What was found before; nothing where the file is missing or damaged, and none of what older versions kept, which
    did not know how much was free."""
    try:
        entries = read_object(memory).items()
    except (OSError, ValueError):
        return {}
    return {key: _Fit(**fit) for key, fit in entries if _is_whole(fit)}


def _is_whole(fit: object) -> bool:
    if not isinstance(fit, Mapping) or fit.keys() != set(_Fit._fields):
        return False
    return all(type(value) is int and value > 0 for value in fit.values())


def _write(memory: Path, found: Mapping[str, _Fit]) -> None:
    kept = {key: fit._asdict() for key, fit in found.items()}
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        durable.write_text(memory, json.dumps(kept, indent=1))
    except OSError as error:
        log.warning("what fits cannot be kept, and will be found again: %s", error.strerror or "unknown error")


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
