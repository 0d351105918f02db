"""Candidates that were tried, in a file of a run: what a search that was stopped goes on from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor
from pathlib import Path
from typing import Any

from detachnet.errors import CheckpointError, MeasurementError, one_line
from detachnet.selection.candidate import Candidate
from detachnet.selection.worth import Worth
from detachnet.storage import read_file, replace_file
from detachnet.text import parse_json


class Journal:
    """A file with a line of JSON for the search and one for each candidate; a line that was torn off is left out.

    Args:
        path: The file; None to keep nothing.
        about: What worths depend on. Budgets and seeds are not among it: other searches use the same worths.

    Raises:
        CheckpointError: The file is of another network or other images, or cannot be read.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        self.path = path
        self.known: dict[str, Worth] = {}
        self.noted: dict[str, float] = {}
        if path is None:
            return
        lines = self._read(path)
        if lines and lines[0] != {"about": dict(about)}:
            told = lines[0].get("about")
            told = told if isinstance(told, dict) else {}
            different = [key for key in about if told.get(key) != about[key]]
            raise CheckpointError(
                f"{path} is of another search: it differs in {', '.join(different) or 'what it is'}",
                what="; ".join(f"{key} was {told.get(key)!r}, is {about[key]!r}" for key in different[:3]),
                hint="remove the file to begin anew, or search with what it was begun with",
            )
        try:
            for line in lines[1:]:
                if "note" in line:
                    self.noted[str(line["note"])] = _number(line["value"])
                else:
                    self.known[Candidate.of_key(line["tried"]).key] = Worth(
                        _number(line["accuracy"], 1), _number(line["loss"]), _number(line["seconds"])
                    )
        except (KeyError, TypeError, ValueError, OverflowError, CheckpointError) as error:
            raise CheckpointError(
                f"{path} says something unknown", what=one_line(error), hint="remove it to begin anew"
            ) from error
        text = "".join(json.dumps(line) + "\n" for line in lines or [{"about": dict(about)}])
        replace_file(path, text.encode())

    def _read(self, path: Path) -> list[dict[str, Any]]:
        """The lines that are whole."""
        try:
            *whole, _ = read_file(path).decode().split("\n")
            lines = [parse_json(line) for line in whole]
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"cannot read {path}", what=one_line(error), hint="remove it to begin anew"
            ) from error
        if not all(isinstance(line, dict) for line in lines):
            raise CheckpointError(f"{path} is no file of a search", hint="remove it to begin anew")
        return lines

    def add(self, candidate: Candidate, worth: Worth) -> None:
        """Keep what a candidate is worth."""
        self.known[candidate.key] = worth
        self._append({"tried": candidate.key} | worth._asdict())

    def note(self, name: str, value: float) -> None:
        """Keep something else that was measured."""
        self.noted[name] = value
        self._append({"note": name, "value": value})

    def _append(self, line: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}", what=str(error)) from error


def _number(value: object, most: float = math.inf) -> float:
    """A number that is not negative, and finite.

    Raises:
        ValueError: It is none.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 <= value <= most
        or value == math.inf
    ):
        raise ValueError(f"{value!r} is no number from 0 on")
    return float(value)


class Trials:
    """The candidates of one search and what they are worth, each tried once.

    Args:
        judge: Says what one is worth.
        journal: Of what was tried before.
        executor: Tries several at a time, where one is given.
    """

    def __init__(
        self, judge: Callable[[Candidate], Worth], journal: Journal, executor: Executor | None = None
    ) -> None:
        self.judge, self.journal, self.executor = judge, journal, executor
        self.seen: dict[Candidate, Worth] = {}

    def __call__(self, candidates: Sequence[Candidate]) -> list[Worth]:
        """What some candidates are worth.

        Raises:
            MeasurementError: A process of the executor has ended.
        """
        new = [c for c in dict.fromkeys(candidates) if c.key not in self.journal.known]
        found = map(self.judge, new) if self.executor is None else self.executor.map(self.judge, new)
        try:
            for candidate, worth in zip(new, found, strict=True):
                self.journal.add(candidate, worth)
        except BrokenExecutor as error:
            raise MeasurementError(
                "a process that tried candidates has ended",
                what=one_line(error),
                hint="fewer at a time take less memory; what was tried is kept",
            ) from error
        worths = [self.journal.known[candidate.key] for candidate in candidates]
        self.seen |= zip(candidates, worths, strict=True)
        return worths
