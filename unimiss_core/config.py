"""YAML -> frozen, typed configuration; every mistake in one message.

A configuration class is a `Config` subclass; its field names are the YAML keys. `load` reads a file,
`parse` a mapping that was read already. Both raise one `ConfigError` that lists every problem with its
dotted path, and the nearest known key where one is close.
"""

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, ValidationError
from pydantic_core import ErrorDetails

from unimiss_core.errors import ConfigError
from unimiss_core.file_kinds import taken_for
from unimiss_core.yaml_files import printable, read_yaml

ConfigT = TypeVar("ConfigT", bound="Config")

NAME = r"[a-z0-9][a-z0-9_-]{0,63}"
"""What sites, studies and probes may be called: it goes into paths, logs and reports as it is."""

NAME_IN_WORDS = "lower-case letters, digits, '-' and '_', first a letter or digit, 64 at most"

Name = Annotated[str, Field(pattern=f"^{NAME}$")]

RUN = r"[0-9a-f]{16}"
"""What a run of a study is called: drawn at random by its coordinator; it goes into paths too."""

# PyYAML follows YAML 1.1, where an exponent needs a dot and a sign: 1e-4 is text there.
_TEXT_THAT_LOOKS_LIKE_A_NUMBER = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$")


LARGEST, SMALLEST = 1e300, 1e-300
"""Of the numbers in a file."""

_SIMPLE = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}


class Config(BaseModel):
    """Base of all configuration: frozen, no unknown keys, no silent conversion, no NaN and no infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def canonical(self) -> str:
        """The one JSON text of this configuration: sorted keys, every default written out."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    def digest(self) -> str:
        """sha256 of `canonical()`, in hex: two parties agree exactly when their digests do."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()


class Mistakes(ValueError):  # noqa: N818 - what there are, as people say it
    """Relations between settings that do not hold: what a validator raises that found several. Each is told as a
    problem of its own."""

    def __init__(self, found: Iterable[str]) -> None:
        self.found = tuple(found)
        super().__init__("; ".join(self.found))


_TAG_KEYS = ("name", "mode")
"""Keys that say which class of a union a mapping is of."""


def chosen_by_name(default: str, key: str = "name") -> Discriminator:
    """Which class of a union a mapping is of: the one tagged with its `key`, or with `default` where it has none.

    Each class has a field of that key whose default is its tag, so that messages can tell what is allowed where.
    """

    def tag_of(given: Any) -> str:
        name = given.get(key, default) if isinstance(given, Mapping) else getattr(given, key, default)
        return name if isinstance(name, str) else default  # of any other type: that class's own message tells

    return Discriminator(tag_of)


NAME_ALONE = BeforeValidator(lambda given: {"name": given} if isinstance(given, str) else given)
"""In a union that is chosen by name, `median` stands for `{name: median}`: that class with its defaults."""


def load(kind: type[ConfigT], path: Path) -> ConfigT:
    """Read `path` as `kind`. Raises ConfigError: no such file, not YAML, or any mistake in its content."""
    return parse(kind, read_yaml(path), where=str(path))


def parse(kind: type[ConfigT], raw: Any, *, where: str) -> ConfigT:
    """Check `raw` (what YAML gave) as `kind`; `where` begins the message of a ConfigError."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where}: expected a mapping of settings, got {_describe(raw)}")
    try:
        if beyond := list(_beyond_all(raw)):
            raise ConfigError(
                f"{where}: {printable(', '.join(beyond[:MOST_PLACES]))}: expected numbers of at most {LARGEST:g} and, "
                f"beside 0, at least {SMALLEST:g}"
            )
        # Through JSON, so that YAML lists become tuples and texts become paths while types stay strict.
        return kind.model_validate_json(json.dumps(raw))
    except TypeError as error:
        raise ConfigError(f"{where}: {error}; write dates and binary values as text in quotes") from None
    except RecursionError:
        raise ConfigError(f"{where}: nests lists or mappings too deep") from None
    except ValidationError as error:  # a ValueError, too
        if (mixed_up := taken_for(kind.model_fields, raw)) is not None:
            raise ConfigError(f"{where}: this is {mixed_up[0]}, by its keys; expected {mixed_up[1]}") from None
        found = error.errors(include_url=False)
        # A list whose entries failed is reported as too short as well, which says nothing new.
        inside = {detail["loc"][:depth] for detail in found for depth in range(len(detail["loc"]))}
        told = [detail for detail in found if not (detail["type"] == "too_short" and detail["loc"] in inside)]
        problems = list(dict.fromkeys(printable(words) for detail in told for words in _explained(kind, detail)))
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ConfigError(f"{where}: {count}\n" + "\n".join(f"  - {line}" for line in problems)) from None
    except ValueError as error:  # an integer of thousands of digits
        raise ConfigError(f"{where}: holds a value that cannot be read ({error})") from None


