"""Everything detachnet refuses, as one tree.

    DetachNetError
    ├── ModelError        a model name or its arguments
    ├── TraceError        a model that torch.fx cannot turn into a graph
    ├── CutError          a cut that is unknown, crossed, repeated or out of order
    ├── StepDownError     a feature map that no step-down can produce
    ├── WidthError        a width out of range, or of filters that cannot be left out
    ├── RecipeError       a recipe file or an override
    ├── DataError         a data set that is missing or damaged
    ├── CheckpointError   a checkpoint file or a run folder
    ├── TrainingError     a training that went wrong: a loss or a weight that is not finite
    ├── MeasurementError  a measurement that is missing, or cannot be made as asked
    ├── BudgetError       a budget that no model of the family keeps
    │   └── LateError     a request that even the fastest model cannot answer in time any more
    └── ExportError       a model that a format cannot express, or an export folder

The first line of a message is complete in itself; up to four lines with fixed labels follow it: `what`
(the underlying message), `where` (node, submodule, file), `try` (what to do) and `nearest` (known names). Of a
line longer than `LONGEST` characters the middle is left out.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

LONGEST = 500
"""Characters of a line of a message."""


class DetachNetError(Exception):
    """The base of every refusal.

    Args:
        summary: One line, complete in itself.
        what: The underlying message, word for word.
        where: The node, submodule, file or table that is meant.
        hint: What to do about it.
        nearest: Known names close to the one given.
        node: The dotted name of the graph node that is meant, if there is one.

    Attributes:
        summary: The first line.
        node: As given.
        candidates: `nearest` as a tuple.
    """

    def __init__(
        self,
        summary: str,
        *,
        what: str = "",
        where: str = "",
        hint: str = "",
        nearest: Sequence[str] = (),
        node: str | None = None,
    ) -> None:
        self.summary = shorten(summary)
        self.node = node
        self.candidates = tuple(nearest)
        details = {"what": what, "where": where, "try": hint, "nearest": ", ".join(map(repr, nearest))}
        lines = [f"  {label:<8} {shorten(text)}" for label, text in details.items() if text]
        super().__init__("\n".join([self.summary, *lines]))


class ModelError(DetachNetError, ValueError):
    """A model name that the zoo does not have, or arguments the model does not take."""


class TraceError(DetachNetError):
    """A model that torch.fx cannot turn into a graph."""


class CutError(DetachNetError, ValueError):
    """A cut that is unknown, crossed by another path, repeated, out of order, or at the output."""


class StepDownError(DetachNetError, ValueError):
    """A feature map that no step-down can produce from the image."""


class WidthError(DetachNetError, ValueError):
    """A width that is out of range, or of filters that are not there or cannot be left out."""


class RecipeError(DetachNetError, ValueError):
    """A recipe with an unknown key, a wrong type or a value out of range."""


class DataError(DetachNetError):
    """A data set that is missing, incomplete or damaged."""


class CheckpointError(DetachNetError):
    """A checkpoint that is missing, damaged, or does not fit what it is used for."""


class TrainingError(DetachNetError):
    """A training whose losses or weights are not finite any more, or that finds no memory."""


class MeasurementError(DetachNetError, ValueError):
    """A measurement that is missing, damaged, of another family, or cannot be made as asked."""


class BudgetError(DetachNetError, ValueError):
    """A budget that no model of the family keeps, or that makes no sense."""


class LateError(BudgetError):
    """A request that even the fastest model could not answer in time any more; it was not run."""


class ExportError(DetachNetError):
    """A model that cannot be exported, or an export folder that is missing, damaged or in the way."""


def shorten(text: str, longest: int = LONGEST) -> str:
    """A text without its middle, if it is longer than so many characters."""
    if len(text) <= longest:
        return text
    end = longest // 3
    return f"{text[: longest - end - 1]}…{text[-end:]}"


def one_line(error: BaseException) -> str:
    """The first lines of an error's message, as one, of ours the first; its class where it has none."""
    if isinstance(error, DetachNetError):
        return error.summary
    text = re.sub(r" \[type=.*|For further information visit .*", "", str(error))  # of pydantic
    lines = [line.strip() for line in shorten(text, 4 * LONGEST).splitlines() if line.strip()]
    return "; ".join(lines[:3]) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its class where it has none."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def nearest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The `n` known names that look most like `name`, best first; empty when none comes close."""
    return difflib.get_close_matches(name[:LONGEST], list(known), n=n, cutoff=0.5)
