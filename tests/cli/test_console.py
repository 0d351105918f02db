"""What a narrow terminal shows."""

import io
import logging

import pytest
from detachnet_cli import console
from detachnet_cli.app import app
from rich.console import Console
from typer.testing import CliRunner

from detachnet.errors import DetachNetError
from detachnet.text import Table

HEADER = ("model", "MACs", "parameters", "MB", "p50 ms", "p90 ms", "p99 ms", "images/s", "peak MB", "accuracy")
ROWS = (
    ("base", "45.3 M", "315.7 k", "1.29", "14.340", "19.120", "21.280", "71", "11.9", "91.67 %"),
    ("sub0", "26.4 M", "75.1 k", "0.32", "8.325", "12.777", "18.706", "104", "7.0", "91.67 %"),
)


@pytest.mark.parametrize("width", [80, 160])
def test_a_table_loses_no_digits(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = _shown(Table(HEADER, ROWS, "measured"), width, monkeypatch)
    assert max(map(len, lines)) <= width
    for row in ROWS:
        (shown,) = [line for line in lines if line.startswith(row[0])]
        assert shown.split() == " ".join(row).split()
    assert (len(lines) == 5) == (width == 160)  # an empty line, the title, the header in one line or in two


SPANS = "features.16:features.22, features.26:features.32, features.39:features.42"
PLANS = {
    80: ("sub1  features.16:features.22, –, –    152.8 M  49 % 115.0 M", "      features.39:features.42\n"),
    60: ("sub1", "  left out    features.16:features.22,", "  bridges     –, –", "  MACs        152.8 M"),
}


@pytest.mark.parametrize("width", PLANS)
@pytest.mark.parametrize("models", [2, 5])
def test_a_plan_with_long_spans_loses_nothing(width: int, models: int, monkeypatch: pytest.MonkeyPatch) -> None:
    header = ("model", "left out", "bridges", "MACs", "of base", "shared", "parameters", "own")
    figures = ("152.8 M", "49 %", "115.0 M", "6.5 M", "3.1 k")
    rows = [("base", "", "", "313.2 M", "100 %", "", "14.7 M", "")]
    rows += [(f"sub{i}", SPANS, "–, –", *figures) for i in range(models - 1)]
    shown = _shown(Table(header, tuple(rows), notes=("checked: all",), left=3), width, monkeypatch)
    assert max(map(len, shown)) <= width
    text = "\n".join(shown).replace("sub0", "sub1")
    assert all(line in text for line in PLANS[width])
    assert all(text.count(part) >= models - 1 for part in (*figures, *SPANS.split(", ")))
    assert sum(line.startswith("sub") for line in shown) == models - 1


def test_the_spans_ends_part_at_their_colon_where_room_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = _shown(
        Table(("model", "left out", "MACs"), (("sub0", ":features.6:b", "1.0 M"),), left=2), 24, monkeypatch
    )
    assert [line.split() for line in shown[-2:]] == [["sub0", ":features.6:", "1.0", "M"], ["b"]]


def _shown(table: Table, width: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines on a terminal."""
    out = io.StringIO()
    monkeypatch.setattr(console, "console", lambda: Console(file=out, width=width, highlight=False))
    console.show(table)
    return [line.rstrip() for line in out.getvalue().splitlines()]


TAKES = {
    "device": str,
    "input_size": str | None,
    "sub_models": str | None,
    "drop": list[str] | None,
    "cut": list[str] | None,
    "width": list[float] | None,
    "widths": bool,
}


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("device='cpu'", "--device cpu"),
        ("input_size=(3, 224, 224), or another", "--input-size 3,224,224, or another"),
        ("sub_models=2, sub_models=[0.7, 0.4]", "--sub-models 2, --sub-models 0.7,0.4"),
        ("drop=['a:b', ':c']", "--drop a:b --drop :c"),
        ("cuts=[0.7, 0.3]", "--cut 0.7 --cut 0.3"),
        ("widths=[0.75, 0.5]", "--width 0.75 --width 0.5"),
        ("norm='private'", "norm='private'"),
        (
            "make_detachable(model, sub_models=2); or device='cpu'",
            "make_detachable(model, sub_models=2); or --device cpu",
        ),
    ],
)
def test_what_to_try_is_in_the_words_of_the_command(
    said: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    console.show_error(DetachNetError("wrong", what=said, hint=said), takes=TAKES)
    assert capsys.readouterr().err.splitlines() == ["Error: wrong", f"  what     {said}", f"  try      {shown}"]


def test_what_the_library_says_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert CliRunner().invoke(app, ["recipes"]).exit_code == 0
    logging.getLogger("detachnet").warning("a [word]")
    logging.getLogger("detachnet").info("another")
    assert capsys.readouterr().err.splitlines() == ["Warning: a [word]", "Note: another"]


def test_a_number_that_is_not_known_leaves_its_column_on_the_right() -> None:
    assert Table(("model", "peak MB"), (("base", "10.5"), ("sub0", "–"))).lines()[-1] == "sub0         –"
