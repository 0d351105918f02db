"""The machine, and what else runs on it."""

import logging
import os
import time
from pathlib import Path

import pytest

from detachnet import machine
from detachnet.machine import OtherWork


def stat(busy_s: float) -> str:
    """What Linux says of all cores; the idle ones do not count, nor does waiting for a disk."""
    each = round(busy_s * os.sysconf("SC_CLK_TCK") / 4)
    return f"cpu  {each} {each} {each} 99999 88888 0 {each} 0 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n"


@pytest.mark.parametrize(
    ("cores", "threads", "others", "told"), [(2, 2, 1, True), (2, 1, 1, False), (8, 2, 1, False)]
)
def test_other_work_is_told(
    cores: int,
    threads: int,
    others: float,
    told: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = {"wall": 5.0, "own": 1.0}
    monkeypatch.setattr(machine, "STAT", tmp_path / "stat")
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(time, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(time, "process_time", lambda: now["own"])
    other_work = OtherWork(threads)
    for turn in range(2):  # in two parts, and what happens between them does not count
        machine.STAT.write_text(stat(500 * turn))
        with other_work:
            now.update(wall=now["wall"] + 10, own=now["own"] + 10)
            machine.STAT.write_text(stat(500 * turn + 10 * (1 + others)))
    with caplog.at_level(logging.WARNING):
        other_work.tell()
    expected = f"other work took 1.0 of {cores} cores meanwhile: at rest this is faster"
    assert caplog.messages == ([expected] if told else [])


@pytest.mark.parametrize("text", [None, "", "cpu", "cpu a b c d e f g h"])
def test_where_the_system_does_not_count(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(machine, "STAT", tmp_path / "stat")
    if text is not None:
        machine.STAT.write_text(text)
    other_work = OtherWork(1)
    with other_work:
        pass
    other_work.tell()
    assert caplog.messages == []
