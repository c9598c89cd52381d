"""Everything that crosses between coordinator and site, and nothing else: three messages, each packs itself.

    coordinator                                     site
        Hello(study, run)             ──query──▶
                                      ◀─────────    Introduction(site, ranks, scans)
        TrainRequest(student, ...)    ──train──▶
                                      ◀─────────    TrainReply(update, ...)  or  Refusal(reason)

This is the place where a tensor leaves the hospital: `TrainReply.pack`. The protocol's version is checked before
the content. A sender's claim is checked here for type and form; whether it may count, `server.admission` decides.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from safetensors.torch import save
from torch import Tensor

from unimiss_core import codec
from unimiss_core.chain import Head
from unimiss_core.codec import Layout, Payloads, TensorSpec
from unimiss_core.config import NAME, RUN, parse
from unimiss_core.errors import ConfigError, WireError
from unimiss_core.figures import is_diagnostic, is_loss
from unimiss_core.formats import FORMATS
from unimiss_core.groups import GROUPS, Group
from unimiss_core.json_text import value_in
from unimiss_core.reasons import REASONS
from unimiss_core.scan import RANKS, Rank
from unimiss_core.study import StudyConfig
from unimiss_core.tensor_bytes import load_whole

PROTOCOL = 4

LARGEST_FIGURE = 1e30
"""Beyond it a figure has diverged; means and charts of such numbers overflow."""
LONGEST_S, LARGEST_COUNT = 1e12, 2**63 - 1
"""Seconds that a site may say it worked, and scans, files or steps; a run's artefacts hold no more."""
STUDY_LIMIT = 65_536
"""Characters of a study; the longest of ours has some 4,000."""
FIGURES_LIMIT = 16_384
"""Characters of a mapping of figures; the largest of ours has some 1,000."""
PIECE = 2**23
"""Bytes of an array that are hashed at a time."""

ScalarT = TypeVar("ScalarT", str, int, float)

Reading = Callable[[bytes, Sequence[TensorSpec], str], dict[str, Tensor]]
"""`codec.unpack` or `codec.view`."""

EXACT = "fp32"
"""What travels so that those who rebuild it and those who receive it hold the same bits."""


@dataclass(frozen=True)
class Hello:
    """Coordinator to site: this is the study, and this run of it; who are you?"""

    study: StudyConfig
    run: str

    def pack(self) -> RecordDict:
        return _content({"study": self.study.canonical(), "run": self.run})

    @classmethod
    def unpack(cls, content: RecordDict) -> Self:
        facts = _facts(content)
        return cls(study=_study(facts), run=_run(facts))


@dataclass(frozen=True)
class Introduction:
    """Site to coordinator: its name, the ranks it trains, how many scans of each it trains on, and how many files and
    series of its folders it left out (its own log says why).

    Of a private study a site says 1 for any number of scans, and 0 for what it left out, and where its ledger stands.
    """

    site: str
    scans: Mapping[Rank, int]
    left_out: int = 0
    ledger: Head | None = None

    @property
    def ranks(self) -> frozenset[Rank]:
        return frozenset(rank for rank, count in self.scans.items() if count > 0)

    def pack(self) -> RecordDict:
        told = {"site": self.site, "left_out": self.left_out, **_count_facts(self.scans), **_ledger_fact(self.ledger)}
        return _content(told)

    @classmethod
    def unpack(cls, content: RecordDict) -> Self:
        facts = _facts(content)
        if not re.fullmatch(NAME, site := _take(facts, "site", str)):
            raise WireError("malformed", "the site's name is not of the agreed form")
        left_out = max(0, _count(facts, "left_out"))
        return cls(site=site, scans=_counts(facts), left_out=left_out, ledger=_ledger(facts))


