"""What parts of a message come to, against Flower's own joining of them."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from server import uploads
from tests.unfolding import array_of_one_chunk
from unimiss_core.unfolding import CHUNK_BYTES, MOST_PART_BYTES, bytes_in_memory


def parts_of(content: RecordDict) -> dict[str, bytes]:
    return {object_id: held.deflate() for object_id, held in get_all_nested_objects(content).items()}


def test_no_message_takes_more_than_was_said_and_an_honest_one_not_much_less() -> None:
    held = np.zeros(6_000_000, dtype=np.float32)  # 24 MB, three of its five chunks the same
    content = RecordDict({"update": ArrayRecord({"2d": Array(held)}), "facts": ConfigRecord({"a": "b"})})
    parts = parts_of(content)
    said = uploads.in_memory(parts)
    received = sum(map(len, parts.values()))
    assert len(parts) == 7  # both records, the array, three chunks, and the whole
    assert held.nbytes + received <= said < held.nbytes + received + CHUNK_BYTES


def test_flower_joins_a_chunk_as_often_as_it_is_listed() -> None:
    """The reason for all this: where it fails, a newer Flower may have mended it."""
    chunk = Array(np.ones(4, dtype=np.float32))
    (chunk_id,) = chunk.children
    parts = {"array": array_of_one_chunk(times=1000), chunk_id: chunk.children[chunk_id].deflate()}
    joined = inflate_object_from_contents("array", dict(parts))
    assert isinstance(joined, Array)
    assert len(joined.data) == 1000 * len(chunk.data)
    assert uploads.in_memory(parts) >= 1000 * CHUNK_BYTES


def test_what_would_fill_the_memory_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MOST_BYTES", 10 * CHUNK_BYTES)
    with pytest.raises(ValueError, match="of memory"):
        uploads.joined("array", {"array": array_of_one_chunk(times=11)})


@pytest.mark.parametrize(
    "part",
    [
        ConfigRecord({"a": b"x" * MOST_PART_BYTES}).deflate(),
        ArrayRecord({str(number): Array(np.ones(1)) for number in range(9)}).deflate(),
        RecordDict({str(number): ConfigRecord() for number in range(9)}).deflate(),
        b"Array  4\x00null",
        b"Array  2\x00{}",
        b"ArrayRecord  20000\x00" + b"[" * 20000,
        b"no head",
    ],
    ids=["long", "many arrays", "many records", "no mapping", "no chunks", "deep", "no head"],
)
def test_what_is_no_part_of_ours_is_said_to_be_none(part: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - Flower's own words for some
        bytes_in_memory(part)
