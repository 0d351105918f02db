"""The file of a search: read back as it was, refused where it says something else."""

import json
from pathlib import Path
from typing import Any

import pytest

from detachnet.errors import CheckpointError
from detachnet.selection.candidate import Candidate
from detachnet.selection.journal import Journal
from detachnet.selection.worth import Worth

ABOUT = {"model": "M", "images": 3}
CANDIDATE, WORTH = Candidate(("a:b",), (("c", 3),)), Worth(0.25, 1.5, 0.125)


def test_what_was_kept_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    journal = Journal(path, ABOUT)
    journal.add(CANDIDATE, WORTH)
    journal.note("a:b", 0.5)
    with path.open("a") as file:
        file.write('{"note": "torn')
    again = Journal(path, ABOUT)
    assert again.known == {CANDIDATE.key: WORTH}
    assert again.noted == {"a:b": 0.5}
    assert path.read_text().count("\n") == 3
    assert "torn" not in path.read_text()


@pytest.mark.parametrize(
    "change",
    [
        {"accuracy": 1.5},
        {"accuracy": float("nan")},
        {"loss": float("inf")},
        {"loss": "1"},
        {"loss": 10**400},
        {"seconds": -1},
        {"seconds": True},
        {"tried": 5},
        {"tried": "[]"},
        {"tried": '{"drop": [], "eighths": {"a": Infinity}}'},
        {"note": "x", "value": None},
        {"note": "x", "value": -1.0},
    ],
    ids=repr,
)
def test_what_no_search_writes(tmp_path: Path, change: dict[str, Any]) -> None:
    line = {"tried": CANDIDATE.key} | WORTH._asdict() | change
    (tmp_path / "f").write_text(json.dumps({"about": ABOUT}) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(CheckpointError, match=r"f says something unknown[\s\S]*remove it to begin anew"):
        Journal(tmp_path / "f", ABOUT)
