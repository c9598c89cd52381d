"""What a measure does inside a site's own processes: makes it slow, gives it a wrong clock, or makes it hostile.

`place` writes a folder with a sitecustomize.py, which Python loads in every process that has the folder in PYTHONPATH,
and orders.json beside it, which may be changed while the site runs:

    clock_s   by how much the site's clock, as it signs its requests, is ahead of the true one
    slow_s    round -> seconds by which its update is late
    tamper    round -> what is sent in the place of its update: replay, pickle or claim
"""

import json
import pickle
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

LOADER = "import benchmarks.sabotage; benchmarks.sabotage.begin(__file__)\n"
CLAIMED_VALUES = 2_500_000_000
"""5 GB of bf16."""


def place(folder: Path, **orders: Any) -> dict[str, str]:
    """The environment that loads them."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(LOADER)
    (folder / "orders.json").write_text(json.dumps(orders))
    return {"PYTHONPATH": str(folder)}


def begin(loader: str) -> None:
    """Called by Python before anything else of the process."""
    folder, command = Path(loader).parent, " ".join(sys.orig_argv)
    orders = json.loads((folder / "orders.json").read_text())
    if "client.gate" in command and orders.get("clock_s"):
        _shift_the_clock(orders["clock_s"])
    if "flwr-clientapp" in command and orders.keys() & {"slow_s", "tamper"}:
        _change_replies(folder, orders)


def _shift_the_clock(ahead_s: float) -> None:
    from flwr.supernode import node_auth_http_interceptor

    signing: Any = node_auth_http_interceptor
    true_now = signing.now
    signing.now = lambda: true_now() + timedelta(seconds=ahead_s)


def _change_replies(folder: Path, orders: Mapping[str, Mapping[str, Any]]) -> None:
    from unimiss_core.wire import TrainReply

    honest = TrainReply.pack

    def pack(reply: TrainReply, layout: Any, dtype: str) -> Any:
        number = str(reply.round)
        time.sleep(orders.get("slow_s", {}).get(number, 0.0))
        content = honest(reply, layout, dtype)
        return _tampered(folder, content, orders.get("tamper", {}).get(number, ""))

    TrainReply.pack = pack  # type: ignore[method-assign,assignment]


def _tampered(folder: Path, content: Any, how: str) -> Any:
    """content: of an honest reply. An honest round's is kept, to be replayed."""
    from flwr.app import Array, ArrayRecord, RecordDict
    from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
    from flwr.proto.recorddict_pb2 import RecordDict as Written

    kept = folder / "kept"
    if not how:
        kept.write_bytes(recorddict_to_proto(content).SerializeToString())
        return content
    if how == "replay":
        return recorddict_from_proto(Written.FromString(kept.read_bytes()))
    update = dict(content.array_records["update"])
    held = update["head"]
    if how == "pickle":
        update["head"] = Array("float32", (1,), "numpy.ndarray", pickle.dumps(_Bomb(folder / "opened")))
    else:
        update["head"] = Array(held.dtype, (CLAIMED_VALUES,), held.stype, b"\0" * 10)
    return RecordDict({**content, "update": ArrayRecord(update)})


class _Bomb:
    """Writes a file where somebody unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)
