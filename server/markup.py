"""HTML that is escaped by construction: text becomes markup only through `tag`."""

from collections.abc import Mapping
from html import escape

Attributes = Mapping[str, str | float]

_WITHOUT_CONTENT = {"meta", "img", "br"}


class Html(str):
    """Text that is markup already. Every other `str` is escaped where it becomes a child of a tag."""

    __slots__ = ()


def tag(name: str, attributes: Attributes | None = None, *children: str) -> Html:
    """`<name attributes>children</name>`; numbers in attributes are written with two decimals at most."""
    written = "".join(f' {key}="{escape(_attribute(value))}"' for key, value in (attributes or {}).items())
    if name in _WITHOUT_CONTENT:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{joined(*children)}</{name}>")


def joined(*children: str) -> Html:
    """Children one after another, without a tag around them."""
    return Html("".join(child if isinstance(child, Html) else escape(child) for child in children))


def _attribute(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
