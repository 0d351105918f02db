"""What a narrow terminal shows."""

import io
import logging

import pytest
from detachnet_cli import console
from detachnet_cli.app import app
from rich.console import Console
from typer.testing import CliRunner

from detachnet.text import Table

HEADER = ("model", "MACs", "parameters", "MB", "p50 ms", "p90 ms", "p99 ms", "images/s", "peak MB", "accuracy")
ROWS = (
    ("base", "45.3 M", "315.7 k", "1.29", "14.340", "19.120", "21.280", "71", "11.9", "91.67 %"),
    ("sub0", "26.4 M", "75.1 k", "0.32", "8.325", "12.777", "18.706", "104", "7.0", "91.67 %"),
)


@pytest.mark.parametrize("width", [80, 160])
def test_a_table_loses_no_digits(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(console, "console", lambda: Console(file=out, width=width, highlight=False))
    console.show(Table(HEADER, ROWS, "measured"))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    for row in ROWS:
        (shown,) = [line for line in lines if line.startswith(row[0])]
        assert shown.split() == " ".join(row).split()
    assert "…" not in out.getvalue()
    assert (len(lines) == 5) == (width == 160)  # an empty line, the title, the header in one line or in two


def test_what_the_library_says_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert CliRunner().invoke(app, ["recipes"]).exit_code == 0
    logging.getLogger("detachnet").warning("a [word]")
    logging.getLogger("detachnet").info("another")
    assert capsys.readouterr().err.splitlines() == ["Warning: a [word]", "Note: another"]
