"""Counts, shapes and tables as text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]


def si(count: int) -> str:
    """A count with three to five digits and its unit: `313.2 M`, `4.9 k`."""
    if count < 1000:
        return str(count)
    return f"{count / 1e6:,.1f} M" if count >= 999_950 else f"{count / 1e3:.1f} k"


def number_of(count: int, noun: str) -> str:
    """`1 image`, `2 images`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def by(shape: Shape) -> str:
    """`2×2` for (2, 2)."""
    return "×".join(map(str, shape))


MOST_NESTED = 64
"""Lists and objects inside each other in a JSON file that is read at all; in ours there are a dozen."""


def parse_json(content: str | bytes) -> Any:
    """JSON that anybody may have written.

    Raises:
        ValueError: It is none, a number has thousands of digits, or it is nested too deeply.
    """
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value]
    for _ in range(MOST_NESTED):
        level = [part for item in level for part in _parts(item)]
    if level:
        raise ValueError("it is nested too deeply")
    return value


def _parts(value: Any) -> Iterable[Any]:
    """What is in a list or an object."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


@dataclass(frozen=True)
class Table:
    """A result as rows of text; prints with aligned columns.

    Attributes:
        header: Name of each column.
        rows: Cells, one tuple per row.
        title: The heading.
        notes: Lines below.
        left: So many columns stand on the left where a terminal shows it, the others on the right.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    notes: tuple[str, ...] = ()
    left: int = 1

    def __str__(self) -> str:
        return "\n".join([*([self.title] if self.title else []), *self.lines(), *self.notes])

    def lines(self) -> list[str]:
        """Header and rows with aligned columns; those of numbers stand on the right."""
        rows = [self.header, *self.rows]
        columns = list(zip(*rows, strict=True))
        widths = [max(map(len, column)) for column in columns]
        numeric = [_is_numeric(column) for column in columns]
        return [
            "  ".join(
                c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)
            ).rstrip()
            for row in rows
        ]

    def markdown(self) -> str:
        """Header and rows in Markdown; the first column stands on the left, the others on the right."""
        rule = ["---", *["---:"] * (len(self.header) - 1)]
        return "".join("| " + " | ".join(line) + " |\n" for line in [self.header, rule, *self.rows])


def _is_numeric(column: Sequence[str]) -> bool:
    """Whether what stands below a column's name are numbers."""
    cells = [cell for cell in column[1:] if cell not in ("", "–")]
    return bool(cells) and all(cell[:1].isdigit() for cell in cells) and "×" not in "".join(column)
