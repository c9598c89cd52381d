"""Several devices of a site: the same outcome as one, and no harm where one is lost."""

import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch

from client import devices, interpreter
from client.devices import LEFT_OVER_S, _clear_old_meeting_places, _packed, _unpacked, run_team
from client.interpreter import Interpreter
from client.watch import Watch
from tests import team_members
from tests.federation import Placed, small_study
from unimiss_core import progress
from unimiss_core.device import device_of, devices_of, is_out_of_memory, memory_of, runs_on
from unimiss_core.errors import ConfigError, DeviceError, NonFiniteLossError, WireError
from unimiss_core.execution import out_of_memory_by_its_name
from unimiss_core.team import Alone, largest_part, part_of

CPU = torch.device("cpu")
TWO = (CPU, CPU)


def views(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def children_of(pid: int) -> list[int]:
    """Processes of a team that `pid` has started and that still run."""
    command = ["ps", "-o", "pid=,args=", "--ppid", str(pid)]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return [int(line.split()[0]) for line in listed if "-m client.devices" in line]


@pytest.mark.parametrize(("size", "scans"), [(1, 5), (2, 5), (3, 2), (4, 1), (3, 9)])
def test_parts_cover_the_batch_once_and_their_shares_add_up_to_one(size: int, scans: int) -> None:
    parts = [part_of(Placed(place, size), scans) for place in range(size)]
    taken = [scan for part in parts if part.share > 0 for scan in range(scans)[part.scans]]
    assert taken == list(range(scans))
    assert sum(part.share for part in parts) == pytest.approx(1)
    assert all(part.share == pytest.approx(len(range(scans)[part.scans]) / scans) for part in parts if part.share)
    assert all(part.scans == slice(0, 1) for part in parts if not part.share)
    lengths = [part.scans.stop - part.scans.start for part in parts if part.share]
    assert max(lengths) - min(lengths) <= 1
    assert largest_part(Placed(0, size), scans) == max(lengths)


STUDY = small_study(2, model={"prototypes": 16}, optimiser={"warmup_steps": 1, "lr": 1e-3})


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    """Batches of three images, of two volumes, and of one volume, which leaves a process without a scan; then one with
    NaN in a scan that the second process alone sees."""
    bad = views(3, 2, 1, 33, 40)
    bad[2, 1, 0, 7, 7] = math.nan
    batches = [
        views(3, 2, 1, 33, 40),
        views(2, 2, 1, 13, 33, 40),
        views(1, 3, 1, 14, 33, 36),
        bad,
        views(2, 2, 1, 37, 33),
    ]
    one = team_members.train(STUDY, batches, torch.float64, device=CPU, team=Alone())
    two = run_team(team_members.train, (STUDY, batches, torch.float64), devices=TWO, state=tmp_path)
    assert two.keys() == one.keys()
    assert two["losses"].isnan().tolist() == [False, False, False, True, False]
    torch.testing.assert_close(two.pop("losses"), one.pop("losses"), rtol=1e-5, atol=1e-9, equal_nan=True)
    for name, expected in one.items():
        torch.testing.assert_close(
            two[name], expected, rtol=1e-5, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_two_processes_give_the_bits_of_one_that_takes_the_same_parts_in_turn(tmp_path: Path) -> None:
    """A step on images and, of a learner of its own, one on volumes. But for the head's matrices, whose gradients one
    process finds in one product each over all parts."""
    batches, halves = [views(4, 2, 1, 33, 40), views(2, 2, 1, 13, 33, 40)], {2: 2, 3: 1}
    one_by_one = team_members.train_each(STUDY, batches, halves, device=CPU, team=Alone())
    by_two = run_team(team_members.train_each, (STUDY, batches), devices=TWO, state=tmp_path)
    for one, two in zip(one_by_one, by_two, strict=True):
        differing = {name for name in one if not torch.equal(two[name], one[name])}
        assert all(".head." in name and name.endswith(".weight") for name in differing)
        assert two.keys() == one.keys()
        for name in differing:
            if name.startswith("adam_moment"):  # the clipped gradients, after one step
                torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-7)


def test_the_first_place_speaks_for_all_and_nothing_is_left(tmp_path: Path) -> None:
    heard: list[Any] = []
    with progress.listen(heard.append):
        size, total = run_team(team_members.every_place, (), devices=(CPU, CPU, CPU), state=tmp_path)
    assert (size, total.item()) == (3, 6.0)
    assert heard == [progress.Note("from place 0")]
    assert children_of(os.getpid()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["device-0.log", "device-1.log", "device-2.log"]
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_what_killed_teams_have_left_is_cleared_and_what_may_be_at_work_is_not(tmp_path: Path) -> None:
    for name, age_s in {"team-old": LEFT_OVER_S + 60, "team-young": 60, "runs": LEFT_OVER_S + 60}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "rendezvous").touch()
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    _clear_old_meeting_places(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "team-young"]


def test_a_killed_process_fails_the_round_by_name_and_the_next_round_works(tmp_path: Path) -> None:
    told = r"process 1 on cpu was lost in mid-round: it was killed, .* memory \(SIGKILL\); it printed nothing$"
    with pytest.raises(DeviceError, match=told):
        run_team(team_members.one_is_killed, (), devices=TWO, state=tmp_path)
    assert children_of(os.getpid()) == []
    assert run_team(team_members.every_place, (), devices=TWO, state=tmp_path)[0] == 2


def late(_: object) -> None:
    """Is heard for so long that the others, too, have said what the cause did to them."""
    time.sleep(2)


def test_a_failing_process_tells_where_but_not_what_however_late_it_is_heard(tmp_path: Path) -> None:
    with (
        progress.listen(late),
        pytest.raises(DeviceError, match=r"process 1 on cpu .*OSError at team_members.py:") as e,
    ):
        run_team(team_members.one_fails, ("/archive/DOE^JANE/1.dcm is broken",), devices=TWO, state=tmp_path)
    logged = "".join(path.read_text() for path in tmp_path.glob("device-*.log*"))
    assert "one_fails" in logged
    assert "DOE" not in str(e.value) + logged


def test_a_process_that_does_not_come_up_is_told_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Interpreter.start

    def stillborn(_: str, environment: Mapping[str, str], *, log: Path) -> Interpreter:
        member = start("client.no_such_module", environment, log=log)
        member.process.wait()
        return member

    monkeypatch.setattr(Interpreter, "start", stillborn)
    with pytest.raises(DeviceError, match=r"process 0 on cpu .* it ended with code 1; see device-0\.log\.1"):
        run_team(team_members.every_place, (), devices=TWO, state=tmp_path)
    assert "no_such_module" in (tmp_path / "device-0.log.1").read_text()


def test_what_the_last_failed_process_printed_outlives_the_rounds_after_it(tmp_path: Path) -> None:
    """A site that fails on a Saturday is looked at on a Monday."""
    for _ in range(2):
        with pytest.raises(DeviceError, match=r"process 1 .* see device-1\.log\.1 in the site's state folder$"):
            run_team(team_members.one_fails, ("",), devices=TWO, state=tmp_path)
    run_team(team_members.every_place, (), devices=TWO, state=tmp_path)
    assert "one_fails" in (tmp_path / "device-1.log.1").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["device-0.log", "device-1.log", "device-1.log.1"]
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


class Unending(subprocess.Popen[bytes]):
    """Waits in a driver: no signal reaches it."""

    def kill(self) -> None:
        pass


def test_a_process_that_cannot_be_killed_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = Pipe()
    with Unending(["sleep", "60"]) as process:
        monkeypatch.setattr(interpreter, "KILLED_WITHIN_S", 0.1)
        began = time.monotonic()
        assert not Interpreter(process, ours).stop()
        assert time.monotonic() - began < 30
        super(Unending, process).kill()
    theirs.close()


def test_a_team_whose_first_process_falls_silent_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "LOOK_S", 0.05)
    watch, looks = Watch([2] * 9), list[float]()
    monkeypatch.setattr(watch, "silent_for", lambda seconds: looks.append(seconds) or len(looks) > 3)
    told = (
        "one of the devices cpu, cpu hangs, which of them is not known: no step was taken, and nothing else was heard"
    )
    with pytest.raises(DeviceError, match=told):
        run_team(team_members.never_ends, (), devices=TWO, state=tmp_path, watch=watch)
    assert looks == [0.05] * 4
    assert children_of(os.getpid()) == []


