"""What a part of a message comes to in memory once Flower has put it together: told before it does.

Flower cuts an array into chunks, and sends beside them a list of which to join. The list may name one chunk a million
times, so that a few megabytes unfold to terabytes in the memory of whoever reads them; a record may name one array
likewise. Both ends add up what parts come to, and let none go on that says too much.
"""

from flwr.app import Array, ArrayRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
)

from unimiss_core.json_text import value_in

CHUNK_BYTES = 5 << 20
"""Of an array, as Flower cuts them."""
MOST_PART_BYTES = CHUNK_BYTES + (1 << 16)
"""A chunk and its head; no other part of our messages is as large."""
MOST_NAMES = 8
"""Records of a message, arrays of a record: ours have four at most."""

Part = Array | ArrayRecord | RecordDict
_COMPOSED: dict[str, type[Part]] = {kind.__qualname__: kind for kind in (Array, ArrayRecord, RecordDict)}


def bytes_in_memory(part: bytes) -> int:
    """At most so many bytes `part` takes, with what is joined by it. Raises ValueError: no message of ours has such a
    part."""
    if len(part) > MOST_PART_BYTES:
        raise ValueError(f"a part of {len(part)} bytes; expected {MOST_PART_BYTES} at most")
    kind, _, _ = get_object_head_values_from_object_content(part)
    if kind not in _COMPOSED:
        return len(part)
    named = _named_by(get_object_body(part, _COMPOSED[kind]), "arraychunk_ids" if kind == "Array" else None)
    if kind == "Array":
        return len(part) + named * CHUNK_BYTES
    if named > MOST_NAMES:
        raise ValueError(f"a record of {named} entries; expected {MOST_NAMES} at most")
    return len(part)


def _named_by(body: bytes, key: str | None) -> int:
    """How many other parts the JSON of a part names, below `key` if there is one. Raises ValueError."""
    try:
        told = value_in(body)
        return len(told if key is None else told[key])
    except (TypeError, KeyError):
        raise ValueError("a part of another form than Flower's") from None
