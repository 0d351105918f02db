"""Freed memory is kept or given back as asked."""

import os
import platform
import subprocess
import sys

import pytest

GLIBC = platform.libc_ver()[0] == "glibc"

TASK = """
import sys
import torch
from detachnet import memory as heap
from detachnet.memory import _resident

if "keep" in sys.argv:
    heap.keep_freed()
before = _resident("VmRSS")
tensor = torch.ones(50, 1_000_000)
held = _resident("VmRSS") - before
del tensor
freed = _resident("VmRSS") - before
heap.give_back()
print(held, freed, _resident("VmRSS") - before)
"""


def resident(*words: str) -> list[int]:
    """Bytes over the start: with a tensor of 200 MB, after it is freed, after what was kept is given back."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", TASK, *words], capture_output=True, text=True, check=True, env=env
    )
    return [int(word) for word in done.stdout.split()]


@pytest.mark.slow
@pytest.mark.skipif(not GLIBC, reason="only glibc can be told")
def test_memory_is_kept_until_it_is_given_back() -> None:
    held, freed, given_back = resident("keep")
    assert held == pytest.approx(200e6, rel=0.05)
    assert freed == pytest.approx(200e6, rel=0.05)
    assert given_back < 20e6


@pytest.mark.slow
@pytest.mark.skipif(not GLIBC, reason="only glibc can be told")
def test_without_it_memory_goes_back() -> None:
    held, freed, _ = resident()
    assert held == pytest.approx(200e6, rel=0.05)
    assert freed < 20e6


@pytest.mark.parametrize("system", ["darwin", "linux"])
def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    """Not even looked at on another system; on Linux asked for its name first, which musl has not."""
    from detachnet import memory as heap

    class Musl:
        def mallopt(self, *_: int) -> None:
            raise AssertionError("musl's was called")

        malloc_trim = mallopt

    def opened(name: None) -> Musl:
        assert system == "linux"
        return Musl()

    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(heap.ctypes, "CDLL", opened)
    heap.keep_freed()
    heap.give_back()
