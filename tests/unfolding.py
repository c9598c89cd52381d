"""A part of a message, in Flower's own form, that says to join one chunk many times."""

import json

import numpy as np
from flwr.app import Array


def array_of_one_chunk(*, times: int) -> bytes:
    """The object of an array of one small chunk, changed to list that chunk `times` times."""
    array = Array(np.ones(4, dtype=np.float32)).deflate()
    head, _, body = array.partition(b"\x00")
    told = json.loads(body) | {"arraychunk_ids": [0] * times}
    changed = json.dumps(told).encode()
    kind, children, _ = head.split(b" ")
    return b"%s %s %d\x00%s" % (kind, children, len(changed), changed)