@dataclass(frozen=True)
class TrainRequest:
    """Coordinator to site: train this round from this student. Tensors are those of the groups that the site trains.

    run: which run of the study; what a site remembers is of one run.
    student: the released student; None where the site can rebuild it from `student_step`.
    teacher: the global teacher's; None where the site can rebuild it from what it received in the round before
        (in round 1 it is the student).
    teacher_retention: per group, what was left of the global teacher after the round before:
        teacher <- m teacher + (1 - m) student, m = 1 for a group that nobody trained.
    student_step: what the released student changed by since the round before, for a format that carries over.
    ledger: where the site's ledger stood when the coordinator last heard of it; None where it has not.
    """

    study: StudyConfig
    run: str
    round: int
    student: Mapping[str, Tensor] | None
    teacher: Mapping[str, Tensor] | None
    teacher_retention: Mapping[Group, float]
    student_step: Mapping[str, Tensor] | None = None
    ledger: Head | None = None

    def pack(self, layout: Layout, payloads: Mapping[str, Payloads] | None = None) -> RecordDict:
        """payloads: by part, what is packed already; the request itself need not hold it then."""
        facts = {
            "study": self.study.canonical(),
            "run": self.run,
            "round": self.round,
            "teacher_retention": json.dumps(dict(self.teacher_retention), sort_keys=True),
            **_ledger_fact(self.ledger),
        }
        held = {"student": self.student, "student_step": self.student_step, "teacher": self.teacher}
        dtypes = _request_dtypes(self.study)
        packed = {part: _packed(tensors, layout, dtypes[part]) for part, tensors in held.items() if tensors}
        parts = {**packed, **(payloads or {})}
        return _content(facts, {part: _arrays(found, layout, dtypes[part]) for part, found in parts.items()})

    @classmethod
    def unpack(cls, content: RecordDict, layout: Layout) -> Self:
        """layout: of the network that `study_of(content)` names."""
        facts = _facts(content)
        study = _study(facts)
        retention = _figures(facts, "teacher_retention", GROUPS.__contains__)
        if not all(0 <= value <= 1 for value in retention.values()):
            raise WireError("malformed", "'teacher_retention' should hold a share for each parameter group")
        held = {
            part: _tensors(content, part, layout, dtype)
            for part, dtype in _request_dtypes(study).items()
            if part in arrays_in(content)
        }
        if ("student" in held) == ("student_step" in held):
            raise WireError("malformed", "the request should hold either a student or its step")
        if not all(bool(tensor.isfinite().all()) for tensors in held.values() for tensor in tensors.values()):
            raise WireError("not_finite", "student or teacher holds a value that is not a finite number")
        if not 1 <= (round := _take(facts, "round", int)) <= study.schedule.rounds:
            raise WireError("malformed", f"the study has {study.schedule.rounds} rounds, asked is another")
        return cls(
            study=study,
            run=_run(facts),
            round=round,
            student=held.get("student"),
            teacher=held.get("teacher"),
            teacher_retention={group: retention[group] for group in GROUPS if group in retention},
            student_step=held.get("student_step"),
            ledger=_ledger(facts),
        )


@dataclass(frozen=True)
class TrainReply:
    """Site to coordinator: what training changed.

    update: trained minus received, for the groups that the site trained; unpacked, of the float type that it travelled
    in and in the message's own memory, to be read and not written to.
    steps: optimiser steps of each rank in this round; losses: mean of each loss term over the round;
    diagnostics: means over the round of collapse indicators, of the gradient's norm and, under FedProx, of the distance
    to the received student; under FedEMA the site's own share of its start; how many batches were skipped for NaN or
    infinity. Nothing else leaves the site.

    Of a private study even less does: see `client.private_round.undisclosed`. Where its ledger stands then is told
    beside the reply (`with_ledger`), so that a reply that is sent again is the same.
    """

    site: str
    run: str
    round: int
    study_digest: str
    update: Mapping[str, Tensor]
    scans: Mapping[Rank, int]
    steps: int
    seconds: float
    losses: Mapping[str, float]
    diagnostics: Mapping[str, float]
    ledger: Head | None = None

    def pack(self, layout: Layout, dtype: str) -> RecordDict:
        facts = {
            "status": "ok",
            "site": self.site,
            "run": self.run,
            "round": self.round,
            "study_digest": self.study_digest,
            "steps": self.steps,
            "seconds": self.seconds,
            "losses": json.dumps(dict(self.losses), sort_keys=True),
            "diagnostics": json.dumps(dict(self.diagnostics), sort_keys=True),
            **_count_facts(self.scans),
        }
        return _content(facts, {"update": _arrays(_packed(self.update, layout, dtype), layout, dtype)})

    @classmethod
    def unpack(cls, content: RecordDict, layout: Layout, dtype: str) -> Self:
        """layout: only the groups that the coordinator asked this site for; any other is a WireError."""
        facts = _facts(content)
        if not 0 <= (seconds := _take(facts, "seconds", float)) <= LONGEST_S:
            raise WireError("malformed", f"'seconds' should be a number from 0 to {LONGEST_S:g}")
        if more := arrays_in(content).keys() - {"update"}:
            raise WireError("malformed", f"the reply holds arrays beside its update, in {len(more)} parts")
        return cls(
            site=_take(facts, "site", str),
            run=_run(facts),
            round=_take(facts, "round", int),
            study_digest=_take(facts, "study_digest", str),
            update=_tensors(content, "update", layout, dtype, codec.view),
            scans=_counts(facts),
            steps=_count(facts, "steps"),
            seconds=seconds,
            losses=_figures(facts, "losses", is_loss),
            diagnostics=_figures(facts, "diagnostics", is_diagnostic),
            ledger=_ledger(facts),
        )


