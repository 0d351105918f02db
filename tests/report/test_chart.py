import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import matplotlib
import pytest

from detachnet.report.chart import INK, LOOKS, Axis, Chart, Point, Series, key, on_page, percent, write

MACS = Axis("million MACs", "{:g}".format, from_zero=True)
ACCURACY = Axis("accuracy", percent)
FAMILY = (
    Point(20.1, 0.855, "base", "base: 85.50 %", 0.004),
    Point(12.2, 0.84, "sub0", "sub0: 84.00 %", 0.005),
    Point(4.1, 0.75, "sub1", "sub1: 75.00 %"),
)


def chart(*points: Point, name: str = "run", markers: bool = True) -> Chart:
    return Chart("A title", "A description", MACS, ACCURACY, (Series(name, points, 0),), markers)


@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
def test_equal_charts_are_equal_bytes_whatever_the_users_settings(tmp_path: Path, suffix: str) -> None:
    one, other = tmp_path / f"one.{suffix}", tmp_path / f"other.{suffix}"
    write(chart(*FAMILY), one)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        write(chart(*FAMILY), other)
        assert dict(matplotlib.rcParams) == before
    assert one.read_bytes() == other.read_bytes()


def test_a_chart_is_a_file_of_about_ten_kilobytes(tmp_path: Path) -> None:
    write(chart(*FAMILY), tmp_path / "chart.svg")
    text = (tmp_path / "chart.svg").read_text(encoding="utf-8")
    assert len(text) < 15_000
    assert text.startswith('<svg class="chart" viewBox="0 0 520 340" width="520"')
    for words in ("base", "sub0", "sub1", "run", "million MACs", "accuracy", "<title>sub0: 84.00 %</title>"):
        assert words in text
    assert "var(" not in text  # not every viewer knows style sheets


def test_a_page_can_have_several(tmp_path: Path) -> None:
    page = on_page(chart(*FAMILY)) + key(0)
    assert not re.search(r'\bid="|href|url\(', page)
    assert not any(colour in page for colour in (INK, *(look[0] for look in LOOKS)))
    assert {"currentColor", "var(--s0)"} <= set(re.findall(r"currentColor|var\(--\w+\)", page))


def luminance(colour: str) -> float:
    shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("colour", [INK, *(look[0] for look in LOOKS)])
def test_colours_are_readable_on_white_and_on_black(colour: str) -> None:
    for background in ("#ffffff", "#11151b", "#000000"):
        dark, light = sorted((luminance(colour), luminance(background)))
        assert (light + 0.05) / (dark + 0.05) > 3  # WCAG 2.2, 1.4.11


def labels(page: str) -> dict[str, tuple[float, float, float, float]]:
    """The bold texts of a chart and the boxes they are in."""
    boxes = {}
    for style, x, y, text in re.findall(
        r'<text style="([^"]*)" x="([\d.]+)" y="([\d.]+)"[^>]*>(.*?)</text>', page
    ):
        if "bold" in style or "700" in style:
            left = float(x) - (7 * len(text) if "text-anchor: end" in style else 0)
            boxes[text] = (left, float(y) - 10, left + 7 * len(text), float(y) + 3)
    return boxes


def test_names_of_equal_points_do_not_overlap() -> None:
    near = [Point(10 + i / 50, 0.7 + i / 5000, f"sub{i}") for i in range(6)]
    found = labels(on_page(chart(*near, Point(0, 0.5, "left"), Point(20, 0.9, "right"))))
    assert set(found) == {*(p.label for p in near), "left", "right"}
    for (_, a), (_, b) in combinations(found.items(), 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    assert all(box[0] >= 0 and box[2] <= 400 for box in found.values())


def test_one_name_for_points_of_one_model() -> None:
    series = tuple(Series(f"run {i}", (Point(10, 0.7 + i / 10, "base"),), i) for i in range(2))
    page = on_page(Chart("A title", "A description", MACS, ACCURACY, series))
    assert len(re.findall(">base</text>", page)) == 1


def test_error_bars_are_where_errors_are_known() -> None:
    point = Point(1, 0.5)
    plain, bar = on_page(chart(point)), on_page(chart(Point(1, 0.5, error=0.1)))
    assert bar.count("var(--s0)") > plain.count("var(--s0)")


def test_what_is_not_finite_is_left_out() -> None:
    nothing = float("nan")
    for points in ((), (Point(nothing, 1),), (Point(1, nothing), Point(2, 0.5, "there"), Point(3, float("inf")))):
        for markers in (True, False):
            page = on_page(chart(*points, markers=markers))
            assert "nan" not in page
            assert "inf" not in page


def test_names_are_text(tmp_path: Path) -> None:
    names = ("$\\frac{1}{2}$", "_hidden", "<script>", "模型")
    points = tuple(Point(i, i / 10, name) for i, name in enumerate(names, 1))
    series = tuple(Series(name, (point,), i) for i, (name, point) in enumerate(zip(names, points, strict=True)))
    write(Chart("A title", "A description", MACS, ACCURACY, series), tmp_path / "chart.svg")
    text = (tmp_path / "chart.svg").read_text(encoding="utf-8")
    for name in ("$\\frac{1}{2}$", "_hidden", "&lt;script&gt;", "模型"):
        assert text.count(f">{name}</text>") == 2  # beside the point, in the legend


@pytest.mark.slow
def test_nothing_of_matplotlib_is_loaded_before_it_draws_and_no_state_is_shared() -> None:
    code = (
        "import sys; from detachnet.report.chart import key\n"
        "assert 'matplotlib' not in sys.modules\n"
        "key(0)\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
