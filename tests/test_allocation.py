"""Where the C library puts memory, in a process of its own: its settings are of the whole process."""

import platform
import subprocess
import sys

import pytest

import unimiss_core.allocation
from tests.test_learner import apart, images, study
from unimiss_core.execution import Execution
from unimiss_core.learner import Learner

IN_PAGES_OF_ITS_OWN = """
import ctypes
from unimiss_core.allocation import large_apart

class Told(ctypes.Structure):  # struct mallinfo2
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd a b c d e".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype, libc.malloc.restype, libc.malloc.argtypes = Told, ctypes.c_void_p, [ctypes.c_size_t]

def mapped_by(size):
    before = libc.mallinfo2().hblks
    libc.malloc(size)
    return libc.mallinfo2().hblks - before

with large_apart():
    first = mapped_by(1 << 20)
print(first, mapped_by(1 << 20), mapped_by(64 << 20))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no other C library has these settings")
def test_what_is_large_has_pages_of_its_own_in_a_first_step_and_shares_the_heap_later() -> None:
    done = subprocess.run([sys.executable, "-c", IN_PAGES_OF_ITS_OWN], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "0", "1"]


@pytest.mark.parametrize("of", ["another library", "an operator"])
def test_what_others_have_set_is_left_alone(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if of == "an operator":
        monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "100000")
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc" if of == "an operator" else "", ""))
    monkeypatch.setattr("ctypes.CDLL", lambda _: pytest.fail("a setting was changed"))
    with unimiss_core.allocation.large_apart():
        pass


def test_the_first_step_over_each_size_of_part_lays_memory_out(monkeypatch: pytest.MonkeyPatch) -> None:
    laid_out: list[bool] = []

    class Counted:
        def __enter__(self) -> None:
            laid_out.append(True)

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(unimiss_core.allocation, "large_apart", Counted)
    bf16 = Execution(precision="bf16", micro_batch={2: 2})
    learner = apart(Learner(study(), ranks={2}, execution=bf16))
    learner.step(images(scans=2), step=0)
    learner.step(images(scans=4), step=1)
    assert len(laid_out) == 1
    learner.step(images(scans=3), step=2)  # in parts of two and one
    assert len(laid_out) == 2
    apart(Learner(study(), ranks={2})).step(images(scans=2), step=0)  # in float32 kernels hang on no shape
    assert len(laid_out) == 2