def _beyond_all(raw: Any, at: str = "") -> Iterator[str]:
    """Places of numbers with which plain arithmetic fails, a message's, too; no setting has such values."""
    if isinstance(raw, int | float) and not isinstance(raw, bool):
        if LARGEST < abs(raw) < math.inf or 0 < abs(raw) < SMALLEST:  # infinity has a message of its own
            yield f"'{at}'"
    elif isinstance(raw, Mapping):
        for key, value in raw.items():
            yield from _beyond_all(value, f"{at}.{key}" if at else str(key))
    elif isinstance(raw, list | tuple):
        for place, value in enumerate(raw):
            yield from _beyond_all(value, f"{at}.{place}")


def dump_yaml(config: Config) -> str:
    """`config` as YAML that `load` reads back to an equal object, keys in the order of the class."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _explained(kind: type[BaseModel], problem: ErrorDetails) -> list[str]:
    error = problem.get("ctx", {}).get("error")
    if not isinstance(error, Mistakes):
        return [_explain(kind, problem)]
    return [_explain(kind, {**problem, "msg": words}) for words in error.found]


def _explain(kind: type[BaseModel], problem: ErrorDetails) -> str:
    at = problem["loc"]
    path, models, _ = _place(kind, at)
    given = problem["input"]
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{path}' ({_hint(str(at[-1]), _place(kind, at[:-1]), kind)})"
    if problem["type"] == "union_tag_invalid":
        names = [str(_tag(model)) for model in models]
        near = difflib.get_close_matches(str(problem["ctx"]["tag"]), names, n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        got, key = _describe(problem["ctx"]["tag"]), _tag_key(models[0])
        return f"'{path}.{key}': expected one of {', '.join(names)}, got {got}{hint}"
    if problem["type"] == "missing":
        return f"missing key '{path}'"
    if problem["type"] == "string_pattern_mismatch" and problem["ctx"]["pattern"] == f"^{NAME}$":
        return f"'{path}': expected {NAME_IN_WORDS}, got {_describe(given)}"
    if problem["type"] == "json_invalid":
        return "holds half a character (a lone surrogate), or nests lists or mappings too deep"
    if isinstance(given, str) and _TEXT_THAT_LOOKS_LIKE_A_NUMBER.match(given) and math.isfinite(float(given)):
        return f"'{path}': YAML reads {given} as text; write {float(given):.1e} (a dot and a signed exponent)"
    if choices := _choices(kind, at[:-1]):
        return f"'{_place(kind, at[:-1]).path}': expected {choices}, got {_describe(given)}"
    if problem["type"] in ("too_short", "too_long"):
        few, limit = ("at least", "min_length") if problem["type"] == "too_short" else ("at most", "max_length")
        number = problem["ctx"][limit]
        return f"'{path}': expected {few} {number} {'entry' if number == 1 else 'entries'}, got {_describe(given)}"
    if problem["type"] == "tuple_type":
        return f"'{path}': expected a list, got {_describe(given)}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"'{path}': {message}" if at else message
    return f"'{path}': {message[0].lower()}{message[1:]}, got {_describe(given)}"


class _Place(NamedTuple):
    """A place in a configuration: how it is written, the classes that may stand there, and those that another `name`
    there would choose."""

    path: str
    models: list[type[BaseModel]]
    others: list[type[BaseModel]]


def _place(kind: type[BaseModel], loc: tuple[int | str, ...]) -> _Place:
    """Where `loc` of a problem in `kind` is, found by walking the annotations.

    Pydantic puts the tag of a union's chosen class into `loc`; no such key stands in the file.
    """
    path: list[str] = []
    models, others = [kind], list[type[BaseModel]]()
    for part in loc:
        chosen = [model for model in models if _tag(model) == part] if len(models) > 1 else []
        if chosen:
            models, others = chosen, [model for model in models if model not in chosen]
            continue
        path.append(str(part))
        fields = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        models, others = [m for field in fields for m in _models_in(field)] or models, []
    return _Place(".".join(path) or "(top level)", models, others)


def _choices(kind: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    """What may stand at `loc` where that is one of several simple kinds, as in `auto, an integer above 0 or null`;
    else empty. Pydantic tells a problem for each kind, as if each had been meant."""
    fields = [model.model_fields.get(str(loc[-1])) for model in _place(kind, loc[:-1]).models] if loc else []
    kinds = [part for field in fields if field for part in _alternatives(field.annotation)]
    if len([one for one in kinds if one is not NoneType]) < 2 or any(_models_in(one) for one in kinds):
        return ""
    *others, last = [words for one in kinds for words in _in_words(one)]
    return f"{', '.join(others)} or {last}"


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()


def _in_words(simple: Any) -> list[str]:
    if simple is NoneType:
        return ["null"]
    if get_origin(simple) is Literal:
        return [str(value) for value in get_args(simple)]
    if get_origin(simple) is not Annotated:
        return [_SIMPLE.get(simple, simple.__name__)]
    bare, *limits = get_args(simple)
    rules = [rule for limit in limits for rule in getattr(limit, "metadata", ())]
    bounds = [f"above {rule.gt}" for rule in rules if hasattr(rule, "gt")]
    bounds += [f"at most {rule.le}" for rule in rules if hasattr(rule, "le")]
    return [" ".join([word, " and ".join(bounds)]).strip() for word in _in_words(bare)]


MOST_PLACES = 3
"""Places of a key that are named to who wrote it elsewhere; one that stands in more says nothing of what was meant."""


def _hint(key: str, place: _Place, kind: type[BaseModel]) -> str:
    """What may have been meant by a key that is unknown at a place in `kind`."""
    known = sorted({key for model in place.models for key in model.model_fields})
    if of_others := [str(_tag(model)) for model in place.others if key in model.model_fields]:
        return f"a setting of {_tag_key(place.others[0])}: {' or '.join(of_others)}"
    if 0 < len(elsewhere := _places_of(key, kind)) <= MOST_PLACES:
        return f"did you mean {' or '.join(elsewhere)}?"
    if near := difflib.get_close_matches(key, known, n=1):
        return f"did you mean '{near[0]}'?"
    return f"known keys here: {', '.join(known)}"


def _places_of(key: str, kind: type[BaseModel], at: str = "") -> list[str]:
    """Where in `kind` a key of this name stands, quoted; not within lists, whose entries have no names."""
    here = [f"'{at}{key}'" if at else f"'{key}' at the top level"] if key in kind.model_fields else []
    below = [
        found
        for name, field in kind.model_fields.items()
        if get_origin(field.annotation) is not tuple
        for model in _models_in(field.annotation)
        for found in _places_of(key, model, f"{at}{name}.")
    ]
    return list(dict.fromkeys(here + below))


def _tag(model: type[BaseModel]) -> Any:
    """By which a union's class is chosen."""
    key = _tag_key(model)
    return model.model_fields[key].default if key in model.model_fields else None


def _tag_key(model: type[BaseModel]) -> str:
    return next((key for key in _TAG_KEYS if key in model.model_fields), _TAG_KEYS[0])


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in get_args(annotation) for m in _models_in(part)]


def _describe(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
