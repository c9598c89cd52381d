"""Who trains, who validates, who tests: always whole patients, and the same ones for the same seed."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from math import ceil

from client.finetune_config import FinetuneConfig, FoldSplit
from client.label_tables import PARTS, Case, Part
from unimiss_core.errors import ConfigError
from unimiss_core.task_config import ClassificationConfig

Split = Mapping[Part, tuple[Case, ...]]


def split_cases(cases: Sequence[Case], config: FinetuneConfig) -> Split:
    """The cases of each part, in their order. `test` may be empty where the split is given.

    Raises ConfigError: a patient in several parts, an empty part, a class that a part lacks.
    """
    split = config.split
    seed = config.seed if split.seed is None else split.seed
    if isinstance(split, FoldSplit):
        parts = _of_fold(cases, split, seed)
    else:
        parts = _as_given(cases)
        if not parts["validation"]:
            parts = {**parts, **_with_validation(parts["train"], split.validation, seed)}
    _check_patients(parts)
    check_parts(parts, config)
    return parts


def _as_given(cases: Sequence[Case]) -> Split:
    return {part: tuple(case for case in cases if case.part == part) for part in PARTS}


def _of_fold(cases: Sequence[Case], split: FoldSplit, seed: int) -> Split:
    dealt = _dealt(cases, split.folds, seed)
    test = tuple(case for case in cases if dealt[case.patient] == split.fold)
    rest = tuple(case for case in cases if dealt[case.patient] != split.fold)
    return {"test": test, **_with_validation(rest, split.validation, seed + 1)}


def _with_validation(cases: Sequence[Case], share: float, seed: int) -> Split:
    """share x patients, rounded up, validate: of a fifth every fifth patient in the order that `_ordered` gives, the
    first among them, and of any share as evenly through it, so that each class has its part."""
    exact = Fraction(str(share))  # 0.07 is 7 of 100; the float next to it would make that 8
    order = _ordered(cases, seed)
    chosen = {p for place, p in enumerate(order) if ceil(exact * (place + 1)) > ceil(exact * place)}
    return {
        "train": tuple(case for case in cases if case.patient not in chosen),
        "validation": tuple(case for case in cases if case.patient in chosen),
    }


def _dealt(cases: Iterable[Case], piles: int, seed: int) -> dict[str, int]:
    """Patient -> pile. Patients are dealt in turn, so that each pile has its share of each kind."""
    return {patient: place % piles for place, patient in enumerate(_ordered(cases, seed))}


def _ordered(cases: Iterable[Case], seed: int) -> list[str]:
    """All patients, those of one kind together, rare kinds first.

    A patient's kind is the rarest target among its scans. The order within a kind is that of sha256(seed, patient).
    """
    cases = tuple(cases)
    often = Counter(case.target for case in cases)
    kinds: dict[str, tuple[int, ...]] = {}
    for case in cases:
        known = kinds.get(case.patient)
        if known is None or (often[case.target], case.target) < (often[known], known):
            kinds[case.patient] = case.target
    return sorted(kinds, key=lambda p: (often[kinds[p]], kinds[p], hashlib.sha256(f"{seed}/{p}".encode()).digest()))


def _check_patients(parts: Split) -> None:
    first: dict[str, dict[Part, int]] = {}
    for part, cases in parts.items():
        for case in cases:
            first.setdefault(case.patient, {}).setdefault(part, case.number)
    if torn := sorted(sorted(lines.values()) for lines in first.values() if len(lines) > 1):
        raise ConfigError(
            f"split: {len(torn)} patient(s) stand in several parts, as in lines {torn[0][0]} and {torn[0][1]}; "
            "a patient's scans must stay together"
        )


def check_parts(parts: Split, config: FinetuneConfig) -> None:
    """Raises ConfigError: a part that needs scans has none, or lacks a class."""
    needed = [part for part in PARTS if part != "test" or parts["test"] or isinstance(config.split, FoldSplit)]
    if empty := [part for part in needed if not parts[part]]:
        raise ConfigError(f"split: nobody is left for {' and '.join(empty)}; give more patients, or other shares")
    task = config.task
    if not isinstance(task, ClassificationConfig):
        return
    problems = [
        f"no '{name}' among the {len(parts[part])} scans for {part}"
        for part in needed
        for number, name in enumerate(task.classes)
        if not any(_has(case, number, task) for case in parts[part])
    ]
    if task.kind == "multi_label":
        problems += [
            f"nothing but '{name}' among the {len(parts[part])} scans for {part}"
            for part in needed
            for number, name in enumerate(task.classes)
            if not any(case.target[number] == 0 for case in parts[part])
        ]
    if problems:
        fold = f" (fold {config.split.fold})" if isinstance(config.split, FoldSplit) else ""
        raise ConfigError(f"split{fold}: {'; '.join(problems)}; use fewer folds, or leave the class out of `classes`")


def _has(case: Case, number: int, task: ClassificationConfig) -> bool:
    return case.target[number] == 1 if task.kind == "multi_label" else case.target[0] == number
