"""A site's devices at work together: a process for each, started for a round, gone after it.

A process that dies or fails ends the round of this site and no more: the others are stopped, and whoever asked for the
round gets one error. All of them talk over the loopback interface alone.
"""

import io
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from client.interpreter import Interpreter
from client.watch import LOOK_S, STALLED, Watch
from unimiss_core import progress
from unimiss_core.errors import DeviceError, UnimissError, where
from unimiss_core.team import Processes

Result = TypeVar("Result")
log = logging.getLogger(__name__)

LEFT_OVER_S = 7 * 86_400.0
"""A meeting place of a team that nobody has touched for so long is of processes that were killed with their parent."""
_MEETING = "team-"
_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}


class _Place(NamedTuple):
    """What a process is told of its place in the team."""

    place: int
    devices: Sequence[torch.device]
    rendezvous: str


def run_team(
    function: Callable[..., Result],
    arguments: tuple[Any, ...],
    *,
    devices: Sequence[torch.device],
    state: Path,
    watch: Watch | None = None,
) -> Result:
    """`function(*arguments, device=..., team=...)` in a process for each device; what the first one returns.

    function: importable by name. state: folder for `device-0.log`, ..., what each process and its libraries print; of
    the one that failed last it stays, as `device-0.log.1`. watch: how long the first one may be silent, whose progress
    is reported here as it comes; without it, for ever. Raises the UnimissError that a process ended in, or DeviceError
    where one died, hung or failed otherwise; no process is left then, but what waits in a driver.
    """
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    _clear_old_meeting_places(state)
    with tempfile.TemporaryDirectory(dir=state, prefix=_MEETING) as folder:
        members: list[Interpreter] = []
        try:
            for place in range(len(devices)):
                printed = state / f"device-{place}.log"
                members.append(Interpreter.start("client.devices", _environment(devices), log=printed))
            work = _packed((function, arguments))
            for place, member in enumerate(members):
                with suppress(OSError):  # it is dead already: its closed channel is found below
                    _send(member.channel, _Place(place, devices, f"{folder}/rendezvous"))
                    member.channel.send_bytes(work)
            result: Result = _result(members, devices, state, watch)
            return result
        finally:
            for place, member in enumerate(members):
                if not member.stop():
                    log.error("the process on %s waits in the driver and cannot be ended", devices[place])


def _environment(devices: Sequence[torch.device]) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // len(devices))
    return {**_LOOPBACK, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}


def _result(members: Sequence[Interpreter], devices: Sequence[torch.device], state: Path, watch: Watch | None) -> Any:
    """Listen until the first process has a result and the others are done, or one has none to give."""
    waiting = {member.channel: place for place, member in enumerate(members)}
    results: dict[int, Any] = {}
    while waiting:
        ready = wait(list(waiting), LOOK_S)
        if not ready and watch is not None and watch.silent_for(LOOK_S):
            among = ", ".join(map(str, devices))
            raise DeviceError(f"one of the devices {among} hangs, which of them is not known: {watch.in_words()}")
        for channel in ready:
            assert isinstance(channel, Connection)
            place = waiting[channel]
            try:
                said = _unpacked(channel.recv_bytes())
            except (EOFError, OSError):
                with suppress(subprocess.TimeoutExpired):
                    members[place].process.wait(timeout=5)
                raise _lost(members, devices, state, place, "") from None
            match said:
                case ("result", result):
                    results[place] = result
                    del waiting[channel]
                case ("refused", error):
                    raise error
                case ("failed", what):
                    raise _lost(members, devices, state, place, what)
                case event:
                    if watch is not None:
                        watch.heard(event)
                    progress.report(event)
    return results[0]


def _lost(
    members: Sequence[Interpreter], devices: Sequence[torch.device], state: Path, place: int, what: str
) -> DeviceError:
    """Blames a process that is dead before one that failed because of it, and keeps what it printed from the next
    round's, under another name."""
    codes = {number: code for number, member in enumerate(members) if (code := member.process.poll()) is not None}
    if codes:
        place, code = next(iter(codes.items()))
        what = _ending(code)
    printed, kept = state / f"device-{place}.log", state / f"device-{place}.log.1"
    told = "it printed nothing"
    if printed.stat().st_size:
        printed.replace(kept)  # it goes on writing there, if it lives
        told = f"see {kept.name} in the site's state folder"
    return DeviceError(
        f"training process {place} on {devices[place]} was lost in mid-round: {what or 'it fell silent'}; {told}"
    )


def _ending(code: int) -> str:
    """What the end of a process means, in words."""
    if code >= 0:
        return f"it ended with code {code}"
    if -code == signal.SIGKILL:
        return "it was killed, as a system does that runs out of memory (SIGKILL)"
    return f"it was ended by {signal.strsignal(-code) or 'a signal'} (signal {-code})"


def _clear_old_meeting_places(state: Path) -> None:
    for folder in state.glob(f"{_MEETING}*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > LEFT_OVER_S:
                shutil.rmtree(folder)


def _send(channel: Connection, message: object) -> None:
    channel.send_bytes(_packed(message))


def _packed(message: object) -> bytes:
    """Not `Connection.send`, which would pass tensors as shared memory that ends with the process; nor plain pickle,
    which writes the whole of a long tensor for each part of it: a request, of 200 such parts, would grow 50 times."""
    written = io.BytesIO()
    torch.save(message, written)
    return written.getvalue()


def _unpacked(message: bytes) -> Any:
    return torch.load(io.BytesIO(message), weights_only=False)  # from a process of our own


def _serve(channel: Connection) -> None:
    """The life of a process: join the team, run, say how it ended."""
    place: _Place = _unpacked(channel.recv_bytes())
    function, arguments = _unpacked(channel.recv_bytes())
    until_told_to_go = Thread(target=_leave_with_parent, args=[channel], daemon=True)
    until_told_to_go.start()
    try:
        _join_team(place)
        with progress.listen(lambda event: _send(channel, event) if place.place == 0 else None):
            result = function(*arguments, device=place.devices[place.place], team=Processes())
        _send(channel, ("result", result if place.place == 0 else None))
    except UnimissError as error:
        _send(channel, ("refused", error))
    except Exception as error:
        traceback.print_tb(error.__traceback__)
        if isinstance(error, RuntimeError):  # torch's own words, of devices and sums; any other's could quote a file
            print(error, file=sys.stderr)
        _send(channel, ("failed", where(error)))
    until_told_to_go.join()  # one that left would be a lost one to the others, and could be heard of after them


def _join_team(place: _Place) -> None:
    device = place.devices[place.place]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Not init_method="file://...": a folder's name may hold what ends a path in an address.
    store = dist.FileStore(place.rendezvous, len(place.devices))  # type: ignore[attr-defined]
    store.set_timeout(STALLED)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=place.place,
        world_size=len(place.devices),
        timeout=STALLED,
    )
    # Processes meet at the first sum, for which NCCL takes hundreds of MB: before it is tried how many scans fit.
    dist.all_reduce(torch.zeros(1, device=device))


def _leave_with_parent(channel: Connection) -> None:
    """End this process when the parent closes the channel or dies, also where it hangs in a sum with one that did."""
    with suppress(EOFError, OSError):
        channel.recv_bytes()
    os._exit(0)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
