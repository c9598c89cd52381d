"""JSON that a crash, a disk or a stranger may have spoilt: whatever is wrong with it is one kind of error.

Python's own reader raises RecursionError, which is no ValueError, of what nests too deep, as 50 kB of `[` do.
"""

import json
from pathlib import Path
from typing import Any


def value_in(text: str | bytes) -> Any:
    """Raises ValueError: it is no JSON, or nests too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nests lists or objects too deep") from None


def object_in(text: str | bytes) -> dict[str, Any]:
    """Raises ValueError: as `value_in`, or it is no object."""
    if not isinstance(value := value_in(text), dict):
        raise ValueError("expected an object")
    return value


def read_value(path: Path) -> Any:
    """Raises OSError; ValueError: as `value_in`, or it is not UTF-8."""
    return value_in(path.read_text(encoding="utf-8"))


def read_object(path: Path) -> dict[str, Any]:
    """Raises OSError; ValueError: as `object_in`, or it is not UTF-8."""
    return object_in(path.read_text(encoding="utf-8"))
