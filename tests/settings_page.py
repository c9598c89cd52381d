"""docs/settings.md, made of the configuration classes: `python -m tests.settings_page` writes it anew.

A class is written out where it is met first; elsewhere a line says where that was.
"""

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from client.finetune_config import FinetuneConfig
from client.site_config import SiteConfig
from server.coordinator_config import CoordinatorConfig
from server.server_config import ServerConfig
from server.simulate import SimulationConfig
from unimiss_core.config import NAME, NAME_IN_WORDS, Config
from unimiss_core.study import StudyConfig

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
FILES: Mapping[str, type[Config]] = {
    "Study": StudyConfig,
    "Site": SiteConfig,
    "Coordinator": CoordinatorConfig,
    "server.yaml": ServerConfig,
    "Simulation": SimulationConfig,
    "Fine-tuning": FinetuneConfig,
}
_BEGINS = """# Settings

Made of the classes by `python -m tests.settings_page`; a test holds it to them. The whole of what a setting means, and
why, stands under it in the class's file.

A dot leads into a mapping, `[]` to each entry of a list. A path counts from the file's own folder. Numbers need no
quotation marks, texts that look like numbers do; an exponent has a dot and a sign (1.0e-4). Where a meaning speaks of
None, the file has null. In brackets before a meaning stand the classes that have the setting, by the `name` or `mode`
that chooses them. A name has {name}.
"""
_SHORT = 12
"""A first sentence of fewer letters, such as '(H, W).', takes the next along."""
_SIMPLE = {int: "integer", float: "number", str: "text", bool: "true or false", Path: "path", object: "anything"}
_BOUNDS = {"gt": "above {}", "ge": "from {}", "lt": "below {}", "le": "up to {}"}


@dataclass
class _Row:
    key: str
    kind: str
    default: str
    meaning: str
    tags: list[str] = field(default_factory=list)
    """Names that choose a class which has it; none where every class at its place has it."""

    def line(self) -> str:
        of = f"({', '.join(f'`{tag}`' for tag in self.tags)}) " if self.tags else ""
        cells = (f"`{self.key}`", self.kind, self.default, (of + self.meaning).strip())
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page() -> str:
    """All of docs/settings.md."""
    shown: dict[type[BaseModel], str] = {}
    parts = [_BEGINS.format(name=NAME_IN_WORDS)]
    for name, kind in FILES.items():
        rows = [row.line() for row in _rows(kind, "", name, shown)]
        source = Path(inspect.getfile(kind)).relative_to(PAGE.parents[1]).as_posix()
        table = ["| key | is | default | means |", "|---|---|---|---|", *rows]
        parts.append("\n".join([f"## {name}", "", f"`{source}`", "", *table, ""]))
    return "\n".join(parts)


def _rows(kind: type[BaseModel], at: str, file: str, shown: dict[type[BaseModel], str]) -> Iterator[_Row]:
    """The settings of a class at a place of a file. shown: class -> where it was written out; is added to."""
    shown[kind] = f"`{at.rstrip('.')}` of {file}" if at else file
    alike: dict[str, list[str]] = {}
    for key, one in kind.model_fields.items():
        owner = _owner(kind, key)
        where = _of_kin(kind, key, shown) if owner is not kind else None
        if where is not None:
            alike.setdefault(where, []).append(key)
        else:
            yield from _of_field(one, f"{at}{key}", _doc(owner, key), file, shown)
    for where, keys in alike.items():
        yield _Row(f"{at}*", "", "", f"{', '.join(f'`{key}`' for key in keys)}: as in {where}")


def _of_kin(kind: type[BaseModel], key: str, shown: Mapping[type[BaseModel], str]) -> str | None:
    """Where another class that has the setting from the same ancestor, and as that has it, was written out."""
    owner = _owner(kind, key)
    return next(
        (
            where
            for other, where in shown.items()
            if other is not kind and not where.startswith("`") and key in other.model_fields
            if _owner(other, key) is owner
        ),
        None,
    )


def _of_field(one: FieldInfo, key: str, doc: str, file: str, shown: dict[type[BaseModel], str]) -> Iterator[_Row]:
    models = list(dict.fromkeys(_models_in(one.annotation)))
    below = f"{key}[]." if _is_list(one.annotation) else f"{key}."
    meaning = doc or (_first_sentence(models[0].__doc__) if len(models) == 1 and "__doc__" in vars(models[0]) else "")
    if known := [shown[model] for model in models if model in shown]:
        meaning = f"{meaning} As {known[0]}.".strip()
    yield _Row(key, _kind_of(one), _default(one), meaning)
    rows: dict[tuple[str, ...], _Row] = {}
    fresh = [model for model in models if model not in shown]
    for model in fresh:
        for row in _rows(model, below, file, shown):
            if len(models) == 1:
                yield row
            elif row.key != f"{below}{_tag_key(model)}":  # the row above names them
                alike = rows.setdefault((row.key, row.kind, row.default, row.meaning, *row.tags), row)
                if alike is not row or not row.tags:
                    alike.tags.append(str(_tag(model)))
    for row in rows.values():
        yield row if len(row.tags) < len(models) else replace(row, tags=[])