def test_what_one_process_refuses_is_refused_here_however_late_it_is_heard(tmp_path: Path) -> None:
    with progress.listen(late), pytest.raises(WireError, match="needs_whole: in words") as error:
        run_team(team_members.one_refuses, ("needs_whole",), devices=TWO, state=tmp_path)
    assert error.value.reason == "needs_whole"


def test_what_is_sent_is_no_larger_than_the_tensors_that_it_holds() -> None:
    """Received tensors are parts of one long one (`unimiss_core.codec.unpack`); pickle would repeat it for each."""
    whole = torch.arange(1000 * 64, dtype=torch.float32)
    tensors = {str(number): part.view(8, 8) for number, part in enumerate(whole.split(64))}
    packed = _packed(tensors)
    assert len(packed) < 2 * 4 * len(whole)
    again = _unpacked(packed)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_a_state_folder_may_have_any_name_and_nothing_is_written_beside_it(tmp_path: Path) -> None:
    """As part of an address, it would end at either sign."""
    name = "why?not=1 site#1"
    run_team(team_members.every_place, (), devices=TWO, state=tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_every_process_refuses_is_refused_here(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match="step 3: loss nan"):
        run_team(team_members.refuse, (), devices=TWO, state=tmp_path)


def test_who_stops_this_process_stops_the_team(tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with progress.guarded_by(stop), pytest.raises(KeyboardInterrupt):
        run_team(team_members.never_ends, (), devices=TWO, state=tmp_path)
    assert children_of(os.getpid()) == []


PARENT = """
import sys
from pathlib import Path
import torch
from client.devices import _packed, _unpacked, run_team
from client.interpreter import Interpreter
from tests import team_members
from unimiss_core import progress
with progress.listen(lambda event: print("at work", flush=True)):
    run_team(team_members.never_ends, (), devices=[torch.device("cpu")] * 2, state=Path(sys.argv[1]))
"""


def test_a_killed_parent_leaves_no_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"at work\n"
    members = children_of(parent.pid)
    assert len(members) == 2
    parent.kill()
    parent.communicate()
    until = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in members):
        assert time.monotonic() < until, "a process trains on for nobody"
        time.sleep(0.1)


WHEEL = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_90a", "sm_100", "compute_100")


def with_gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int], start: bool = True) -> None:
    """GPUs as torch would see them. start: whether CUDA does."""

    def capability(gpu: str) -> tuple[int, int]:
        found = capabilities[torch.device(gpu).index]
        if found == GONE:
            raise RuntimeError("CUDA error: unknown error\nCUDA kernel errors might be reported elsewhere")
        return found

    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: start)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(WHEEL))