@dataclass(frozen=True)
class Refusal:
    """Site to coordinator: it did not train, for a reason that is one of a fixed set of codes, never free text."""

    reason: str

    def pack(self) -> RecordDict:
        return _content({"status": "refused", "reason": self.reason})

    @classmethod
    def found_in(cls, content: RecordDict) -> Self | None:
        facts = _facts(content)
        if facts.get("status") != "refused":
            return None
        reason = _take(facts, "reason", str)
        return cls(reason if reason in REASONS else "malformed")


def study_of(content: RecordDict) -> StudyConfig:
    """The study that a request names: what a site checks before it looks at anything else."""
    return _study(_facts(content))


def run_of(content: RecordDict) -> str:
    """The run that a request is of: whose memory a site opens."""
    return _run(_facts(content))


def with_ledger(reply: RecordDict, head: Head) -> RecordDict:
    """The reply, saying where the site's ledger stands."""
    return RecordDict({**reply, "facts": ConfigRecord({**facts_in(reply), **_ledger_fact(head)})})


def to_keep(reply: RecordDict) -> bytes:
    """A packed `TrainReply` as a safetensors file, for a site that may have to send it again bit for bit."""
    arrays = {(part, group): array for part, record in arrays_in(reply).items() for group, array in record.items()}
    described = [[part, group, array.dtype, list(array.shape), array.stype] for (part, group), array in arrays.items()]
    payloads = {str(n): torch.frombuffer(bytearray(a.data), dtype=torch.uint8) for n, a in enumerate(arrays.values())}
    return save(payloads, metadata={"facts": json.dumps(facts_in(reply)), "arrays": json.dumps(described)})


def as_kept(payload: bytes) -> RecordDict:
    """The inverse of `to_keep`, for a payload that was seen to be whole."""
    header, payloads = load_whole(payload)
    parts: dict[str, ArrayRecord] = {}
    for number, (part, group, dtype, shape, stype) in enumerate(value_in(header["arrays"])):
        data = payloads[str(number)].numpy().tobytes()
        parts.setdefault(part, ArrayRecord())[group] = Array(dtype=dtype, shape=tuple(shape), stype=stype, data=data)
    return _content(value_in(header["facts"]), parts)


def facts_in(content: RecordDict) -> dict[str, Any]:
    """What a message says besides arrays, unchecked: nothing where it is not of our form."""
    record = content.get("facts")
    return dict(record) if isinstance(record, ConfigRecord) else {}


def content_digest(content: RecordDict) -> str:
    """sha256, in hex, of all facts, and of the sha256 of each piece of the arrays: the same at both ends."""
    arrays = [(part, group, array) for part, record in arrays_in(content).items() for group, array in record.items()]
    arrays.sort(key=lambda found: found[:2])
    pieces = [piece for _, _, array in arrays for piece in _pieces(array.data)]
    with ThreadPoolExecutor(max_workers=2) as threads:  # of as many processors: hashing holds no lock
        digests = list(threads.map(lambda piece: hashlib.sha256(piece).hexdigest(), pieces))
    told = [(part, group, array.dtype, array.stype, len(array.data)) for part, group, array in arrays]
    return hashlib.sha256(
        json.dumps([facts_in(content), told, digests], sort_keys=True, default=repr).encode()
    ).hexdigest()


def _pieces(values: bytes) -> Iterator[memoryview]:
    """PIECE bytes of an array at a time."""
    return (memoryview(values)[begin : begin + PIECE] for begin in range(0, len(values), PIECE))


def num_bytes(content: RecordDict) -> int:
    """Bytes of the arrays of a message: all of its size but some hundred bytes."""
    return sum(len(array.data) for record in arrays_in(content).values() for array in record.values())


def arrays_in(content: RecordDict) -> dict[str, ArrayRecord]:
    """The arrays of a message, by part. Not by `content.array_records`: each reading of that is a cycle of objects that
    holds the whole message until Python's collector comes by, and messages as large as the model pile up."""
    return {name: record for name, record in content.items() if isinstance(record, ArrayRecord)}


def _request_dtypes(study: StudyConfig) -> dict[str, str]:
    """What each part of a request travels as. Only a format that carries over has steps to send."""
    dtype = study.wire.dtype
    if FORMATS[dtype].carries_over:
        return {"student": EXACT, "student_step": dtype, "teacher": EXACT}
    return {"student": dtype, "teacher": EXACT}


def _content(facts: Mapping[str, Any], arrays: Mapping[str, ArrayRecord] | None = None) -> RecordDict:
    return RecordDict({"facts": ConfigRecord({"protocol": PROTOCOL, **facts}), **(arrays or {})})