# ------------------------------------------------------------------------------------------------------------ words


def _kind_of(one: FieldInfo) -> str:
    return _bounded(_in_words(one.annotation), one.metadata)


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        bare, *more = get_args(kind)
        return _bounded(_in_words(bare), [rule for one in more for rule in (getattr(one, "metadata", None) or [one])])
    if get_origin(kind) in (Union, UnionType):
        parts = get_args(kind)
        models = [model for part in parts for model in _models_in(part)]
        if len(models) > 1 and len(models) >= len([part for part in parts if part is not NoneType]):
            told = f"mapping, by `{_tag_key(models[0])}`: " + ", ".join(f"`{_tag(model)}`" for model in models)
            return told + (" or null" if NoneType in parts else "")
        return " or ".join(_in_words(part) for part in parts)
    if get_origin(kind) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) is tuple:
        return _list_in_words(get_args(kind))
    if get_origin(kind) is not None:  # Mapping
        _, value = get_args(kind)
        return f"mapping of texts to {_in_words(value)}"
    if kind is NoneType:
        return "null"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "mapping"
    return _SIMPLE.get(kind, "anything")


def _list_in_words(entries: tuple[Any, ...]) -> str:
    if entries[-1] is Ellipsis:
        return f"list: {_in_words(entries[0])}"
    told = [_in_words(entry) for entry in entries]
    return f"list of {len(told)}: {told[0]}" if len(set(told)) == 1 else f"list of {', '.join(told)}"


def _bounded(words: str, rules: list[Any]) -> str:
    """words: of a kind that may be null, which bounds are not asked of."""
    bare, null, _ = words.partition(" or null")
    for rule in rules:
        if least := _of(rule, "min_length"):
            is_list, at_least = bare.startswith("list"), "" if least == 1 else f" of {least} or more"
            bare = f"{'non-empty ' * (least == 1)}{bare.replace('list', f'list{at_least}', 1) if is_list else bare}"
        if pattern := _of(rule, "pattern"):
            bare = "name" if pattern == f"^{NAME}$" else f"{bare} of the form `{pattern}`"
    told = [
        form.format(_number(value)) for rule in rules for name, form in _BOUNDS.items() if _is(value := _of(rule, name))
    ]
    return " ".join([bare, *told]) + null


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _of(rule: Any, name: str) -> Any:
    return getattr(rule, name, None)


def _is(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _default(one: FieldInfo) -> str:
    if one.is_required():
        return "**required**"
    value = one.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return f"`{_tag(type(value))}`" if len(_models_in(one.annotation)) > 1 else ""
    return f"`{json.dumps(value, default=str)}`"


def _first_sentence(doc: str | None) -> str:
    told = " ".join(inspect.cleandoc(doc or "").split("\n\n")[0].split())
    first, *more = re.split(r"(?<=[.])\s+(?=[A-Z`])", told)
    return f"{first} {more[0]}" if more and len(first) < _SHORT else first


# ------------------------------------------------------------------------------------------------------------ classes


def _models_in(kind: Any) -> list[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [model for part in get_args(kind) for model in _models_in(part)]


def _is_list(kind: Any) -> bool:
    return get_origin(kind) is tuple or any(_is_list(part) for part in get_args(kind) if get_origin(kind) is Annotated)


def _tag_key(model: type[BaseModel]) -> str:
    """Which key's value chooses the class in a union."""
    return "mode" if "mode" in model.model_fields else "name"


def _tag(model: type[BaseModel]) -> str | None:
    one = model.model_fields.get(_tag_key(model))
    return None if one is None or one.is_required() else str(one.get_default())


def _owner(kind: type[BaseModel], key: str) -> type[BaseModel]:
    """The class that says last what the setting is."""
    return next(one for one in kind.__mro__ if key in vars(one).get("__annotations__", {}))


@cache
def _docs(kind: type[BaseModel]) -> Mapping[str, str]:
    """Key -> the text under it in the class's source."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for one, below in zip(tree.body, tree.body[1:], strict=False):
        is_field = isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
        if is_field and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[one.target.id] = str(below.value.value)
    return found


def _doc(kind: type[BaseModel], key: str) -> str:
    return _first_sentence(_docs(kind).get(key))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