GONE = (0, 0)


def test_where_cuda_does_not_start_auto_is_the_cpu_and_a_named_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, (8, 0), start=False)
    assert devices_of(["auto"]) == [CPU]
    with pytest.raises(ConfigError, match=r"^device cuda:0 cannot be used: CUDA does not start.*nvidia-smi$"):
        devices_of(["cuda"])


def test_auto_skips_gpus_that_torch_has_no_programs_for_or_that_do_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, (6, 1), (8, 9), GONE)
    assert devices_of(["auto"]) == [torch.device("cuda:1")] == devices_of(["cuda:1"])
    assert device_of("auto") == torch.device("cuda:1")
    told = "device cuda:0 cannot be used: the installed torch has no programs for its architecture, sm_61, but for sm_7"
    with pytest.raises(ConfigError, match=f"^{told}"):
        devices_of(["cuda"])
    told = r"device cuda:2 cannot be used: it does not answer \(CUDA error: unknown error\); see nvidia-smi$"
    with pytest.raises(ConfigError, match=told):
        devices_of(["cuda:1", "cuda:2"])


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((7, 5), WHEEL, True),
        ((7, 0), WHEEL, False),
        ((8, 9), WHEEL, True),  # programs for 8.6 run on it
        ((12, 0), WHEEL, True),  # compiled from compute_100 when first used
        ((12, 0), WHEEL[:-1], False),
        ((9, 0), ("sm_90a",), True),
        ((9, 1), ("sm_90a",), False),
        ((10, 3), ("sm_100f",), True),
        ((12, 0), ("compute_100f",), False),
        ((9, 0), ("gfx90a",), True),
        ((9, 0), (), True),
    ],
)
def test_which_cards_run_what_torch_was_compiled_to(
    capability: tuple[int, int], architectures: tuple[str, ...], runs: bool
) -> None:
    assert runs_on(capability, architectures) == runs


NO_HANDLE = "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling "


@pytest.mark.parametrize(
    ("error", "is_so"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError(), True),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported elsewhere"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError(f"{NO_HANDLE}`cublasCreate(handle)`"), True),
        (RuntimeError(f"{NO_HANDLE}`cublasSgemm(handle)`"), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("backend='inductor' raised:\nCppCompileError: cannot allocate a register"), False),
        (RuntimeError("The tensor has a non-zero number of elements, but its data is not allocated yet."), False),
        (ValueError("out of memory"), False),
    ],
)
def test_memory_that_ran_out_is_known_by_each_of_its_names(error: Exception, is_so: bool) -> None:
    assert is_out_of_memory(error) == is_so
    with pytest.raises(torch.OutOfMemoryError if is_so else type(error)), out_of_memory_by_its_name():
        raise error


def test_a_gpu_that_does_not_tell_its_memory_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: torch.device) -> tuple[int, int]:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported elsewhere")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lost)
    with pytest.raises(ConfigError, match=r"^cuda:1 cannot be used \(CUDA error: out of memory\); nvidia-smi shows"):
        memory_of(torch.device("cuda:1"))


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices_of(["auto"]) == [CPU]
    assert devices_of(["cpu", "cpu"]) == [CPU, CPU]
    absent = "is not on this machine, which has cpu$"
    for name, told in {"cuda": absent, "cuda:0": absent, "meta": "no device's name", "gpu": "no device's name"}.items():
        with pytest.raises(ConfigError, match=told):
            devices_of([name])
    with_gpus(monkeypatch, (8, 0), (9, 0))
    both = [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert devices_of(["auto"]) == devices_of(["cuda", "cuda:1"]) == both
    assert device_of("auto") == both[0]
    for names in (["cuda", "cuda:0"], ["cpu", "cuda:1"]):
        with pytest.raises(ConfigError, match="give each GPU once and no CPU beside it"):
            devices_of(names)