def _facts(content: RecordDict) -> dict[str, Any]:
    record = content.get("facts")
    if not isinstance(record, ConfigRecord):
        raise WireError("malformed", "the message has no facts")
    facts = dict(record)
    if (theirs := facts.pop("protocol", None)) != PROTOCOL:
        raise WireError(
            "protocol", f"the peer speaks wire protocol {ascii(theirs)[:20]}, this side {PROTOCOL}; upgrade the older"
        )
    return facts


def _take(facts: Mapping[str, Any], name: str, kind: type[ScalarT]) -> ScalarT:
    value = facts.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise WireError("malformed", f"'{name}' should be {kind.__name__}, got {type(value).__name__}")
    return value


def _study(facts: Mapping[str, Any]) -> StudyConfig:
    try:
        if len(text := _take(facts, "study", str)) > STUDY_LIMIT:
            raise ValueError
        return parse(StudyConfig, value_in(text), where="study")
    except (ConfigError, ValueError, ArithmeticError):
        raise WireError("study", "the message holds no study that this version understands") from None


def _run(facts: Mapping[str, Any]) -> str:
    if not re.fullmatch(RUN, run := _take(facts, "run", str)):
        raise WireError("malformed", "the run's id is not of the agreed form")
    return run


def _ledger_fact(head: Head | None) -> dict[str, str]:
    return {} if head is None else {"ledger": str(head)}


def _ledger(facts: Mapping[str, Any]) -> Head | None:
    if "ledger" not in facts:
        return None
    try:
        return Head.of(_take(facts, "ledger", str))
    except ValueError:
        raise WireError("malformed", "'ledger' does not say where a ledger stands") from None


def _count_facts(scans: Mapping[Rank, int]) -> dict[str, int]:
    return {f"scans_{rank}d": scans.get(rank, 0) for rank in RANKS}


def _count(facts: Mapping[str, Any], name: str) -> int:
    """A whole number, of either sign, that a run's artefacts can hold."""
    if abs(count := _take(facts, name, int)) > LARGEST_COUNT:
        raise WireError("malformed", f"'{name}' should be at most {LARGEST_COUNT}")
    return count


def _counts(facts: Mapping[str, Any]) -> dict[Rank, int]:
    counts = {rank: _count(facts, f"scans_{rank}d") for rank in RANKS}
    if min(counts.values()) < 0:
        raise WireError("counts", "a number of scans is below zero")
    return counts


def _figures(facts: Mapping[str, Any], name: str, is_known: Callable[[str], bool]) -> dict[str, float]:
    """A mapping of known names to finite numbers. Raises WireError for all else, however a hostile peer wrote it."""
    text = _take(facts, name, str)
    try:
        if len(text) > FIGURES_LIMIT:
            raise ValueError
        figures = value_in(text)
        checked = {key: float(value) for key, value in figures.items() if is_known(key)}
        if len(checked) < len(figures):
            raise ValueError
    except (ValueError, TypeError, AttributeError, OverflowError):
        raise WireError("malformed", f"'{name}' should be a mapping of known names to numbers") from None
    if not all(abs(value) <= LARGEST_FIGURE for value in checked.values()):
        raise WireError("not_finite", f"a figure of '{name}' is not a finite number, or beyond {LARGEST_FIGURE:g}")
    return checked


def _packed(tensors: Mapping[str, Tensor], layout: Layout, dtype: str) -> Payloads:
    return {group: codec.pack(tensors, specs, dtype) for group, specs in layout.items()}


def _arrays(payloads: Payloads, layout: Layout, dtype: str) -> ArrayRecord:
    record = ArrayRecord()
    for group, specs in layout.items():
        shape = (sum(spec.size for spec in specs),)
        record[group] = Array(dtype=dtype, shape=shape, stype="unimiss", data=payloads[group])
    return record


def _tensors(
    content: RecordDict, name: str, layout: Layout, dtype: str, read: Reading = codec.unpack
) -> dict[str, Tensor]:
    record = content.get(name)
    if not isinstance(record, ArrayRecord):
        raise WireError("malformed", f"the message has no '{name}'")
    if set(record) != set(layout):
        odd = ascii(", ".join(sorted(set(record) ^ set(layout))[:5]))[:80]
        raise WireError("wrong_names", f"'{name}' should hold the groups {', '.join(sorted(layout))}; odd: {odd}")
    tensors: dict[str, Tensor] = {}
    for group, specs in layout.items():
        array = record[group]
        if array.dtype != dtype or array.stype != "unimiss":
            raise WireError("wrong_dtype", f"'{name}.{group}' should be {dtype}")
        tensors |= read(array.data, specs, dtype)
    return tensors
